"""What the machine can do at most, measured on the threads in use: bytes read a second, FLOP a second.

A token cannot be computed faster than its weights are read, a prompt not faster than its products are computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from llamakit.errors import MemoryError_
from llamakit.files import available_memory_bytes
from llamakit.model.device import faster_dtype

# Larger than any cache; the free memory may allow less.
_READ_BYTES, _LEAST_READ_BYTES, _SHARE_OF_FREE = 256 << 20, 1 << 20, 1 / 8
_MATRIX = 2048
_SECONDS = 0.2


@dataclass(frozen=True)
class Limits:
    """read_bandwidth: bytes a second out of memory; gemm_peak: FLOP a second, in bf16 or float32, whichever the device
    multiplies faster."""

    read_bandwidth: float
    gemm_peak: float


def measure_limits(device: torch.device | str = "cpu") -> Limits:
    """Both limits of a device with as many threads as torch uses now, in about a second.

    Each is the best of many short runs: what else happens on the machine only makes a run longer. Raises MemoryError_
    where there is no memory to read.
    """
    where = torch.device(device)
    return Limits(_read_bandwidth(where), gemm_peak(where))


def _read_bandwidth(device: torch.device) -> float:
    # The sum of 64-bit integers is torch's fastest way to touch every byte; that of floats waits for its additions.
    free = available_memory_bytes()
    n_bytes = _READ_BYTES if free is None else min(_READ_BYTES, int(free * _SHARE_OF_FREE))
    if n_bytes < _LEAST_READ_BYTES:
        raise MemoryError_("there is no memory left to measure how fast it is read", hint="close other programs")
    data = torch.ones(n_bytes // 8, dtype=torch.int64, device=device)
    return data.nbytes / _fastest_s(data.sum, device)


def gemm_peak(device: torch.device) -> float:
    """FLOP a second of a large product, in the type of `Limits`; a quarter of a second."""
    dtype = faster_dtype(device)
    a, b, out = (torch.ones(_MATRIX, _MATRIX, dtype=dtype, device=device) for _ in range(3))
    return 2 * _MATRIX**3 / _fastest_s(lambda: torch.mm(a, b.t(), out=out), device)


def _fastest_s(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest run, after one that does not count."""
    fastest, deadline = float("inf"), None
    while deadline is None or time.perf_counter() < deadline:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ended = time.perf_counter()
        fastest = ended - started if deadline is None else min(fastest, ended - started)
        deadline = deadline or ended + _SECONDS
    return fastest
