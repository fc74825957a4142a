"""std::mt19937 and the two uniform distributions that libstdc++ makes of it: the random numbers of llama.cpp."""

from __future__ import annotations

import numpy as np


class Mt19937:
    """One generator; equal seeds (0 to 2**32 - 1) give the numbers that C++ gives."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.RandomState(seed)

    def _words(self, n: int) -> list[int]:
        return np.frombuffer(self._random.bytes(4 * n), dtype="<u4").tolist()

    def uniform(self) -> float:
        """std::uniform_real_distribution<double>(0, 1): two words, the low half first; below 1."""
        low, high = self._words(2)
        value = (float(low) + float(high) * 2.0**32) / 2.0**64
        return value if value < 1 else float(np.nextafter(1.0, 0.0))

    def uniform_float(self) -> np.float32:
        """std::uniform_real_distribution<float>(0, 1): one word; below 1."""
        value = np.float32(self._words(1)[0]) / np.float32(2.0**32)
        return value if value < 1 else np.nextafter(np.float32(1), np.float32(0))
