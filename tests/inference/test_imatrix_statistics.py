"""Expected figures: llama.cpp's llama-imatrix --show-statistics of 2026, on the same entries in a file."""

from __future__ import annotations

import numpy as np
import pytest

from llamakit.formats.imatrix import Entry, Imatrix
from llamakit.inference.imatrix_statistics import layer_statistics, tensor_statistics
from tests.inference.imatrix_files import entry


def same(value: float, n_in: int) -> Entry:
    return Entry(np.full((1, n_in), value, np.float32), np.array([32], np.float32))


IMATRIX = Imatrix(
    {
        "blk.0.attn_q.weight": entry(0, 48, 32),
        "blk.1.attn_q.weight": entry(7, 48, 32),
        "blk.0.ffn_up_exps.weight": entry(3, 16, 32, 8, 0),
        "blk.1.ffn_up_exps.weight": entry(5, 16, 3, 9, 21),
        "output.weight": entry(9, 48, 64),
        "blk.2.ffn_down.weight": same(8, 24),
        "blk.1.ffn_down.weight": same(0, 24),
        "blk.3.attn_q.weight": entry(7, 48, 0),
    },
    ("t",),
    2,
    16,
)

TENSORS = [  # layer, tensor, total, min, max, mean, stddev, active, n, entropy, entropy_norm, zd, cossim
    (0, "attn_q", 17.67, 0.0, 0.7656, 0.37, 0.20, 0.9583, 48, 5.3138, 0.9515, 0.1458, 0.0),
    (1, "attn_q", 17.20, 0.0, 0.7656, 0.36, 0.20, 0.9792, 48, 5.3151, 0.9517, 0.2083, 0.7433),
    (2, "ffn_down", 6.00, 0.25, 0.25, 0.25, 0.0, 1.0, 24, 4.5850, 1.0, 0.0, 0.0),
    (1, "ffn_down", 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 24, 0.0, 0.0, 0.0, 0.0),
    (1, "ffn_up_exps", 98.98, 0.0, 7.0833, 2.06, 2.05, 0.9792, 48, 4.9185, 0.8807, 0.2083, 0.7464),
    (0, "ffn_up_exps", 31.27, 0.0, 3.0625, 0.98, 0.82, 0.9688, 32, 4.5034, 0.9007, 0.2188, 0.0),
    (None, "output", 8.62, 0.0, 0.3828, 0.18, 0.10, 0.9792, 48, 5.3004, 0.9491, 0.1875, 0.0),
]
LAYERS = [(0, 23.11, 0.175, 0.0), (1, 46.47, 0.166667, 0.5959), (2, 6.0, 0.0, 0.0)]


def test_the_table_of_llama_imatrix() -> None:
    rows = tensor_statistics(IMATRIX)
    assert [(row.layer, row.tensor) for row in rows] == [expected[:2] for expected in TENSORS]
    for row, expected in zip(rows, TENSORS, strict=True):
        assert list(vars(row).values())[2:] == pytest.approx(expected[2:], abs=0.0051 if row.total else 0)
        four_digits = (row.min, row.max, row.active, row.entropy, row.entropy_norm, row.zd, row.cossim)
        assert four_digits == pytest.approx((*expected[3:5], expected[7], *expected[9:]), abs=5.1e-5)
    layers = layer_statistics(rows)
    assert [row.layer for row in layers] == [0, 1, 2]
    for row, expected in zip(layers, LAYERS, strict=True):
        assert tuple(vars(row).values()) == pytest.approx(expected, abs=0.0051)
        assert (row.zd, row.cossim) == pytest.approx(expected[2:], abs=5.1e-5)


def test_names_of_no_layer() -> None:
    for name, place in (
        ("weight", (None, "weight")),
        ("weight.weight", (None, "weight")),
        ("blk.x.a.weight", (None, "a")),
        ("blk.٣.a.weight", (None, "a")),
        (f"blk.{'9' * 5000}.a.weight", (None, "a")),
        ("xblk.1.a.weight", (None, "a")),
        ("a.blk.12.b.weight", (12, "b")),
    ):
        (row,) = tensor_statistics(Imatrix({name: same(1, 2)}, (), 1, 1))
        assert (row.layer, row.tensor) == place
    assert tensor_statistics(Imatrix({"a": entry(0, 2, 0)}, (), 1, 1)) == []


def test_other_sizes_are_not_compared() -> None:
    rows = tensor_statistics(Imatrix({"blk.0.a.weight": same(1, 2), "blk.1.a.weight": same(1, 4)}, (), 1, 1))
    assert [row.cossim for row in rows] == [0, 0]
    same_size = {"blk.0.a.weight": same(1, 2), "blk.1.a.weight": same(3, 2)}
    assert tensor_statistics(Imatrix(same_size, (), 1, 1))[0].cossim == pytest.approx(1)
