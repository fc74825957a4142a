"""Importance matrices with fixed numbers, for tests that know what llama-imatrix makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llamakit.formats.imatrix import Entry, Imatrix
from llamakit.formats.imatrix_writer import write_imatrix, write_imatrix_dat


def entry(seed: int, n_in: int, *counts: int) -> Entry:
    """Sums from 0 to 25 in quarters, a row for each count."""
    i = np.arange(len(counts) * n_in) + seed
    sums = ((i * i * 37 + 11 * i) % 101 / 4).astype(np.float32).reshape(len(counts), n_in)
    return Entry(sums, np.array(counts, np.float32))


def write_three(directory: Path) -> list[Path]:
    """one.gguf and two.gguf with experts of which one saw nothing and an entry without data; old.dat without either."""
    nothing = Entry(np.zeros((1, 4), np.float32), np.zeros(1, np.float32))
    first = {"a": entry(0, 6, 32), "experts": entry(3, 4, 16, 0, 5), "none": nothing}
    second = {"a": entry(5, 6, 9), "experts": entry(1, 4, 7, 0, 8), "b": entry(2, 3, 8)}
    paths = [directory / name for name in ("one.gguf", "two.gguf", "old.dat")]
    write_imatrix(paths[0], Imatrix(first, ("one.txt",), 4, 8))
    write_imatrix(paths[1], Imatrix(second, ("two.txt",), 1, 8))
    write_imatrix_dat(paths[2], Imatrix({"a": entry(9, 6, 24), "c": entry(4, 3, 20)}, ("old.txt",), 3, 8))
    return paths
