"""The learning rate over time, and AdamW as llama.cpp's `finetune` applied it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llamakit.training.config import FinetuneConfig, LoopOptions

_EPS = 1e-8


def _cosine(step: float, steps: float, least: float) -> float:
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
    return above_floor(factor, config)


def above_floor(factor: float, config: LoopOptions) -> float:
    """A factor on --adam-alpha, raised so that 0 gives --adam-min-alpha."""
    floor = config.adam_min_alpha / config.adam_alpha if config.adam_alpha else 0.0
    return floor + factor * (1 - floor)


def decay(kind: str, share: float, least: float) -> float:
    """Factor after a share of the decay has passed (0 before, 1 behind it): cosine, linear, or constant."""
    share = min(max(share, 0.0), 1.0)
    if kind == "cosine":
        return _cosine(share, 1.0, least)
    return least + (1 - least) * (1 - share) if kind == "linear" else 1.0


def ggml_n_dims(parameter: Tensor) -> int:
    """Dimensions as ggml counted them for the old tensors (a matrix of one row and one column has one)."""
    return 1 if parameter.numel() == 1 else parameter.dim()


class AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) on all parameters at once, with torch's fused kernel.

    Parameters and gradients become views of one vector each: a norm or a reduction over devices is one operation, and
    all memory is taken before the first step. Weight decay is on tensors of enough dimensions only. torch.optim is
    not used: it imports torch's compiler, half a second of every run, and 60 MB.
    """

    def __init__(self, parameters: Sequence[Tensor], config: LoopOptions) -> None:
        self._parameters, self._config = list(parameters), config
        self._vector = torch.cat([p.detach().flatten() for p in self._parameters])
        self.gradient, self._m, self._v = (torch.zeros_like(self._vector) for _ in range(3))
        views = zip(self._views(self._vector), self._views(self.gradient), strict=True)
        for parameter, (view, gradient) in zip(self._parameters, views, strict=True):
            parameter.data, parameter.grad = view, gradient
        weights = [p.detach() for p in self._parameters]
        states = zip(weights, *map(self._views, (self.gradient, self._m, self._v)), strict=True)
        self._states = list(states)
        least = config.adam_decay_min_ndim
        self._groups = [
            (decay, [state for state in self._states if (ggml_n_dims(state[0]) >= least) == decays])
            for decay, decays in ((config.adam_decay, True), (0.0, False))
        ]
        self.updates = 0

    def _views(self, vector: Tensor) -> list[Tensor]:
        parts = vector.split([p.numel() for p in self._parameters])
        return [part.view(p.shape) for part, p in zip(parts, self._parameters, strict=True)]

    def moments(self) -> list[tuple[Tensor, Tensor]]:
        """First and second moment of each parameter, in its shape: views."""
        return [(m, v) for _, _, m, v in self._states]

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """All weights, first and second moments: a vector each."""
        return self._vector, self._m, self._v

    def step(self, lr: float) -> None:
        """One update with what has been added up in `gradient`."""
        config = self._config
        self.updates += 1
        for decay, states in self._groups:
            if not states:
                continue
            weights, gradients, m, v = (list(part) for part in zip(*states, strict=True))
            steps = [torch.tensor(float(self.updates), device=self._vector.device)] * len(states)
            torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
                weights, gradients, m, v, [], steps, lr=lr, beta1=config.adam_beta1, beta2=config.adam_beta2,
                weight_decay=decay, eps=_EPS, amsgrad=False, maximize=False,
            )  # fmt: skip
            # The fused kernel does not count as a change: who keeps a rounded copy would not see that it is stale.
            torch.autograd.graph.increment_version(weights)


def clip_gradient(gradient: Tensor, limit: float) -> float:
    """Scale the gradient so that its norm is at most limit (0: no limit); returns the norm before."""
    norm = float(torch.linalg.vector_norm(gradient))
    if 0 < limit < norm:
        gradient.mul_(limit / norm)
    return norm
