"""safetensors: a strict reader, and a writer that streams.

A file is a u64 length, a JSON header of that many bytes, and the tensors' data without a gap. What is accepted here,
the `safetensors` library (0.8) accepts. Differences, all towards refusing: no name stands in the header twice, the
header starts with "{", and an entry is an object. Format: the safetensors repository's README.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from llamakit.errors import FormatError, UnsupportedError
from llamakit.files import atomic_path, escape_control
from llamakit.formats.base import TensorData, TensorInfo, read_back
from llamakit.formats.source import FileSource
from llamakit.formats.strict_json import parse_object
from llamakit.ggml import GGMLType

_MAX_HEADER_BYTES = 100_000_000
_MAX_SIZE = 2**64
#: dtype -> bits of an element, in the order of the library, which writes wide ones first
_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
_TYPES = {t.name: t for t in GGMLType if t.name in _BITS}
_RANK = {dtype: rank for rank, dtype in enumerate(_BITS)}
_WRITTEN = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)


class SafetensorsFile:
    """An opened safetensors file, its tensors under their own names.

    tensors: in the order of their data; other_dtypes: name -> dtype of those whose type GGUF does not have (U8, F8_E4M3
    and the like), which cannot be read. metadata: the header's own notes.
    Raises UsageError when the path is no readable regular file, FormatError for anything that is not sound.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._source = FileSource(path)
        self.path: Path = self._source.path
        try:
            header, self._data_start = self._header()
            metadata = header.pop("__metadata__", None) or {}
            if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
                raise self._error("__metadata__ is not a list of names and texts")
            self.metadata: Mapping[str, str] = MappingProxyType(metadata)
            self._place(header)
        except BaseException:
            self._source.close()
            raise

    def _error(self, reason: str, offset: int = 8) -> FormatError:
        return FormatError(f"broken safetensors file: {reason}", path=self.path, offset=offset)

    def _header(self) -> tuple[dict[str, Any], int]:
        size = self._source.size
        if size < 8:
            raise self._error(f"no room for a header (expected at least 8 bytes, got {size})", 0)
        (n_bytes,) = struct.unpack("<Q", self._source.read(0, 8).tobytes())
        if n_bytes > min(size - 8, _MAX_HEADER_BYTES):
            raise self._error(f"a header of {n_bytes} bytes (expected at most {min(size - 8, _MAX_HEADER_BYTES)})", 0)
        raw = self._source.read(8, n_bytes).tobytes()
        if raw[:1] != b"{":
            raise self._error('the header does not start with "{"')
        return parse_object(raw, self.path, "the header"), 8 + n_bytes

    def _place(self, header: Mapping[str, Any]) -> None:
        """Every entry checked, in the order of the data, which must be covered without a gap."""
        entries = [(self._entry(name, entry), name) for name, entry in header.items()]
        entries.sort(key=lambda e: e[0][2])
        tensors: dict[str, TensorInfo] = {}
        others: dict[str, str] = {}
        end = 0
        for (dtype, shape, (start, stop)), name in entries:
            if start != end:
                raise self._error(f"the data of {_shown(name)} starts at {start} (expected {end})")
            end = stop
            if dtype in _TYPES:
                tensors[name] = TensorInfo(name, shape, _TYPES[dtype], self._data_start + start)
            else:
                others[name] = dtype
        there = self._source.size - self._data_start
        if end != there:
            raise FormatError(
                f"safetensors file of the wrong size (expected {self._data_start + end} bytes, "
                f"got {self._source.size})",
                path=self.path,
                hint="it was cut off while it was copied or downloaded; get it again" if end > there else None,
            )
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self.other_dtypes: Mapping[str, str] = MappingProxyType(others)

    def _entry(self, name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
        """(dtype, shape, (start, stop)) of one tensor, with everything held against everything else."""
        if not isinstance(entry, dict):
            raise self._error(f"the entry of {_shown(name)} is no object")
        dtype, shape, offsets = entry.get("dtype"), _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise self._error(f"{_shown(name)} has the unknown dtype {_shown(dtype)}")
        if shape is None or offsets is None or len(offsets) != 2:
            raise self._error(f"shape or data_offsets of {_shown(name)} are no lists of whole numbers")
        bits = _BITS[dtype]
        for n in shape:
            bits *= n
            if bits // _BITS[dtype] >= _MAX_SIZE:
                raise self._error(f"{_shown(name)} has the impossible shape {shape[:8]}")
        if bits != 8 * (offsets[1] - offsets[0]):
            raise self._error(
                f"{_shown(name)} of dtype {dtype} and shape {shape[:8]} has {offsets[1] - offsets[0]} bytes "
                f"(expected {bits / 8:g})"
            )
        return dtype, tuple(shape), (offsets[0], offsets[1])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) as a fresh, writable uint8 array (rows, row_bytes).

        Raises KeyError for an unknown name, UnsupportedError for a dtype that GGUF does not have, ValueError for rows
        that are not there, FormatError when the file is shorter than it was when opened.
        """
        if name in self.other_dtypes:
            raise UnsupportedError(
                f"tensor {escape_control(name)} has dtype {self.other_dtypes[name]}, which is not supported",
                path=self.path,
            )
        info = self.tensors[name]
        start, stop = info.row_range(start, stop)
        data = self._source.read(info.offset + start * info.row_bytes, (stop - start) * info.row_bytes)
        return data.reshape(stop - start, info.row_bytes)

    def close(self) -> None:
        """Close the file; `read` fails afterwards."""
        self._source.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _sizes(values: Any) -> list[int] | None:
    """A list of JSON integers that fit into 64 bits (no bool, which Python takes for one); None for anything else."""
    fine = isinstance(values, list) and all(type(v) is int and 0 <= v < _MAX_SIZE for v in values)
    return values if fine else None


def _shown(value: Any) -> str:
    """A name from the file as it may be printed."""
    return escape_control(repr(value)[:100])


def write_safetensors(
    path: str | os.PathLike[str], *, tensors: Iterable[TensorData], metadata: Mapping[str, str] | None = None
) -> None:
    """Write F32, F16 and BF16 tensors, whole or not at all, under their own names.

    The same bytes as `safetensors` writes: wide types first, then by name; the header padded to 8 bytes. Memory holds
    one piece of one tensor. metadata: the header's notes, in this order (the library's order is random).

    Raises SaveError when the disk refuses; ValueError for another type, a name given twice, or data of another size.
    """
    ordered = sorted(tensors, key=lambda t: (-_rank(t), t.name))
    header = _packed_header(ordered, metadata)

    def check(temporary: Path) -> None:
        with read_back(SafetensorsFile, temporary) as file:
            names = list(file.tensors)
        if sorted(names) != sorted(t.name for t in ordered):
            raise OSError(errno.EIO, "the file reads back with other names than were written")

    with atomic_path(path, check) as temporary, open(temporary, "wb") as out:
        out.write(header)
        for tensor in ordered:
            written = 0
            for part in tensor_parts(tensor):
                out.write(part.data)
                written += part.nbytes
            if written != _n_bytes(tensor):
                raise ValueError(f"tensor '{tensor.name}' needs {_n_bytes(tensor)} bytes, {written} were given")


def tensor_parts(tensor: TensorData) -> Iterator[np.ndarray]:
    """The packed bytes of a tensor, piece by piece, each a flat uint8 array."""
    data = tensor.data() if callable(tensor.data) else tensor.data
    for part in [data] if isinstance(data, np.ndarray) else data:
        yield np.ascontiguousarray(part).reshape(-1).view(np.uint8)


def _rank(tensor: TensorData) -> int:
    if tensor.type not in _WRITTEN:
        raise ValueError(f"tensor '{tensor.name}' is {tensor.type.name} (expected F32, F16 or BF16)")
    return _RANK[tensor.type.name]


def _n_bytes(tensor: TensorData) -> int:
    return prod(tensor.shape) * _BITS[tensor.type.name] // 8


def _packed_header(tensors: Sequence[TensorData], metadata: Mapping[str, str] | None) -> bytes:
    """The length and the header, padded with spaces so that the data starts at a multiple of 8."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in tensors:
        if tensor.name in entries:
            raise ValueError(f"two tensors have the name '{tensor.name}'")
        end = offset + _n_bytes(tensor)
        shape = [int(n) for n in tensor.shape]
        entries[tensor.name] = {"dtype": tensor.type.name, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw
