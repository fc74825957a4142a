"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174), and a backward pass that begins inside of a model.

torch has both, and imports its compiler and a computer algebra system for them: a second of every run, and 70 MB.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def weighted_sum(y: Tensor, grad: Tensor) -> Tensor:
    """A scalar whose gradient with respect to y is grad, to the last bit; `.backward()` of it is `y.backward(grad)`."""
    return (y * grad).sum()


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, function: Callable[[Tensor], Tensor], *parameters: Tensor) -> Tensor:
        ctx.function, ctx.parameters = function, parameters
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_too = ctx.needs_input_grad[0]
        x = ctx.saved_tensors[0].detach().requires_grad_(x_too)
        with torch.enable_grad():
            y = weighted_sum(ctx.function(x), grad)
        # A trained matrix adds to the gradient that it has, and then gives none of its own: see model/trained.py.
        gradients = torch.autograd.grad(y, (x, *ctx.parameters) if x_too else ctx.parameters, allow_unused=True)
        return (gradients[0], None, *gradients[1:]) if x_too else (None, None, *gradients)


def recomputed(module: nn.Module, x: Tensor, *arguments: Tensor | None) -> Tensor:
    """module(x, *arguments), of which only x is kept: the backward pass computes the rest again. Dropout must draw the
    same masks then; nothing but x and the module's parameters gets a gradient."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return _Recomputed.apply(x, lambda x: module(x, *arguments), *trained)
