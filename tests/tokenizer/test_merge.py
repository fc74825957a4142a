from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from llamakit.tokenizer import merge as module
from llamakit.tokenizer.merge import NO_MERGE, cut_apart, merge

TOKENS = {t: i % 5 for i, t in enumerate(["ab", "ba", "aa", "bb", "aab", "aba", "abab", "bab", "cc", "ccc", "aaaa"])}


def rank_of(a: str, b: str) -> int:
    return TOKENS.get(a + b, NO_MERGE)


def naive(text: str) -> list[str]:
    symbols = list(text)
    while True:
        ranks = [(rank_of(a, b), i) for i, (a, b) in enumerate(pairwise(symbols))]
        best, i = min(ranks, default=(NO_MERGE, 0))
        if best == NO_MERGE:
            return symbols
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


@given(st.text("abcd", max_size=40))
def test_lowest_rank_first_then_leftmost(text: str) -> None:
    assert merge(list(text), rank_of) == naive(text)


@given(st.text("abcd", max_size=60))
def test_the_heap_merges_alike(text: str) -> None:
    assert module._merge_long(list(text), rank_of) == naive(text)


def test_a_long_word_goes_to_the_heap() -> None:
    text = "".join(random.Random(1).choices("abcd", k=3000))
    assert merge(list(text), rank_of) == naive(text)


@given(st.text("abcd", max_size=40))
def test_parts_that_no_merge_joins(text: str) -> None:
    joined = {t[i : i + 2] for t in TOKENS for i in range(len(t) - 1)}
    parts = cut_apart(text, joined)
    assert "".join(parts) == text and all(parts)
    assert [s for part in parts for s in merge(list(part), rank_of)] == naive(text)
