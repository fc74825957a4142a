"""Training data as people have it, text, JSON lines, JSON, CSV or a folder of these, as one kind of record.

Whatever cannot be used becomes a `Problem` with its file and line: nothing is dropped without a word.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamakit.dataset.schemas import Conversation, Message, SchemaError, read_object
from llamakit.errors import DataError, UsageError
from llamakit.files import escape_control, read_whole

_TEXT = (".txt", ".md", ".text")
_LINES, _JSON, _TABLES = (".jsonl", ".ndjson"), (".json",), (".csv", ".tsv")
_KNOWN = (*_TEXT, *_LINES, *_JSON, *_TABLES)
_DELIMITERS = (",", ";", "\t")
_LONGEST_REASON = 300


@dataclass(frozen=True)
class Record:
    """One sample as it was written: where it stands, its schema, and its messages or its text.

    line: the first line of it, from 1. messages: empty for a plain text.
    """

    path: str
    line: int
    schema: str
    messages: tuple[Message, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Problem:
    """Something that cannot be used. kind: broken, schema, role, empty, template, or untrained."""

    path: str
    line: int | None
    kind: str
    reason: str

    def error(self) -> DataError:
        """The same as an error, for a run that stops at the first."""
        hint = "llamakit data check lists all of them; --on-error skip goes on without them"
        return DataError(self.reason, path=self.path, line=self.line, hint=hint)


def is_chat_file(source: str | os.PathLike[str]) -> bool:
    """Whether a source is read record by record: JSON, JSON lines, a table, or a folder with one of these in it."""
    path = Path(source)
    if path.is_dir():
        return any(is_chat_file(file) for file in _files_in(path)[0])
    return path.suffix.lower() in (*_LINES, *_JSON, *_TABLES)


def data_files(sources: Iterable[str | os.PathLike[str]]) -> tuple[list[Path], list[Path]]:
    """(files to read, files left aside) of sources that are files or folders; a folder's in the order of their names.

    A folder's hidden files are no data; its files of other kinds are left aside. Raises UsageError for a source that
    is not there, and for a folder without any data.
    """
    found: list[Path] = []
    aside: list[Path] = []
    for source in sources:
        path = Path(source)
        if not path.is_dir():
            if not os.path.lexists(path):
                raise UsageError("there is no such file", path=path)
            found.append(path)
            continue
        files, others = _files_in(path)
        if not files:
            raise UsageError(f"has no training data (expected files named *{', *'.join(_KNOWN)})", path=path)
        found += files
        aside += others
    return found, aside


def _files_in(folder: Path) -> tuple[list[Path], list[Path]]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    seen = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    data = [file for file in seen if file.suffix.lower() in _KNOWN]
    return data, [file for file in seen if file not in data]


def read_records(path: str | os.PathLike[str]) -> Iterator[Record | Problem]:
    """The records of one file, in its order, and a Problem in the place of each that cannot be used.

    By the file's name: *.jsonl and *.ndjson have an object a line, *.json one object, a list of them, or lines, *.csv
    and *.tsv a header and a record a row; anything else is one text. Raises UsageError where it cannot be read.
    """
    name, suffix = os.fspath(path), Path(path).suffix.lower()
    data = read_whole(path)
    if suffix in _LINES:
        yield from _read_lines(name, data)
        return
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        yield Problem(name, line, "broken", f"is not UTF-8 text (byte 0x{data[error.start]:02x})")
        return
    if suffix in _JSON:
        yield from _read_json(name, text)
    elif suffix in _TABLES:
        yield from _read_table(name, text)
    elif text.strip():
        yield Record(name, 1, "text", text=text)
    else:
        yield Problem(name, None, "empty", "is empty: there is nothing to train on")


def _record(path: str, line: int, value: Any) -> Record | Problem:
    try:
        found: Conversation = read_object(value)
    except SchemaError as error:
        return Problem(path, line, error.kind, escape_control(str(error))[:_LONGEST_REASON])
    return Record(path, line, found.schema, found.messages, found.text)


def _broken(path: str, line: int, error: Exception, rest: str = "") -> Problem:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error) or "it is nested too deeply"
    place = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
    return Problem(path, line, "broken", f"is not JSON: {escape_control(reason)[:_LONGEST_REASON]}{place}{rest}")


def _read_lines(path: str, data: bytes) -> Iterator[Record | Problem]:
    n_found = 0
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not raw.strip():
            continue
        n_found += 1
        try:
            value = json.loads(raw.decode())
        except UnicodeDecodeError as error:
            yield Problem(path, number, "broken", f"is not UTF-8 text (byte 0x{raw[error.start]:02x})")
        except (ValueError, RecursionError) as error:
            yield _broken(path, number, error)
        else:
            yield _record(path, number, value)
    if not n_found:
        yield Problem(path, None, "empty", "is empty: there is nothing to train on")


def _read_json(path: str, text: str) -> Iterator[Record | Problem]:
    start = _skip(text, 0)
    if start == len(text):
        yield Problem(path, None, "empty", "is empty: there is nothing to train on")
    elif text[start] != "[":
        yield from _read_values(path, text, start, in_list=False)
    elif _is_conversation(text):
        yield _record(path, _line(text, start), json.loads(text))
    else:
        yield from _read_values(path, text, start + 1, in_list=True)


def _is_conversation(text: str) -> bool:
    """Whether a list is one conversation, as `llamakit chat`'s /save writes it, and not a list of records."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return bool(value) and all(isinstance(item, dict) and {"role", "content"} <= item.keys() for item in value)


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _read_values(path: str, text: str, at: int, *, in_list: bool) -> Iterator[Record | Problem]:
    """JSON values one after the other: the elements of a list, or objects without commas between them."""
    decoder = json.JSONDecoder()
    line, counted, n_found = 1, 0, 0
    lost = ": what follows in this file cannot be read"
    while True:
        at = _skip(text, at)
        line, counted = line + text.count("\n", counted, at), at
        if at == len(text) and not in_list:
            return
        if in_list and text[at : at + 1] == "]":
            rest = _skip(text, at + 1)
            if rest < len(text):
                yield Problem(path, _line(text, rest), "broken", f"is not JSON: text after the list's end{lost}")
            elif not n_found:
                yield Problem(path, line, "empty", "is an empty list: there is nothing to train on")
            return
        if in_list and n_found:
            if text[at : at + 1] != ",":
                yield Problem(path, line, "broken", f"is not JSON: expected a comma or the list's end{lost}")
                return
            at = _skip(text, at + 1)
            line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            yield _broken(path, error.lineno, error, lost)
            return
        except (ValueError, RecursionError) as error:
            yield _broken(path, line, error, lost)
            return
        n_found += 1
        yield _record(path, line, value)


def _read_table(path: str, text: str) -> Iterator[Record | Problem]:
    """A header, then a record a row; the delimiter is the one that gives the header a known form."""
    rows = _rows(path, text)
    header = next(rows, None)
    if header is None:
        yield Problem(path, None, "empty", "is empty: there is nothing to train on")
        return
    if isinstance(header, Problem):
        yield header
        return
    columns = [column.strip() for column in header[1]]
    n_found = 0
    for row in rows:
        n_found += 1
        if isinstance(row, Problem):
            yield row
            return
        line, cells = row
        if len(cells) != len(columns):
            yield Problem(path, line, "broken", f"has {len(cells)} columns (expected {len(columns)}, as in the header)")
        else:
            yield _record(path, line, dict(zip(columns, cells, strict=True)))
    if not n_found:
        yield Problem(path, None, "empty", "has a header and no row: there is nothing to train on")


def _rows(path: str, text: str) -> Iterator[tuple[int, list[str]] | Problem]:
    """(first line, cells) of each row that is not blank; a Problem ends them."""
    first = text.split("\n", 1)[0]
    delimiter = max(_DELIMITERS, key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Problem(path, line, "broken", f"is not CSV: {error}: what follows in this file cannot be read")
            return
        if any(cell.strip() for cell in cells):
            yield line, cells
