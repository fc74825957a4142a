from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamakit.errors import FormatError, UnsupportedError
from llamakit.formats.llama2c_vocab import read_llama2c_vocabulary, write_llama2c_vocabulary
from llamakit.formats.open import open_model
from llamakit.formats.vocabulary import vocabulary_only
from tests.tokenizer.vocabularies import bpe_metadata, shared, spm_metadata

PIECES = [("\u2581", -1.0), ("a", -2.0), ("\u2581a", -3.5), ("\u4e2d", -4.0)]


def packed(*entries: tuple[bytes, float]) -> bytes:
    return b"".join(struct.pack("<fI", score, len(text)) + text for text, score in entries)


def test_a_file_in_full(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.bin"
    write_llama2c_vocabulary(path, spm_metadata(PIECES))
    head = packed((b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0))
    tail = packed((b" ", -1.0), (b"a", -2.0), (b" a", -3.5), ("\u4e2d".encode(), -4.0))
    bytes_ = packed(*((b"<0x%02X>" % b, 0.0) for b in range(256)))
    assert path.read_bytes() == struct.pack("<I", 6) + head + bytes_ + tail
    metadata = read_llama2c_vocabulary(path, 263)
    assert metadata["tokenizer.ggml.tokens"][:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert metadata["tokenizer.ggml.tokens"][259:] == [piece for piece, _ in PIECES]
    assert metadata["tokenizer.ggml.token_type"].tolist() == [2, 3, 3, *[6] * 256, 1, 1, 1, 1]
    assert metadata["tokenizer.ggml.scores"].tolist()[259:] == [-1.0, -2.0, -3.5, -4.0]
    assert list(metadata)[-3:] == [f"tokenizer.ggml.{k}_token_id" for k in ("bos", "eos", "unknown")]


def test_empty_tokens_come_back(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.bin"
    write_llama2c_vocabulary(path, spm_metadata(PIECES))
    whole = path.read_bytes() + packed((b"", 0.0), (b"", 0.0))
    path.write_bytes(whole)
    metadata = read_llama2c_vocabulary(path, 265)
    assert metadata["tokenizer.ggml.token_type"].tolist()[-2:] == [3, 3]
    write_llama2c_vocabulary(path, metadata)
    assert path.read_bytes() == whole


def test_a_spelling_that_is_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.bin"
    write_llama2c_vocabulary(path, spm_metadata(PIECES))
    path.write_bytes(path.read_bytes() + packed((b"a", 0.0)))
    with pytest.raises(FormatError, match="has 'a' twice, as 260 and 263"):
        read_llama2c_vocabulary(path, 264)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (bpe_metadata(["a b"]), "tokenizer.ggml.model is 'gpt2'"),
        (spm_metadata(PIECES, tokenizer__ggml__bos_token_id=5), "bos_token_id is 5 .expected 1."),
        (spm_metadata(PIECES, tokenizer__ggml__eos_token_id=5), "eos_token_id is 5 .expected 2."),
        (spm_metadata(PIECES, with_bytes=False), "no byte tokens"),
        (spm_metadata(PIECES[1:]), "no token for the space"),
        (spm_metadata([*PIECES, (" a", 0.0)]), "has ' a' twice once"),
        (spm_metadata([*PIECES, ("\udc80", 0.0)]), "which is no UTF-8"),
    ],
)
def test_what_run_c_could_not_use(tmp_path: Path, metadata: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        write_llama2c_vocabulary(tmp_path / "t.bin", metadata)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "target", "n_vocab"),
    [
        ("llama2-tokenizer.model", "llama2-tokenizer.bin", None),
        ("llama2-tokenizer.bin", "llama2-tokenizer.bin", 32000),
        ("tok512.bin", "tok512.bin", 512),
    ],
)
def test_the_bytes_of_llama2_c(tmp_path: Path, source: str, target: str, n_vocab: int | None) -> None:
    metadata = vocabulary_only(shared(f"models/{source}"), n_vocab)
    write_llama2c_vocabulary(tmp_path / "tokenizer.bin", metadata)
    assert (tmp_path / "tokenizer.bin").read_bytes() == shared(f"models/{target}").read_bytes()


def test_what_llama_cpp_made_of_it() -> None:
    ours = read_llama2c_vocabulary(shared("models/tok512.bin"), 512)
    with open_model(shared("golden/stories260K-f32.gguf")) as file:
        for key, value in ours.items():
            theirs = file.metadata.get(key, "default")  # llama.cpp writes no `pre` there
            assert np.array_equal(theirs, value) if isinstance(value, np.ndarray) else theirs == value, key
