"""Norm and gate: cheap functions that the backward pass computes again, so that their results need not be kept.

On a CPU native code does each in one pass over memory (kernels/train.py), elsewhere torch does. Each gives its
result and a pullback, which turns the gradient of the result into those of the function's tensors.

Shapes: any leading axes, C channels, F n_ff.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llamakit.kernels import train

Pullback = Callable[[Tensor, Sequence[bool]], tuple[Tensor | None, ...]]
"""(gradient of the result, which tensors want one) -> gradients of the tensors."""
Function = Callable[..., tuple[Tensor, Pullback]]
"""tensors -> result and pullback."""


def as_rows(x: Tensor) -> Tensor:
    """(..., I) -> (N, I), also of a single row (I,)."""
    return x.reshape(-1, x.shape[-1])


def identity(x: Tensor) -> tuple[Tensor, Pullback]:
    """x itself."""
    return x, lambda grad, _: (grad,)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Pullback]:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv 1910.07467).

    x (..., C), weight (C,) float32; computed in float32, the result is in x's dtype.
    """
    if train.usable(x) and weight.dtype == torch.float32:

        def fused(grad: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
            dx, d_weight = train.rms_norm_back(x, weight, grad, eps, weight_too=wanted[1])
            return dx if wanted[0] else None, d_weight

        return train.rms_norm(x, weight, eps), fused
    normed = x.to(torch.float32, copy=True)
    length = torch.linalg.vector_norm(normed, dim=-1, keepdim=True)
    inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normed.mul_(inverse)

    def pullback(grad: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
        d_weight = (grad * normed).flatten(0, -2).sum(0) if wanted[1] else None
        if not wanted[0]:
            return None, d_weight
        scaled = grad * weight  # float32: weight is
        mean = (scaled * normed).mean(-1, keepdim=True)
        return scaled.addcmul_(normed, mean, value=-1).mul_(inverse).to(x.dtype), d_weight

    return (normed * weight).to(x.dtype), pullback


def gated_silu(gate: Tensor, up: Tensor) -> tuple[Tensor, Pullback]:
    """silu(gate) * up, both (..., F) (Shazeer 2020, arXiv 2002.05202), in their dtype."""
    if train.usable(gate, up):
        return train.gate(gate, up), lambda grad, _: train.gate_back(gate, up, grad)
    silu = F.silu(gate)

    def pullback(grad: Tensor, _: Sequence[bool]) -> tuple[Tensor, Tensor]:
        return torch.ops.aten.silu_backward(grad * up, gate), silu * grad

    return silu * up, pullback


class Lazy(NamedTuple):
    """function(*tensors), not computed yet."""

    function: Function
    tensors: tuple[Tensor, ...]

    def compute(self) -> Tensor:
        """The result, with a gradient where one is recorded; only the tensors are kept for it."""
        if not torch.is_grad_enabled():  # a node of the graph costs a token as much as the function itself
            return self.function(*self.tensors)[0]
        return _Computed.apply(self.function, *self.tensors)


class _Computed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function: Function, *tensors: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)[0]

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *ctx.function(*ctx.saved_tensors)[1](grad, ctx.needs_input_grad[1:])
