"""Samples as a model sees them: windows of ctx tokens, one after the other, as llama2.c cuts them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llamakit.dataset.tokens import Split, TokenData, shard_path
from llamakit.errors import DataError, UsageError


@dataclass(frozen=True)
class Window:
    """Window `number` of `count`: ids (ctx,), which stand in `file` from token `start` on."""

    number: int
    count: int
    file: Path
    start: int
    ids: np.ndarray


def windows(data: TokenData, split: Split, ctx: int, *, first: int = 0, n: int = 3) -> Iterator[Window]:
    """n windows of ctx tokens from the first-th on; fewer where the data ends.

    Raises UsageError for numbers that cannot be, DataError where there is no window of that length.
    """
    if ctx < 1 or n < 1 or first < 0:
        raise UsageError(f"--ctx {ctx}, -n {n}, --first {first}: expected at least 1, 1 and 0")
    counts = [len(shard) // ctx for shard in split.shards]
    total = sum(counts)
    if not total:
        longest = max(map(len, split.shards), default=0)
        raise DataError(f"has no {ctx} tokens in a row (the longest shard has {longest})", path=data.path)
    if first >= total:
        raise UsageError(f"--first is {first}, there are {total} windows of {ctx} tokens")
    before = 0
    for shard, count in zip(split.shards, counts, strict=True):
        for number in range(max(first, before), min(first + n, before + count)):
            start = (number - before) * ctx
            yield Window(number, total, shard_path(shard, data.path), start, np.array(shard[start : start + ctx]))
        before += count
