"""std::mt19937 and the two uniform distributions that libstdc++ makes of it: the random numbers of llama.cpp."""

from __future__ import annotations

import numpy as np

_AT_ONCE = 256


class Mt19937:
    """One generator; equal seeds (0 to 2**32 - 1) give the numbers that C++ gives."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.RandomState(seed)
        self._words: list[int] = []

    def _word(self) -> int:
        if not self._words:  # many at once: a call costs more than a number
            self._words = np.frombuffer(self._random.bytes(4 * _AT_ONCE), dtype="<u4")[::-1].tolist()
        return self._words.pop()

    def uniform(self) -> float:
        """std::uniform_real_distribution<double>(0, 1): two words, the low half first; below 1."""
        low, high = self._word(), self._word()
        value = (float(low) + float(high) * 2.0**32) / 2.0**64
        return value if value < 1 else float(np.nextafter(1.0, 0.0))

    def uniform_float(self) -> np.float32:
        """std::uniform_real_distribution<float>(0, 1): one word; below 1."""
        value = np.float32(self._word()) / np.float32(2.0**32)
        return value if value < 1 else np.nextafter(np.float32(1), np.float32(0))
