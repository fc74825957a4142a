"""Token shards as training samples: windows of ctx tokens and the one that follows, in an order of their own.

Windows lie side by side, as llama2.c cuts them, but each epoch shifts all of a shard's by an amount of its own: a text
that is seen many times is not always cut at the same places.

Shapes: B batch, T ctx.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llamakit.dataset.order import SampleOrder, counter_uniform
from llamakit.dataset.text import Batch
from llamakit.dataset.tokens import Split
from llamakit.errors import DataError

# The numbers of an order's generator that say how far an epoch's windows are shifted; samples use those from 1 on.
_SHIFTS = -(1 << 32)


class Windows:
    """The windows of a split. count: how many an epoch has."""

    def __init__(self, split: Split, ctx: int) -> None:
        """Raises DataError where no shard holds ctx + 1 tokens."""
        self.ctx = ctx
        self._shards = [shard for shard in split.shards if len(shard) > ctx]
        if not self._shards:
            longest = max((len(shard) for shard in split.shards), default=0)
            raise DataError(
                f"the training part has {longest} tokens in a row (expected more than --ctx {ctx})",
                hint="give more text, or a smaller --ctx",
            )
        # One window less than there is room for, so that all can be shifted; a short shard has one, wherever it fits.
        counts = [max(1, (len(shard) - 1) // ctx - 1) for shard in self._shards]
        self._ends = np.cumsum(counts)
        self.count = int(self._ends[-1])

    def build(self, order: SampleOrder, batch: int) -> Batch:
        """The next `batch` windows: inputs and targets (B, T); the order itself is not moved."""
        rows = np.stack([self._window(order, ahead) for ahead in range(batch)]).astype(np.int64)
        return Batch(rows[:, :-1], rows[:, 1:], batch)

    def _window(self, order: SampleOrder, ahead: int) -> np.ndarray:
        i = order.sample(ahead)
        which = int(np.searchsorted(self._ends, i, side="right"))
        shard, first = self._shards[which], int(self._ends[which - 1]) if which else 0
        n_windows = int(self._ends[which]) - first
        slack = len(shard) - 1 - n_windows * self.ctx
        share = counter_uniform(order.seed, _SHIFTS - order.epoch, np.array([which]))[0]
        start = (i - first) * self.ctx + int(share * (slack + 1))
        return shard[start : start + self.ctx + 1]


def even_windows(split: Split, ctx: int, at_most: int | None) -> Iterator[np.ndarray]:
    """Windows of ctx + 1 tokens, (at most n,) in order, evenly spread over the split; None: all of them, and the rest
    of each shard, which is shorter."""
    starts = [(shard, at) for shard in split.shards for at in range(0, len(shard) - 1, ctx)]
    if at_most is not None:
        whole = [(shard, at) for shard, at in starts if at + ctx < len(shard)] or starts[:1]
        count = min(at_most, len(whole))
        starts = [whole[i * len(whole) // count] for i in range(count)]
    for shard, at in starts:
        yield shard[at : at + ctx + 1].astype(np.int64)
