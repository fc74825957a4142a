"""Folders written: the tensors come back to the last bit, the numbers as they were, and nothing is left when it fails."""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamakit.errors import FormatError, LlamakitError, MismatchError, SaveError, UnsupportedError, UsageError
from llamakit.formats.base import ModelFile, TensorData
from llamakit.formats.gguf import GGUFFile, Typed, copied_tensor, typed_metadata, write_gguf
from llamakit.formats.huggingface import HuggingFaceModel
from llamakit.formats.huggingface_config import shape_of_config
from llamakit.formats.huggingface_writer import write_huggingface
from llamakit.formats.safetensors import SafetensorsFile
from llamakit.ggml import GGMLType
from tests.hf import CONVERTED, VARIANTS, hf_config, hf_weights, stored, tiny_hf
from tests.tiny import cached_tiny_gguf


def copy(model: ModelFile, target: Path, **options: Any) -> Path:
    metadata = {k: v for k, v in typed_metadata(model).items() if not k.startswith("tokenizer.")}
    write_huggingface(
        target, metadata=metadata, tensors=[copied_tensor(model, name) for name in model.tensors], **options
    )
    return target


def hf_tensors(directory: Path) -> dict[str, bytes]:
    """Every tensor by its own name, as it lies in the files."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with SafetensorsFile(path) as file:
            found |= {name: file.read(name).tobytes() for name in file.tensors}
    return found


@pytest.mark.parametrize("name", CONVERTED)
def test_there_and_back_to_the_last_bit(tmp_path: Path, name: str) -> None:
    source = tiny_hf(tmp_path / "source", **CONVERTED[name])
    with HuggingFaceModel(source) as model:
        copy(model, tmp_path / "target")
    options = {k: v for k, v in CONVERTED[name].items() if k not in ("n_shards", "generation_config")}
    config = hf_config(**options)
    expected = stored(hf_weights(config), options.get("dtype", "float32"))
    assert hf_tensors(tmp_path / "target") == {n: a.tobytes() for n, a in expected.items()}
    written = json.loads((tmp_path / "target" / "config.json").read_text())
    assert shape_of_config(written, "x") == shape_of_config(config, "x")
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["torch_dtype"] == options.get("dtype", "float32")


@pytest.mark.parametrize("name", VARIANTS)
def test_by_way_of_gguf(tmp_path: Path, name: str) -> None:
    source = tiny_hf(tmp_path / "source", **VARIANTS[name])
    with HuggingFaceModel(source) as model:
        tensors = [copied_tensor(model, n) for n in model.tensors]
        write_gguf(tmp_path / "m.gguf", metadata=model.metadata, tensors=tensors)
        direct = copy(model, tmp_path / "direct")
    with GGUFFile(tmp_path / "m.gguf") as file:
        through = copy(file, tmp_path / "through")
    for path in sorted(direct.iterdir()):
        assert (through / path.name).read_bytes() == path.read_bytes()


def test_the_same_arguments_give_the_same_bytes_in_shards(tmp_path: Path) -> None:
    with HuggingFaceModel(tiny_hf(tmp_path / "source")) as model:
        one = copy(model, tmp_path / "one")
        folders = [copy(model, tmp_path / n, max_shard_bytes=10_000) for n in ("a", "b")]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    assert "model-00001-of-00011.safetensors" in names[0]
    for name in names[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert hf_tensors(folders[0]) == hf_tensors(one)
    index = json.loads((folders[0] / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(map(len, hf_tensors(one).values())), "total_parameters": 18080}
    assert list(HuggingFaceModel(folders[0]).tensors.keys() ^ HuggingFaceModel(one).tensors.keys()) == []


@pytest.mark.parametrize("cut", [1, 7, 8, 13])
def test_slices_that_cut_heads(tmp_path: Path, cut: int) -> None:
    source = HuggingFaceModel(tiny_hf(tmp_path / "source", attention_bias=True))

    def sliced(name: str) -> TensorData:
        info = source.tensors[name]
        rows = source.read(name)
        return TensorData(name, info.shape, info.type, lambda: (rows[i : i + cut] for i in range(0, len(rows), cut)))

    whole = copy(source, tmp_path / "whole")
    write_huggingface(tmp_path / "cut", metadata=source.metadata, tensors=map(sliced, source.tensors))
    assert hf_tensors(tmp_path / "cut") == hf_tensors(whole)


def test_a_gguf_model_with_norms_that_are_wider(tmp_path: Path) -> None:
    with GGUFFile(cached_tiny_gguf(type="F16", tied=True)) as file:
        target = copy(file, tmp_path / "x")
    config = json.loads((target / "config.json").read_text())
    assert (config["torch_dtype"], config["tie_word_embeddings"]) == ("float16", True)
    assert (config["bos_token_id"], config["rope_scaling"]) == (None, None)
    with HuggingFaceModel(target) as model:
        assert model.tensors["output_norm.weight"].type is GGMLType.F32
        assert model.tensors["token_embd.weight"].type is GGMLType.F16
        assert "output.weight" not in model.tensors


def test_the_vocabulary_is_written_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    module = types.ModuleType("llamakit.formats.huggingface_vocab")
    module.write_vocabulary = lambda directory, metadata: given.append(dict(metadata))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with GGUFFile(cached_tiny_gguf(type="F32")) as file:
        tensors = [copied_tensor(file, name) for name in file.tensors]
        write_huggingface(tmp_path / "x", metadata=typed_metadata(file), tensors=tensors)
    assert given[0]["tokenizer.ggml.eos_token_id"] == 2
    assert not any(isinstance(value, Typed) for value in given[0].values())
    assert json.loads((tmp_path / "x" / "generation_config.json").read_text())["eos_token_id"] == 2


def _tensors(model: HuggingFaceModel, change: Callable[[TensorData], TensorData | None]) -> list[TensorData]:
    changed = [change(copied_tensor(model, name)) for name in model.tensors]
    return [t for t in changed if t is not None]


#: change of a tensor (None: gone) -> (error, what is said)
WRONG: dict[str, tuple[Callable[[TensorData], TensorData | None], type[Exception], str]] = {
    "quantized": (lambda t: t._replace(type=GGMLType.Q8_0), UnsupportedError, "is Q8_0, which safetensors cannot hold"),
    "missing": (lambda t: None if "norm" in t.name else t, FormatError, "tensor output_norm.weight is missing"),
    "shape": (
        lambda t: t._replace(shape=(41, 32)) if t.name == "output.weight" else t, FormatError,
        r"output.weight has shape \[41, 32\]"),
    "three biases of four": (
        lambda t: None if t.name == "blk.1.attn_output.bias" else t, FormatError, "blk.1.attn_output.bias is missing"),
    "another tensor": (
        lambda t: t._replace(name="blk.0.attn_qkv.weight") if t.name == "output.weight" else t, FormatError,
        "blk.0.attn_qkv.weight has no place"),
    "too little": (
        lambda t: t._replace(data=np.zeros(5, "<f4")) if t.name == "blk.0.attn_q.weight" else t, ValueError,
        "needs 4096 bytes, 20 were given"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_written(tmp_path: Path, name: str) -> None:
    change, error, reason = WRONG[name]
    model = HuggingFaceModel(tiny_hf(tmp_path / "source", attention_bias=True))
    with pytest.raises(error, match=reason):
        write_huggingface(tmp_path / "x", metadata=model.metadata, tensors=_tensors(model, change))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_occupied_folders_and_full_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_hf(tmp_path / "source")
    with HuggingFaceModel(source) as model:
        with pytest.raises(UsageError, match="is not empty"):
            copy(model, source)
        with pytest.raises(SaveError):
            copy(model, tmp_path / "no" / "x")

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        (tmp_path / "x").mkdir()
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(SaveError, match="No space left") as caught:
            copy(model, tmp_path / "x")
    assert caught.value.exit_code == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "x"]
    assert list((tmp_path / "x").iterdir()) == []


def test_verify_has_the_last_word(tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def look(model: HuggingFaceModel) -> None:
        seen.append(set(model.tensors))
        if len(seen) > 1:
            raise MismatchError("something differs")

    with HuggingFaceModel(tiny_hf(tmp_path / "source")) as model:
        copy(model, tmp_path / "a", verify=look)
        with pytest.raises(LlamakitError, match="something differs"):
            copy(model, tmp_path / "b", verify=look)
        assert seen == [set(model.tensors)] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "source"]
