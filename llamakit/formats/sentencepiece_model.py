"""SentencePiece's `tokenizer.model`: a protobuf message ModelProto, read strictly and written.

Only what a vocabulary consists of is read; fields that are not named here are skipped, as protobuf does. Every length
is held against the bytes that are left. What the `sentencepiece` library refuses is refused here. Layout:
sentencepiece_model.proto; the wire format: protobuf's encoding guide.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llamakit.errors import FormatError, UnsupportedError
from llamakit.files import atomic_path, escape_control
from llamakit.formats.source import FileSource

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_MAX_FILE_BYTES = 1 << 28
#: the first line of tiktoken's files, which Llama 3 has under the same name
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\n")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_BPE = 2
_MODEL_TYPES = {1: "unigram", 3: "word", 4: "char"}


class Piece(NamedTuple):
    """One token. type: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte, as in GGUF."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """A BPE vocabulary. add_dummy_prefix: a space stands before a text that is encoded.

    byte_fallback: what no piece spells is spelled by byte pieces. bos_id, eos_id, pad_id: None where there is none.
    """

    pieces: Sequence[Piece]
    byte_fallback: bool = True
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    bos_id: int | None = 1
    eos_id: int | None = 2
    pad_id: int | None = None


class _Reader:
    """Fields of one message, a part of the file."""

    def __init__(self, data: bytes, start: int, stop: int, path: str | os.PathLike[str]) -> None:
        self._data, self._at, self._stop, self._path = data, start, stop, path

    def error(self, reason: str, at: int | None = None) -> FormatError:
        return FormatError(
            f"broken SentencePiece model: {reason}", path=self._path, offset=self._at if at is None else at
        )

    def _varint(self) -> int:
        value = shift = 0
        for at in range(self._at, min(self._at + 10, self._stop)):
            byte = self._data[at]
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                self._at = at + 1
                return value & 0xFFFF_FFFF_FFFF_FFFF
        raise self.error("a number does not end")

    def _take(self, n: int) -> int:
        """Where the next n bytes begin."""
        if n > self._stop - self._at:
            raise self.error(f"a field of {n} bytes does not fit (expected at most {self._stop - self._at})")
        at = self._at
        self._at += n
        return at

    def fields(self) -> Iterator[tuple[int, int, int, int]]:
        """(number, wire type, value or start, stop) of every field in its order."""
        while self._at < self._stop:
            at = self._at
            tag = self._varint()
            number, kind = tag >> 3, tag & 7
            if not 1 <= number < 1 << 29:
                raise self.error(f"a field has the number {number}", at)
            if kind == _VARINT:
                yield number, kind, self._varint(), 0
            elif kind == _BYTES:
                n = self._varint()
                start = self._take(n)
                yield number, kind, start, start + n
            elif kind in (_FIXED32, _FIXED64):
                n = 4 if kind == _FIXED32 else 8
                yield number, kind, self._take(n), self._at
            else:
                raise self.error(f"a field is of wire type {kind}, which no such file has", at)

    def inner(self, start: int, stop: int) -> _Reader:
        """The message in one of the fields."""
        return _Reader(self._data, start, stop, self._path)

    def wanted(self, number: int, kind: int, expected: int) -> None:
        if kind != expected:
            raise self.error(f"field {number} is of wire type {kind} (expected {expected})")

    def text(self, start: int, stop: int) -> str:
        try:
            return self._data[start:stop].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error("a piece is not UTF-8", start) from error

    def float32(self, start: int) -> float:
        return struct.unpack_from("<f", self._data, start)[0]


def read_sentencepiece_model(path: str | os.PathLike[str]) -> SentencePieceModel:
    """The vocabulary in a `tokenizer.model`.

    Raises UsageError where the file cannot be read, FormatError, with the offset where there is one, for a broken
    message and for pieces that `sentencepiece` refuses, UnsupportedError for one that is not of the kind BPE.
    """
    with FileSource(path) as source:
        if source.size > _MAX_FILE_BYTES:
            raise FormatError(f"is too large (expected at most {_MAX_FILE_BYTES} bytes, got {source.size})", path=path)
        data = source.read(0, source.size).tobytes()
    return parse_sentencepiece_model(data, path)


def parse_sentencepiece_model(data: bytes, path: str | os.PathLike[str]) -> SentencePieceModel:
    """The same from the bytes of a file; `path` is for the errors."""
    if _TIKTOKEN.match(data):
        raise UnsupportedError(
            "is a tiktoken vocabulary (expected SentencePiece's)",
            path=path,
            hint="take the tokenizer.json that the same model has on Hugging Face",
        )
    top = _Reader(data, 0, len(data), path)
    pieces: list[Piece] = []
    trainer: dict[int, int] = {}
    normalizer: dict[int, int] = {}
    for number, kind, start, stop in top.fields():
        if number == 1:
            top.wanted(number, kind, _BYTES)
            pieces.append(_piece(top.inner(start, stop), len(pieces), start))
        elif number in (2, 3):
            top.wanted(number, kind, _BYTES)
            into = trainer if number == 2 else normalizer
            into.update({n: v for n, k, v, _ in top.inner(start, stop).fields() if k == _VARINT})
    _check_kind(data, trainer, bool(pieces), path)
    model = SentencePieceModel(
        pieces,
        byte_fallback=trainer.get(35, 0) != 0,
        add_dummy_prefix=normalizer.get(3, 1) != 0,
        remove_extra_whitespaces=normalizer.get(4, 1) != 0,
        bos_id=_id(trainer.get(41, 1), len(pieces)),
        eos_id=_id(trainer.get(42, 2), len(pieces)),
        pad_id=_id(trainer.get(43, -1), len(pieces)),
    )
    _check(model, lambda reason: FormatError(escape_control(reason), path=path))
    return model


def _check_kind(data: bytes, trainer: dict[int, int], has_pieces: bool, path: str | os.PathLike[str]) -> None:
    if not has_pieces:
        raise FormatError("is no SentencePiece model: it has no pieces", path=path, offset=0)
    kind = trainer.get(3, 1)
    if kind != _BPE:
        raise UnsupportedError(
            f"is a SentencePiece vocabulary of the kind {_MODEL_TYPES.get(kind, kind)} (expected BPE): "
            "llama.cpp would cut text in another way",
            path=path,
        )


def _id(value: int, n_pieces: int) -> int | None:
    return value if 0 <= value < n_pieces else None


def _piece(reader: _Reader, index: int, at: int) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, wire, value, stop in reader.fields():
        if number == 1:
            reader.wanted(number, wire, _BYTES)
            text = reader.text(value, stop)
        elif number == 2:
            reader.wanted(number, wire, _FIXED32)
            score = reader.float32(value)
        elif number == 3:
            reader.wanted(number, wire, _VARINT)
            kind = value
    if not NORMAL <= kind <= BYTE:
        raise reader.error(f"piece {index} is of type {kind} (expected 1 to 6)", at)
    if math.isnan(score):
        raise reader.error(f"the score of piece {index} is not a number", at)
    return Piece(text, score, kind)


def _check(model: SentencePieceModel, error: Callable[[str], Exception]) -> None:
    """What `sentencepiece` asks of a vocabulary, and GGUF too: no spelling twice."""
    first: dict[str, int] = {}
    for i, piece in enumerate(model.pieces):
        if not piece.text:
            raise error(f"piece {i} is empty")
        if "\0" in piece.text:
            raise error(f"piece {i} contains a NUL character")
        if first.setdefault(piece.text, i) != i:
            raise error(f"piece {piece.text[:80]!r} is there twice, as {first[piece.text]} and {i}")
    unknown = [i for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN]
    if len(unknown) != 1:
        raise error(f"has {len(unknown)} unknown pieces (expected 1)")
    spelled = {piece.text for piece in model.pieces if piece.type == BYTE}
    wanted = {f"<0x{b:02X}>" for b in range(256)} if model.byte_fallback else set()
    if spelled != wanted:
        odd = min(spelled ^ wanted)
        reason = "is missing" if odd in wanted else "is none of the bytes that this vocabulary has"
        raise error(f"the byte piece {odd[:80]!r} {reason}")


def write_sentencepiece_model(path: str | os.PathLike[str], model: SentencePieceModel) -> None:
    """Write a vocabulary as `sentencepiece` and transformers read it: whole or not at all.

    Raises UnsupportedError for pieces that such a file cannot hold, SaveError when the disk refuses.
    """
    data = encode_sentencepiece_model(model, path)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def encode_sentencepiece_model(model: SentencePieceModel, path: str | os.PathLike[str] | None = None) -> bytes:
    """The bytes of a vocabulary; they depend on it alone. Raises as `write_sentencepiece_model`."""
    _check(model, lambda reason: UnsupportedError(escape_control(reason), path=path, hint=_HINT))
    unknown = next(i for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN)
    texts = [
        (45 + i, model.pieces[id].text) for i, id in enumerate((unknown, model.bos_id, model.eos_id)) if id is not None
    ]
    ids = (unknown, model.bos_id, model.eos_id, model.pad_id)
    trainer = [
        _number(3, _BPE),
        _number(4, len(model.pieces)),
        _number(35, model.byte_fallback),
        *(_number(40 + i, -1 if id is None else id) for i, id in enumerate(ids)),
        *(_bytes(number, text.encode()) for number, text in texts),
    ]
    flags = (model.add_dummy_prefix, model.remove_extra_whitespaces, True)
    normalizer = [_bytes(1, b"identity"), *(_number(3 + i, flag) for i, flag in enumerate(flags))]
    parts = [_bytes(1, _encoded(piece, path)) for piece in model.pieces]
    return b"".join([*parts, _bytes(2, b"".join(trainer)), _bytes(3, b"".join(normalizer))])


_HINT = "a SentencePiece file cannot hold such a vocabulary"


def _encoded(piece: Piece, path: str | os.PathLike[str] | None) -> bytes:
    try:
        text = piece.text.encode()
    except UnicodeEncodeError as error:
        raise UnsupportedError(f"piece {piece.text[:80]!a} is not Unicode", path=path, hint=_HINT) from error
    kind = b"" if piece.type == NORMAL else _number(3, piece.type)
    return _bytes(1, text) + _varint(2 << 3 | _FIXED32) + struct.pack("<f", piece.score) + kind


def _varint(value: int) -> bytes:
    value &= 0xFFFF_FFFF_FFFF_FFFF
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(int(value))


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(len(value)) + value
