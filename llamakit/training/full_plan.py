"""What a run that trains all weights will take, predicted from the model's shape and one short measurement."""

from __future__ import annotations

import torch

from llamakit.files import resident_memory_bytes
from llamakit.model import Llama
from llamakit.training.config import FinetuneConfig
from llamakit.training.plan import activation_bytes, efficiency, measured_s
from llamakit.training.report import Plan

# A weight has a gradient and two moments, float32 each, which are touched in the first step.
_BYTES_PER_WEIGHT = 12
_ROWS = 512
# Logits of one chunk (loss.py), in the dtype and as gradients.
_CHUNK_LOGITS = 1 << 25


def plan_full(model: Llama, config: FinetuneConfig, *, dtype: torch.dtype, dtype_name: str, device: torch.device,
              trained: int) -> Plan:  # fmt: skip
    """The prediction for a run that is about to begin. trained: weights, which are in memory already."""
    shape, item = model.config, dtype.itemsize
    n_tokens = config.batch * config.ctx
    activations = activation_bytes(
        shape, n_tokens=n_tokens, ctx=config.ctx, checkpointing=config.use_checkpointing, item=item
    )
    copies = 0 if dtype == torch.float32 else shape.n_matmul * item  # weights in the dtype of the products
    logits = min(max(256 * shape.n_vocab, _CHUNK_LOGITS), n_tokens * shape.n_vocab) * item
    return Plan(
        device=device.type,
        dtype=dtype_name,
        threads=torch.get_num_threads(),
        weights_kept_dense=True,
        memory_bytes=resident_memory_bytes() + _BYTES_PER_WEIGHT * trained + copies + activations + logits,
        step_s=_step_seconds(model, config, dtype, device),
        n_steps=config.adam_iter,
    )


def _step_seconds(model: Llama, config: FinetuneConfig, dtype: torch.dtype, device: torch.device) -> float:
    """Six operations per weight and token (forward, back to the input, back to the weight), two more with
    checkpointing, at the rate of the largest matrix of a block."""
    shape = model.config
    n_tokens = config.batch * config.ctx
    rows = min(n_tokens, _ROWS)
    x, w = (torch.zeros(n, shape.n_embd, dtype=dtype, device=device) for n in (rows, shape.n_ff))
    rate = 2 * rows * w.numel() / max(measured_s(3, lambda: torch.nn.functional.linear(x, w)), 1e-9)
    attention = 2 * config.ctx * shape.n_head * shape.head_dim * shape.n_layer  # causal: half of 4
    passes = 8 if config.use_checkpointing else 6
    return config.grad_acc * n_tokens * passes * (shape.n_matmul + attention) / (rate * efficiency(shape))
