"""Writes importance matrices as llama-imatrix does: GGUF, or the older .dat.

Layouts: see `formats.imatrix`. Entries are sorted by their names, and an entry of one matrix is a vector, as in ggml,
which drops outer axes of size 1. Source: llama.cpp of 2026, tools/imatrix/imatrix.cpp.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from llamakit.errors import UnsupportedError
from llamakit.files import atomic_path, escape_control
from llamakit.formats.base import TensorData
from llamakit.formats.gguf_reader import MAX_NAME_BYTES
from llamakit.formats.gguf_writer import write_gguf
from llamakit.formats.imatrix import CHUNK_COUNT, CHUNK_SIZE, COUNTS, DATASETS, SUMS, Imatrix
from llamakit.ggml import GGMLType


def write_imatrix(path: str | os.PathLike[str], imatrix: Imatrix) -> None:
    """Write the GGUF form: sums and counts as they are.

    Raises SaveError when the disk refuses, UnsupportedError for a name that no GGUF file can hold.
    """
    metadata = {
        "general.type": "imatrix",
        DATASETS: list(imatrix.datasets),
        CHUNK_COUNT: imatrix.chunk_count,
        CHUNK_SIZE: imatrix.chunk_size,
    }
    write_gguf(path, metadata=metadata, tensors=_tensors(path, imatrix))


def _names(imatrix: Imatrix) -> list[str]:
    return sorted(imatrix.entries, key=lambda name: name.encode("utf-8", "surrogateescape"))


def _tensors(path: str | os.PathLike[str], imatrix: Imatrix) -> Iterator[TensorData]:
    for name in _names(imatrix):
        raw = name.encode("utf-8", "surrogateescape")
        if len(raw) + len(SUMS) > MAX_NAME_BYTES or not name.isprintable():
            raise UnsupportedError(f"cannot hold an entry of the name {escape_control(name[:80])}", path=path)
        sums, counts = imatrix.entries[name]
        one = len(counts) == 1
        yield _tensor(name + SUMS, sums.reshape(-1) if one else sums)
        yield _tensor(name + COUNTS, counts if one else counts.reshape(-1, 1))


def _tensor(name: str, values: np.ndarray) -> TensorData:
    return TensorData(name, values.shape, GGMLType.F32, values.astype("<f4"))


def write_imatrix_dat(path: str | os.PathLike[str], imatrix: Imatrix) -> None:
    """Write the .dat form: mean squares times chunks; entries without data are left out, experts without any are 1.

    Only the last of the datasets has a place in it. Raises SaveError when the disk refuses, ValueError where
    chunk_size is unknown.
    """
    if imatrix.chunk_size < 1 or imatrix.legacy:
        raise ValueError("counts of rows and the size of a chunk are needed")
    names = [name for name in _names(imatrix) if imatrix.entries[name].counts.any()]
    with atomic_path(path) as temporary, open(temporary, "wb") as out:
        out.write(struct.pack("<i", len(names)))
        for name in names:
            sums, counts = imatrix.entries[name]
            n_calls = -(-int(counts.max()) // imatrix.chunk_size)
            _write_text(out, name)
            out.write(struct.pack("<2i", n_calls, sums.size))
            scaled = imatrix.weights(name) * np.float32(n_calls)
            out.write(scaled.astype("<f4").tobytes())
        out.write(struct.pack("<i", imatrix.chunk_count))
        _write_text(out, imatrix.datasets[-1] if imatrix.datasets else "")


def _write_text(out: BinaryIO, text: str) -> None:
    raw = text.encode("utf-8", "surrogateescape")
    out.write(struct.pack("<i", len(raw)) + raw)
