"""Importance matrices: how much an error in each column of a matrix matters, as llama-imatrix measures it.

Two formats: GGUF with a tensor NAME.in_sum2 (sums of squares of the inputs, a row for each expert) and one NAME.counts
for each matrix, and the older .dat. Facts: llama.cpp of 2026, common/imatrix-loader.cpp, tools/quantize/quantize.cpp.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from llamakit.errors import FormatError
from llamakit.files import escape_control
from llamakit.formats.gguf_reader import MAGIC, GGUFFile
from llamakit.formats.source import FileSource
from llamakit.ggml import GGMLType

_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNK_COUNT, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_F32 = np.dtype("<f4")


class Entry(NamedTuple):
    """Of one matrix: sums, float32 (n_mat, n_in); counts, float32 (n_mat,), of what was summed."""

    sums: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Imatrix:
    """entries: tensor name -> Entry; datasets: names of the texts; chunk_count chunks of chunk_size tokens, 0 where the
    file does not say. legacy: from a .dat."""

    entries: Mapping[str, Entry]
    datasets: Sequence[str]
    chunk_count: int
    chunk_size: int
    legacy: bool = False

    def weights(self, name: str) -> np.ndarray:
        """The importances of a tensor's columns as llama-quantize takes them: float32 (n_mat, n_in).

        The mean; 1 for an expert that was never asked. In a .dat without a count, the sums as they are.
        """
        sums, counts = self.entries[name]
        missing = sums if self.legacy else np.float32(1)
        asked = counts[:, None] > 0
        return np.where(asked, sums / np.where(asked, counts[:, None], np.float32(1)), missing).astype(np.float32)


def read_imatrix(path: str | os.PathLike[str]) -> Imatrix:
    """Read an importance matrix, GGUF or .dat, whole.

    Raises UsageError when it cannot be opened, FormatError when it is broken or none.
    """
    with FileSource(path) as source:
        if source.size < len(MAGIC) or source.read(0, len(MAGIC)).tobytes() != MAGIC:
            return _Dat(source).read()
    with GGUFFile(path) as file:
        return _read_gguf(file)


def _read_gguf(file: GGUFFile) -> Imatrix:
    missing = [key for key in (_DATASETS, _CHUNK_COUNT, _CHUNK_SIZE) if key not in file.metadata]
    if missing:
        raise FormatError(f"is no importance matrix ({missing[0]} is missing)", path=file.path)
    names = [name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)]
    counted = [name.removesuffix(_COUNTS) for name in file.tensors if name.endswith(_COUNTS)]
    if set(names) != set(counted):
        odd = escape_control(min(set(names) ^ set(counted)))
        raise FormatError(f"has sums without counts, or counts without sums, of {odd}", path=file.path)
    if not names:
        raise FormatError("has no entries", path=file.path)
    datasets = file.metadata[_DATASETS]
    if isinstance(datasets, (str, np.ndarray)) or not isinstance(datasets, Sequence):
        datasets = ()
    entries = {name: _entry(file, name) for name in names}
    return Imatrix(entries, tuple(datasets), _natural(file, _CHUNK_COUNT), _natural(file, _CHUNK_SIZE))


def _natural(file: GGUFFile, key: str) -> int:
    value: Any = file.metadata[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise FormatError(f"{key} is no number of chunks or tokens", path=file.path)
    return value


def _entry(file: GGUFFile, name: str) -> Entry:
    for info in (file.tensors[name + _SUMS], file.tensors[name + _COUNTS]):
        if info.type is not GGMLType.F32:
            raise FormatError(f"{escape_control(info.name)} is {info.type.name} (expected F32)", path=file.path)
    sums, counts = (file.read(name + end).reshape(-1).view(_F32) for end in (_SUMS, _COUNTS))
    if not counts.size or not sums.size or sums.size % counts.size:
        shown = escape_control(name)
        raise FormatError(f"has {sums.size} sums and {counts.size} counts of {shown}", path=file.path)
    return Entry(sums.reshape(counts.size, -1), np.floor(counts + np.float32(0.5)).astype(np.float32))


class _Dat:
    """i32 entries; of each: i32 length, name, i32 calls, i32 values, float32 sums. Then, or not: i32 chunks, i32
    length, name of the text."""

    def __init__(self, source: FileSource) -> None:
        self._source, self._offset = source, 0

    def read(self) -> Imatrix:
        entries: dict[str, Entry] = {}
        n_entries = self._natural("number of entries", 1)
        for _ in range(n_entries):
            name = self._take(self._natural("length of a name")).tobytes().decode("utf-8", "surrogateescape")
            n_calls = self._int()
            sums = self._take(4 * self._natural("number of values", 1)).view(_F32)
            entries[name] = Entry(sums.reshape(1, -1), np.array([max(0, n_calls)], np.float32))
        chunks, datasets = 0, list[str]()
        if self._source.size - self._offset >= 8:
            chunks = max(0, self._int())
            text = self._take(self._natural("length of a name")).tobytes().decode("utf-8", "surrogateescape")
            datasets = [text] if text else []
        return Imatrix(entries, tuple(datasets), chunks, 0, legacy=True)

    def _take(self, n_bytes: int) -> np.ndarray:
        if n_bytes > self._source.size - self._offset:
            raise self._broken(f"ends too soon (expected {n_bytes} bytes, got {self._source.size - self._offset})")
        data = self._source.read(self._offset, n_bytes)
        self._offset += n_bytes
        return data

    def _int(self) -> int:
        return struct.unpack("<i", self._take(4).tobytes())[0]

    def _natural(self, what: str, least: int = 0) -> int:
        value = self._int()
        if value < least:
            raise self._broken(f"has {value} as the {what}")
        return value

    def _broken(self, reason: str) -> FormatError:
        return FormatError(f"is no importance matrix: {reason}", path=self._source.path, offset=self._offset)
