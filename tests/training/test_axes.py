"""Ticks are round and told apart, smoothing follows, fewer points look the same."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamakit.training.axes import limits, number, smooth, thin, tick_labels, ticks


@pytest.mark.parametrize(
    ("low", "high", "count", "labels"),
    [
        (0, 1, 5, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (2.1, 10.4, 5, ["4", "6", "8", "10"]),
        (0, 5e-4, 5, ["0", "1e-4", "2e-4", "3e-4", "4e-4", "5e-4"]),
        (0, 2.5e-4, 2, ["0", "2e-4"]),
        (4000, 5300, 4, ["4,000", "4,500", "5,000"]),
        (1.00012, 1.00019, 2, ["1.00015"]),
        (3, 3, 4, ["3"]),
    ],
)
def test_ticks(low: float, high: float, count: int, labels: list[str]) -> None:
    assert tick_labels(ticks(low, high, count)) == labels


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12), st.integers(1, 20))
def test_ticks_lie_inside_and_their_labels_differ(low: float, span: float, count: int) -> None:
    if low + span == low or span < abs(low) * 1e-9:
        return  # nothing that a label could tell apart
    found = ticks(low, low + span, count)
    assert 1 <= len(found) <= count + 2
    assert all(low - span * 1e-6 <= value <= low + span * (1 + 1e-6) for value in found)
    assert len(set(tick_labels(found))) == len(found)


def test_steps_are_whole() -> None:
    assert ticks(1, 3, 8, whole=True) == [1, 2, 3]


def test_numbers() -> None:
    assert [number(value) for value in (2.34567, 5012.4, 123.44, 3.2e-4, 0.0)] == [
        "2.3457", "5,012", "123.4", "3.20e-4", "0.0000",
    ]  # fmt: skip


def test_smoothing_follows_a_line_and_calms_noise() -> None:
    line = [float(i) for i in range(500)]
    assert smooth(line) == pytest.approx(line)
    wave = [5 + math.sin(i * 2.1) for i in range(500)]
    assert max(abs(value - 5) for value in smooth(wave)[20:-20]) < 0.15
    assert smooth([]) == [] and smooth([3.0]) == [3.0]


def test_thinned_curves_keep_their_ends_and_spikes() -> None:
    ys = [0.0] * 10_000
    ys[1234], ys[8765] = 9.0, -9.0
    xs, kept = thin(range(10_000), ys, 400)
    assert len(xs) <= 400 and xs == sorted(xs)
    assert xs[0] == 0 and xs[-1] == 9999
    assert (1234, 9.0) in zip(xs, kept, strict=True) and (8765, -9.0) in zip(xs, kept, strict=True)
    assert thin([1, 2], [3, 4], 4) == ([1, 2], [3, 4])


def test_limits_hold_everything() -> None:
    assert limits([5, 5]) == pytest.approx((4.5, 5.5))
    low, high = limits([0.0, 0.0])
    assert low < 0 < high
    assert limits([1.0, 2.0], from_zero=True)[0] == 0
