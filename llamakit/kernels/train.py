"""native/train.h's kernels on torch tensors: what a training step does to rows between its matrix products.

They take contiguous CPU tensors of bfloat16 or float32, compute in float32, and give the same bits with any number of
threads. Where `usable` says no, the caller does the same in torch.

Shapes: N rows, n numbers of a row; B batch, T tokens, H heads, D head dimension.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from llamakit.native import Library, library

(_RMS_NORM, _RMS_NORM_BACK, _GATE, _GATE_BACK, _ROTATE, _CAUSAL_SOFTMAX, _SOFTMAX_BACK, _CROSS_ENTROPY, _ACCUMULATE,
 _NARROW, _WIDEN, _OUTER) = range(12)  # fmt: skip
_TYPES = (torch.bfloat16, torch.float32)
# Numbers of a piece of work: some microseconds, so that threads end together.
_PIECE = 16384
# Columns of a piece of an outer product: OUTER_COLUMNS of native/narrow.h.
_OUTER_COLUMNS = 32
# Rows whose share of a norm's gradient is added up in one place: not for the number of threads to decide.
_ROWS = 64


class _Job(ctypes.Structure):
    """train_job of native/train.h."""

    _fields_ = (
        ("x", ctypes.c_void_p * 3), ("out", ctypes.c_void_p * 2),
        ("n", ctypes.c_int64), ("step", ctypes.c_int64), ("n_tokens", ctypes.c_int64), ("n_heads", ctypes.c_int64),
        ("first", ctypes.c_int64), ("tile", ctypes.c_int64), ("strides", ctypes.c_int64 * 8), ("scale", ctypes.c_float),
    )  # fmt: skip


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels take these: of one type that they know, on the CPU, and the library is there."""
    return (
        library() is not None
        and tensors[0].dtype in _TYPES
        and all(x.device.type == "cpu" and x.dtype == tensors[0].dtype for x in tensors)
    )


def _run(
    kernel: int,
    inputs: tuple[Tensor | None, ...],
    outputs: tuple[Tensor | None, ...],
    n: int,
    n_rows: int,
    *,
    bf16: bool,
    scale: float = 1.0,
    step: int = 0,
    strides: Sequence[int] = (),
    n_tokens: int = 0,
    n_heads: int = 0,
    first: int = 0,
    tile: int = 0,
) -> None:
    found = library()
    assert isinstance(found, Library), "the caller asked `usable`"
    places = {"n_tokens": n_tokens, "n_heads": n_heads, "first": first, "tile": tile}
    job = _Job(n=n, step=step or max(1, _PIECE // n), scale=scale, **places)
    job.x[:] = [None if x is None else x.data_ptr() for x in inputs] + [None] * (3 - len(inputs))
    job.out[:] = [None if x is None else x.data_ptr() for x in outputs] + [None] * (2 - len(outputs))
    job.strides[: len(strides)] = strides
    found.train(kernel, job, n_rows, torch.get_num_threads(), bf16=bf16)


def _is_bf16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight; x (..., n), weight (n,) float32."""
    x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    n = x.shape[-1]
    _run(_RMS_NORM, (x, weight.contiguous()), (y,), n, x.numel() // n, bf16=_is_bf16(x), scale=eps)
    return y


def rms_norm_back(
    x: Tensor, weight: Tensor, grad: Tensor, eps: float, *, weight_too: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x (..., n), and of the weight (n,) float32 where it is wanted."""
    x, grad, dx = x.contiguous(), grad.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    n = x.shape[-1]
    n_rows = x.numel() // n
    parts = torch.empty(-(-n_rows // _ROWS), n) if weight_too else None
    _run(
        _RMS_NORM_BACK, (x, weight.contiguous(), grad), (dx, parts), n, n_rows,
        bf16=_is_bf16(x), scale=eps, step=_ROWS,
    )  # fmt: skip
    return dx, None if parts is None else parts.sum(0)


def gate(gates: Tensor, ups: Tensor) -> Tensor:
    """silu(gates) * ups, of one shape."""
    gates, ups = gates.contiguous(), ups.contiguous()
    y = torch.empty(gates.shape, dtype=gates.dtype)
    _run(_GATE, (gates, ups), (y,), gates.shape[-1], gates.numel() // gates.shape[-1], bf16=_is_bf16(gates))
    return y


def gate_back(gates: Tensor, ups: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of both."""
    gates, ups, grad = gates.contiguous(), ups.contiguous(), grad.contiguous()
    d_gates, d_ups = (torch.empty(gates.shape, dtype=gates.dtype) for _ in range(2))
    n = gates.shape[-1]
    _run(_GATE_BACK, (gates, ups, grad), (d_gates, d_ups), n, gates.numel() // n, bf16=_is_bf16(gates))
    return d_gates, d_ups


def rotate(x: Tensor, rotations: Tensor, out: Tensor, *, back: bool = False) -> Tensor:
    """x (B, T, H, D) with its pairs turned, into `out` of that shape; both of any strides but along D.

    rotations: (T, 1, D/2) or (B, T, 1, D/2) complex64. back: turned the other way.
    """
    b, t, h, d = x.shape
    turns = torch.view_as_real(rotations).contiguous()
    per_batch = t * d if rotations.dim() == 4 else 0
    _run(
        _ROTATE, (x, turns), (out,), d, b * t * h,
        bf16=_is_bf16(x), scale=-1.0 if back else 1.0, n_tokens=t, n_heads=h,
        strides=(*x.stride()[:3], *out.stride()[:3], per_batch, d),
    )  # fmt: skip
    return out


def _segments(starts: Tensor | None, n_rows: int, tile: int) -> tuple[int, int]:
    """How the kernels find a row's place in starts (B, T): its T, and how many heads a row of the batch has."""
    if starts is None:
        return 0, 0
    assert starts.dtype == torch.int64 and starts.is_contiguous() and n_rows % (len(starts) * tile) == 0
    return starts.shape[1], n_rows // (len(starts) * tile)


def causal_softmax_(scores: Tensor, first: int, tile: int, scale: float, starts: Tensor | None = None) -> Tensor:
    """softmax(scale * scores) in place, (N, n) contiguous; row r sees the keys up to first + r % tile, no others.

    starts: (B, T) int64 contiguous, the first key that each query sees; rows are then (B, H, tile).
    """
    n = scores.shape[-1]
    n_rows = scores.numel() // n
    n_tokens, n_heads = _segments(starts, n_rows, tile)
    _run(
        _CAUSAL_SOFTMAX, (None, starts), (scores,), n, n_rows,
        bf16=_is_bf16(scores), scale=scale, first=first, tile=tile, n_tokens=n_tokens, n_heads=n_heads,
    )  # fmt: skip
    return scores


def softmax_back_(
    weights: Tensor, grad: Tensor, first: int, tile: int, scale: float, starts: Tensor | None = None
) -> Tensor:
    """The gradient of causal_softmax_'s scores, in place of that of its result."""
    n = weights.shape[-1]
    n_rows = weights.numel() // n
    n_tokens, n_heads = _segments(starts, n_rows, tile)
    _run(
        _SOFTMAX_BACK, (weights, starts), (grad,), n, n_rows,
        bf16=_is_bf16(weights), scale=scale, first=first, tile=tile, n_tokens=n_tokens, n_heads=n_heads,
    )  # fmt: skip
    return grad


def cross_entropy_(logits: Tensor, targets: Tensor, weight: float) -> Tensor:
    """-log softmax(logits)[target], (N,) float32, of logits (N, n) contiguous; they become weight times its gradient.

    targets: (N,) int64. weight 0: the logits stay.
    """
    n_rows, n = logits.shape
    losses = torch.empty(n_rows)
    targets = targets.contiguous()
    _run(_CROSS_ENTROPY, (logits, targets), (logits, losses), n, n_rows, bf16=_is_bf16(logits), scale=weight, step=4)
    return losses


def accumulate_(total: Tensor, x: Tensor) -> Tensor:
    """total += x; total float32, x of any type that the kernels know, both contiguous and of one shape."""
    n = x.shape[-1]
    _run(_ACCUMULATE, (x,), (total,), n, x.numel() // n, bf16=_is_bf16(x))
    return total


def _is_narrow(low: Tensor, m: Tensor) -> bool:
    """Whether the kernels take these as their float32 side: low (N, R) of rows in one piece each, m (R, n)."""
    return low.dtype == m.dtype == torch.float32 and low.stride(1) == 1 and m.is_contiguous()


def narrow(x: Tensor, m: Tensor, out: Tensor) -> Tensor:
    """x m^T into out (N, R), float32, whose rows may be apart; x (N, n) contiguous, m (R, n) float32, R small."""
    assert _is_narrow(out, m) and x.is_contiguous()
    n_rows, n = x.shape
    _run(_NARROW, (x, m), (out,), n, n_rows, bf16=_is_bf16(x), tile=len(m), first=out.stride(0))
    return out


def widen_(y: Tensor, low: Tensor, m: Tensor) -> Tensor:
    """y (N, n) += low m, rounded once; y contiguous, low (N, R) and m (R, n) float32, R small."""
    assert _is_narrow(low, m) and y.is_contiguous()
    n_rows, n = y.shape
    _run(_WIDEN, (low, m), (y,), n, n_rows, bf16=_is_bf16(y), tile=len(m), first=low.stride(0))
    return y


def outer(low: Tensor, x: Tensor) -> Tensor:
    """low^T x, (R, n) float32; low (N, R) float32, x (N, n) contiguous, R small."""
    n_rows, n = x.shape
    out = torch.empty(low.shape[1], n)
    assert _is_narrow(low, out) and x.is_contiguous()
    _run(
        _OUTER, (x, low), (out,), n, -(-n // _OUTER_COLUMNS),
        bf16=_is_bf16(x), step=1, tile=low.shape[1], first=low.stride(0), n_tokens=n_rows,
    )  # fmt: skip
    return out
