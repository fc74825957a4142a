"""What every drawing of a curve needs, on paper, in a page or on a terminal: ticks, smoothing, fewer points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from llamakit.training.curves import Quantity

#: what a quantity is called on an axis
LABELS: dict[Quantity, str] = {
    "loss": "loss",
    "val_loss": "validation loss",
    "lr": "learning rate",
    "tok_per_s": "tokens per second",
}
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Round numbers from `low` to `high`, at most about `count`, at least one; whole: no fractions."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low]
    raw = span / max(1, count)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in _STEPS if factor * magnitude >= raw * (1 - 1e-9))
    step = max(1.0, math.ceil(step)) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)] or [low]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Ticks as text, all with as many digits as tell them apart: 0.5 1.0, 12,000, 2.5e-4."""
    largest = max((abs(value) for value in values), default=0.0)
    if len(values) == 1:
        text = f"{values[0]:,.6g}"
        return [_exponent(text) if "e" in text else text]
    gaps = [abs(b - a) for a, b in itertools.pairwise(values)]
    gap = min(gaps, default=0.0) or largest or 1.0
    if largest and (largest < 0.01 or largest >= 1e7):
        digits = max(0, math.floor(math.log10(largest)) - _place(gap))
        return ["0" if not value else _exponent(f"{value:.{digits}e}") for value in values]
    return [f"{value:,.{max(0, -_place(gap))}f}" for value in values]


def number(value: float) -> str:
    """One value as people read it: 2.3456, 5,012, 3.2e-4."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.1f}"
    return f"{value:.4f}" if size >= 0.01 or not size else _exponent(f"{value:.2e}")


def _place(gap: float) -> int:
    """The decimal place of the last digit that counts in `gap`: 0.5 -> -1, 0.25 -> -2, 10 -> 0 or more."""
    place = math.floor(math.log10(gap) + 1e-9)
    return place if abs(gap / 10.0**place - round(gap / 10.0**place)) < 1e-6 else place - 1


def _exponent(text: str) -> str:
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}"


def smooth(values: Sequence[float]) -> list[float]:
    """A running mean of as many values, about a fortieth of them at a time. The same number to the left and to the
    right of each, fewer towards the ends: a mean of the past alone would trail behind a loss that falls."""
    sums = [0.0, *itertools.accumulate(values)]
    widest = len(values) // 80
    out: list[float] = []
    for i in range(len(values)):
        reach = min(widest, i, len(values) - 1 - i)
        out.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return out


def thin(xs: Sequence[float], ys: Sequence[float], n_max: int) -> tuple[list[float], list[float]]:
    """At most `n_max` points of a curve, 4 or more, that look the same: of each stretch its first, its least, its
    greatest and its last."""
    if len(xs) <= n_max:
        return list(xs), list(ys)
    n_stretches = max(1, n_max // 4)
    kept: list[int] = []
    for i in range(n_stretches):
        start, stop = i * len(xs) // n_stretches, (i + 1) * len(xs) // n_stretches
        inside = range(start, stop)
        kept += sorted({start, min(inside, key=ys.__getitem__), max(inside, key=ys.__getitem__), stop - 1})
    return [xs[i] for i in kept], [ys[i] for i in kept]


def limits(values: Sequence[float], *, from_zero: bool = False) -> tuple[float, float]:
    """The range of an axis that holds all of `values` (one or more) with a little air."""
    low, high = min(values), max(values)
    if from_zero:
        low = min(0.0, low)
    air = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return low if from_zero and low == 0 else low - air, high + air
