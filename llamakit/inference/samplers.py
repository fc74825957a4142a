"""The samplers that leave candidates over, one pure function each, as llama.cpp defines them (src/llama-sampler.cpp).

Every float32 operation is done as in C, one rounding each, and sums run from the first element to the last. Sorting
puts the likeliest first; equal logits are ordered by id, which llama.cpp leaves open. Arguments are rounded to float32,
which they are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llamakit.inference.libm import expf, log_one, logf, powf

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


_GROUP = 64


class Candidates(NamedTuple):
    """Tokens that can still be drawn: ids (n,) int64 and logits (n,) float32, n falling from V to 1.

    is_sorted: llama.cpp's own mark, which decides whether a sampler sorts; set by those that sort, and removed by those
    that may break the order.
    """

    ids: Ids
    logits: Logits
    is_sorted: bool = False


def whole_vocabulary(logits: Logits) -> Candidates:
    """All tokens, by id."""
    return Candidates(np.arange(len(logits), dtype=np.int64), logits)


def sort(c: Candidates) -> Candidates:
    """Likeliest first; as it is where it is marked as sorted."""
    if c.is_sorted:
        return c
    order = _descending(c)
    return Candidates(c.ids[order], c.logits[order], True)


def _descending(c: Candidates) -> Ids:
    """The order that puts the largest logit first and, among equal ones, the smallest id.

    Where the ids ascend, logit and place make one whole number: numpy sorts those several times as fast.
    """
    if not (c.ids[1:] > c.ids[:-1]).all():
        return np.lexsort((c.ids, -c.logits))
    bits = (np.float32(0) - c.logits).view(np.int32)  # never -0, which would not equal 0
    ordered = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))  # as whole numbers in the order of the floats
    keys = (ordered.astype(np.int64) << 32) | np.arange(len(bits))
    keys.sort()
    return keys & 0xFFFFFFFF


def running_sum(values: Logits) -> Logits:
    """Float32 sums from the first value on: cumsum adds one after the other as a C loop does, sum() in pairs."""
    return values.cumsum(dtype=np.float32)


def softmax(c: Candidates) -> Logits:
    """Float32 probabilities (n,) in the order of the candidates; their sum runs in that order, too."""
    highest = c.logits[0] if c.is_sorted else c.logits.max()
    with np.errstate(over="ignore", invalid="ignore"):
        shares = expf(c.logits - highest)
        return shares / running_sum(shares)[-1]


def logit_bias(c: Candidates, bias: Sequence[tuple[int, float]]) -> Candidates:
    """Adds to the logits of the tokens named, in turn where one is named twice; c: the whole vocabulary, by id."""
    if not bias:
        return c
    logits = c.logits.copy()
    ids, amounts = zip(*bias, strict=True)
    np.add.at(logits, np.array(ids), np.array(amounts, dtype=np.float32))
    return c._replace(logits=logits)


def penalties(c: Candidates, counts: Mapping[int, int], repeat: float, frequency: float, presence: float) -> Candidates:
    """Logits of the tokens counted: multiplied (at most zero) or divided by `repeat`, less count * frequency, less
    presence."""
    if repeat == 1 and frequency == 0 and presence == 0:
        return c
    logits = c.logits.copy()
    seen = np.fromiter(counts, dtype=np.int64, count=len(counts))
    places = places_of(c.ids, seen)
    found = places >= 0
    places, times = places[found], np.fromiter(counts.values(), dtype=np.float32, count=len(counts))[found]
    values = logits[places]
    factor = np.float32(repeat)
    with np.errstate(over="ignore"):
        values = np.where(values <= 0, values * factor, values / factor)
        logits[places] = values - (times * np.float32(frequency) + np.float32(presence))
    return Candidates(c.ids, logits)


def places_of(ids: Ids, wanted: Ids) -> Ids:
    """Where each wanted id stands among ids; -1 where it does not."""
    in_place = wanted[wanted < len(ids)]
    if len(in_place) == len(wanted) and (ids[wanted] == wanted).all():
        return wanted  # the whole vocabulary, by id
    order = np.argsort(ids)
    at = np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)
    return np.where(ids[order[at]] == wanted, order[at], -1)


def top_n_sigma(c: Candidates, n: float) -> Candidates:
    """Logits more than n standard deviations below the highest become -inf; -inf does not count for the deviation."""
    if n <= 0 or len(c.logits) <= 1:
        return c
    valid = c.logits[c.logits != -np.inf]
    if not valid.size:
        return c
    count = np.float32(valid.size)
    mean = running_sum(valid)[-1] / count
    distances = (valid - mean).astype(np.float64)
    deviation = np.sqrt(_sum_of_squares(distances) / count)
    with np.errstate(over="ignore"):
        least = c.logits.max() - np.float32(n) * deviation
    return c._replace(logits=np.where(c.logits < least, np.float32(-np.inf), c.logits))


def _sum_of_squares(distances: NDArray[np.float64]) -> np.float32:
    """A float32 sum to which squares are added in float64, rounded after each addition.

    Within one binade of the sum each addition moves it by a whole number of its units, the square's nearest. So a
    whole stretch is added at once, up to where the sum leaves the binade or a square lies halfway between two units,
    and that step is done as it is written.
    """
    squares = distances * distances
    total, at = np.float32(0), 0
    with np.errstate(over="ignore", invalid="ignore"):
        while at < len(squares):
            total = np.float32(np.float64(total) + squares[at])
            at += 1
            if not np.isfinite(total):
                return total
            unit = float(np.spacing(total))
            steps = squares[at : 2 * at + 32] / unit
            whole = np.rint(steps)
            sums = float(total) + np.cumsum(whole) * unit
            binade = unit * 2.0**24
            stop = np.flatnonzero((sums >= binade) | (np.abs(np.abs(steps - whole) - 0.5) < 2.0**-20))
            n = int(stop[0]) if stop.size else len(steps)
            if n:
                total, at = np.float32(sums[n - 1]), at + n
    return total


def top_k(c: Candidates, k: int) -> Candidates:
    """The k largest logits, sorted; all of them, as they are, for k <= 0."""
    if k <= 0:
        return c
    if c.is_sorted:
        return Candidates(c.ids[:k], c.logits[:k], True)
    if k < len(c.logits):
        c = _not_hopeless(c, k)
        least = np.partition(c.logits, len(c.logits) - k)[len(c.logits) - k]
        above = np.flatnonzero(c.logits > least)
        equal = np.flatnonzero(c.logits == least)
        equal = equal[np.argsort(c.ids[equal], kind="stable")[: k - len(above)]]
        keep = np.sort(np.concatenate([above, equal]))
        c = Candidates(c.ids[keep], c.logits[keep])
    return sort(c)


def _not_hopeless(c: Candidates, k: int) -> Candidates:
    """Without what cannot be among the k largest: less than the k-th largest of the highest logits of many groups."""
    n_groups = len(c.logits) // _GROUP
    if n_groups < 2 * k:
        return c
    highest = c.logits[: n_groups * _GROUP].reshape(_GROUP, n_groups).max(axis=0)
    keep = np.flatnonzero(c.logits >= np.partition(highest, n_groups - k)[n_groups - k])
    return Candidates(c.ids[keep], c.logits[keep])


def typical(c: Candidates, p: float) -> Candidates:
    """The tokens whose surprise is nearest to the entropy, until their probabilities exceed p; all for p >= 1.

    A probability of zero makes the entropy nan there, and the order that of an unstable sort; here it stays as it is.
    """
    if p >= 1:
        return c
    c = sort(c)
    shares = softmax(c)
    order = np.argsort(off_entropy(shares), kind="stable")
    reached = running_sum(shares[order]) > np.float32(p)
    n_kept = int(reached.argmax()) + 1 if reached.any() else len(order)
    return Candidates(c.ids[order[:n_kept]], c.logits[order[:n_kept]])


def off_entropy(shares: Logits) -> Logits:
    """How far the surprise of each of the probabilities (n,) lies off their entropy, in nats."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = logf(shares)
        entropy = running_sum(-shares * logs)[-1]
        return np.abs(-logs - entropy)


def top_p(c: Candidates, p: float) -> Candidates:
    """The shortest sorted prefix whose probabilities sum to at least p; everything, as it is, for p >= 1."""
    if p >= 1:
        return c
    shares = softmax(c)
    if not c.is_sorted:
        order = _descending(c)
        c, shares = Candidates(c.ids[order], c.logits[order], True), shares[order]
    reached = running_sum(shares) >= np.float32(p)
    n_kept = int(reached.argmax()) + 1 if reached.any() else len(shares)
    return Candidates(c.ids[:n_kept], c.logits[:n_kept], True)


def min_p(c: Candidates, p: float) -> Candidates:
    """Tokens at least p times as likely as the likeliest, order kept; everything for p <= 0."""
    if p <= 0:
        return c
    keep = c.logits >= c.logits.max() + log_one(p)
    if not keep.any():  # p is above 1: the first of the sorted stays
        c = sort(c)
        return Candidates(c.ids[:1], c.logits[:1], True)
    return Candidates(c.ids[keep], c.logits[keep], c.is_sorted)


def xtc(c: Candidates, threshold: float) -> Candidates:
    """Without the likely tokens: of those at or above the threshold only the least likely stays. The caller has drawn
    the lot that says whether to do so."""
    c = sort(c)
    below = softmax(c) < np.float32(threshold)
    n_above = int(below.argmax()) if below.any() else len(below)
    first = max(n_above - 1, 0)
    return Candidates(c.ids[first:], c.logits[first:], True)


def temperature(c: Candidates, t: float) -> Candidates:
    """Logits divided by t > 0 in float32; for t <= 0 all but the first largest become -inf."""
    if t <= 0:
        logits = np.full_like(c.logits, -np.inf)
        best = int(c.logits.argmax())
        logits[best] = c.logits[best]
        return c._replace(logits=logits)
    with np.errstate(over="ignore", divide="ignore"):
        return c._replace(logits=c.logits / np.float32(t))


def dynamic_temperature(c: Candidates, t: float, spread: float, exponent: float) -> Candidates:
    """A temperature from t - spread (at least 0) to t + spread, higher where the tokens are more evenly likely: by the
    entropy's share of the largest one possible, to the power of `exponent`; t itself for spread <= 0."""
    if spread <= 0:
        return temperature(c, t)
    if len(c.ids) <= 1:
        return c
    low = max(np.float32(0), np.float32(t) - np.float32(spread))
    high = np.float32(t) + np.float32(spread)
    largest = -log_one(float(np.float32(1) / np.float32(len(c.ids))))
    c = sort(c)
    shares = softmax(c)
    positive = shares[shares > 0]
    entropy = running_sum(-(positive * logf(positive)))[-1] if positive.size else np.float32(0)
    return temperature(c, float(low + (high - low) * powf(float(entropy / largest), exponent)))
