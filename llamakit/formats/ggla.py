"""The old LoRA adapter format `ggla` (llama.cpp before 2024-03; finetune's `.bin` files), read only.

u32 magic, u32 version 1, i32 r, i32 alpha; then until the end of the file: u32 n_dims, u32 name_len, u32 type
(0 F32, 1 F16), u32 ne[n_dims], the name, zeros to the next multiple of 32 of the file offset, the data.
Source: examples/finetune/finetune.cpp (save_as_llama_lora) and llama.cpp's reader of that time.
"""

from __future__ import annotations

import os
import struct
from math import prod
from pathlib import Path

import numpy as np

from llamakit.errors import FormatError, UnsupportedError
from llamakit.files import escape_control
from llamakit.formats.source import FileSource

MAGIC = struct.pack("<I", 0x67676C61)
_ALIGNMENT = 32
_MAX_NAME_BYTES = 63 + len(".loraA")
_DTYPES = {0: np.dtype("<f4"), 1: np.dtype("<f2")}
_SUFFIXES = (".loraA", ".loraB")


def read_ggla(path: str | os.PathLike[str]) -> tuple[int, float, dict[str, np.ndarray]]:
    """(rank, alpha, name -> float32 matrix as stored), names ending .loraA (n_in, r) or .loraB (n_out, r).

    Raises UsageError when the path cannot be read, UnsupportedError for another version, FormatError
    otherwise.
    """
    with FileSource(path) as source:
        if source.size < 16:
            raise FormatError(f"truncated header (expected 16 bytes, got {source.size})", path=path, offset=0)
        magic, version, rank, alpha = struct.unpack("<4sIii", source.read(0, 16).tobytes())
        if magic != MAGIC:
            raise FormatError(f"is no ggla adapter (expected magic {MAGIC!r}, got {magic!r})", path=path, offset=0)
        if version != 1:
            raise UnsupportedError(f"has an unknown ggla version (expected 1, got {version})", path=path, offset=4)
        if not 1 <= rank <= 1 << 16 or alpha < 1:
            raise FormatError(f"impossible rank {rank} or alpha {alpha}", path=path, offset=8)
        tensors: dict[str, np.ndarray] = {}
        position = 16
        while position < source.size:
            name, matrix, end = _read_tensor(source, position)
            if name in tensors:
                raise FormatError(f"duplicate tensor '{escape_control(name)}'", path=path, offset=position)
            tensors[name], position = matrix, end
    return rank, float(alpha), tensors


def _read_tensor(source: FileSource, position: int) -> tuple[str, np.ndarray, int]:
    """The tensor at a position -> (name, float32 (rows, n), position after it)."""

    def fail(reason: str) -> FormatError:
        return FormatError(reason, path=source.path, offset=position)

    n_dims, name_bytes, kind = struct.unpack("<3I", _take(source, position, 12, "tensor header"))
    if n_dims not in (1, 2):
        raise fail(f"a tensor has {n_dims} dimensions (expected 1 or 2)")
    if not 1 <= name_bytes <= _MAX_NAME_BYTES:
        raise fail(f"a tensor name has {name_bytes} bytes (expected 1 to {_MAX_NAME_BYTES})")
    if kind not in _DTYPES:
        raise fail(f"a tensor has the type {kind} (expected 0, F32, or 1, F16)")
    at = position + 12
    ne = struct.unpack(f"<{n_dims}I", _take(source, at, 4 * n_dims, "tensor dimensions"))
    name = _name(source.path, _take(source, at + 4 * n_dims, name_bytes, "tensor name"), position)
    at += 4 * n_dims + name_bytes
    at += -at % _ALIGNMENT
    n_bytes = prod(ne) * _DTYPES[kind].itemsize
    if not n_bytes or at + n_bytes > source.size:
        raise fail(f"tensor '{escape_control(name)}' needs bytes {at}..{at + n_bytes}, the file has {source.size}")
    shape = (ne[1], ne[0]) if n_dims == 2 else (1, ne[0])
    matrix = source.read(at, n_bytes).view(_DTYPES[kind]).astype(np.float32).reshape(shape)
    return name, matrix, at + n_bytes


def _take(source: FileSource, position: int, n: int, what: str) -> bytes:
    if position + n > source.size:
        raise FormatError(
            f"truncated {what} (expected {n} bytes, got {source.size - position})",
            path=source.path,
            offset=position,
        )
    return source.read(position, n).tobytes()


def _name(path: Path, raw: bytes, position: int) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        shown = escape_control(raw.decode("utf-8", "backslashreplace"))
        raise FormatError(f"tensor name '{shown}' is not UTF-8", path=path, offset=position) from error
    if not name.endswith(_SUFFIXES):
        raise FormatError(
            f"tensor '{escape_control(name)}' has an unexpected suffix (expected .loraA or .loraB)",
            path=path,
            offset=position,
        )
    return name
