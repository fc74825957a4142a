"""Documents in files that hold many: lines and paragraphs of a text, JSON lines, lists of objects, tables."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

from llamakit.dataset.plays import plain_text
from llamakit.dataset.prepare_config import CorpusConfig
from llamakit.dataset.sources import MAX_RECORD, Reader
from llamakit.files import escape_control

_NOT_SPACE = re.compile(r"\S")
_DELIMITERS = (",", "\t", ";")
_DECODER = json.JSONDecoder()


class _Found(NamedTuple):
    """A JSON value that stands in text[start:end]."""

    value: Any
    text: str
    start: int
    end: int


def records(reader: Reader, config: CorpusConfig) -> Iterator[str]:
    """The documents of a file, white space around each removed; an empty one is given, too, for whoever counts.

    Raises DataError with file and line for a record that is broken or has no text.
    """
    kind = reader.source.kind
    if kind == "play":
        yield plain_text("".join(reader.blocks())).strip()
    elif kind == "jsonl":
        yield from _json_lines(reader, config)
    elif kind == "json":
        yield from _json(reader, config)
    elif kind == "csv":
        yield from _table(reader, config)
    elif config.split_on == "line":
        yield from (line.strip() for line in reader.lines())
    else:
        yield from _paragraphs(reader)


def _paragraphs(reader: Reader) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    for number, line in enumerate(reader.lines(), 1):
        if line.isspace():
            if lines:
                yield "".join(lines).strip()
            lines, size = [], 0
        else:
            lines.append(line)
            size += len(line)
            if size > MAX_RECORD:
                raise reader.error(f"has more than {MAX_RECORD} characters in one paragraph", number)
    if lines:
        yield "".join(lines).strip()


def _json_lines(reader: Reader, config: CorpusConfig) -> Iterator[str]:
    for number, line in enumerate(reader.lines(), 1):
        if line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _no_json(reader, error, number) from error
        yield _text_of(value, reader, config, number)


def _no_json(reader: Reader, error: Exception, line: int) -> Exception:
    reason = "too deeply nested" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
    return reader.error(f"is no JSON: {escape_control(reason)}", line)


def _text_of(value: Any, reader: Reader, config: CorpusConfig, line: int) -> str:
    """The text of one record, under the key that was asked for."""
    if not isinstance(value, dict):
        raise reader.error(f"a record is {escape_control(repr(value)[:40])} (expected an object)", line)
    key = _key(value, config)
    if key is None:
        keys = ", ".join(sorted(map(repr, value))[:8]) or "none"
        hint = f"say which key holds the text with --text-key; this record has {escape_control(keys)}"
        raise reader.error(f"a record has no {config.text_key!r}", line, hint)
    if not isinstance(value[key], str):
        raise reader.error(f"{key!r} is {escape_control(repr(value[key])[:40])} (expected text)", line)
    return _sound(value[key].strip(), reader, config, line)


def _key(value: Mapping[str, Any], config: CorpusConfig) -> str | None:
    for key in (config.text_key, "story") if config.text_key == "text" else (config.text_key,):
        if key in value:
            return key
    return None


def _sound(text: str, reader: Reader, config: CorpusConfig, line: int) -> str:
    """JSON can spell half of a character that UTF-16 needs two units for; that is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if config.errors == "strict":
            hint = "--errors replace puts U+FFFD in its place"
            raise reader.error("a text holds half of a surrogate pair, which is no Unicode", line, hint) from error
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        reader.n_replaced += 1
    return text


def _json(reader: Reader, config: CorpusConfig) -> Iterator[str]:
    """A list of objects, as TinyStories has them, or objects one after the other; read as far as is needed."""
    for value, line in _values(reader):
        yield _text_of(value, reader, config, line)


def _values(reader: Reader) -> Iterator[tuple[Any, int]]:
    """(value, line) of each element of a list, or of each of several values in a row."""
    blocks = reader.blocks()
    text, at, line = "", 0, 1
    in_list, wanted = False, "start"  # then "value" or "comma" where that alone may follow, "either" behind [
    while True:
        match = _NOT_SPACE.search(text, at)
        if match is None:
            line += text.count("\n", at)
            text, at = next(blocks, ""), 0
            if not text:
                break
            continue
        line += text.count("\n", at, match.start())
        at = match.start()
        char = text[at]
        if wanted == "start" and char == "[":
            in_list, wanted, at = True, "either", at + 1
        elif in_list and char == "]" and wanted != "value":
            _nothing_after(reader, text[at + 1 :], blocks, line)
            return
        elif wanted == "comma":
            if char != ",":
                raise reader.error(f"is no JSON: {char!r} between two records (expected a comma)", line)
            wanted, at = "value", at + 1
        else:
            found = _value(reader, text, at, blocks, line)
            yield found.value, line
            text, at = found.text, found.end
            line += text.count("\n", found.start, at)
            wanted = "comma" if in_list else "value"
    if in_list:
        raise reader.error("the list of records is not closed: the file was cut off", line)


def _value(reader: Reader, text: str, at: int, blocks: Iterator[str], line: int) -> _Found:
    """The JSON value at a place in the text, with as many blocks more as that takes."""
    wanted = 0
    while True:
        if len(text) - at >= wanted:
            try:
                value, end = _DECODER.raw_decode(text, at)
            except RecursionError as error:
                raise _no_json(reader, error, line) from error
            except json.JSONDecodeError:
                pass  # it may go on in the next block
            else:
                if end < len(text) or isinstance(value, (dict, list)):
                    return _Found(value, text, at, end)
            wanted = 2 * (len(text) - at)  # a long value is not looked at anew with every block
        block = next(blocks, "")
        if not block:
            break
        text, at = text[at:] + block, 0
        if len(text) > MAX_RECORD:
            raise reader.error(f"a record has more than {MAX_RECORD} characters, or is broken", line)
    try:
        value, end = _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise _no_json(reader, error, line + text.count("\n", at, error.pos)) from error
    return _Found(value, text, at, end)


def _nothing_after(reader: Reader, text: str, blocks: Iterator[str], line: int) -> None:
    for rest in chain((text,), blocks):
        if rest and not rest.isspace():
            raise reader.error("something stands behind the list of records", line)


def _table(reader: Reader, config: CorpusConfig) -> Iterator[str]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD))
    lines = reader.lines()
    head = next(lines, None)
    if head is None:
        return
    delimiter = max(_DELIMITERS, key=head.count)
    rows = csv.reader(chain((head,), lines), delimiter=delimiter, strict=True)
    try:
        columns = next(rows, [])
        key = _key(dict.fromkeys(columns), config)
        if key is None:
            shown = escape_control(", ".join(map(repr, columns[:8])))
            hint = f"say which column holds the text with --text-key; the first line names {shown}"
            raise reader.error(f"has no column {config.text_key!r}", 1, hint)
        at = columns.index(key)
        for row in rows:
            if row and len(row) <= at:
                raise reader.error(f"a row has {len(row)} columns (expected {len(columns)})", rows.line_num)
            if row:
                yield row[at].strip()
    except csv.Error as error:
        raise reader.error(f"is no sound CSV: {error}", rows.line_num) from error
