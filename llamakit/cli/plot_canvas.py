"""Curves in a grid of characters: braille dots where there is one curve or colour, else a letter for each curve."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from llamakit.cli import render
from llamakit.training.axes import limits, tick_labels, ticks

#: bits of a braille character by column and row of its 2 x 4 dots
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BRAILLE = 0x2800
_MARKS = "*+x#@%&="
#: left, tick, corner, bottom, tick of the bottom
_BOX, _ASCII = "│┤└─┬", "|++-+"


@dataclass(frozen=True)
class Line:
    """A curve. mark: drawn as this character at each point, unconnected; "": as a line. index: of its colour."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    index: int
    mark: str = ""


def draw(lines: Sequence[Line], width: int, height: int, *, unicode: bool, color: bool, from_zero: bool) -> list[str]:
    """A plot of `width` x `height` characters, a string for each row, coloured by render where `color` is.

    lines: one or more, each with one point or more; unicode: the output takes more than ASCII; from_zero: the vertical
    axis begins at 0. Names are not in it: see `legend`.
    """
    n_curves = sum(not line.mark for line in lines)
    dots = unicode and (color or n_curves <= 1)
    low, high = limits([y for line in lines for y in line.ys], from_zero=from_zero)
    first, last = min(min(line.xs) for line in lines), max(max(line.xs) for line in lines)
    rows = height - 2  # the axis and its numbers
    y_ticks = ticks(low, high, max(2, rows // 3))
    y_labels = tick_labels(y_ticks)
    margin = max(map(len, y_labels))
    grid = _Grid(width - margin - 1, rows, (first, last), (low, high))
    for line in lines:
        mark = line.mark or ("" if dots else curve_mark(line.index))
        grid.add(line, mark, connected=not line.mark)
    box = _BOX if unicode else _ASCII
    at_row = {grid.row(value): label for value, label in zip(y_ticks, y_labels, strict=True)}
    drawn = [
        f"{at_row.get(row, ''):>{margin}}{box[1] if row in at_row else box[0]}{grid.text(row)}" for row in range(rows)
    ]
    return [*drawn, *_bottom(grid, margin, box)]


def curve_mark(index: int) -> str:
    """The character that a curve is drawn with where there are no dots."""
    return _MARKS[index % len(_MARKS)]


def legend(lines: Sequence[Line], *, unicode: bool, color: bool) -> str:
    """The lines' names, each behind what it is drawn with."""
    dots = unicode and (color or sum(not line.mark for line in lines) <= 1)
    marks = [line.mark or ("⣿" if dots else curve_mark(line.index)) for line in lines]
    return "   ".join(f"{render.curve(mark, line.index)} {line.name}" for mark, line in zip(marks, lines, strict=True))


class _Grid:
    """The inside of a plot: `width` x `height` characters for x from..to and y from..to."""

    def __init__(self, width: int, height: int, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.width, self.height = width, height
        self._x, self._y = x if x[1] > x[0] else (x[0] - 1, x[1] + 1), y
        self._bits: dict[tuple[int, int], int] = {}
        self._marks: dict[tuple[int, int], str] = {}
        self._owner: dict[tuple[int, int], int] = {}

    @property
    def x_range(self) -> tuple[float, float]:
        """What the width stands for."""
        return self._x

    def column(self, value: float, scale: int = 1) -> int:
        """The column, `scale` to a character, that an x falls into."""
        share = (value - self._x[0]) / (self._x[1] - self._x[0])
        return min(self.width * scale - 1, max(0, int(share * self.width * scale)))

    def row(self, value: float, scale: int = 1) -> int:
        """The row from above, `scale` to a character, that a y falls into."""
        share = (self._y[1] - value) / (self._y[1] - self._y[0])
        return min(self.height * scale - 1, max(0, int(share * self.height * scale)))

    def add(self, line: Line, mark: str, *, connected: bool) -> None:
        """Draw a line with a mark in each character that it touches, or with dots where the mark is empty."""
        wide, high = (1, 1) if mark else (2, 4)
        points = [(self.column(x, wide), self.row(y, high)) for x, y in zip(line.xs, line.ys, strict=True)]
        if connected:
            points = [dot for a, b in zip(points, points[1:] or points, strict=False) for dot in _between(a, b)]
        for column, row in points:
            cell = (column // wide, row // high)
            self._owner[cell] = line.index
            if mark:
                self._marks[cell] = mark
            else:
                self._bits[cell] = self._bits.get(cell, 0) | _DOTS[column % 2][row % 4]

    def text(self, row: int) -> str:
        """One row of characters, without spaces at its end; what is of one curve is coloured together."""
        last = max((column for column, at in self._owner if at == row), default=-1)
        cells = [(self._owner.get((column, row), -1), self._character(column, row)) for column in range(last + 1)]
        runs = (
            (owner, "".join(c for _, c in run)) for owner, run in itertools.groupby(cells, key=lambda cell: cell[0])
        )
        return "".join(text if owner < 0 else render.curve(text, owner) for owner, text in runs)

    def _character(self, column: int, row: int) -> str:
        cell = (column, row)
        bits = self._bits.get(cell)
        return self._marks.get(cell) or (" " if bits is None else chr(_BRAILLE + bits))


def _between(a: tuple[int, int], b: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots of a straight line, both ends included."""
    n = max(abs(b[0] - a[0]), abs(b[1] - a[1]), 1)
    return [(round(a[0] + (b[0] - a[0]) * i / n), round(a[1] + (b[1] - a[1]) * i / n)) for i in range(n + 1)]


def _bottom(grid: _Grid, margin: int, box: str) -> list[str]:
    """The horizontal axis and its numbers, those that have room."""
    marks = ticks(*grid.x_range, max(2, grid.width // 12), whole=True)
    axis, numbers = list(box[3] * grid.width), list(" " * grid.width)
    free_from = 0
    for value, label in zip(marks, tick_labels(marks), strict=True):
        column = grid.column(value)
        axis[column] = box[4]
        start = min(max(0, column - len(label) // 2), grid.width - len(label))
        if start >= free_from:
            numbers[start : start + len(label)] = label
            free_from = start + len(label) + 1
    return [" " * margin + box[2] + "".join(axis), (" " * (margin + 1) + "".join(numbers)).rstrip()]
