"""The learning rate over time, and AdamW as llama.cpp's `finetune` applied it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llamakit.training.config import FinetuneConfig, LoopOptions
from llamakit.training.distributed import Dist

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
    all memory is taken before the first step. Of a parameter whose rows lie on several ranks (a DTensor) only this
    rank's rows count, which stay where they are. Weight decay is on tensors of enough dimensions only. torch.optim is
    not used: it imports torch's compiler, half a second of every run, and 60 MB.
    """

    def __init__(self, parameters: Sequence[Tensor], config: LoopOptions) -> None:
        self._parameters, self._config = list(parameters), config
        rows = [p for p in self._parameters if is_sharded(p)]
        whole = [p for p in self._parameters if not is_sharded(p)]
        self._n_rows = sum(own_rows(p).numel() for p in rows)
        self._vector = torch.cat([p.detach().flatten() for p in whole])
        n_numbers = self._n_rows + self._vector.numel()
        self.gradient, self._m, self._v = (self._vector.new_zeros(n_numbers) for _ in range(3))
        self._order = [*rows, *whole]
        for parameter, view in zip(whole, self._vector.split([p.numel() for p in whole]), strict=True):
            parameter.data = view.view(parameter.shape)
        for parameter, gradient in zip(self._order, self._views(self.gradient), strict=True):
            parameter.grad = like_rows(parameter, gradient)
        views = map(self._views, (self.gradient, self._m, self._v))
        self._states = list(zip(self._order, *views, strict=True))
        least = config.adam_decay_min_ndim
        self._groups = [
            (decay, [state for state in self._states if (ggml_n_dims(state[0]) >= least) == decays])
            for decay, decays in ((config.adam_decay, True), (0.0, False))
        ]
        self.updates = 0

    def _views(self, vector: Tensor) -> list[Tensor]:
        shares = [own_rows(p) for p in self._order]
        parts = vector.split([share.numel() for share in shares])
        return [part.view(share.shape) for part, share in zip(parts, shares, strict=True)]

    def moments(self) -> list[tuple[Tensor, Tensor]]:
        """First and second moment of each parameter, in its shape, or that of its own rows: views."""
        found = {id(parameter): (m, v) for parameter, _, m, v in self._states}
        return [found[id(parameter)] for parameter in self._parameters]

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, first and second moments of what each rank has whole: a vector each."""
        return self._vector, self._m[self._n_rows :], self._v[self._n_rows :]

    def add_up(self, dist: Dist) -> None:
        """The gradient of what each rank has whole becomes that of all ranks; of rows it is that already."""
        dist.add_up(self.gradient[self._n_rows :])

    def gradient_norm(self, dist: Dist) -> float:
        """The norm of the gradient of all ranks, the same on each."""
        if not self._n_rows:
            return float(torch.linalg.vector_norm(self.gradient))
        rows, whole = (float(torch.linalg.vector_norm(part)) for part in self.gradient.tensor_split([self._n_rows]))
        return math.hypot(math.sqrt(dist.sum([rows**2])[0]), whole)

    def step(self, lr: float) -> None:
        """One update with what has been added up in `gradient`."""
        config = self._config
        self.updates += 1
        for decay, states in self._groups:
            if not states:
                continue
            parameters, gradients, m, v = (list(part) for part in zip(*states, strict=True))
            weights = [own_rows(parameter) for parameter in parameters]
            steps = [torch.tensor(float(self.updates), device=self._vector.device)] * len(states)
            torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
                weights, gradients, m, v, [], steps, lr=lr, beta1=config.adam_beta1, beta2=config.adam_beta2,
                weight_decay=decay, eps=_EPS, amsgrad=False, maximize=False,
            )  # fmt: skip
            # The fused kernel does not count as a change: who keeps a rounded copy would not see that it is stale.
            torch.autograd.graph.increment_version(weights)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor's rows lie on several ranks: a DTensor, whose module loads torch's compiler."""
    return hasattr(tensor, "placements")


def own_rows(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor, detached: its rows, or all of it."""
    with torch.no_grad():
        return tensor.to_local() if is_sharded(tensor) else tensor.detach()  # pyright: ignore


def row_range(tensor: Tensor) -> tuple[int, int | None]:
    """Which rows of a tensor this rank has, first and last but one; torch.chunk has shared them out."""
    if not is_sharded(tensor):
        return 0, None
    mesh: Any = tensor.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
    first = min(len(tensor), mesh.get_local_rank() * -(-len(tensor) // mesh.size()))
    return first, first + len(own_rows(tensor))


def like_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Own rows as a share of something of a tensor's shape, where it is sharded; else as they are."""
    if not is_sharded(tensor):
        return rows
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    where = (tensor.device_mesh, tensor.placements)
    return DTensor.from_local(rows, *where, run_check=False, shape=tensor.shape, stride=tensor.stride())


def clip_gradient(gradient: Tensor, limit: float, norm: float | None = None) -> float:
    """Scale the gradient so that its norm is at most limit (0: no limit); returns the norm before.

    norm: of all of it, where this is a rank's share.
    """
    norm = float(torch.linalg.vector_norm(gradient)) if norm is None else norm
    if 0 < limit < norm:
        gradient.mul_(limit / norm)
    return norm
