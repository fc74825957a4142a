"""Random numbers and orders as functions of a counter, never of a generator's history.

The same (seed, epoch, index) gives the same sample on every platform, after any resume, and for any number of
workers. The mixing function is SplitMix64's finalizer (Steele, Lea and Flood 2014).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_U64 = np.uint64
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer, uint64 -> uint64, a bijection."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def _key(*parts: int) -> int:
    """One 64-bit key of several integers."""
    key = 0
    for part in parts:
        key = int(_mix(np.array([(key + _GOLDEN + (part & _MASK)) & _MASK], dtype=_U64))[0])
    return key


def counter_uniform(seed: int, stream: int, index: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), float64, one for each counter value in `index`."""
    with np.errstate(over="ignore"):
        bits = _mix(index.astype(_U64) * _U64(_GOLDEN) + _U64(_key(seed, stream)))
    return (bits >> _U64(11)).astype(np.float64) * 2.0**-53


def counter_normal(seed: int, stream: int, n: int) -> np.ndarray:
    """n standard normal numbers, float64 (Box and Muller 1958)."""
    counters = np.arange(2 * n, dtype=np.int64)
    radius = np.sqrt(-2 * np.log1p(-counter_uniform(seed, stream, counters[0::2])))
    return radius * np.cos(2 * np.pi * counter_uniform(seed, stream, counters[1::2]))


def shuffled(seed: int, epoch: int, positions: np.ndarray, count: int) -> np.ndarray:
    """Which item of `count` stands at each of `positions` (int64, below count) in the shuffle of an epoch.

    A four-round Feistel network over the smallest even number of bits that holds `count`, walked until the value is
    below count: a true permutation, in constant memory, for any count.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    low = _U64((1 << half) - 1)
    keys = [_U64(_key(seed, epoch, r)) for r in range(4)]

    def permute(x: np.ndarray) -> np.ndarray:
        left, right = x >> _U64(half), x & low
        for key in keys:
            with np.errstate(over="ignore"):
                left, right = right, left ^ (_mix(right + key) & low)
        return left << _U64(half) | right

    values = permute(positions.astype(_U64))
    while (outside := values >= _U64(count)).any():
        values[outside] = permute(values[outside])
    return values.astype(np.int64)


@dataclass
class SampleOrder:
    """The shuffled order of `count` samples, and where a run stands in it."""

    seed: int
    count: int
    epoch: int = 0
    next_sample: int = 0

    def sample(self, ahead: int) -> int:
        """Index of the sample `ahead` places on, in this epoch's order (which wraps within a batch)."""
        position = (self.next_sample + ahead) % self.count
        return int(shuffled(self.seed, self.epoch, np.array([position]), self.count)[0])

    def uniform(self, ahead: int) -> float:
        """A number in [0, 1) that belongs to that place of this epoch."""
        position = (self.next_sample + ahead) % self.count
        return float(counter_uniform(self.seed, 1 + self.epoch, np.array([position]))[0])

    def advance(self, used: int) -> bool:
        """Move on by the samples that a batch used; True when that completed the epoch."""
        self.next_sample += used
        if self.next_sample < self.count:
            return False
        self.epoch, self.next_sample = self.epoch + 1, 0
        return True
