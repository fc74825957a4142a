"""Where a corpus lies, and its text in pieces: files, folders, what comes through a pipe; decoded as it is read."""

from __future__ import annotations

import codecs
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from llamakit.dataset.plays import find_plays
from llamakit.dataset.prepare_config import CorpusConfig
from llamakit.errors import DataError, UsageError

Kind = Literal["text", "jsonl", "json", "csv", "play"]

_KINDS: dict[str, Kind] = {
    ".txt": "text", ".text": "text", ".md": "text",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv",
}  # fmt: skip
_BLOCK_BYTES = 1 << 18
#: characters of a line, a record, or what is between two line breaks of a text
MAX_RECORD = 1 << 26


@dataclass(frozen=True)
class Source:
    """One file. shown: how errors call it; size: bytes."""

    path: Path
    shown: str
    kind: Kind
    size: int


@dataclass(frozen=True)
class Found:
    """What there is to read; n_left_out: files in folders whose names do not say that they hold text."""

    sources: tuple[Source, ...]
    n_left_out: int

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(source.size for source in self.sources)


def find_sources(config: CorpusConfig, scratch: Path, stdin: BinaryIO | None) -> Found:
    """The files of a corpus: in the order in which they are given, those of a folder in the order of their paths.

    What can be read only once, standard input and pipes, is copied into `scratch` first. Raises UsageError for what
    cannot be read, DataError for a folder without text.
    """
    sources: list[Source] = []
    n_left_out = 0
    if not config.inputs:
        sources = [Source(path, str(path), "play", _size(path)) for path in find_plays()]
    for number, name in enumerate(config.inputs):
        if name != "-" and os.path.isdir(name):
            inside, left_out = _folder(Path(name), config)
            sources += inside
            n_left_out += left_out
        else:
            sources.append(_file(name, config, scratch / f".input{number}", stdin))
    return Found(tuple(sources), n_left_out)


def _kind(path: Path, config: CorpusConfig) -> Kind | None:
    return _KINDS.get(path.suffix.lower()) if config.format == "auto" else config.format


def _folder(folder: Path, config: CorpusConfig) -> tuple[list[Source], int]:
    found: list[Source] = []
    n_left_out = 0
    for root, folders, files in os.walk(folder, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            path = Path(root, name)
            kind = _KINDS.get(path.suffix.lower())
            if kind is None or not path.is_file():
                n_left_out += 1
            else:
                found.append(Source(path, str(path), _kind(path, config) or kind, _size(path)))
    if not found:
        raise DataError(
            f"holds no text: none of its {n_left_out} files is named {', '.join('*' + suffix for suffix in _KINDS)}",
            path=folder,
            hint="name the files themselves, and say what they are with --format",
        )
    return sorted(found, key=lambda source: source.path.parts), n_left_out


def _unreadable(error: OSError) -> None:
    raise UsageError(f"cannot be read: {error.strerror}", path=error.filename) from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", path=path) from error


def _file(name: str, config: CorpusConfig, scratch: Path, stdin: BinaryIO | None) -> Source:
    if name == "-":
        if stdin is None:
            raise UsageError("standard input (-) is not there to be read")
        _copy(stdin, scratch)
        kind = config.format if config.format != "auto" else "text"
        return Source(scratch, "<stdin>", kind, _size(scratch))
    path = Path(name)
    try:
        mode = path.stat().st_mode
        if stat.S_ISFIFO(mode):
            with path.open("rb") as pipe:
                _copy(pipe, scratch)
            return Source(scratch, name, _kind(path, config) or "text", _size(scratch))
        if not stat.S_ISREG(mode):
            raise UsageError("is no file that can be read", path=path)
        path.open("rb").close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot be read: {reason}", path=path) from error
    return Source(path, name, _kind(path, config) or "text", _size(path))


def _copy(stream: BinaryIO, target: Path) -> None:
    with target.open("wb") as file:
        shutil.copyfileobj(stream, file, _BLOCK_BYTES)


class Reader:
    """A file's text, block after block; knows where it is.

    start, stop: the part of the file that is read, in bytes. n_read: bytes read so far; n_replaced: how often something
    that is no UTF-8 became U+FFFD.
    """

    def __init__(self, source: Source, errors: str, start: int = 0, stop: int | None = None) -> None:
        self.source, self._errors, self._start = source, errors, start
        self._stop = source.size if stop is None else stop
        self.n_read = self.n_replaced = 0

    def error(self, reason: str, line: int | None = None, hint: str | None = None) -> DataError:
        """A DataError about this file."""
        return DataError(reason, path=self.source.shown, line=line, hint=hint)

    def blocks(self) -> Iterator[str]:
        """The text, a mark of the byte order before it left out.

        Raises DataError, with the line, for what is no UTF-8 where errors is "strict"; UsageError where the system
        cannot read.
        """
        pending, n_lines = b"", 1
        for raw in self._raw_blocks():
            data = pending + raw
            final = self.n_read == self._stop - self._start or not raw
            try:
                text, n_used = codecs.utf_8_decode(data, self._errors, final)
            except UnicodeDecodeError as error:
                raise self.error(
                    f"is not UTF-8 text (byte 0x{data[error.start]:02x})",
                    n_lines + data.count(b"\n", 0, error.start) + self._lines_before(),
                    "--errors replace puts U+FFFD in its place; or convert it first: iconv -f ISO-8859-1 -t UTF-8",
                ) from error
            if self._errors == "replace":
                self.n_replaced += text.count("\ufffd") - data.count(b"\xef\xbf\xbd", 0, n_used)
            n_lines += data.count(b"\n", 0, n_used)
            pending = data[n_used:]
            yield text

    def _lines_before(self) -> int:
        """Line breaks before the part that is read."""
        n = done = 0
        with self.source.path.open("rb") as file:
            while done < self._start and (block := file.read(min(_BLOCK_BYTES, self._start - done))):
                n, done = n + block.count(b"\n"), done + len(block)
        return n

    def _raw_blocks(self) -> Iterator[bytes]:
        try:
            with self.source.path.open("rb") as file:
                if self._start:
                    file.seek(self._start)
                elif file.read(3) != codecs.BOM_UTF8:
                    file.seek(0)
                else:
                    self.n_read = 3
                while self.n_read < self._stop - self._start:
                    block = file.read(min(_BLOCK_BYTES, self._stop - self._start - self.n_read))
                    self.n_read += len(block)
                    yield block
                    if not block:  # it has become shorter
                        return
        except OSError as error:
            raise UsageError(f"cannot be read: {error.strerror}", path=self.source.shown) from error

    def lines(self) -> Iterator[str]:
        """The text line by line, with their line breaks, which are LF or CR LF."""
        rest: list[str] = []
        n_rest = n_lines = 0
        for block in self.blocks():
            *whole, last = block.split("\n")
            for line in whole:
                n_lines += 1
                yield "".join((*rest, line, "\n")) if rest else line + "\n"
                rest, n_rest = [], 0
            if last:
                rest.append(last)
                n_rest += len(last)
                if n_rest > MAX_RECORD:
                    raise self.error(f"has more than {MAX_RECORD} characters in one line", n_lines + 1)
        if rest:
            yield "".join(rest)
