"""The strict GGUF reader (versions 2 and 3, little-endian): what it accepts, llama.cpp accepts.

Every count and length is held against the bytes that are left before anything is allocated or looped over, so
the work and the memory are bounded by the header, whatever it claims. Tensor data is not touched until it is
asked for.

Differences from llama.cpp's own reader, all towards refusing: keys are UTF-8 and at most 64 KiB, one string
at most 16 MiB, alignment at most 1 MiB, the header at most 64 MiB. A bool other than 0 and 1 is read as true,
as there. Layout: the GGUF specification (ggml/docs/gguf.md).
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np

from llamakit.errors import FormatError, UnsupportedError
from llamakit.files import escape_control
from llamakit.formats.base import TensorInfo
from llamakit.formats.gguf_values import SCALAR_DTYPES, GGUFValueType, StringArray, ValueType
from llamakit.formats.source import FileSource
from llamakit.ggml import BLOCK_SIZES, GGMLType

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_NAME_BYTES = 63  # ggml keeps names in 64 bytes, the last one a NUL
MAX_DIMS = 4

_MAX_KEY_BYTES = 1 << 16
_MAX_STRING_BYTES = 1 << 24
_MAX_ALIGNMENT = 1 << 20
_MAX_HEADER_BYTES = 1 << 26
_MIN_KV_BYTES = 8 + 1 + 4 + 1  # length, one byte of key, type, one byte of value
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8  # length of an empty name, no dims, type, offset
_CHUNK_BYTES = 1 << 20

_REMOVED_TYPES = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip


class _Cursor:
    """Walks over the header of a file, reading it in chunks; every error names the position."""

    def __init__(self, source: FileSource) -> None:
        self.path = source.path
        self._source = source
        self._limit = min(source.size, _MAX_HEADER_BYTES)
        self._data = b""
        self.position = 0

    @property
    def remaining(self) -> int:
        """Bytes from here to the end of the file."""
        return self._source.size - self.position

    def error(self, reason: str, *, at: int | None = None, hint: str | None = None) -> FormatError:
        """A FormatError at a position (by default, here)."""
        offset = self.position if at is None else at
        return FormatError(reason, path=self._source.path, offset=offset, hint=hint)

    def _fill(self, end: int) -> None:
        have = len(self._data)
        # Doubling what is there keeps the copies of a large header linear.
        missing = max(end, min(have + max(have, _CHUNK_BYTES), self._limit)) - have
        self._data += self._source.read(have, missing).tobytes()

    def take(self, n: int, what: str) -> bytes:
        """The next n bytes; `what` names them in the error."""
        end = self.position + n
        if end > len(self._data):
            if n > self.remaining:
                raise self.error(f"truncated {what} (expected {n} bytes, got {self.remaining})")
            if end > self._limit:
                raise self.error(f"the header is larger than {_MAX_HEADER_BYTES >> 20} MiB")
            self._fill(end)
        data = self._data[self.position : end]
        self.position = end
        return data

    def unpack(self, layout: struct.Struct, what: str) -> Any:
        """The next scalar."""
        return layout.unpack(self.take(layout.size, what))[0]

    def count(self, what: str, least_bytes: int) -> int:
        """A u64 number of things of at least `least_bytes` each, which must fit into the header."""
        at = self.position
        n = self.unpack(_U64, f"number of {what}")
        room = self._limit - self.position
        if n * least_bytes > room:
            raise self.error(
                f"{n} {what} cannot fit into the rest of the header "
                f"(expected at least {n * least_bytes} bytes, got {room})",
                at=at,
            )
        return n

    def string(self, what: str, limit: int = _MAX_STRING_BYTES) -> bytes:
        """A u64 length and as many bytes."""
        at = self.position
        n = self.unpack(_U64, f"length of {what}")
        if n > min(limit, self.remaining):
            if n > self.remaining:
                raise self.error(f"truncated {what} (expected {n} bytes, got {self.remaining})", at=at)
            raise self.error(f"{what} is too long (expected at most {limit} bytes, got {n})", at=at)
        return self.take(n, what)

    def strings(self, n: int, what: str) -> StringArray:
        """n strings in a row. The loop is plain Python, so it does nothing but find the ends."""
        begin, position, unpack = self.position, self.position, _U64.unpack_from
        data, ends = self._data, array("q")
        for _ in range(n):
            start = position + 8
            if start > len(data):
                data = self._need(start, position, what)
            position = start + unpack(data, position)[0]
            if position > len(data):
                data = self._need(position, start - 8, what)
            ends.append(position - begin)
        self.position = position
        return StringArray(data[begin:position], ends)

    def _need(self, end: int, at: int, what: str) -> bytes:
        if end > self._source.size:
            raise self.error(
                f"truncated {what} (expected {end - at} bytes, got {max(0, self._source.size - at)})", at=at
            )
        if end > self._limit:
            raise self.error(f"the header is larger than {_MAX_HEADER_BYTES >> 20} MiB", at=at)
        self._fill(end)
        return self._data


_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class GGUFFile:
    """A GGUF file, opened and checked; a `ModelFile`.

    metadata: key -> int, float, bool, str, numpy array (read-only) or StringArray; metadata_types: key -> its
    types.
    tensors: name -> TensorInfo, in the order of the file. version: 2 or 3. data_offset: where tensor data
    begins.
    alignment: of every tensor, in bytes. Strings that are no UTF-8 hold lone surrogates (see StringArray).
    part: open one part of a split file, too, as the file that it is (gguf_split.SplitGGUF opens them all as one).

    Raises UsageError when the path is no readable regular file, FormatError when the content is broken or
    hostile, UnsupportedError for sound files of another version or byte order, and for one part of several.
    """

    def __init__(self, path: str | os.PathLike[str], *, part: bool = False) -> None:
        self._source = FileSource(path)
        self.path = self._source.path
        try:
            cursor = _Cursor(self._source)
            self.version, n_tensors, n_kv = _read_head(cursor)
            metadata, types = _read_metadata(cursor, n_kv)
            self._metadata, self._types = MappingProxyType(metadata), MappingProxyType(types)
            self.alignment = _alignment(cursor, metadata, types)
            if not part:
                _refuse_part(self._source, metadata)
            tensors, self.data_offset = _read_tensors(cursor, n_tensors, self.alignment)
            self._tensors = MappingProxyType(tensors)
        except BaseException:
            self._source.close()
            raise

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Values under their keys, in the order of the file."""
        return self._metadata

    @property
    def metadata_types(self) -> Mapping[str, ValueType]:
        """Key -> (type, element type or None), as stored."""
        return self._types

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """In the order of the file."""
        return self._tensors

    @property
    def n_bytes(self) -> int:
        """Size of the file when it was opened."""
        return self._source.size

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Packed rows [start, stop) as a fresh, writable uint8 array (rows, row_bytes).

        Raises KeyError for an unknown name, ValueError for rows that are not there, FormatError when the file
        is shorter than it was when opened.
        """
        info = self._tensors[name]
        start, stop = info.row_range(start, stop)
        n_bytes = info.row_bytes
        data = self._source.read(info.offset + start * n_bytes, (stop - start) * n_bytes)
        return data.reshape(stop - start, n_bytes)

    def close(self) -> None:
        """Close the file; `read` fails afterwards, metadata and tensor table stay."""
        self._source.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_head(cursor: _Cursor) -> tuple[int, int, int]:
    """Magic, version and the two counts -> (version, n_tensors, n_kv)."""
    if cursor.remaining < 24:
        raise cursor.error(f"truncated header (expected 24 bytes, got {cursor.remaining})")
    magic = cursor.take(4, "magic")
    if magic != MAGIC:
        raise cursor.error(f"is not a GGUF file (expected magic {MAGIC!r}, got {magic!r})", at=0)
    version = cursor.unpack(_U32, "version")
    if version & 0xFFFF == 0 and version:
        raise UnsupportedError("is a big-endian GGUF file, only little-endian ones are supported", path=cursor.path)
    if version == 1:
        raise UnsupportedError(
            "is a GGUF file of version 1, which is no longer supported (expected 2 or 3)",
            path=cursor.path,
            hint="convert the original model again, or get a newer file",
        )
    if version not in (2, 3):
        raise UnsupportedError(f"has an unknown GGUF version (expected 2 or 3, got {version})", path=cursor.path)
    at = cursor.position
    n_tensors, n_kv = cursor.unpack(_U64, "number of tensors"), cursor.unpack(_U64, "number of metadata keys")
    least = n_tensors * _MIN_TENSOR_BYTES + n_kv * _MIN_KV_BYTES
    if least > cursor.remaining:
        raise cursor.error(
            f"{n_tensors} tensors and {n_kv} metadata keys cannot fit into the file "
            f"(expected at least {least} bytes, got {cursor.remaining})",
            at=at,
        )
    return version, n_tensors, n_kv


def _text(cursor: _Cursor, what: str, limit: int) -> str:
    """A key or a name: UTF-8, without NUL."""
    at = cursor.position
    raw = cursor.string(what, limit)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        shown = escape_control(raw[:64].decode("utf-8", "backslashreplace"))
        raise cursor.error(f"{what} '{shown}' is not UTF-8", at=at) from error
    if "\0" in text:
        raise cursor.error(f"{what} '{escape_control(text[:64])}' contains a NUL character", at=at)
    return text


def _read_metadata(cursor: _Cursor, n_kv: int) -> tuple[dict[str, Any], dict[str, ValueType]]:
    metadata: dict[str, Any] = {}
    types: dict[str, ValueType] = {}
    for _ in range(n_kv):
        at = cursor.position
        key = _text(cursor, "metadata key", _MAX_KEY_BYTES)
        if not key:
            raise cursor.error("empty metadata key", at=at)
        if key in metadata:
            raise cursor.error(f"duplicate metadata key '{escape_control(key)}'", at=at)
        metadata[key], types[key] = _read_value(cursor, f"value of '{escape_control(key)}'")
    return metadata, types


def _value_type(cursor: _Cursor, what: str) -> GGUFValueType:
    at = cursor.position
    number = cursor.unpack(_U32, f"type of {what}")
    try:
        return GGUFValueType(number)
    except ValueError as error:
        raise cursor.error(f"{what} has an unknown type (expected 0 to 12, got {number})", at=at) from error


def _read_value(cursor: _Cursor, what: str) -> tuple[Any, ValueType]:
    kind = _value_type(cursor, what)
    if kind is GGUFValueType.STRING:
        return cursor.string(what).decode("utf-8", "surrogateescape"), (kind, None)
    if kind is GGUFValueType.ARRAY:
        return _read_array(cursor, what)
    dtype = SCALAR_DTYPES[kind]
    value = np.frombuffer(cursor.take(dtype.itemsize, what), dtype)[0].item()
    return bool(value) if kind is GGUFValueType.BOOL else value, (kind, None)


def _read_array(cursor: _Cursor, what: str) -> tuple[Any, ValueType]:
    at = cursor.position
    element = _value_type(cursor, f"elements of {what}")
    if element is GGUFValueType.ARRAY:
        raise cursor.error(f"{what} is an array of arrays", at=at)
    if element is GGUFValueType.STRING:
        n = cursor.count(f"elements of {what}", 8)
        return cursor.strings(n, what), (GGUFValueType.ARRAY, element)
    dtype = SCALAR_DTYPES[element]
    n = cursor.count(f"elements of {what}", dtype.itemsize)
    values = np.frombuffer(cursor.take(n * dtype.itemsize, what), dtype)
    return values != 0 if element is GGUFValueType.BOOL else values, (GGUFValueType.ARRAY, element)


def _alignment(cursor: _Cursor, metadata: Mapping[str, Any], types: Mapping[str, ValueType]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    kind = types.get("general.alignment", (GGUFValueType.UINT32, None))[0]
    if kind is not GGUFValueType.UINT32:
        raise cursor.error(f"general.alignment has the wrong type (expected UINT32, got {kind.name})")
    if value == 0 or value & (value - 1) or value > _MAX_ALIGNMENT:
        raise cursor.error(f"general.alignment must be a power of two up to {_MAX_ALIGNMENT} (got {value})")
    return value


def _refuse_part(source: FileSource, metadata: Mapping[str, Any]) -> None:
    count = metadata.get("split.count", 0)
    if isinstance(count, int) and count > 1:
        raise UnsupportedError(
            f"is one of {count} parts of a split GGUF file, a whole one is needed here",
            path=source.path,
            hint="join them with: llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf",
        )


def _read_tensors(cursor: _Cursor, n_tensors: int, alignment: int) -> tuple[dict[str, TensorInfo], int]:
    """The tensor table, and where the data begins."""
    found: list[tuple[TensorInfo, int]] = []
    names: set[str] = set()
    end = 0
    for _ in range(n_tensors):
        at = cursor.position
        info = _read_tensor(cursor)
        if info.name in names:
            raise cursor.error(f"duplicate tensor '{escape_control(info.name)}'", at=at)
        names.add(info.name)
        if info.offset != end:
            raise cursor.error(
                f"tensor '{escape_control(info.name)}' does not follow the one before it "
                f"(expected data offset {end}, got {info.offset})",
                at=at,
            )
        end += _padded(info.n_bytes, alignment)
        found.append((info, at))
    base = _padded(cursor.position, alignment)
    tensors = {i.name: TensorInfo(i.name, i.shape, i.type, base + i.offset) for i, _ in found}
    _check_data_ends(cursor, tensors, found)
    return tensors, base


def _check_data_ends(
    cursor: _Cursor, tensors: Mapping[str, TensorInfo], found: Sequence[tuple[TensorInfo, int]]
) -> None:
    size = cursor.position + cursor.remaining
    for relative, at in found:
        info = tensors[relative.name]
        if info.n_bytes and info.offset + info.n_bytes > size:
            end = info.offset + info.n_bytes
            raise cursor.error(
                f"tensor '{escape_control(info.name)}' needs bytes {info.offset}..{end}, the file has {size}",
                at=at,
                hint="the file was cut off (a download that did not finish?); get it again",
            )


def _read_tensor(cursor: _Cursor) -> TensorInfo:
    """One entry of the table; its offset is still relative to the start of the data."""
    name = _text(cursor, "tensor name", MAX_NAME_BYTES)
    shown, at = escape_control(name), cursor.position
    n_dims = cursor.unpack(_U32, f"dimensions of tensor '{shown}'")
    if n_dims > MAX_DIMS:
        raise cursor.error(f"tensor '{shown}' has too many dimensions (expected at most 4, got {n_dims})", at=at)
    dims = struct.unpack(f"<{n_dims}q", cursor.take(8 * n_dims, f"dimensions of tensor '{shown}'"))
    if any(d < 0 for d in dims):
        raise cursor.error(f"tensor '{shown}' has a negative dimension ({min(dims)})", at=at)
    if prod(d for d in dims if d) >= 1 << 63:
        raise cursor.error(f"tensor '{shown}' is too large (dimensions {list(dims)})", at=at)
    kind = _tensor_type(cursor, shown)
    row, block = dims[0] if dims else 1, BLOCK_SIZES[kind][0]
    if row % block:
        raise cursor.error(
            f"tensor '{shown}' has rows that are no whole blocks of {kind.name} "
            f"(expected a multiple of {block}, got {row})",
            at=at,
        )
    offset = cursor.unpack(_U64, f"offset of tensor '{shown}'")
    return TensorInfo(name, tuple(reversed(dims)), kind, offset)


def _tensor_type(cursor: _Cursor, shown: str) -> GGMLType:
    at = cursor.position
    number = cursor.unpack(_U32, f"type of tensor '{shown}'")
    try:
        return GGMLType(number)
    except ValueError as error:
        removed = _REMOVED_TYPES.get(number)
        kind = f"the type {removed}, which was removed from GGML" if removed else f"an unknown type ({number})"
        raise cursor.error(f"tensor '{shown}' has {kind}", at=at) from error


def _padded(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment
