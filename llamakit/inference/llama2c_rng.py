"""llama2.c's own sampler (run.c): temperature, top-p with its cutoff, and a 64-bit xorshift* generator."""

from __future__ import annotations

import numpy as np

from llamakit.inference.libm import expf
from llamakit.inference.samplers import Logits, running_sum

_MASK = 2**64 - 1


class Xorshift:
    """xorshift64* (Vigna, arXiv 1402.6246), the upper 24 of its bits as a float32 in [0, 1). seed: not 0."""

    def __init__(self, seed: int) -> None:
        self._state = seed

    def uniform(self) -> np.float32:
        """The next number."""
        s = self._state
        s ^= s >> 12
        s ^= s << 25 & _MASK
        s ^= s >> 27
        self._state = s
        high = (s * 0x2545F4914F6CDD1D & _MASK) >> 32
        return np.float32((high >> 8) / 16777216)


def sample(logits: Logits, temperature: float, top_p: float, random: Xorshift) -> int:
    """The next token for logits (V,) float32, drawn with one number; the first likeliest for temperature 0."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits / np.float32(temperature)
    shares = expf(scaled - scaled.max())
    shares = shares / running_sum(shares)[-1]
    coin = random.uniform()
    if not 0 < top_p < 1:
        return min(int(np.searchsorted(running_sum(shares), coin, side="right")), len(shares) - 1)
    return _from_top(shares, np.float32(top_p), coin)


def _from_top(shares: Logits, top_p: np.float32, coin: np.float32) -> int:
    """Among the likeliest whose sum exceeds top_p; what is too small to be one of them is left out beforehand."""
    cutoff = (np.float32(1) - top_p) / np.float32(max(len(shares) - 1, 1))
    ids = np.flatnonzero(shares >= cutoff)
    ids = ids[np.argsort(-shares[ids], kind="stable")]
    sums = running_sum(shares[ids])
    exceeded = sums > top_p
    last = int(exceeded.argmax()) if exceeded.any() else len(ids) - 1
    chosen = int(np.searchsorted(sums[: last + 1], coin * sums[last], side="right"))
    return int(ids[min(chosen, last)])
