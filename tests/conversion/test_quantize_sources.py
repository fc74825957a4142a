"""What is no GGUF file, quantized as it is: the same bytes as by way of a GGUF file in its own types."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llamakit.cli import run
from llamakit.conversion.convert import convert
from llamakit.conversion.convert_config import ConvertConfig
from llamakit.conversion.quantize import quantize
from llamakit.conversion.quantize_config import QuantizeConfig
from llamakit.errors import UsageError
from llamakit.formats.open import open_model
from tests.formats.files import split_gguf
from tests.formats.torch_models import meta_model
from tests.tiny import cached_tiny_gguf

WIDE = {"n_embd": 256, "n_ff": 256, "n_layer": 2, "n_ctx": 64}


def source_of(kind: str, folder: Path) -> Path:
    """A model in another format, with what it needs beside it."""
    if kind == "meta":
        return meta_model(folder / "meta")
    model = cached_tiny_gguf(**WIDE)
    name, options = {
        "bf16 folder": ("hf", {"outtype": "bf16"}), "f16 folder": ("hf", {"outtype": "f16"}),
        "f32 folder": ("hf", {"outtype": "f32"}), "llama2c": ("m.bin", {}),
    }[kind]  # fmt: skip
    return convert(ConvertConfig(source=model, out=folder / name, **options)).paths[0]


@pytest.mark.parametrize("kind", ["bf16 folder", "f16 folder", "f32 folder", "llama2c", "meta"])
def test_it_is_as_if_it_were_converted_first(kind: str, tmp_path: Path) -> None:
    source = source_of(kind, tmp_path)
    own = {"bf16 folder": "bf16", "f16 folder": "f16", "meta": "bf16"}.get(kind, "f32")
    stated = {"ctx": 64} if kind == "meta" else {}
    if kind == "llama2c":
        stated = {"vocab": tmp_path / "tokenizer.bin"}
    convert(ConvertConfig(source=source, out=tmp_path / "whole.gguf", outtype=own, **stated))
    for type in ("Q8_0", "COPY") if kind == "meta" else ("Q4_K_M", "Q8_0", "F16", "COPY"):
        list(quantize(QuantizeConfig(source=tmp_path / "whole.gguf", out=tmp_path / "two.gguf", type=type)))
        list(quantize(QuantizeConfig(source=source, out=tmp_path / "one.gguf", type=type, **stated)))
        assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes(), type


def test_by_default_it_goes_into_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = source_of("bf16 folder", tmp_path)
    assert run(["quantize", str(source), "q8_0"]) == 0
    assert str(source / "ggml-model-Q8_0.gguf") in capsys.readouterr().out
    with open_model(source / "ggml-model-Q8_0.gguf") as file:
        assert {info.type.name for info in file.tensors.values()} == {"F32", "Q8_0"}


def test_what_the_folder_leaves_open_is_asked_for(tmp_path: Path) -> None:
    source = source_of("meta", tmp_path)
    with pytest.raises(UsageError, match="does not state the context") as caught:
        list(quantize(QuantizeConfig(source=source, out=tmp_path / "o.gguf", type="Q8_0")))
    assert "--ctx" in (caught.value.hint or "")
    wanted = QuantizeConfig(source=source, out=tmp_path / "o.gguf", type="Q8_0", ctx=64, rope_freq_base=5e5)
    list(quantize(wanted))
    with open_model(tmp_path / "o.gguf") as file:
        assert file.metadata["llama.context_length"] == 64 and file.metadata["llama.rope.freq_base"] == 5e5


def test_the_source_is_never_overwritten(tmp_path: Path) -> None:
    source = source_of("bf16 folder", tmp_path)
    before = {name: (source / name).read_bytes() for name in os.listdir(source)}
    for target in ("model.safetensors", "config.json"):
        with pytest.raises(UsageError, match="input and output files are the same"):
            list(quantize(QuantizeConfig(source=source, out=source / target, type="Q8_0")))
    assert {name: (source / name).read_bytes() for name in os.listdir(source)} == before


def test_what_is_stated_leaves_a_split_model_in_its_parts(tmp_path: Path) -> None:
    parts = split_gguf(tmp_path / "m.gguf", cached_tiny_gguf(**WIDE), 8)
    wanted = {"source": parts[0], "out": tmp_path / "o.gguf", "type": "Q8_0", "keep_split": True}
    names = [path.name for path in list(quantize(QuantizeConfig(**wanted)))[-1].paths]
    stated = list(quantize(QuantizeConfig(**wanted, ctx=77, rope_freq_base=5e5)))[-1].paths
    assert [path.name for path in stated] == names and len(names) == len(parts) > 1
    with open_model(stated[0]) as file:
        assert file.metadata["llama.context_length"] == 77 and file.metadata["llama.rope.freq_base"] == 5e5


@pytest.mark.slow
def test_kl_compares_with_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = source_of("f32 folder", tmp_path)
    (tmp_path / "text").write_text("To be, or not to be: that is the question. " * 40)
    assert run(["quantize", str(source), str(tmp_path / "o.gguf"), "q8_0", "--kl", str(tmp_path / "text")]) == 0
    assert "mean KLD" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["perplexity", "imatrix"])
@pytest.mark.slow
def test_metas_checkpoints_are_measured_in_chunks(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = source_of("meta", tmp_path)
    convert(ConvertConfig(source=source, out=tmp_path / "m.gguf", outtype="f32", ctx=64))
    Path("text").write_text("abc " * 200)
    outputs = []
    for model in (source, tmp_path / "m.gguf"):
        assert run([command, "-m", str(model), "-f", "text", "--ctx", "16", "--chunks", "3"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and "Final estimate: PPL" in outputs[0]
    assert run([command, "-m", str(source), "-f", "text", "-c", "16", "--chunks", "3", "--rope-freq-base", "50"]) == 0
    assert capsys.readouterr().out != outputs[0]
