"""Writes GGUF (version 3, little-endian): a whole file or none.

llama.cpp accepts a file only when the tensors lie in the order of their table, each padded to the alignment,
without gaps; so that is what is written. The bytes depend on the arguments alone: no time, no path, no
version of a tool. Layout: the GGUF specification (ggml/docs/gguf.md).
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llamakit.files import atomic_path
from llamakit.formats.base import ModelFile, TensorData, TensorInfo, read_back
from llamakit.formats.gguf_reader import (
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMS,
    MAX_NAME_BYTES,
    GGUFFile,
)
from llamakit.formats.gguf_values import SCALAR_DTYPES, GGUFValueType, StringArray
from llamakit.ggml import BLOCK_SIZES, GGMLType

_VERSION = 3
_COPY_BYTES = 1 << 24
_TYPE_OF_DTYPE = {(d.kind, d.itemsize): t for t, d in SCALAR_DTYPES.items() if t is not GGUFValueType.BOOL}


@dataclass(frozen=True)
class Typed:
    """A metadata value with the exact type under which it is stored; element_type: where it is an array."""

    value: Any
    type: GGUFValueType
    element_type: GGUFValueType | None = None


def write_gguf(
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any],
    tensors: Iterable[TensorData],
    verify: Callable[[GGUFFile], None] | None = None,
) -> None:
    """Write a GGUF file: to a temporary name, flushed, read back by the strict reader, then renamed over
    `path`.

    metadata: key -> value, stored in this order. bool, str, int (stored as u32), float (f32), a list of str,
    a numpy array (its dtype), or `Typed`. "general.alignment" sets the alignment. tensors: in the order of
    the file.
    verify: called with the opened result before the rename; what it raises leaves `path` as it was.

    Raises SaveError when the disk refuses; ValueError or TypeError for arguments that no GGUF file can hold.
    """
    for _ in written_tensors(path, metadata=metadata, tensors=tensors, verify=verify):
        pass


def written_tensors(
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any],
    tensors: Iterable[TensorData],
    verify: Callable[[GGUFFile], None] | None = None,
) -> Iterator[TensorData]:
    """`write_gguf`, giving each tensor once it is written, for a caller who shows progress.

    The file is in its place when the iterator ends; an iterator that is given up leaves `path` as it was.
    """
    tensors = list(tensors)
    typed = {key: _typed(key, value) for key, value in metadata.items()}
    alignment = typed["general.alignment"].value if "general.alignment" in typed else DEFAULT_ALIGNMENT
    header = _header(typed, tensors, alignment)

    def check(temporary: Path) -> None:
        with read_back(partial(GGUFFile, part=True), temporary) as file:
            if list(file.tensors) != [t.name for t in tensors] or list(file.metadata) != list(metadata):
                raise OSError(errno.EIO, "the file reads back with other names than were written")
            if verify is not None:
                verify(file)

    with atomic_path(path, check) as temporary, open(temporary, "wb") as out:
        out.write(header)
        for tensor in tensors:
            _write_padded(out, tensor, alignment)
            yield tensor


def typed_metadata(file: ModelFile) -> dict[str, Any]:
    """The metadata of an opened file as `write_gguf` takes it; a GGUF file's values keep their types."""
    types = getattr(file, "metadata_types", {})
    return {key: Typed(value, *types[key]) if key in types else value for key, value in file.metadata.items()}


def copied_tensor(file: ModelFile, name: str) -> TensorData:
    """A tensor to be copied as it is, in slices of about 16 MiB."""
    info = file.tensors[name]
    return TensorData(name, info.shape, info.type, lambda: _slices(file, info))


def _slices(file: ModelFile, info: TensorInfo) -> Iterator[np.ndarray]:
    rows = max(1, _COPY_BYTES // max(1, info.row_bytes))
    for start in range(0, info.n_rows if info.n_bytes else 0, rows):
        yield file.read(info.name, start, min(start + rows, info.n_rows))


def _typed(key: str, value: Any) -> Typed:
    """A plain Python value under the type that llama.cpp expects of most keys."""
    if isinstance(value, Typed):
        return value
    if isinstance(value, (bool, np.bool_)):
        return Typed(bool(value), GGUFValueType.BOOL)
    if isinstance(value, int):
        return Typed(value, GGUFValueType.UINT32)
    if isinstance(value, float):
        return Typed(value, GGUFValueType.FLOAT32)
    if isinstance(value, str):
        return Typed(value, GGUFValueType.STRING)
    if isinstance(value, StringArray) or (isinstance(value, Sequence) and all(isinstance(v, str) for v in value)):
        return Typed(value, GGUFValueType.ARRAY, GGUFValueType.STRING)
    if isinstance(value, np.ndarray):
        bools = value.dtype == np.bool_
        element = GGUFValueType.BOOL if bools else _TYPE_OF_DTYPE.get((value.dtype.kind, value.dtype.itemsize))
        if element is not None:
            return Typed(value, GGUFValueType.ARRAY, element)
    raise TypeError(f"metadata '{key}': no GGUF type for {type(value).__name__}; say it with Typed")


def _pack_string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _pack_scalar(value: Any, kind: GGUFValueType) -> bytes:
    if kind is GGUFValueType.STRING:
        return _pack_string(value)
    if kind is GGUFValueType.BOOL:
        return bytes([bool(value)])
    dtype = SCALAR_DTYPES[kind]
    if dtype.kind != "f" and not np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
        raise ValueError(f"{value} does not fit into {kind.name}")
    return np.asarray(value, dtype).tobytes()


def _pack_array(value: Any, element: GGUFValueType) -> bytes:
    head = struct.pack("<IQ", element, len(value))
    if isinstance(value, StringArray):
        return head + value.packed
    if element is GGUFValueType.STRING:
        return head + b"".join(_pack_string(v) for v in value)
    if element is GGUFValueType.BOOL:
        return head + np.asarray(value, np.bool_).tobytes()
    return head + np.asarray(value).astype(SCALAR_DTYPES[element]).tobytes()


def _pack_entry(key: str, typed: Typed) -> bytes:
    if not key:
        raise ValueError("empty metadata key")
    head = _pack_string(key) + struct.pack("<I", typed.type)
    if typed.type is GGUFValueType.ARRAY:
        if typed.element_type in (None, GGUFValueType.ARRAY):
            raise ValueError(f"metadata '{key}': an array needs the type of its elements")
        return head + _pack_array(typed.value, GGUFValueType(typed.element_type))
    return head + _pack_scalar(typed.value, typed.type)


def _info(tensor: TensorData) -> TensorInfo:
    """Checks what the reader will check, while it is still our caller who hears of it."""
    raw, shape = tensor.name.encode("utf-8"), tuple(int(n) for n in tensor.shape)
    if not 0 < len(raw) <= MAX_NAME_BYTES:
        raise ValueError(f"tensor name '{tensor.name}' must have 1 to {MAX_NAME_BYTES} bytes")
    if len(shape) > MAX_DIMS or any(n < 0 for n in shape):
        raise ValueError(f"tensor '{tensor.name}' cannot have the shape {shape}")
    if (shape[-1] if shape else 1) % BLOCK_SIZES[tensor.type][0]:
        raise ValueError(f"tensor '{tensor.name}': rows of {shape} are no whole blocks of {tensor.type.name}")
    return TensorInfo(tensor.name, shape, GGMLType(tensor.type), 0)


def _header(metadata: Mapping[str, Typed], tensors: Sequence[TensorData], alignment: int) -> bytes:
    """Everything before the data, padded to the alignment where data follows, and in each part of a split."""
    if len({t.name for t in tensors}) != len(tensors):
        raise ValueError("two tensors have the same name")
    parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    parts += [_pack_entry(key, typed) for key, typed in metadata.items()]
    offset = 0
    for tensor in tensors:
        info = _info(tensor)
        ne = tuple(reversed(info.shape))
        parts += [_pack_string(info.name), struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, info.type, offset)]
        offset += info.n_bytes + -info.n_bytes % alignment
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment if tensors or "split.count" in metadata else 0)


def _write_padded(out: BinaryIO, tensor: TensorData, alignment: int) -> None:
    data = tensor.data() if callable(tensor.data) else tensor.data
    written = 0
    for part in [data] if isinstance(data, np.ndarray) else data:
        flat = np.ascontiguousarray(part)
        out.write(flat.reshape(-1).view(np.uint8).data)
        written += flat.nbytes
    if written != _info(tensor).n_bytes:
        raise ValueError(f"tensor '{tensor.name}' needs {_info(tensor).n_bytes} bytes, {written} were given")
    out.write(bytes(-written % alignment))
