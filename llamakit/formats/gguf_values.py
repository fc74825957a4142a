"""Metadata values of GGUF: their types, their dtypes, and arrays of strings that are decoded when asked
for."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from types import MappingProxyType
from typing import Any, overload

import numpy as np


class GGUFValueType(IntEnum):
    """Types of metadata values, numbered as in the GGUF specification."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


#: (type of the value, type of its elements where it is an array)
ValueType = tuple[GGUFValueType, GGUFValueType | None]

#: scalar types -> little-endian numpy dtype; bool is read as a byte
SCALAR_DTYPES: Mapping[GGUFValueType, np.dtype[Any]] = MappingProxyType(
    {
        GGUFValueType.UINT8: np.dtype("<u1"),
        GGUFValueType.INT8: np.dtype("<i1"),
        GGUFValueType.UINT16: np.dtype("<u2"),
        GGUFValueType.INT16: np.dtype("<i2"),
        GGUFValueType.UINT32: np.dtype("<u4"),
        GGUFValueType.INT32: np.dtype("<i4"),
        GGUFValueType.FLOAT32: np.dtype("<f4"),
        GGUFValueType.BOOL: np.dtype("<u1"),
        GGUFValueType.UINT64: np.dtype("<u8"),
        GGUFValueType.INT64: np.dtype("<i8"),
        GGUFValueType.FLOAT64: np.dtype("<f8"),
    }
)


class StringArray(Sequence[str]):
    """An array of strings, decoded only when asked for.

    packed: the elements as in the file, each a u64 length and its bytes; ends: where each of them ends in
    there. Bytes that are no UTF-8 (a few vocabularies hold such tokens) become lone surrogates
    ("surrogateescape"), so that encoding with the same error handler gives the bytes back.
    """

    __slots__ = ("_ends", "packed")

    def __init__(self, packed: bytes, ends: array[int]) -> None:
        self.packed, self._ends = packed, ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.raw(index).decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        start = 8
        for end in self._ends:
            yield self.packed[start:end].decode("utf-8", "surrogateescape")
            start = end + 8

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StringArray):
            return self.packed == other.packed
        return isinstance(other, (list, tuple)) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"StringArray({len(self)} strings)"

    def raw(self, index: int) -> bytes:
        """The bytes of one element, as in the file."""
        index = range(len(self))[index]
        return self.packed[self._ends[index - 1] + 8 if index else 8 : self._ends[index]]
