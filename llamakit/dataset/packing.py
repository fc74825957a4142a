"""Rows of a batch from samples of different lengths: several short ones in a row, or rows of like lengths together.

A row holds inputs, and behind each its target. A sample of n tokens takes n - 1 places; the last token of one is no
input for the first of the next, and `segments` says which places belong together, so that attention stays within a
sample as well. Shapes: B rows, T places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llamakit.dataset.chat_data import ChatData
from llamakit.dataset.order import SampleOrder, shuffled

#: rows that a sample is tried on: all of the rows so far would cost quadratic time, and gain nothing
_OPEN_ROWS = 256
#: batches of like lengths are cut from so many batches' samples at a time, so that lengths do not rule the order
_GROUP = 32
_PADDING = -1


@dataclass(frozen=True)
class ChatBatch:
    """The rows of one micro-step.

    inputs, targets: (B, T) int64. trained: (B, T) bool, which targets a loss is taken on. segments: (B, T) int32, the
    number of the sample within its row, -1 for padding; positions: (B, T) int64, from 0 in each sample. used: samples
    in it. n_trained: targets with a loss; n_tokens: places that are no padding. packed: some row has several samples,
    and attention must be kept within segments; else the causal mask is enough.
    """

    inputs: np.ndarray
    targets: np.ndarray
    trained: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    used: int
    n_trained: int
    n_tokens: int
    packed: bool


class ChatBatches:
    """Batches of samples in the order of a seed and an epoch; every sample once an epoch.

    pack: several samples share a row of ctx places, first fit in the epoch's shuffled order. Else a row has one sample,
    a batch has samples of like lengths, and is as wide as the longest of them; which samples share a batch then depends
    on the number of rows asked for. pad: a token id for places that are empty.
    """

    def __init__(self, data: ChatData, *, ctx: int, pack: bool, pad: int) -> None:
        self._data, self._ctx, self._pack, self._pad = data, ctx, pack, pad
        self._made: tuple[tuple[int, int, int], list[list[int]]] | None = None

    @property
    def count(self) -> int:
        """Number of samples: what a `SampleOrder` counts."""
        return self._data.count

    def n_rows(self, seed: int, epoch: int) -> int:
        """Rows of an epoch."""
        return len(self._rows(seed, epoch, 1))

    def build(self, order: SampleOrder, batch: int) -> ChatBatch:
        """The next `batch` rows; the order itself is not moved.

        The last batch of an epoch has the rows that are left: no sample comes twice to fill it.
        """
        rows = self._rows(order.seed, order.epoch, batch)
        before = np.cumsum([0, *map(len, rows)])
        first = int(np.searchsorted(before, order.next_sample, side="right")) - 1
        return self._batch(rows[first : first + batch])

    def in_order(self, batch: int) -> Iterator[ChatBatch]:
        """All samples once, in the data's own order, for an evaluation."""
        numbers = list(range(self.count))
        rows = _first_fit(numbers, self._data.sizes - 1, self._ctx) if self._pack else [[i] for i in numbers]
        for at in range(0, len(rows), batch):
            yield self._batch(rows[at : at + batch])

    def _rows(self, seed: int, epoch: int, batch: int) -> list[list[int]]:
        """Numbers of the samples of every row of an epoch."""
        key = (seed, epoch, 0 if self._pack else batch)
        if self._made is None or self._made[0] != key:
            numbers = shuffled(seed, epoch, np.arange(self.count, dtype=np.int64), self.count).tolist()
            if self._pack:
                rows = _first_fit(numbers, self._data.sizes - 1, self._ctx)
            else:
                rows = [[i] for i in _alike(numbers, self._data.sizes, batch, seed, epoch)]
            self._made = key, rows
        return self._made[1]

    def _batch(self, rows: Sequence[Sequence[int]]) -> ChatBatch:
        width = self._ctx if self._pack else max(int(self._data.sizes[row[0]]) - 1 for row in rows)
        shape = (len(rows), width)
        inputs, targets = np.full(shape, self._pad, dtype=np.int64), np.full(shape, self._pad, dtype=np.int64)
        trained, segments = np.zeros(shape, dtype=bool), np.full(shape, _PADDING, dtype=np.int32)
        positions = np.zeros(shape, dtype=np.int64)
        for r, row in enumerate(rows):
            at = 0
            for segment, number in enumerate(row):
                tokens, mask = self._data.sample(number)
                place = slice(at, at + len(tokens) - 1)
                inputs[r, place], targets[r, place], trained[r, place] = tokens[:-1], tokens[1:], mask[1:]
                segments[r, place], positions[r, place] = segment, np.arange(len(tokens) - 1)
                at = place.stop
            positions[r, at:] = np.arange(width - at)
        return ChatBatch(
            inputs=inputs,
            targets=targets,
            trained=trained,
            segments=segments,
            positions=positions,
            used=sum(map(len, rows)),
            n_trained=int(trained.sum()),
            n_tokens=int((segments != _PADDING).sum()),
            packed=any(len(row) > 1 for row in rows),
        )


def _first_fit(numbers: Sequence[int], sizes: np.ndarray, ctx: int) -> list[list[int]]:
    """Each sample into the first row, of the newest ones, that has room for it; rows in the order of their start."""
    rows: list[list[int]] = []
    room = np.zeros(len(numbers), dtype=np.int64)
    for number in numbers:
        size = int(sizes[number])
        oldest = max(0, len(rows) - _OPEN_ROWS)
        fits = room[oldest : len(rows)] >= size
        at = oldest + int(fits.argmax()) if fits.any() else len(rows)
        if at == len(rows):
            rows.append([])
            room[at] = ctx
        rows[at].append(number)
        room[at] -= size
    return rows


def _alike(numbers: Sequence[int], sizes: np.ndarray, batch: int, seed: int, epoch: int) -> list[int]:
    """Samples in an order whose consecutive batches have like lengths, the batches themselves shuffled.

    The short batch, where there is one, is the epoch's last.
    """
    batches: list[list[int]] = []
    for at in range(0, len(numbers), batch * _GROUP):
        part = sorted(numbers[at : at + batch * _GROUP], key=lambda i: int(sizes[i]))
        batches += [part[i : i + batch] for i in range(0, len(part), batch)]
    whole = [part for part in batches if len(part) == batch]
    order = shuffled(seed, epoch, np.arange(len(whole), dtype=np.int64), len(whole)) if whole else ()
    rest = [part for part in batches if len(part) != batch]
    return [i for part in [*(whole[j] for j in order), *rest] for i in part]
