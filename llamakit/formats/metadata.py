"""A vocabulary's metadata, read strictly: every value is checked for its type, every error names its key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamakit.errors import FormatError
from llamakit.files import escape_control

#: the id that some converters write for "none"
_NO_ID = 0xFFFFFFFF


class Metadata:
    """The metadata of one file (path: for the errors), asked key by key; what is odd but no error is in `warnings`."""

    def __init__(self, values: Mapping[str, Any], path: Path | None) -> None:
        self._values, self._path = values, path
        self.warnings: list[str] = []

    def error(self, key: str, reason: str) -> FormatError:
        """A FormatError about one key; the reason may quote the file."""
        return FormatError(f"{key} {escape_control(reason)}", path=self._path)

    def string(self, key: str) -> str | None:
        """A string, None where the key is missing."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, f"is no string ({_kind(value)})")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A truth value."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, (bool, np.bool_)):
            raise self.error(key, f"is neither true nor false ({_kind(value)})")
        return bool(value)

    def token_id(self, key: str, default: int | None, n_tokens: int) -> int | None:
        """The id of a token; one outside the vocabulary counts as missing, with a warning unless it says "none"."""
        if default is not None and default >= n_tokens:
            default = None
        value = self._values.get(key)
        if value is None:
            return default
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
            raise self.error(key, f"is no token id ({_kind(value)})")
        if 0 <= value < n_tokens:
            return int(value)
        if value not in (_NO_ID, -1):
            self.warnings.append(f"{key} is {value}, outside the vocabulary of {n_tokens} tokens; it is ignored")
        return default

    def strings(self, key: str) -> list[str] | None:
        """An array of strings, decoded."""
        value = self._values.get(key)
        if value is None:
            return None
        if isinstance(value, (str, bytes, np.ndarray)) or not isinstance(value, Sequence):
            raise self.error(key, f"is no array of strings ({_kind(value)})")
        strings = list(value)
        if any(type(s) is not str for s in strings):
            raise self.error(key, "is no array of strings")
        return strings

    def numbers(self, key: str, n: int, kinds: str) -> np.ndarray | None:
        """The first n of an array of numbers (n,), whose dtype is of one of these numpy kinds."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind not in kinds:
            raise self.error(key, f"is no array of numbers ({_kind(value)})")
        if len(value) < n:
            raise self.error(key, f"has {len(value)} values for {n} tokens")
        return value[:n]


def _kind(value: Any) -> str:
    return f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
