"""The ends of a chain: from candidates to a token, as llama.cpp draws it (src/llama-sampler.cpp).

`uniform`: gives the next number of std::uniform_real_distribution<double>(0, 1).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llamakit.inference.libm import expf, log2f, logf, powf
from llamakit.inference.samplers import Candidates, Logits, running_sum, softmax, sort, top_k

Uniform = Callable[[], float]


def greedy(c: Candidates) -> int:
    """The id of the first largest logit."""
    return int(c.ids[c.logits.argmax()])


def dist(c: Candidates, uniform: Uniform) -> int:
    """The id at which the running float64 sum of exp(logit - max) reaches a random share of the whole; one number is
    drawn for a single candidate, too. The last one where the largest logit is infinite: no sum is a number then."""
    share = uniform()
    if len(c.ids) == 1:
        return int(c.ids[0])
    highest = c.logits[0] if c.is_sorted else c.logits.max()
    if not np.isfinite(highest):
        return int(c.ids[-1])
    sums = expf(c.logits - highest).cumsum(dtype=np.float64)
    chosen = int(sums.searchsorted(sums[-1] * share))
    return int(c.ids[min(chosen, len(c.ids) - 1)])


def discrete(shares: Logits, uniform: Uniform) -> int:
    """An index of shares (n,) as std::discrete_distribution draws it; nothing is drawn for n = 1."""
    if len(shares) < 2:
        return 0
    weights = shares.astype(np.float64)
    sums = np.cumsum(weights / np.cumsum(weights)[-1])
    sums[-1] = 1.0
    return int(np.searchsorted(sums, uniform(), side="left"))


def mirostat(
    c: Candidates, mu: np.float32, tau: float, eta: float, n_vocab: int, uniform: Uniform
) -> tuple[int, np.float32]:
    """Mirostat 1 (arXiv 2007.14966) over the 100 likeliest tokens: (id, the next mu)."""
    c = sort(c)
    c = top_k(c, _mirostat_k(softmax(c), mu, n_vocab))
    return _surprised(c, mu, tau, eta, uniform)


def _mirostat_k(shares: Logits, mu: np.float32, n_vocab: int) -> int:
    """How many tokens Mirostat 1 keeps. What is not a number or too large for an int counts as 1, as on x86-64."""
    n = min(99, len(shares) - 1)
    ranks = np.arange(1, n + 1, dtype=np.float32)
    one = np.float32(1)
    with np.errstate(all="ignore"):
        t = logf((ranks + one) / ranks)
        b = logf(shares[:n] / shares[1 : n + 1])
        s_hat = running_sum(t * b)[-1] / running_sum(t * t)[-1] if n else np.float32(np.nan)
        epsilon = s_hat - one
        power = powf(2.0, float(mu))
        base = (epsilon * power) / (one - powf(n_vocab, float(-epsilon)))
        k = float(powf(float(base), float(one / s_hat)))
    return max(int(k), 1) if -(2.0**31) <= k < 2.0**31 else 1


def mirostat_v2(c: Candidates, mu: np.float32, tau: float, eta: float, uniform: Uniform) -> tuple[int, np.float32]:
    """Mirostat 2: without the tokens whose surprise in bits is above mu (one stays): (id, the next mu)."""
    c = sort(c)
    above = -log2f(softmax(c)) > mu
    n = max(int(above.argmax()), 1) if above.any() else len(above)
    return _surprised(Candidates(c.ids[:n], c.logits[:n], True), mu, tau, eta, uniform)


def _surprised(c: Candidates, mu: np.float32, tau: float, eta: float, uniform: Uniform) -> tuple[int, np.float32]:
    """Draw, and move mu by eta times what the surprise in bits lies off tau."""
    shares = softmax(c)
    at = discrete(shares, uniform)
    error = -log2f(shares[at : at + 1])[0] - np.float32(tau)
    return int(c.ids[at]), mu - np.float32(eta) * error


def adaptive_p(c: Candidates, target: np.float32 | None, uniform: Uniform) -> tuple[int, np.float32]:
    """Prefers tokens of about the probability `target` (None: draws from the candidates as they are): (id, its
    probability before).

    Logits become 5 - 10 d^2 / (1 + d), d the distance to the target in units of 0.3; -inf stays.
    """
    shares = softmax(c)
    if target is None:
        at = discrete(shares, uniform)
        return int(c.ids[at]), shares[at]
    one = np.float32(1)
    d = np.abs((shares - target) * (one / np.float32(0.3)))
    bent = np.float32(5) - np.float32(10) * d * d / (one + d)
    bent = np.where(c.logits == -np.inf, c.logits, bent)
    # The mark stays although the order is gone: the first logit, not the largest, is then what is subtracted.
    at = discrete(softmax(c._replace(logits=bent)), uniform)
    return int(c.ids[at]), shares[at]
