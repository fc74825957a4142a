"""Leaves whose weights are trained themselves: float32, multiplied in the activations' dtype.

Shapes: N tokens (any leading axes), I = n_in, O = n_out, C n_embd, V n_vocab.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llamakit.kernels import train
from llamakit.model.elementwise import Function, Lazy, as_rows, identity


class TrainedLinear(nn.Module):
    """y = x W^T + bias; W (O, I) and bias (O,) float32, both trained."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self._rounded, self._version = torch.empty(0), -1

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """W in dtype, rounded anew only when an update has changed it."""
        weight = self.weight.detach()
        if weight.dtype == dtype:
            return weight
        if self._rounded.dtype != dtype or self._rounded.device != weight.device:
            with torch.inference_mode(False):  # the copy outlives the call
                self._rounded, self._version = torch.empty_like(weight, dtype=dtype), -1
        if self._version != self.weight._version:
            self._rounded.copy_(weight)
            self._version = self.weight._version
        return self._rounded

    def collect(self, gradient: Tensor) -> Tensor | None:
        """Add (O, I) to W's gradient; what is left for autograd to add, if any."""
        return _collect(self.weight, gradient)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), in x's dtype."""
        return project_trained(x, self)[0]


class TiedLinear(TrainedLinear):
    """The matrix of an embedding as an output matrix, for one whose parameter comes and goes: it is looked up there
    with each use. Where it is gathered in a narrow dtype its gradient is added up in float32 until the embedding hands
    it on."""

    def __init__(self, embedding: TrainedEmbedding) -> None:
        nn.Module.__init__(self)
        self._embedding = (embedding,)  # not a module of this one: it has its own place in the model
        self.bias = None

    @property
    def embedding(self) -> TrainedEmbedding:
        """Whose matrix it is."""
        return self._embedding[0]

    @property
    def weight(self) -> nn.Parameter:  # pyright: ignore[reportIncompatibleVariableOverride]
        """W (V, C), as it lies in the embedding now."""
        return self.embedding.weight

    def collect(self, gradient: Tensor) -> Tensor | None:
        """Add (V, C) to the gradient that the embedding collects."""
        if self.weight.dtype == torch.float32:
            return _collect(self.weight, gradient)
        embedding = self.embedding
        if embedding.collected is None:
            embedding.collected = gradient.float()
        else:
            embedding.collected += gradient
        return None


class TrainedEmbedding(nn.Module):
    """Rows of W (V, C) float32, in dtype."""

    def __init__(self, weight: nn.Parameter, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.dtype = weight, dtype
        self.collected: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 (B, T) -> (B, T, C)."""
        return _LookUp.apply(self.weight, tokens, self)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, tokens: Tensor, embedding: TrainedEmbedding) -> Tensor:
        ctx.weight, ctx.embedding = weight, embedding
        ctx.save_for_backward(tokens)
        return weight[tokens].to(embedding.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (tokens,) = ctx.saved_tensors
        weight: Tensor = ctx.weight
        if weight.dtype != torch.float32:  # a gathered copy: what many tokens add to a row is rounded once
            embedding: TrainedEmbedding = ctx.embedding
            into, embedding.collected = embedding.collected, None
            if into is None:
                into = torch.zeros_like(weight, dtype=torch.float32)
            into.index_add_(0, tokens.flatten(), grad.flatten(0, -2).float())
            return into.to(weight.dtype), None, None
        # Only the rows of a batch's tokens change: a gradient of the whole matrix is made where there is none yet.
        into = torch.zeros_like(weight) if weight.grad is None else weight.grad
        into.index_add_(0, tokens.flatten(), grad.flatten(0, -2).to(into.dtype))
        return (into if weight.grad is None else None), None, None


def _collect(parameter: Tensor, gradient: Tensor) -> Tensor | None:
    """Add to the parameter's gradient in place, without a float32 copy; what is left for autograd to add, if any."""
    if parameter.grad is None:
        return gradient.to(parameter.dtype)
    if train.usable(gradient) and gradient.is_contiguous():
        train.accumulate_(parameter.grad, gradient)
    else:
        parameter.grad.add_(gradient)
    return None


class _Project(torch.autograd.Function):
    """Several linears of one input h: y_i = h W_i^T + b_i; dh = sum_i dy_i W_i; dW_i = dy_i^T h; db_i = sum dy_i.

    Instead of h the tensors are kept that it is computed from.
    """

    @staticmethod
    def forward(ctx, layers: tuple[TrainedLinear, ...], function: Function, n_tensors: int, *tensors: Tensor):
        tensors = tensors[:n_tensors]
        h = as_rows(function(*tensors)[0])
        ctx.layers, ctx.function = layers, function
        weights = [layer.rounded(h.dtype) for layer in layers]
        ctx.save_for_backward(*weights, *tensors)
        biases = [None if layer.bias is None else layer.bias.detach().to(h.dtype) for layer in layers]
        return tuple(torch.nn.functional.linear(h, w, b) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        layers: tuple[TrainedLinear, ...] = ctx.layers
        saved = ctx.saved_tensors
        weights, tensors = saved[: len(layers)], saved[len(layers) :]
        result, pullback = ctx.function(*tensors)
        h = as_rows(result)
        d_weights = [layer.collect(grad.t() @ h) for layer, grad in zip(layers, grads, strict=True)]
        d_biases = [
            _collect(layer.bias, grad.float().sum(0))
            for layer, grad in zip(layers, grads, strict=True)
            if layer.bias is not None
        ]
        wanted, d_tensors = ctx.needs_input_grad[3 : 3 + len(tensors)], [None] * len(tensors)
        if any(wanted):
            dh = grads[0] @ weights[0]
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                dh.addmm_(grad, weight)
            d_tensors = pullback(dh.view(result.shape), wanted)
        return None, None, None, *d_tensors, *d_weights, *d_biases


def project_trained(x: Lazy | Tensor, *layers: TrainedLinear) -> tuple[Tensor, ...]:
    """Every layer applied to the same x (..., I); kept for the gradient is what a lazy x is computed from."""
    function, tensors = x if isinstance(x, Lazy) else Lazy(identity, (x,))
    parameters = (*(layer.weight for layer in layers), *(layer.bias for layer in layers if layer.bias is not None))
    ys = _Project.apply(layers, function, len(tensors), *tensors, *parameters)
    # FSDP2 warns of views, whose hooks would be lost where they are written to.
    return ys if tensors[0].dim() == 2 else tuple(y.view(*tensors[0].shape[:-1], -1) for y in ys)
