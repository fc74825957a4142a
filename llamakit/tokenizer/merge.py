"""Merging adjacent symbols of a word, best pair first: the step that SPM and BPE have in common."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import compress, pairwise, repeat
from operator import add, not_

#: rank of a pair that does not merge
NO_MERGE = 1 << 62

#: from here on a heap beats searching the whole list for the best pair
_HEAP_FROM = 400

#: rank of two adjacent symbols, NO_MERGE where they stay apart; the lowest rank merges first
RankOf = Callable[[str, str], int]


def merge(symbols: list[str], rank_of: RankOf) -> list[str]:
    """Merge the adjacent pair of lowest rank, the leftmost of equals, until none is left.

    `symbols` is used up. The order is that of llama.cpp's priority queues (rank, then position).
    """
    if len(symbols) >= _HEAP_FROM:
        return _merge_long(symbols, rank_of)
    ranks = [rank_of(a, b) for a, b in pairwise(symbols)]
    while ranks:
        best = min(ranks)
        if best == NO_MERGE:
            break
        i = ranks.index(best)
        symbols[i : i + 2] = (symbols[i] + symbols[i + 1],)
        del ranks[i]
        if i:
            ranks[i - 1] = rank_of(symbols[i - 1], symbols[i])
        if i < len(ranks):
            ranks[i] = rank_of(symbols[i], symbols[i + 1])
    return symbols


def _merge_long(symbols: list[str], rank_of: RankOf) -> list[str]:
    """The same in O(n log n): a heap of (rank, left, right, length) whose entries go stale when a side changes."""
    n = len(symbols)
    before, after = list(range(-1, n - 1)), [*range(1, n), -1]
    heap: list[tuple[int, int, int, int]] = []
    for i, (a, b) in enumerate(pairwise(symbols)):
        rank = rank_of(a, b)
        if rank != NO_MERGE:
            heap.append((rank, i, i + 1, len(a) + len(b)))
    heapq.heapify(heap)
    while heap:
        _, left, right, length = heapq.heappop(heap)
        a, b = symbols[left], symbols[right]
        if not a or not b or len(a) + len(b) != length:
            continue
        symbols[left], symbols[right] = a + b, ""
        after[left] = after[right]
        if after[left] >= 0:
            before[after[left]] = left
        for i, j in ((before[left], left), (left, after[left])):
            if i >= 0 and j >= 0:
                rank = rank_of(symbols[i], symbols[j])
                if rank != NO_MERGE:
                    heapq.heappush(heap, (rank, i, j, len(symbols[i]) + len(symbols[j])))
    return [s for s in symbols if s]


def cut_apart(text: str, joined: frozenset[str] | set[str]) -> list[str]:
    """Cut between any two characters that no merge ever joins: the parts merge as they would within the whole.

    joined: every pair of neighbouring characters (as a string of two) that some merge bridges.
    """
    if len(text) < 2:
        return [text] if text else []
    apart = map(not_, map(joined.__contains__, map(add, text, text[1:])))
    cuts = [0, *compress(range(1, len(text)), apart), len(text)]
    return list(map(text.__getitem__, map(slice, cuts, cuts[1:], repeat(None))))
