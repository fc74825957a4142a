"""From logits to a token, with llama.cpp's definitions, order and random numbers (src/llama-sampler.cpp).

A sampler is a function over candidates: ids (n,) int64 and logits (n,) float32, n falling from V to 1. The order is
penalties, top_k, top_p, min_p, temperature, dist. Sorted candidates stay sorted, likeliest first; equal logits are
ordered by id (llama.cpp leaves their order open). With equal logits and seed the token is llama.cpp's.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llamakit.errors import LlamakitError
from llamakit.inference.config import GenerateConfig

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]
Candidates = tuple[Ids, Logits]


def penalize(logits: Logits, recent: Sequence[int], repeat: float) -> Logits:
    """Logits (V,) with those of the recent tokens divided by `repeat` where positive, multiplied elsewhere; a copy."""
    seen = np.unique(np.asarray(recent, dtype=np.int64))
    if repeat == 1 or not seen.size:
        return logits
    logits, factor = logits.copy(), np.float32(repeat)
    values = logits[seen]
    logits[seen] = np.where(values <= 0, values * factor, values / factor)
    return logits


def _sort(ids: Ids, logits: Logits) -> Candidates:
    order = np.lexsort((ids, -logits))
    return ids[order], logits[order]


def top_k(ids: Ids, logits: Logits, k: int) -> Candidates:
    """The k largest logits, sorted; all of them, unsorted, for k <= 0."""
    if k <= 0:
        return ids, logits
    if k < len(logits):
        least = np.partition(logits, len(logits) - k)[len(logits) - k]
        above = np.flatnonzero(logits > least)
        equal = np.flatnonzero(logits == least)[: k - len(above)]
        keep = np.concatenate([above, equal])
        ids, logits = ids[keep], logits[keep]
    return _sort(ids, logits)


def _exp(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """C's expf: numpy's float32 exp is off by a unit in the last place where a rounded float64 one is not."""
    return np.exp(x, dtype=np.float64).astype(np.float32)


def top_p(ids: Ids, logits: Logits, p: float) -> Candidates:
    """The shortest sorted prefix whose float32 probabilities sum to at least p; everything, as it is, for p >= 1."""
    if p >= 1:
        return ids, logits
    shares = _exp(logits - logits.max())
    # cumsum adds one after the other in float32, as the C loop does; sum() would add pairwise.
    total = np.cumsum(shares, dtype=np.float32)[-1]
    ids, logits = _sort(ids, logits)
    reached = np.cumsum(_exp(logits - logits[0]) / total, dtype=np.float32) >= np.float32(p)
    n_kept = int(reached.argmax()) + 1 if reached.any() else len(ids)
    return ids[:n_kept], logits[:n_kept]


def min_p(ids: Ids, logits: Logits, p: float) -> Candidates:
    """Tokens at least p times as likely as the likeliest, order kept; everything for p <= 0."""
    if p <= 0:
        return ids, logits
    least = logits.max() + np.float32(np.log(np.float64(np.float32(p))))
    keep = logits >= least
    return ids[keep], logits[keep]


def temperature(ids: Ids, logits: Logits, t: float) -> Candidates:
    """Logits divided by t > 0 in float32; for t <= 0 the first largest alone."""
    if t <= 0:
        best = int(logits.argmax())
        return ids[best : best + 1], logits[best : best + 1]
    return ids, logits / np.float32(t)


def dist(ids: Ids, logits: Logits, uniform: float) -> int:
    """The id at which the running float64 sum of exp(logit - max) reaches `uniform` in [0, 1) of the total."""
    sums = np.cumsum(_exp(logits - logits.max()), dtype=np.float64)
    chosen = int(np.searchsorted(sums, sums[-1] * uniform, side="left"))
    return int(ids[min(chosen, len(ids) - 1)])


def log_probability(logits: Logits, token: int) -> float:
    """Natural logarithm of the softmax of logits (V,) at token, in float64."""
    shifted = logits.astype(np.float64) - float(logits.max())
    return float(shifted[token] - np.log(np.exp(shifted).sum()))


def resolve_seed(seed: int) -> int:
    """The seed itself, or for -1 a random one in [0, 2**32 - 1), as llama.cpp keeps the largest for `random`."""
    return secrets.randbelow(2**32 - 1) if seed == -1 or seed == 2**32 - 1 else seed


class Sampler:
    """The whole chain with its random numbers (std::mt19937) and the window of recent tokens.

    seed: the one in use, also when the configuration asked for a random one.
    """

    def __init__(self, config: GenerateConfig, prompt: Sequence[int] = ()) -> None:
        self.seed = resolve_seed(config.seed)
        self._config = config
        self._random = np.random.RandomState(self.seed)
        self._recent: list[int] = []
        for token in prompt[-config.repeat_last_n :] if config.repeat_last_n else ():
            self.accept(token)

    def _uniform(self) -> float:
        """std::uniform_real_distribution<double>(0, 1) over std::mt19937: two draws, the low half first."""
        low, high = np.frombuffer(self._random.bytes(8), dtype="<u4").tolist()
        value = (float(low) + float(high) * 2.0**32) / 2.0**64
        return value if value < 1 else float(np.nextafter(1.0, 0.0))

    def accept(self, token: int) -> None:
        """Count a token as recent."""
        if self._config.repeat_last_n:
            self._recent.append(token)
            del self._recent[: -self._config.repeat_last_n]

    def sample(self, logits: Logits) -> int:
        """The next token for logits (V,) float32; it counts as recent from now on.

        Raises LlamakitError for logits that are not finite.
        """
        token = self._choose(logits)
        self.accept(token)
        return token

    def _choose(self, logits: Logits) -> int:
        config = self._config
        if not np.isfinite(logits).all():
            bad = int(np.flatnonzero(~np.isfinite(logits))[0])
            raise LlamakitError(
                f"the model computed {logits[bad]} as the logit of token {bad} (expected a finite number)",
                hint="the weights or an adapter are damaged, or the scale of an adapter is too large",
            )
        logits = penalize(logits, self._recent, config.repeat_penalty)
        if config.temperature <= 0:
            return int(logits.argmax())
        candidates = top_k(np.arange(len(logits), dtype=np.int64), logits, config.top_k)
        candidates = top_p(*candidates, config.top_p)
        candidates = min_p(*candidates, config.min_p)
        candidates = temperature(*candidates, config.temperature)
        return dist(*candidates, self._uniform())
