"""Typed access to what a file says about itself: GGUF metadata or a config.json; every complaint names its key."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from llamakit.errors import FormatError, UnsupportedError
from llamakit.files import escape_control
from llamakit.formats.gguf_writer import Typed


class Fields:
    """A mapping with checks. A default stands in where a key is absent; None as a value counts as absent.

    Raises FormatError, naming path and key, for what is missing or of another kind.
    """

    def __init__(self, values: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
        self._values, self.path = values, path

    def __contains__(self, key: str) -> bool:
        return self.raw(key) is not None

    def raw(self, key: str) -> Any:
        """The plain value, None where absent: without its GGUF type, one for all layers where all agree."""
        value = self._values.get(key)
        if isinstance(value, Typed):
            value = value.value
        if isinstance(value, np.ndarray) and value.size:
            if not np.all(value == value.flat[0]):
                raise UnsupportedError(f"{key} differs between layers, which is not supported", path=self.path)
            return value.flat[0].item()
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self.raw(key)
        value = default if value is None else value
        if value is None:
            raise FormatError(f"{key} is missing", path=self.path)
        return value

    def wrong(self, key: str, expected: str) -> FormatError:
        """The error for a value that is there and cannot be."""
        shown = escape_control(repr(self.raw(key))[:80])
        return FormatError(f"{key} is {shown} (expected {expected})", path=self.path)

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = 2**31 - 1) -> int:
        """A whole number from least to most."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(key, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e30 < value < 1e30:
            raise self.wrong(key, "a number")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.number(key, default)
        if value <= 0:
            raise self.wrong(key, "a number above 0")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A text."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value
