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


def make_optimizer(parameters: Sequence[Tensor], config: FinetuneConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101); decay on tensors of enough dimensions only."""
    decayed = [p for p in parameters if ggml_n_dims(p) >= config.adam_decay_min_ndim]
    rest = [p for p in parameters if ggml_n_dims(p) < config.adam_decay_min_ndim]
    groups = [{"params": decayed, "weight_decay": config.adam_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.adam_alpha,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=_EPS,
        fused=True,
    )


def clip_gradient(parameters: Sequence[Tensor], limit: float) -> float:
    """Scale all gradients so that their common norm is at most limit (0: no limit); returns the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if limit > 0 and float(norm) > limit:
        for gradient in gradients:
            gradient.mul_(limit / float(norm))
    return float(norm)
