"""The learning rate over time, and AdamW as llama.cpp's `finetune` applied it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llamakit.training.config import FinetuneConfig

_EPS = 1e-8


def _cosine(step: int, steps: int, least: float) -> float:
    return (1 - least) * 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps)) + least


def schedule(iteration: int, config: FinetuneConfig) -> float:
    """Factor on --adam-alpha for an iteration, counted from 1.

    A linear warmup whose first step is 1/warmup, then a cosine decay that begins where the warmup ends (the old
    tool's first step was 0, and its decay counted from the start of the run: it jumped). With --enable-restart the
    decay starts again, each period --cos-decay-restart times as long.
    """
    if iteration <= config.warmup:
        factor = iteration / config.warmup
    else:
        step, period = iteration - config.warmup, config.cos_decay_steps
        while config.enable_restart and step > period:
            step -= period
            period = int(period * config.cos_decay_restart)
        factor = _cosine(step, period, config.cos_decay_min)
    floor = config.adam_min_alpha / config.adam_alpha if config.adam_alpha else 0.0
    return floor + factor * (1 - floor)


def ggml_n_dims(parameter: Tensor) -> int:
    """Dimensions as ggml counted them for the old tensors (a matrix of one row and one column has one)."""
    return 1 if parameter.numel() == 1 else parameter.dim()


class AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) on all parameters at once.

    The parameters become views of one vector, so that a step is a handful of operations and its memory is taken
    before the first one. Weight decay is on tensors of enough dimensions only. Written out here since torch.optim
    imports torch's compiler: half a second of every run, and 60 MB.
    """

    def __init__(self, parameters: Sequence[Tensor], config: FinetuneConfig) -> None:
        self._parameters, self._config = list(parameters), config
        self._vector = torch.cat([p.detach().flatten() for p in self._parameters])
        for parameter, view in zip(self._parameters, self._views(self._vector), strict=True):
            parameter.data = view
        self._m, self._v = torch.zeros_like(self._vector), torch.zeros_like(self._vector)
        self._decayed = [p.data for p in self._parameters if ggml_n_dims(p) >= config.adam_decay_min_ndim]
        self.updates = 0

    def _views(self, vector: Tensor) -> list[Tensor]:
        parts = vector.split([p.numel() for p in self._parameters])
        return [part.view(p.shape) for part, p in zip(parts, self._parameters, strict=True)]

    def moments(self) -> list[tuple[Tensor, Tensor]]:
        """First and second moment of each parameter, in its shape: views."""
        return list(zip(self._views(self._m), self._views(self._v), strict=True))

    def take_gradient(self) -> Tensor:
        """The gradients of all parameters as one vector, float32; those of the parameters are cleared."""
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        return torch.cat([part.flatten() for part in parts])

    def step(self, gradient: Tensor, lr: float) -> None:
        """One update with a gradient as `take_gradient` gave it."""
        config = self._config
        beta1, beta2 = config.adam_beta1, config.adam_beta2
        self.updates += 1
        self._m.lerp_(gradient, 1 - beta1)
        self._v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        if self._decayed:
            torch._foreach_mul_(self._decayed, 1 - lr * config.adam_decay)  # pyright: ignore[reportPrivateImportUsage]
        root = (self._v / (1 - beta2**self.updates)).sqrt_().add_(_EPS)
        self._vector.addcdiv_(self._m, root, value=-lr / (1 - beta1**self.updates))


def clip_gradient(gradient: Tensor, limit: float) -> float:
    """Scale the gradient so that its norm is at most limit (0: no limit); returns the norm before."""
    norm = float(torch.linalg.vector_norm(gradient))
    if 0 < limit < norm:
        gradient.mul_(limit / norm)
    return norm
