"""What an importance matrix says about the inputs of each matrix: the figures of llama-imatrix --show-statistics.

Of each entry the mean squares a_1..a_n of the columns: their sum, extremes, mean and standard deviation; the share
above 1e-5 ("active"); the entropy of a / sum(a) in bits, and its share of log2(n); ZD, the share of columns more than a
standard deviation above the mean (arXiv 2406.17415, section 3.1); the cosine of the angle to the same
matrix of the layer before. float32, added from first to last, as in llama.cpp of 2026, tools/imatrix/imatrix.cpp.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llamakit.formats.imatrix import Entry, Imatrix

_INACTIVE = np.float32(1e-5)
_LAYER = re.compile(r"(?:^|(?<=\.))blk\.([0-9]{1,9})\.")


@dataclass(frozen=True)
class TensorStatistics:
    """Of one entry. layer: None where its name has none; tensor: the name without layer and `.weight`.

    active, entropy_norm, zd: shares from 0 to 1; entropy in bits; cossim 0 where there is nothing to compare with.
    """

    layer: int | None
    tensor: str
    total: float
    min: float
    max: float
    mean: float
    stddev: float
    active: float
    n: int
    entropy: float
    entropy_norm: float
    zd: float
    cossim: float


@dataclass(frozen=True)
class LayerStatistics:
    """Means over a layer's entries, weighted by their columns."""

    layer: int
    total: float
    zd: float
    cossim: float


def tensor_statistics(imatrix: Imatrix) -> list[TensorStatistics]:
    """A row for each entry that has data, sorted by tensor, the largest sum first."""
    rows = [_of_entry(imatrix, name, entry) for name, entry in sorted(imatrix.entries.items()) if entry.counts.any()]
    return sorted(rows, key=lambda row: (row.tensor, -row.total))


def layer_statistics(rows: Sequence[TensorStatistics]) -> list[LayerStatistics]:
    """A row for each layer, in order."""
    layers: dict[int, list[TensorStatistics]] = {}
    for row in rows:
        if row.layer is not None:
            layers.setdefault(row.layer, []).append(row)
    return [
        LayerStatistics(layer, *(_weighted(rows, field) for field in ("total", "zd", "cossim")))
        for layer, rows in sorted(layers.items())
    ]


def _weighted(rows: Sequence[TensorStatistics], field: str) -> float:
    return sum(row.n * getattr(row, field) for row in rows) / sum(row.n for row in rows)


def _of_entry(imatrix: Imatrix, name: str, entry: Entry) -> TensorStatistics:
    asked = entry.counts > 0
    a = (entry.sums[asked] / entry.counts[asked][:, None]).reshape(-1)
    n, total = a.size, _sum(a)
    mean = total / np.float32(n)
    stddev = np.sqrt(np.maximum(_sum(a * a) / np.float32(n) - mean * mean, np.float32(0)))
    entropy = _entropy(a, total)
    zd = np.count_nonzero((a - mean) / stddev > 1) / n if stddev > 0 else 0.0
    layer, tensor = _place(name)
    return TensorStatistics(
        layer, tensor, float(total), float(a.min()), float(a.max()), float(mean), float(stddev),
        1 - np.count_nonzero(a <= _INACTIVE) / n, n, entropy, entropy / math.log2(n) if n > 1 else 0.0, zd,
        _cosine(entry, _before(imatrix, name)),
    )  # fmt: skip


def _sum(values: np.ndarray) -> np.float32:
    """From the first to the last, each step rounded, as a loop over floats does."""
    return np.add.accumulate(values.reshape(-1), dtype=np.float32)[-1]


def _entropy(a: np.ndarray, total: np.float32) -> float:
    if not total > 0:
        return 0.0
    shares = a / total
    shares = shares[shares > 0]
    return float(-_sum(shares * np.log2(shares)))


def _place(name: str) -> tuple[int | None, str]:
    """blk.3.attn_q.weight -> (3, attn_q)."""
    parts, layer = name.split("."), _LAYER.search(name)
    tensor = parts[parts.index("weight", 1) - 1] if "weight" in parts[1:] else name
    return int(layer[1]) if layer else None, tensor


def _before(imatrix: Imatrix, name: str) -> Entry | None:
    """The entry of the same matrix in the layer before."""
    layer = _LAYER.search(name)
    if layer is None:
        return None
    return imatrix.entries.get(f"{name[: layer.start(1)]}{int(layer[1]) - 1}{name[layer.end(1) :]}")


def _cosine(entry: Entry, other: Entry | None) -> float:
    if other is None or other.sums.size != entry.sums.size:
        return 0.0
    a, b = entry.sums.reshape(-1), other.sums.reshape(-1)
    size = np.sqrt(_sum(a * a)) * np.sqrt(_sum(b * b))
    return float(_sum(a * b) / size) if size > 0 and np.isfinite(size) else 0.0
