"""Files are known by their content, and refused in words."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from llamakit.errors import FormatError, LlamakitError, UnsupportedError, UsageError
from llamakit.formats.adapter import Adapter, write_adapter
from llamakit.formats.gguf import GGUFFile, write_gguf
from llamakit.formats.llama2c import Llama2cFile
from llamakit.formats.open import check_is_model, open_model, sniff
from tests.formats.files import ggla_file, llama2c_file
from tests.fuzz.raw import sound
from tests.tiny import cached_tiny_gguf


def _zip() -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as file:
        file.writestr("archive/data.pkl", b"x")
    return raw.getvalue()


KINDS: dict[str, tuple[bytes, type[LlamakitError], str]] = {
    "zip": (_zip(), FormatError, "pickle is not loaded"),
    "pickle": (b"\x80\x02}q\0.", UnsupportedError, "never loaded"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", UnsupportedError, "safetensors"),
    "ggml": (b"tjgg\3\0\0\0", UnsupportedError, "before GGUF"),
    "gzip": (b"\x1f\x8b\x08\0", UnsupportedError, "compressed"),
    "sentencepiece": (b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\2", UnsupportedError, "SentencePiece"),
    "llama2c-tokenizer": (struct.pack("<IfI", 7, 0, 5) + b"<unk>", UnsupportedError, "llama2.c vocabulary"),
    "empty": (b"", FormatError, "is empty"),
    "text": ("Grüße\n".encode(), FormatError, "is a text"),
    "imatrix": (struct.pack("<2i", 1, 1) + b"a" + struct.pack("<2if", 1, 1, 2), UnsupportedError, "importance matrix"),
    "unknown": (b"\0\1\2\3" * 20, FormatError, "unknown format"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_model(tmp_path: Path, kind: str) -> None:
    raw, error, reason = KINDS[kind]
    (tmp_path / "x").write_bytes(raw)
    assert sniff(tmp_path / "x") == kind
    with pytest.raises(error, match=reason) as caught:
        open_model(tmp_path / "x")
    assert caught.value.exit_code == 2


def test_models(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(sound().pack())
    assert sniff(tmp_path / "a.bin") == "gguf"
    assert isinstance(open_model(tmp_path / "a.bin"), GGUFFile)
    for version in (0, 1, 2):
        path = llama2c_file(tmp_path / "b.gguf", version)
        assert sniff(path) == "llama2c"
        assert isinstance(open_model(path), Llama2cFile)


def test_an_old_adapter_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="old LoRA adapter") as caught:
        open_model(ggla_file(tmp_path / "lora.bin"))
    assert "--lora" in str(caught.value.hint)


def test_directories_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a directory"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert sniff(tmp_path) == "huggingface"
    with pytest.raises(FormatError, match="architectures is missing"):
        open_model(tmp_path)
    with pytest.raises(UsageError, match="No such file"):
        open_model(tmp_path / "missing")


def test_a_character_cut_by_the_end_of_what_is_sniffed(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"a" * 4095 + "ü".encode() + b"\0")
    assert sniff(tmp_path / "x") == "text"


def test_what_is_no_model_says_what_it_is(tmp_path):
    base = GGUFFile(cached_tiny_gguf())
    pair = np.ones((2, 64), np.float32), np.ones((64, 2), np.float32)
    write_adapter(tmp_path / "adapter.gguf", Adapter(2.0, {"blk.0.attn_q.weight": pair}), base)
    tokens = {"tokenizer.ggml.tokens": ["a"]}
    for name, keys in {
        "checkpoint": {"training.type": "finetune_lora"},
        "vocabulary": {"general.type": "model"} | tokens,
        "imatrix": {"general.type": "imatrix"},
    }.items():
        write_gguf(tmp_path / f"{name}.gguf", metadata={"general.architecture": "llama"} | keys, tensors=())
    for name in ("adapter", "checkpoint", "vocabulary", "imatrix"):
        with open_model(tmp_path / f"{name}.gguf") as file, pytest.raises(UnsupportedError, match=name):
            check_is_model(file)
    check_is_model(base)


def test_a_pointer_of_git_lfs_is_not_the_file(tmp_path):
    pointer = tmp_path / "model.gguf"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 5\n")
    with pytest.raises(FormatError, match="is a Git LFS pointer") as caught:
        open_model(pointer)
    assert "git lfs pull" in str(caught.value.hint)
