"""JSON from strangers: objects without doubt. No key twice, no NaN, no number that is none, no endless nesting."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from typing import Any, NoReturn

from llamakit.errors import FormatError
from llamakit.files import escape_control
from llamakit.formats.source import FileSource

_MAX_FILE_BYTES = 1 << 26


def parse_value(raw: bytes, path: str | os.PathLike[str], what: str) -> Any:
    """The JSON value in `raw`; `what` names it in the error ("the header").

    Raises FormatError for what is no UTF-8 or no JSON, for a key that an object has twice (readers differ in which of
    the two counts), for NaN and infinities, and for an object's strings that are no Unicode.
    """
    try:
        return json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant,
        )
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else escape_control(str(error))
        raise FormatError(f"{what} is no sound JSON: {reason}", path=path) from error


def parse_object(raw: bytes, path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """The JSON object in `raw`. Raises as `parse_value`, and FormatError for what is no object."""
    value = parse_value(raw, path, what)
    if not isinstance(value, dict):
        raise FormatError(f"{what} is JSON, but no object (expected {{...}})", path=path)
    return value


def read_value(path: str | os.PathLike[str]) -> Any:
    """The JSON value in a file of at most 64 MiB. Raises as `parse_value`, and UsageError when it cannot be read."""
    return parse_value(_read(path), path, "the file")


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file of at most 64 MiB. Raises as `parse_object`, and UsageError when it cannot be read."""
    return parse_object(_read(path), path, "the file")


def _read(path: str | os.PathLike[str]) -> bytes:
    with FileSource(path) as source:
        if source.size > _MAX_FILE_BYTES:
            raise FormatError(f"is too large (expected at most {_MAX_FILE_BYTES} bytes, got {source.size})", path=path)
        return source.read(0, source.size).tobytes()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key '{twice[:100]}' stands there twice")
    for key, value in pairs:
        key.encode("utf-8")  # half of a surrogate pair is no text
        if isinstance(value, str):
            value.encode("utf-8")
    return found


def _integer(digits: str) -> int:
    if len(digits) > 40 or digits == "-0":
        raise ValueError("a number out of range")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError("a number out of range")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
