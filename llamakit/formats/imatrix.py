"""Importance matrices: how much each column of a matrix matters, as llama-imatrix measures it.

GGUF: general.type "imatrix", and for each matrix a tensor NAME.in_sum2 (sums of squares of its inputs, a row for each
expert) and one NAME.counts (rows that were summed). The older .dat: i32 entries; of each: i32 length, name, i32 calls,
i32 values, float32 mean squares times calls; then, or not, i32 chunks, i32 length, name of the text.
Sources: llama.cpp of 2026, common/imatrix-loader.cpp, tools/imatrix/imatrix.cpp, tools/quantize/quantize.cpp.
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

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_F32 = np.dtype("<f4")
#: entries of a .dat; real models have some thousands of matrices at most
_MAX_ENTRIES = 1 << 16


class Entry(NamedTuple):
    """Of one matrix: sums, float32 (n_mat, n_in); counts, float32 (n_mat,), whole numbers of rows that were summed."""

    sums: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Imatrix:
    """entries: tensor name -> Entry; datasets: names of the texts; chunk_count chunks of chunk_size tokens, 0 where the
    file does not say. legacy: from a .dat, whose sums are mean squares times counts, and counts are chunks."""

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
        asked = counts[:, None] > 0
        missing = sums if self.legacy else np.float32(1)
        return np.where(asked, sums / np.where(asked, counts[:, None], np.float32(1)), missing).astype(np.float32)


def read_imatrix(path: str | os.PathLike[str]) -> Imatrix:
    """Read an importance matrix, GGUF or .dat by its content, whole.

    Raises UsageError when it cannot be opened, FormatError when it is broken or none.
    """
    with FileSource(path) as source:
        if source.size < len(MAGIC) or source.read(0, len(MAGIC)).tobytes() != MAGIC:
            return _Dat(source).read()
    with GGUFFile(path) as file:
        return _read_gguf(file)


def is_dat(source: FileSource) -> bool:
    """Whether a file is an importance matrix in the .dat form, to its last byte; its values are not looked at."""
    return _Dat(source).is_one()


def _read_gguf(file: GGUFFile) -> Imatrix:
    for key in (DATASETS, CHUNK_COUNT, CHUNK_SIZE):
        if key not in file.metadata:
            raise FormatError(f"is no importance matrix ({key} is missing)", path=file.path)
    names = [name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)]
    counted = {name.removesuffix(COUNTS) for name in file.tensors if name.endswith(COUNTS)}
    if set(names) != counted:
        odd = escape_control(min(set(names) ^ counted))
        raise FormatError(f"has sums without counts, or counts without sums, of {odd}", path=file.path)
    if not names:
        raise FormatError("has no entries", path=file.path)
    datasets = file.metadata[DATASETS]
    listed = isinstance(datasets, Sequence) and not isinstance(datasets, str)
    if not listed or not all(isinstance(name, str) for name in datasets):
        raise FormatError(f"{DATASETS} is no list of names", path=file.path)
    entries = {name: _entry(file, name) for name in names}
    return Imatrix(entries, tuple(datasets), _natural(file, CHUNK_COUNT), _natural(file, CHUNK_SIZE))


def _natural(file: GGUFFile, key: str) -> int:
    value: Any = file.metadata[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise FormatError(f"{key} is no number of chunks or tokens", path=file.path)
    return value


def _entry(file: GGUFFile, name: str) -> Entry:
    shown = escape_control(name)
    for info in (file.tensors[name + SUMS], file.tensors[name + COUNTS]):
        if info.type is not GGMLType.F32:
            raise FormatError(f"{escape_control(info.name)} is {info.type.name} (expected F32)", path=file.path)
    sums, counts = (file.read(name + end).reshape(-1).view(_F32) for end in (SUMS, COUNTS))
    if not counts.size or not sums.size or sums.size % counts.size:
        raise FormatError(f"has {sums.size} sums and {counts.size} counts of {shown}", path=file.path)
    _refuse_impossible(file, shown, sums, "sum")
    _refuse_impossible(file, shown, counts, "count")
    # float64: half of one has no place beside a float32 above 2^23
    whole = np.floor(counts.astype(np.float64) + 0.5).astype(np.float32)
    return Entry(sums.reshape(counts.size, -1), whole)


def _refuse_impossible(file: GGUFFile | FileSource, shown: str, values: np.ndarray, what: str) -> None:
    """Sums of squares and numbers of rows are finite, and not below zero."""
    wrong = ~(np.isfinite(values) & (values >= 0))
    if wrong.any():
        raise FormatError(f"has {values[wrong][0]} as a {what} of {shown}", path=file.path)


class _Dat:
    """Walks over a .dat; every error names the position."""

    def __init__(self, source: FileSource) -> None:
        self._source, self._offset = source, 0

    def read(self) -> Imatrix:
        """The whole file. The number of entries is bounded by the bytes that each takes."""
        entries: dict[str, Entry] = {}
        for _ in range(self._natural("number of entries", 1, _MAX_ENTRIES)):
            name = self._text()
            n_calls = self._natural("number of calls")
            sums = self._take(4 * self._natural("number of values", 1)).view(_F32)
            if name in entries:
                raise self._broken(f"has two entries of {escape_control(name)}")
            _refuse_impossible(self._source, escape_control(name), sums, "sum")
            entries[name] = Entry(sums.reshape(1, -1), np.array([n_calls], np.float32))
        if self._offset == self._source.size:
            return Imatrix(entries, (), 0, 0, legacy=True)
        chunks, text = self._natural("number of chunks"), self._text()
        return Imatrix(entries, (text,) if text else (), chunks, 0, legacy=True)

    def is_one(self) -> bool:
        """Whether the whole file is built like a .dat, names of visible ASCII, values unseen."""
        try:
            for _ in range(self._natural("number of entries", 1, _MAX_ENTRIES)):
                name = self._text()
                if not (name and name.isascii() and name.isprintable()):
                    return False
                self._natural("number of calls")
                self._skip(4 * self._natural("number of values", 1))
            if self._offset < self._source.size:
                self._natural("number of chunks")
                self._text()
        except FormatError:
            return False
        return self._offset == self._source.size

    def _take(self, n_bytes: int) -> np.ndarray:
        start = self._offset
        self._skip(n_bytes)
        return self._source.read(start, n_bytes)

    def _skip(self, n_bytes: int) -> None:
        if n_bytes > self._source.size - self._offset:
            raise self._broken(f"ends too soon (expected {n_bytes} bytes, got {self._source.size - self._offset})")
        self._offset += n_bytes

    def _text(self) -> str:
        return self._take(self._natural("length of a name")).tobytes().decode("utf-8", "surrogateescape")

    def _natural(self, what: str, least: int = 0, most: int = 2**31 - 1) -> int:
        value = struct.unpack("<i", self._take(4).tobytes())[0]
        if not least <= value <= most:
            raise self._broken(f"has {value} as the {what}")
        return value

    def _broken(self, reason: str) -> FormatError:
        return FormatError(f"is no importance matrix: {reason}", path=self._source.path, offset=self._offset)
