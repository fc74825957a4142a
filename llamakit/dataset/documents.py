"""The documents of a corpus, in order, in units of work that know how much was read for them.

A text file that is one document is never in memory as a whole: it is cut where cutting changes no token.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from llamakit.dataset.encode_worker import Part
from llamakit.dataset.order import counter_uniform
from llamakit.dataset.prepare_config import CorpusConfig, PrepareConfig
from llamakit.dataset.records import records
from llamakit.dataset.sources import MAX_RECORD, Found, Reader, Source
from llamakit.errors import DataError
from llamakit.tokenizer import Tokenizer

_UNIT_CHARS, _UNIT_PARTS = 1 << 18, 4096
#: how far from the wanted place a document is cut between paragraphs rather than lines, lines rather than words
_WINDOW = 1 << 16
_EXAMPLE_CHARS = 400
_SAMPLE_STREAM = 0x7EC5
#: a new vocabulary of text without spaces takes fifty times as much memory as the text
_SAMPLED_BYTES = 16 << 20


@dataclass(frozen=True)
class Piece:
    """A document, or a part of a long one. begins: it is the first part; held_out: of a document for validation."""

    text: str
    begins: bool = True
    held_out: bool = False


@dataclass
class Unit:
    """Pieces to tokenize together. n_read: bytes of the corpus read when it was complete."""

    pieces: list[Piece] = field(default_factory=list)
    n_read: int = 0

    @property
    def parts(self) -> list[Part]:
        """As the tokenizer wants them."""
        return [(piece.text, not piece.begins) for piece in self.pieces]


class Documents:
    """What is read, and what was seen: n_empty records without text, n_replaced, the start of the first document."""

    def __init__(self, found: Found, config: PrepareConfig, tokenizer: Tokenizer) -> None:
        self._found, self._config, self._tokenizer = found, config, tokenizer
        self.n_empty = self.n_replaced = 0
        self.example = ""
        self._hashes = array("Q")
        self._read_before = 0

    def units(self) -> Iterator[Unit]:
        """All documents. Raises DataError for text that cannot be used, UsageError where a file cannot be read."""
        unit, size = Unit(), 0
        digest = None
        for piece in self._pieces():
            if piece.begins:
                self._seen(digest)
                digest = hashlib.blake2b(digest_size=8)
                self.example = self.example or piece.text[:_EXAMPLE_CHARS]
            assert digest is not None
            digest.update(piece.text.encode())
            unit.pieces.append(piece)
            size += len(piece.text)
            if size >= _UNIT_CHARS or len(unit.pieces) >= _UNIT_PARTS:
                unit.n_read = self._n_read()
                yield unit
                unit, size = Unit(), 0
        self._seen(digest)
        if unit.pieces:
            unit.n_read = self._n_read()
            yield unit

    def n_duplicates(self) -> int:
        """Documents whose text was there before."""
        hashes = np.sort(np.frombuffer(self._hashes, np.uint64)) if self._hashes else np.zeros(0, np.uint64)
        return int((hashes[1:] == hashes[:-1]).sum())

    def _seen(self, digest: hashlib.blake2b | None) -> None:
        if digest is not None:
            self._hashes.append(int.from_bytes(digest.digest(), "little"))

    def _n_read(self) -> int:
        return self._read_before + (self._reader.n_read if self._reader is not None else 0)

    _reader: Reader | None = None

    def _open(self, source: Source, start: int = 0, stop: int | None = None) -> Iterator[Reader]:
        """One reader; what it counted is kept when it is done."""
        reader = self._reader = Reader(source, self._config.errors, start, stop)
        yield reader
        self._read_before += reader.n_read
        self.n_replaced += reader.n_replaced
        self._reader = None

    def _pieces(self) -> Iterator[Piece]:
        if any(_is_whole(source, self._config) for source in self._found.sources):
            yield from self._of_files()
            return
        texts = self._texts(self._found.sources)
        first = next(texts, None)
        second = next(texts, None) if first is not None else None
        if first is not None and second is None and self._config.val_split > 0:
            yield from _in_two(first, self._config.val_split)
        else:
            yield from (Piece(text) for text in chain((first, second), texts) if text is not None)

    def _texts(self, sources: Iterable[Source]) -> Iterator[str]:
        """Records that have a text."""
        for source in sources:
            for reader in self._open(source):
                for text in records(reader, self._config):
                    if text:
                        yield text
                    else:
                        self.n_empty += 1

    def _of_files(self) -> Iterator[Piece]:
        """Text files that are one document each, and what else there is."""
        cut_source, at = self._cut_file()
        for source in self._found.sources:
            if not _is_whole(source, self._config):
                yield from map(Piece, self._texts((source,)))
            elif source is cut_source:
                for held_out, start, stop in ((False, 0, at), (True, at, source.size)):
                    for reader in self._open(source, start, stop):
                        yield from self._of_file(reader, held_out)
            else:
                for reader in self._open(source):
                    yield from self._of_file(reader, False)

    def _of_file(self, reader: Reader, held_out: bool) -> Iterator[Piece]:
        text, begins = "", True
        for block in reader.blocks():
            text = (text + block).lstrip() if begins else text + block
            while len(text) > _UNIT_CHARS and (at := self._safe_cut(text)):
                yield Piece(text[:at], begins, held_out)
                text, begins = text[at:], False
            if len(text) > MAX_RECORD:
                raise reader.error(
                    f"has {MAX_RECORD} characters in a row that cannot be cut into parts",
                    hint="break its lines, or make its paragraphs or lines documents with --split-on",
                )
        text = text.rstrip()
        if text:
            yield Piece(text, begins, held_out)
        elif begins:
            self.n_empty += 1

    def _safe_cut(self, text: str) -> int:
        """The last place beside a line break where a cut changes no token, 0 where there is none.

        What follows is more than white space: the end of the document may still be trimmed.
        """
        stop = len(text.rstrip())
        while (at := text.rfind("\n", 1, stop)) > 0:
            for place in (at + 1, at):
                if place < stop and self._tokenizer.may_cut(text, place):
                    return place
            stop = at
        return 0

    def _cut_file(self) -> tuple[Source | None, int]:
        """The file whose end is held out, and from which byte on: the last one, where each is longer than the share."""
        sources = [source for source in self._found.sources if source.size]
        share = self._config.val_split
        room = max(1, int(share * sum(source.size for source in sources)))
        if share <= 0 or not sources or not all(_is_whole(source, self._config) for source in sources):
            return None, 0
        if min(source.size for source in sources) <= room:
            return None, 0
        last = sources[-1]
        wanted = last.size - room
        start = max(0, wanted - _WINDOW)
        with last.path.open("rb") as file:
            file.seek(start)
            window = file.read(wanted + _WINDOW - start)
        at = start + _boundary(window, wanted - start)
        return (last, at) if 0 < at < last.size else (None, 0)


def _is_whole(source: Source, config: CorpusConfig) -> bool:
    return source.kind == "text" and config.split_on == "file"


def _in_two(text: str, share: float) -> Iterator[Piece]:
    """The only document there is, its end held out."""
    raw = text.encode()
    at = _boundary(raw, len(raw) - max(1, int(share * len(raw))))
    head, tail = raw[:at].decode().strip(), raw[at:].decode().strip()
    if not head or not tail:
        raise DataError(
            "the only document is too short to hold a part of it out", hint="--val-split 0 trains on all of it"
        )
    yield Piece(head)
    yield Piece(tail, held_out=True)


def _boundary(data: bytes, wanted: int) -> int:
    """The place nearest to the wanted one behind an empty line, else behind a line break, a space, or a character."""
    low, high = max(0, wanted - _WINDOW), min(len(data), wanted + _WINDOW)
    for mark in (b"\n\n", b"\r\n\r\n", b"\n", b" "):
        places = [data.rfind(mark, low, wanted), data.find(mark, wanted, high)]
        found = [place + len(mark) for place in places if place > 0 and data[place + len(mark) :].strip()]
        if found:
            return min(found, key=lambda place: abs(place - wanted))
    while wanted > 0 and wanted < len(data) and data[wanted] & 0xC0 == 0x80:
        wanted -= 1
    return wanted


def sampled_text(found: Found, config: CorpusConfig, most_bytes: int = _SAMPLED_BYTES) -> Iterator[str]:
    """Lines of the corpus for a new vocabulary: all of them, of a large corpus some most_bytes, drawn by the seed.

    Raises as `Documents.units`.
    """
    share = most_bytes / max(1, found.n_bytes)
    number = 0
    for source in found.sources:
        reader = Reader(source, config.errors)
        texts = reader.lines() if _is_whole(source, config) else records(reader, config)
        for text in texts:
            lines = text.splitlines() if text else []
            if share < 1:
                drawn = counter_uniform(config.seed, _SAMPLE_STREAM, np.arange(number, number + len(lines))) < share
                number += len(lines)
                lines = [line for line, taken in zip(lines, drawn, strict=True) if taken]
            yield from lines
