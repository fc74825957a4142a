"""DRY, a penalty of what would go on with a repetition, as in llama.cpp (src/llama-sampler.cpp).

A token that would make the last L tokens, which stand in the window once before, a repetition of L + 1 tokens loses
multiplier * base**(L - allowed length). Sequence breakers end a repetition: a token that completes one of them starts
the count anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from llamakit.inference.libm import log_one
from llamakit.inference.samplers import Candidates, places_of
from llamakit.tokenizer import Tokenizer

#: first token of a breaker -> the tokens that follow it, for every way to complete it; () for the token alone
Breakers = Mapping[int, Sequence[tuple[int, ...]]]

_MAX_BYTES, _MAX_TAIL = 40, 20


def breakers(tokenizer: Tokenizer, strings: Sequence[str]) -> Breakers:
    """Where each of the strings begins inside of a token, and the tokens that complete it.

    A string counts with its first 40 bytes, its rest with 20 tokens.
    """
    found: dict[int, list[tuple[int, ...]]] = {}
    words = [tokenizer.decode_bytes([id], special=True) for id in range(tokenizer.n_vocab)]
    for string in strings:
        whole = string.encode()[:_MAX_BYTES]
        tails: dict[int, tuple[int, ...]] = {}
        for id, word in enumerate(words):
            if whole in word:
                found.setdefault(id, []).append(())
                continue
            for length in range(min(len(word), len(whole) - 1), 0, -1):
                if not word.endswith(whole[:length]):
                    continue
                if length not in tails:
                    rest = whole[length:].decode("utf-8", "replace")
                    tails[length] = tuple(tokenizer.encode(rest, add_special=False, parse_special=False)[:_MAX_TAIL])
                if tails[length] not in found.setdefault(id, []):
                    found[id].append(tails[length])
    return found


def dry(
    c: Candidates, window: Sequence[int], known: Breakers, multiplier: float, base: float, allowed_length: int
) -> Candidates:
    """The candidates with repetitions penalized; window: the last tokens, the latest last."""
    latest_first = list(window)[::-1]
    n = len(latest_first)
    if n <= allowed_length:
        return c
    limit = _until_breaker(latest_first, known)
    if limit < allowed_length:
        return c
    longest: dict[int, int] = {}
    for k, length in enumerate(_repeats(latest_first)[1:], start=1):
        token = latest_first[k - 1]  # what stood after the earlier occurrence
        if min(length, limit) >= allowed_length:
            longest[token] = max(longest.get(token, 0), min(length, limit))
    logits = c.logits.copy()
    places = dict(zip(longest, places_of(c.ids, np.array(list(longest), dtype=np.int64)).tolist(), strict=True))
    base32 = float(np.float32(base))
    largest = int(np.float32(88.7228391) / log_one(base32)) if base32 > float(np.float32(1.000001)) else 0
    for token, length in longest.items():
        at = places[token]
        if at < 0 or () in known.get(token, ()):
            continue
        exponent = length - allowed_length
        exponent = min(exponent, largest) if largest > 0 else exponent
        with np.errstate(over="ignore"):
            logits[at] -= np.float32(float(np.float32(multiplier)) * math.pow(base32, exponent))
    return Candidates(c.ids, logits)


def _until_breaker(latest_first: list[int], known: Breakers) -> int:
    """How many tokens stand after the last breaker; all of them where there is none."""
    for i, token in enumerate(latest_first):
        best = -1
        for tail in known.get(token, ()):
            n = len(tail)
            if best < n <= i and all(tail[j] == latest_first[i - j - 1] for j in range(n)):
                best = n
        if best >= 0:
            return i - best
    return len(latest_first)


def _repeats(text: list[int]) -> list[int]:
    """For every place k, how many elements from there on equal those from the start on (the Z function; linear)."""
    n = len(text)
    z = [0] * n
    left = right = 0  # the match [left, right) that reaches furthest
    for k in range(1, n):
        length = min(right - k, z[k - left]) if k < right else 0
        while k + length < n and text[length] == text[k + length]:
            length += 1
        z[k] = length
        if k + length > right:
            left, right = k, k + length
    return z
