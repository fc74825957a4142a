"""The body of a request, field by field: what is missing, of another type or out of range is a 400 that says so."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from llamakit.errors import LlamakitError, MismatchError, UsageError

_LONGEST_SHOWN = 60
#: lists and objects inside of each other: what writes them again goes down a level with each
_DEEPEST = 100


class ApiError(Exception):
    """What a client gets instead of an answer. status: of HTTP; type, param, code: of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, message, type, param, code
        self.headers = dict(headers or {})


def api_error(error: LlamakitError) -> ApiError:
    """An error of the library as a client should see it: its own mistake is a 400, what failed here a 500."""
    message = f"{error}; {error.hint}" if error.hint else str(error)
    if isinstance(error, UsageError) and "the context holds" in error.reason:
        return ApiError(400, error.reason, param="messages", code="context_length_exceeded")
    if isinstance(error, MismatchError) or type(error) is LlamakitError:
        return ApiError(500, message, type="server_error")
    return ApiError(400, message)


class Body:
    """A JSON object. A field that is null counts as missing. at: where it stands in the whole, for messages."""

    def __init__(self, values: Mapping[str, Any], at: str = "") -> None:
        self.values, self._at = values, at

    @classmethod
    def parse(cls, data: bytes, *, list_name: str | None = None) -> Body:
        """Raises ApiError for what is no JSON object; JSON has no NaN and no infinity. list_name: a list is taken, too,
        as the field of this name."""
        try:
            value = json.loads(data, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise ApiError(400, f"the body is no JSON: {reason[:200]}") from error
        if list_name is not None and isinstance(value, list):
            value = {list_name: value}
        if not isinstance(value, dict):
            raise ApiError(400, f"the body is {_kind(value)} (expected an object)")
        if _is_deeper(value, _DEEPEST):
            raise ApiError(400, f"the body is nested too deeply (expected at most {_DEEPEST} levels)")
        return cls(value)

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def refuse(self, name: str, expected: str) -> NoReturn:
        """Raise for a field that is not as expected."""
        shown = json.dumps(self.values.get(name))
        shown = shown if len(shown) <= _LONGEST_SHOWN else _kind(self.values.get(name))
        raise ApiError(400, f"{self._at}{name} is {shown} (expected {expected})", param=self._at + name)

    def get(self, name: str) -> Any:
        """The value as it is, None where it is missing."""
        return self.values.get(name)

    def text(self, name: str, default: str = "") -> str:
        """A string without lone surrogates, which no encoding has."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            self.refuse(name, "a string")
        return well_formed(value)

    def needed_text(self, name: str) -> str:
        """A string that must be there."""
        if name not in self:
            raise ApiError(400, f"{self._at}{name} is missing (expected a string)", param=self._at + name)
        return self.text(name)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float | None:
        """A number from low to high."""
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            self.refuse(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        """A whole number from low to high; 3.0 is one."""
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, float) and math.isfinite(value) and value == int(value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(name, f"a whole number from {low} to {high}")
        return value

    def object(self, name: str) -> Body | None:
        """An object, None where it is missing."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(name, "an object")
        return Body(value, f"{self._at}{name}.")

    def objects(self, name: str, most: int) -> list[Body]:
        """A list of objects, empty where it is missing."""
        return [Body(item, f"{self._at}{name}[{i}].") for i, item in enumerate(self._items(name, most, dict))]

    def texts(self, name: str, most: int, longest: int) -> list[str]:
        """A string or a list of strings, each of one character or more."""
        if isinstance(self.values.get(name), str):
            texts: Sequence[str] = [self.values[name]]
        else:
            texts = self._items(name, most, str)
        if not all(1 <= len(text) <= longest for text in texts):
            self.refuse(name, f"strings of 1 to {longest} characters")
        return [well_formed(text) for text in texts]

    def _items(self, name: str, most: int, kind: type) -> list[Any]:
        value = self.values.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            self.refuse(name, f"a list of {'objects' if kind is dict else 'strings'}")
        if len(value) > most:
            raise ApiError(400, f"{self._at}{name} has {len(value)} items (expected at most {most})", param=name)
        return value


def well_formed(text: str) -> str:
    """The text with U+FFFD for lone surrogates."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number in JSON")


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects stand in each other on more than so many levels."""
    inner = [value]
    for _ in range(levels):
        inner = [
            item
            for one in inner
            for item in (one.values() if isinstance(one, dict) else one)
            if isinstance(item, dict | list)
        ]
        if not inner:
            return False
    return True


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
