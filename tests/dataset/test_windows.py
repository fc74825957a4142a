"""Windows of token shards: everything is seen, each epoch is cut elsewhere, and nothing depends on a history."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamakit.dataset.order import SampleOrder
from llamakit.dataset.windows import Windows, even_windows
from llamakit.errors import DataError


def split(*lengths: int) -> Any:
    """Shards whose tokens are numbered through all of them: a window says where it is from."""
    ends = np.cumsum(lengths)
    shards = [np.arange(end - length, end, dtype=np.uint32) for length, end in zip(lengths, ends, strict=True)]
    return SimpleNamespace(shards=tuple(shards), n_tokens=sum(lengths))


def epoch(windows: Windows, number: int, seed: int = 3) -> np.ndarray:
    """First tokens of an epoch's windows, sorted."""
    order = SampleOrder(seed, windows.count, number)
    batch = windows.build(order, windows.count)
    assert (batch.targets == batch.inputs + 1).all()
    assert (np.diff(batch.inputs, axis=1) == 1).all()
    return np.sort(batch.inputs[:, 0])


lengths = st.lists(st.integers(0, 60), min_size=1, max_size=5)


@given(lengths, st.integers(1, 12), st.integers(0, 5), st.integers(0, 1000))
def test_an_epoch_sees_nearly_every_token_once(sizes: list[int], ctx: int, number: int, seed: int) -> None:
    long_enough = [size for size in sizes if size > ctx]
    if not long_enough:
        with pytest.raises(DataError, match=f"{max(sizes)} tokens in a row"):
            Windows(split(*sizes), ctx)
        return
    windows = Windows(split(*sizes), ctx)
    assert windows.count == sum(max(1, (size - 1) // ctx - 1) for size in long_enough)
    starts = epoch(windows, number, seed)
    seen = (starts[:, None] + np.arange(ctx)).ravel()
    assert len(np.unique(seen)) == len(seen)  # no token is an input twice
    ends = np.cumsum(sizes)
    for end, size in zip(ends, sizes, strict=True):
        mine = seen[(seen >= end - size) & (seen < end)]
        left_out = size - len(mine)
        assert left_out == size if size <= ctx else left_out <= 2 * ctx + 1
        assert not len(mine) or int(mine.max()) < end - 1  # its target is of the same shard


def test_each_epoch_is_cut_elsewhere_and_each_again_the_same() -> None:
    windows = Windows(split(200, 150), 16)
    epochs = [epoch(windows, number).tolist() for number in range(6)]
    assert len({tuple(starts) for starts in epochs}) > 3
    assert epochs == [epoch(Windows(split(200, 150), 16), number).tolist() for number in range(6)]
    assert epoch(windows, 0, seed=4).tolist() != epochs[0]
    shifts = {tuple(np.array(starts) % 16) for starts in epochs}
    assert len(shifts) > 3


def test_over_epochs_every_token_is_seen() -> None:
    windows = Windows(split(100, 40), 16)
    seen = {int(token) for n in range(60) for start in epoch(windows, n) for token in range(start, start + 17)}
    assert seen == set(range(140))


def test_a_batch_does_not_depend_on_those_before() -> None:
    windows = Windows(split(300), 8)
    whole = windows.build(SampleOrder(1, windows.count), 8).inputs
    order = SampleOrder(1, windows.count)
    parts = []
    for _ in range(4):
        parts.append(windows.build(order, 2).inputs)
        order.advance(2)
    assert np.array_equal(np.concatenate(parts), whole)
    assert order.next_sample == 8


@given(lengths, st.integers(1, 12))
def test_all_even_windows_are_the_whole_split(sizes: list[int], ctx: int) -> None:
    found = list(even_windows(split(*sizes), ctx, None))
    targets = np.concatenate([window[1:] for window in found]) if found else np.zeros(0, int)
    ends = np.cumsum(sizes)
    firsts = {int(end - size) for end, size in zip(ends, sizes, strict=True)}
    assert targets.tolist() == [token for token in range(sum(sizes)) if token not in firsts]


@given(lengths, st.integers(1, 12), st.integers(1, 9))
def test_some_even_windows_are_whole_ones_in_order(sizes: list[int], ctx: int, at_most: int) -> None:
    found = list(even_windows(split(*sizes), ctx, at_most))
    assert len(found) <= at_most
    starts = [int(window[0]) for window in found]
    assert starts == sorted(set(starts))
    if any(size > ctx for size in sizes):
        assert all(len(window) == ctx + 1 for window in found)
        if at_most == 1:
            assert len(found) == 1


def test_windows_of_an_empty_split() -> None:
    assert list(even_windows(split(0), 4, 3)) == list(even_windows(split(), 4, None)) == []
