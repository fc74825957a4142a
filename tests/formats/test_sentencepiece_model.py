from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from llamakit.errors import FormatError, LlamakitError, UnsupportedError
from llamakit.formats.sentencepiece_model import (
    Piece,
    SentencePieceModel,
    encode_sentencepiece_model,
    parse_sentencepiece_model,
    read_sentencepiece_model,
    write_sentencepiece_model,
)
from tests.formats.vocabulary_folders import pieces
from tests.tokenizer.vocabularies import random_text, shared

SOUND = encode_sentencepiece_model(SentencePieceModel(pieces(), bos_id=1, eos_id=2))


def field(number: int, kind: int, value: bytes) -> bytes:
    return bytes([number << 3 | kind]) + value


def message(number: int, value: bytes) -> bytes:
    assert len(value) < 128
    return field(number, 2, bytes([len(value)]) + value)


UNK = message(1, message(1, b"<unk>") + field(3, 0, b"\x02"))
BPE = message(2, field(3, 0, b"\x02"))


@pytest.mark.parametrize("add_dummy_prefix", [True, False])
@pytest.mark.parametrize("pad_id", [None, 5])
def test_what_is_written_is_read(tmp_path: Path, add_dummy_prefix: bool, pad_id: int | None) -> None:
    kinds = [Piece("<ctl>", 0.0, 3), Piece("[USR]", -1.5, 4), Piece("spare", float("-inf"), 5)]
    model = SentencePieceModel([*pieces(), *kinds], add_dummy_prefix=add_dummy_prefix, pad_id=pad_id, bos_id=None)
    write_sentencepiece_model(tmp_path / "tokenizer.model", model)
    assert read_sentencepiece_model(tmp_path / "tokenizer.model") == model


def test_defaults_and_unknown_fields_of_the_message() -> None:
    extra = field(7, 5, b"abcd") + message(9, b"?") + field(10, 1, bytes(8))
    model = parse_sentencepiece_model(UNK + message(1, message(1, b"a") + extra) + extra + BPE, "m")
    assert model.pieces == [Piece("<unk>", 0.0, 2), Piece("a", 0.0, 1)]
    assert (model.bos_id, model.eos_id, model.pad_id) == (1, None, None)  # 1 and 2, as far as there are pieces
    assert (model.add_dummy_prefix, model.remove_extra_whitespaces, model.byte_fallback) == (True, True, False)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it has no pieces"),
        (BPE, "it has no pieces"),
        (UNK + BPE + b"\x0a", "a number does not end"),
        (UNK + BPE + b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "a number does not end"),
        (UNK + BPE + b"\x0a\x7fabc", "a field of 127 bytes does not fit (expected at most 3)"),
        (UNK + BPE + b"\x0a\x80\x80\x80\x80\x80\x80\x80\x01", "does not fit"),
        (UNK + BPE + b"\x0b", "wire type 3"),
        (UNK + BPE + b"\x02\x00", "a field has the number 0"),
        (UNK + BPE + field(1, 0, b"\1"), "field 1 is of wire type 0 (expected 2)"),
        (UNK + BPE + message(1, message(1, b"\xff")), "a piece is not UTF-8"),
        (UNK + BPE + message(1, b""), "piece 1 is empty"),
        (UNK + BPE + message(1, message(1, b"a\0")), "contains a NUL"),
        (UNK + BPE + message(1, message(1, b"a")) * 2, "piece 'a' is there twice, as 1 and 2"),
        (UNK + BPE + message(1, message(1, b"\x1b[2J")) * 2, "piece '\\x1b[2J' is there twice"),
        (UNK + BPE + message(1, message(1, b"u") + field(3, 0, b"\2")), "has 2 unknown pieces"),
        (UNK.replace(b"\x02", b"\x03") + BPE, "has 0 unknown pieces"),
        (UNK + BPE + message(1, message(1, b"a") + field(3, 0, b"\7")), "piece 1 is of type 7"),
        (UNK + BPE + message(1, message(1, b"a") + field(2, 5, struct.pack("<f", float("nan")))), "is not a number"),
        (UNK + BPE + message(1, message(1, b"<0x00>") + field(3, 0, b"\6")), "'<0x00>' is none of the bytes"),
        (UNK + message(2, field(3, 0, b"\x02") + b"\x98\x02\x01"), "the byte piece '<0x00>' is missing"),
    ],
)
def test_broken_files(data: bytes, reason: str) -> None:
    with pytest.raises(FormatError) as error:
        parse_sentencepiece_model(data, "some.model")
    assert reason in str(error.value).replace("\\\\", "\\") and str(error.value).startswith("some.model")


def test_other_kinds(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="of the kind unigram"):
        parse_sentencepiece_model(UNK, "m")
    with pytest.raises(UnsupportedError, match="tiktoken"):
        parse_sentencepiece_model(b"IQ== 0\nIg== 1\n", "m")
    with pytest.raises(UnsupportedError, match="is not Unicode"):
        encode_sentencepiece_model(SentencePieceModel([*pieces(), Piece("\udcff", 0.0, 1)]))
    with pytest.raises(UnsupportedError, match="there twice"):
        write_sentencepiece_model(tmp_path / "m", SentencePieceModel([*pieces(), Piece("a", 0.0, 1)]))
    assert not list(tmp_path.iterdir())


def test_every_cut_is_refused() -> None:
    for n in range(0, len(SOUND), 7):
        with pytest.raises(LlamakitError):
            parse_sentencepiece_model(SOUND[:n], "m")


def test_llama_2() -> None:
    model = read_sentencepiece_model(shared("models/llama2-tokenizer.model"))
    assert (len(model.pieces), model.pieces[15043], model.pieces[3]) == (
        32000, Piece("\u2581Hello", -14784.0, 1), Piece("<0x00>", 0.0, 6),
    )  # fmt: skip
    assert parse_sentencepiece_model(encode_sentencepiece_model(model), "m") == model


@pytest.mark.interop
def test_sentencepiece_agrees() -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    path = shared("models/llama2-tokenizer.model")
    theirs, again = sentencepiece.SentencePieceProcessor(), sentencepiece.SentencePieceProcessor()
    theirs.LoadFromFile(str(path))
    model = read_sentencepiece_model(path)
    again.LoadFromSerializedProto(encode_sentencepiece_model(model))
    for i, piece in enumerate(model.pieces):
        assert (piece.text, piece.score) == (theirs.IdToPiece(i), theirs.GetScore(i))
        assert (piece.type == 3, piece.type == 6, piece.type == 2) == (
            theirs.IsControl(i), theirs.IsByte(i), theirs.IsUnknown(i),
        )  # fmt: skip
    rng = random.Random(1)
    for _ in range(300):
        text = random_text(rng)
        assert theirs.EncodeAsIds(text) == again.EncodeAsIds(text)
