"""Curves as SVG inside of a page: colours are the page's own, so that they follow a dark one."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from llamakit.training.axes import limits, number, tick_labels, ticks

_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 14.0, 12.0, 34.0


@dataclass(frozen=True)
class Trace:
    """A curve. look: its class in the page's style sheet; points: a dot with its value at each point, too."""

    xs: Sequence[float]
    ys: Sequence[float]
    look: str
    points: bool = False


def svg(traces: Sequence[Trace], label: str, *, width: int, height: int, from_zero: bool = False) -> str:
    """An <svg> of `width` x `height` units that grows with its place. label: what it shows, for who cannot see it.

    traces: one or more, each with one point or more; from_zero: the vertical axis begins at 0.
    """
    xs = [x for trace in traces for x in trace.xs]
    x_from, x_to = min(xs), max(xs)
    if x_from == x_to:
        x_from, x_to = x_from - 1, x_to + 1
    y_from, y_to = limits([y for trace in traces for y in trace.ys], from_zero=from_zero)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_from) / (x_to - x_from) * (width - _LEFT - _RIGHT)
        up = (y - y_from) / (y_to - y_from) * (height - _TOP - _BOTTOM)
        return round(_LEFT + across, 1), round(height - _BOTTOM - up, 1)

    name = html.escape(label)
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{name}"><title>{name}</title>']
    y_ticks = ticks(y_from, y_to, max(2, height // 42))
    for value, text in zip(y_ticks, tick_labels(y_ticks), strict=True):
        _, y = place(x_from, value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{width - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4}" text-anchor="end">{text}</text>')
    x_ticks = ticks(x_from, x_to, width // 100, whole=True)
    for value, text in zip(x_ticks, tick_labels(x_ticks), strict=True):
        x, y = place(value, y_from)
        parts.append(
            f'<path class="grid" d="M{x} {y}v5"/><text x="{x}" y="{y + 18}" text-anchor="middle">{text}</text>'
        )
    parts.append(f'<path class="axis" d="M{_LEFT} {height - _BOTTOM}H{width - _RIGHT}"/>')
    for trace in traces:
        at = [place(x, y) for x, y in zip(trace.xs, trace.ys, strict=True)]
        path = "M" + "L".join(f"{x} {y}" for x, y in at)
        parts.append(f'<path class="{trace.look}" d="{path}"/>')
        if trace.points or len(at) == 1:
            for (x, y), step, value in zip(at, trace.xs, trace.ys, strict=True):
                told = f"<title>step {step:,.0f}: {number(value)}</title>"
                parts.append(f'<circle class="{trace.look}" cx="{x}" cy="{y}" r="3.5">{told}</circle>')
    return "".join([*parts, "</svg>"])
