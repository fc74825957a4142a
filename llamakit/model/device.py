"""Where and in what precision to compute: decided by what the machine can do, never by its name."""

from __future__ import annotations

import functools
import time

import torch

from llamakit.errors import UsageError


def resolve_device(requested: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> a device that is there. Raises UsageError for cuda where there is none."""
    has_cuda = torch.cuda.is_available()
    if requested == "cuda" and not has_cuda:
        raise UsageError("--device cuda: this machine has no usable CUDA device", hint="give --device cpu or auto")
    return torch.device("cuda" if has_cuda and requested != "cpu" else "cpu")


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware; elsewhere it is emulated, and float32 is many times faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@functools.cache
def faster_dtype(device: torch.device) -> torch.dtype:
    """The one of bfloat16 and float32 that the device multiplies faster; on a processor that has both, measured.

    What a processor is called does not tell: with AMX bf16 is many times faster, on AMD twice, and on an Intel
    processor without AMX half as fast. Some 60 ms, once; in one thread's processor time, which other programs do not
    make longer.
    """
    if device.type == "cuda" or not has_fast_bf16(device):
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32
    seconds = dict.fromkeys((torch.bfloat16, torch.float32), float("inf"))
    factors = {dtype: (torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)) for dtype in seconds}
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(4):  # in turn, the best counts: the first makes a kernel
            for dtype, (a, b) in factors.items():
                started = time.thread_time()
                torch.nn.functional.linear(a, b)
                seconds[dtype] = min(seconds[dtype], time.thread_time() - started)
    finally:
        torch.set_num_threads(n_threads)
    return min(seconds, key=lambda dtype: seconds[dtype])


def can_prepack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matrices of dtype are held in oneDNN's own layout: in bfloat16; its float32 is less exact."""
    has_products = dtype == torch.bfloat16 and has_fast_bf16(device)
    return device.type == "cpu" and has_products and torch.backends.mkldnn.is_available()


def training_dtype(requested: str, device: torch.device) -> torch.dtype:
    """`f32` or `bf16` as asked; `auto`: the faster one (float16 never: its backward crawls on a CPU)."""
    if requested == "auto":
        return faster_dtype(device)
    return torch.bfloat16 if requested == "bf16" else torch.float32


def measuring_dtype(requested: str) -> torch.dtype:
    """`f32` or `bf16` as asked; `auto`: float32, so that what is seen is the model's and not the arithmetic's."""
    return torch.bfloat16 if requested == "bf16" else torch.float32


def inference_dtype(requested: str, device: torch.device, *, n_weights: int, free_bytes: int | None) -> torch.dtype:
    """`f32` or `bf16` as asked; `auto`: float32 on a CPU while the decoded weights take half the memory at most.

    A CPU reads decoded weights at one speed in both, so precision is free there until memory runs short.
    """
    if requested != "auto":
        return torch.float32 if requested == "f32" else torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32
    fits = free_bytes is None or 4 * n_weights <= free_bytes / 2
    return torch.float32 if fits or not has_fast_bf16(device) else torch.bfloat16


def dtype_name(dtype: torch.dtype) -> str:
    """`f32` or `bf16`, as the option spells it."""
    return "bf16" if dtype == torch.bfloat16 else "f32"
