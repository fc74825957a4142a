"""What `inspect` says about every kind of file, and that it never reads a tensor of a model."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from llamakit import inspect
from llamakit.conversion.convert import convert
from llamakit.conversion.convert_config import ConvertConfig
from llamakit.conversion.inspect import KeyValue
from llamakit.errors import FormatError, LlamakitError, UsageError
from llamakit.formats.gguf import GGUFFile, TensorData, write_gguf
from llamakit.formats.imatrix import Entry, Imatrix
from llamakit.formats.imatrix_writer import write_imatrix, write_imatrix_dat
from llamakit.formats.open import size_on_disk
from llamakit.ggml import GGMLType
from tests.formats.files import llama2c_file
from tests.formats.torch_models import meta_model
from tests.helpers import ROOT
from tests.tiny import cached_tiny_gguf

SHARED = Path(os.environ.get("LLAMAKIT_SHARED", ROOT.parent / "shared"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the golden files of {SHARED}")


def gguf(path: Path, metadata: dict[str, object], tensors: dict[str, tuple[int, ...]] | None = None) -> Path:
    data = [
        TensorData(name, shape, GGMLType.F32, np.zeros(shape, np.float32)) for name, shape in (tensors or {}).items()
    ]
    write_gguf(path, metadata=metadata, tensors=data)
    return path


def test_model() -> None:
    path = cached_tiny_gguf(type="Q4_0", chat_template="{{ messages }}")
    report = inspect(path)
    assert (report.kind, report.what, report.format, report.n_bytes) == (
        "model",
        "model",
        "GGUF V3",
        path.stat().st_size,
    )
    assert report.facts["architecture"] == "llama" and report.facts["layers"] == 2
    assert report.facts["tokenizer"].startswith("SPM") and report.facts["chat template"] is True
    with GGUFFile(path) as file:
        assert report.n_parameters == sum(t.n_elements for t in file.tensors.values())
        bits = 8 * sum(t.n_bytes for t in file.tensors.values()) / report.n_parameters
        assert report.bits_per_weight == pytest.approx(bits)
        assert [(t.name, t.shape, t.type) for t in report.tensors] == [
            (t.name, t.shape, t.type.name) for t in file.tensors.values()
        ]
        assert [kv.key for kv in report.metadata] == list(file.metadata)
    assert any(re.fullmatch(r"- type q4_0: +\d+ tensors", line) for line in report.type_lines())
    commands = [command[1] for command in report.next_commands]
    assert commands == ["generate", "finetune"] and all(str(path) in command for command in report.next_commands)


def test_no_tensor_of_a_model_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GGUFFile, "read", lambda *_: pytest.fail("inspect read tensor data"))
    assert inspect(cached_tiny_gguf(type="Q4_0", chat_template="{{ messages }}")).kind == "model"


@pytest.mark.parametrize(
    ("metadata", "kind", "what", "command"),
    [
        (
            {"general.type": "adapter", "adapter.type": "lora", "general.architecture": "llama", "adapter.lora.alpha": 8.0},
            "adapter",
            "LoRA adapter",
            "generate",
        ),
        ({"llamakit.checkpoint.version": 1, "general.architecture": "llama"}, "checkpoint", "llamakit training checkpoint", "finetune"),
        ({"training.type": "finetune_lora"}, "old-checkpoint", "training checkpoint of the old llama.cpp finetune", "finetune"),
        ({"training.type": "train_model"}, "old-checkpoint", "training checkpoint of llama.cpp (train_model)", None),
        ({"general.type": "imatrix"}, "imatrix", "importance matrix", "quantize"),
        ({"general.architecture": "bert"}, "model", "model", None),
        ({"general.architecture": "qwen2", "tokenizer.ggml.model": "gpt2"}, "model", "model", "tokenize"),
    ],
)  # fmt: skip
def test_kinds_of_gguf(tmp_path: Path, metadata: dict[str, object], kind: str, what: str, command: str | None) -> None:
    tensors = {"blk.0.attn_q.weight.lora_a": (4, 8), "blk.0.attn_q.weight.lora_b": (8, 4)}
    report = inspect(gguf(tmp_path / "f.gguf", metadata, tensors))
    assert (report.kind, report.what) == (kind, what)
    assert [c[1] for c in report.next_commands][:1] == ([command] if command else [])
    if kind == "adapter":
        assert report.facts == {"architecture": "llama", "alpha": 8.0, "rank": "4", "adapted tensors": 1}


def test_vocabulary_and_empty_gguf(tmp_path: Path) -> None:
    metadata: dict[str, object] = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "a"]}
    report = inspect(gguf(tmp_path / "v.gguf", metadata))
    assert report.kind == "vocabulary" and report.facts["vocabulary"] == 2 and report.next_commands[0][1] == "tokenize"
    assert report.n_parameters == 0 and report.bits_per_weight == 0 and report.type_lines() == []
    report = inspect(gguf(tmp_path / "e.gguf", {"a": 1}))
    assert (report.kind, report.next_commands) == ("unknown", ())


def test_metadata_of_the_wrong_type_is_shown_and_not_believed(tmp_path: Path) -> None:
    metadata: dict[str, object] = {
        "general.architecture": "llama",
        "general.name": 7,
        "general.file_type": "Q4_0",
        "llama.block_count": "many",
        "llama.context_length": True,
        "llama.attention.head_count": np.array([4, 4], np.uint32),
        "tokenizer.ggml.model": 3,
        "tokenizer.ggml.tokens": "abc",
        "tokenizer.chat_template": 1.5,
        "training.iteration_count": "x",
        "adapter.lora.alpha": "y",
    }
    report = inspect(gguf(tmp_path / "f.gguf", metadata, {"t": (2, 2)}))
    assert report.facts == {"architecture": "llama"}
    assert len(report.metadata_lines()) == len(metadata)
    report = inspect(gguf(tmp_path / "g.gguf", metadata | {"llamakit.checkpoint.version": "z"}, {"x.lora_b": (4,)}))
    assert report.kind == "checkpoint" and report.facts["rank"] == "4"


@pytest.mark.parametrize(
    ("value", "type", "line"),
    [
        (1, "u32", "- kv   0:                                        key u32              = 1"),
        (True, "bool", "- kv   0:                                        key bool             = true"),
        (1e-5, "f32", "- kv   0:                                        key f32              = 0.000010"),
        ("a\nb", "str", "- kv   0:                                        key str              = a\\nb"),
        ("x" * 41, "str", f"- kv   0:                                        key str              = {'x' * 37}..."),
        ("é" * 40, "str", f"- kv   0:                                        key str              = {'é' * 18}\ufffd..."),
        (["a", 'b"\\'], "arr[str,2]", '- kv   0:                                        key arr[str,2]       = ["a", "b\\"\\\\"]'),
    ],
)  # fmt: skip
def test_metadata_lines_have_llama_cpps_form(value: object, type: str, line: str) -> None:
    entry = KeyValue("key", type, value)
    assert f"- kv {0:3d}: {entry.key:>42} {entry.type:<16} = {entry.text}" == line


def test_long_arrays_keep_their_first_elements(tmp_path: Path) -> None:
    report = inspect(gguf(tmp_path / "a.gguf", {"a": np.arange(1000, dtype=np.int32), "s": ["x"] * 1000}))
    assert [(kv.n, len(kv.value)) for kv in report.metadata] == [(1000, 32), (1000, 32)]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"plain text\n", "text"),
        (b"PK\x03\x04" + bytes(40), "zip"),
        (b"\x80\x02}q\x00." + bytes(40), "pickle"),
        ((2).to_bytes(8, "little") + b"{}", "safetensors"),
        (b"\xde\xad\xbe\xef" * 20, "unknown"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, kind: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    report = inspect(path)
    assert report.kind == kind and report.what and report.n_bytes == len(content)
    assert [c[1] for c in report.next_commands] == (["finetune"] if kind == "text" else [])


def test_folders(tmp_path: Path) -> None:
    assert inspect(tmp_path).kind == "directory"
    (tmp_path / "config.json").write_text("{}")
    report = inspect(tmp_path)
    assert report.kind == "huggingface" and "config.json" not in report.what and report.facts["no model"]
    (tmp_path / "adapter_config.json").write_text("{}")
    report = inspect(tmp_path)
    assert report.kind == "peft" and report.n_bytes == 2  # config.json is the model's


def test_a_folder_with_a_model_is_shown_in_ggufs_words(tmp_path: Path) -> None:
    convert(ConvertConfig(source=cached_tiny_gguf(type="Q4_0"), out=tmp_path / "hf"))
    report = inspect(tmp_path / "hf")
    assert report.kind == "huggingface" and report.facts["layers"] == 2 and report.facts["tokenizer"] == "SPM (default)"
    assert report.n_parameters == inspect(cached_tiny_gguf()).n_parameters and 16 <= report.bits_per_weight < 16.1
    assert [c[1] for c in report.next_commands] == ["convert", "generate", "finetune"]
    assert inspect(tmp_path / "hf" / "model.safetensors").n_parameters == report.n_parameters


def test_a_checkpoint_that_states_no_context(tmp_path: Path) -> None:
    report = inspect(meta_model(tmp_path / "meta"))
    assert report.kind == "meta" and report.facts["layers"] == 2 and "--ctx" in report.facts["context"]
    commands = {command[1]: command for command in report.next_commands}
    assert (
        commands["convert"][-2:] == commands["generate"][-2:] == ("--ctx", "N") and "--ctx" not in commands["finetune"]
    )
    assert inspect(meta_model(tmp_path / "stated", max_seq_len=77)).facts["context"] == 77


def test_a_folder_is_as_large_as_its_model(tmp_path: Path) -> None:
    meta = meta_model(tmp_path / "meta")
    convert(ConvertConfig(source=cached_tiny_gguf(), out=tmp_path / "hf"))
    for folder in (meta, tmp_path / "hf"):
        n_bytes = sum(path.stat().st_size for path in folder.iterdir())
        for name in ("README.md", "optimizer.pt", "other.safetensors", "model.gguf"):
            (folder / name).write_bytes(bytes(100))
        assert inspect(folder).n_bytes == size_on_disk(folder) == n_bytes


def test_llama2c_model(tmp_path: Path) -> None:
    report = inspect(llama2c_file(tmp_path / "m.bin"))
    assert report.kind == "llama2c" and report.format == "llama2.c version 0" and report.next_commands[0][-2] == "-z"
    assert report.metadata[0].type == "str" and {kv.type for kv in report.metadata} == {"str", "u32", "f32"}


def test_a_name_that_looks_like_an_option_is_given_as_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-x").write_text("text")
    assert "./-x" in inspect("-x").next_commands[0]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        inspect(tmp_path / "none")
    (tmp_path / "empty").touch()
    with pytest.raises(FormatError, match="is empty"):
        inspect(tmp_path / "empty")
    (tmp_path / "cut.gguf").write_bytes(
        cached_tiny_gguf(type="Q4_0", chat_template="{{ messages }}").read_bytes()[:500]
    )
    with pytest.raises(LlamakitError) as caught:
        inspect(tmp_path / "cut.gguf")
    assert caught.value.offset is not None


@needs_shared
def test_dump_equals_llama_cpps() -> None:
    log = (SHARED / "golden/finetune-2024/log.txt").read_text()
    theirs = [
        line.partition(": ")[2] for line in log.splitlines() if re.match(r"llama_model_loader: - (kv|type)", line)
    ]
    report = inspect(SHARED / "golden/stories260K-f32.gguf")
    assert report.metadata_lines() + report.type_lines() == theirs
    assert f"{report.bits_per_weight:.2f} BPW" in log


@needs_shared
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("golden/finetune-2024/chk-20.gguf", "old-checkpoint"),
        ("golden/finetune-2024/lora-20.bin", "ggla"),
        ("golden/finetune-2024/merged-lora-20.gguf", "model"),
        ("golden/llama.cpp-2026/imatrix.gguf", "imatrix"),
        ("models/ggml-vocab-llama-bpe.gguf", "vocabulary"),
        ("models/llama2-tokenizer.bin", "llama2c-tokenizer"),
        ("models/llama2-tokenizer.model", "sentencepiece"),
        ("models/stories260K.bin", "llama2c"),
        ("models/tok512.bin", "llama2c-tokenizer"),
    ],
)
def test_real_files(name: str, kind: str) -> None:
    report = inspect(SHARED / name)
    assert report.kind == kind
    if kind == "ggla":
        assert report.facts == {"alpha": 8.0, "rank": 4, "adapted tensors": 48}


def test_importance_matrices(tmp_path: Path) -> None:
    entry = Entry(np.ones((1, 8), np.float32), np.full(1, 16, np.float32))
    imatrix = Imatrix({"blk.0.attn_q.weight": entry, "blk.1.attn_q.weight": entry}, ("a.txt",), 2, 8)
    write_imatrix(tmp_path / "i.gguf", imatrix)
    write_imatrix_dat(tmp_path / "i.dat", imatrix)
    new, old = inspect(tmp_path / "i.gguf"), inspect(tmp_path / "i.dat")
    assert (new.kind, new.what, new.format, new.facts) == ("imatrix", "importance matrix", "GGUF V3", {"entries": 2})
    assert (old.kind, old.what, old.format) == ("imatrix", "importance matrix", "dat")
    assert old.facts == {"entries": 2, "chunks": 2, "datasets": "a.txt"}
    assert [(row.name, row.shape) for row in old.tensors] == [(name, (8,)) for name in imatrix.entries]
    assert old.next_commands == (
        ("llamakit", "quantize", "--imatrix", str(tmp_path / "i.dat"), "MODEL.gguf", "Q4_K_M"),
    )
