"""What a run will take, predicted from the model's shape and two short measurements.

Shapes: C n_embd, F n_ff, H n_head, K n_head_kv, D head_dim, T ctx, N tokens of a micro-step.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import torch
from torch import Tensor

from llamakit.model import Llama, ModelConfig
from llamakit.model.layers import SLAB_WEIGHTS
from llamakit.model.load import linear_layers
from llamakit.training.config import FinetuneConfig
from llamakit.training.report import Plan

# What a step does beside its products grows with n_embd, they with its square: at so many channels each takes as long
# (measured on models of 576 and 2,048 channels, which work at 47 to 60 and 81 to 84 % of the product rate).
_EVEN_EMBD = 450
# A weight, its gradient and two moments, float32 each; the backward pass keeps a copy in the dtype of the products.
_BYTES_PER_TRAINED = 16
_CHUNK_LOGITS = 256
# The heap holds this much more than the activations: holes between tensors of many sizes, measured over ten steps.
_HEAP_SHARE = 1.2


def kept_numbers(config: ModelConfig, ctx: int) -> int:
    """Numbers that the backward pass needs of the forward pass, per token and block.

    The inputs of two norms (2C), queries and the mixed values (2HD), keys and values (2KD), gate and up (2F), the
    softmax up to 1,024 tokens (HT, of which tiles leave out half).
    """
    heads, kv = config.n_head * config.head_dim, config.n_head_kv * config.head_dim
    softmax = config.n_head * min(ctx, (ctx + 128) // 2) if ctx <= 1024 else 0
    return 2 * config.n_embd + 2 * heads + 2 * kv + 2 * config.n_ff + softmax


def activation_bytes(config: ModelConfig, *, n_tokens: int, ctx: int, checkpointing: bool, item: int) -> int:
    """Most bytes that activations take at a time, item bytes each; with checkpointing one block's and all inputs."""
    block = kept_numbers(config, ctx)
    # The backward pass of a block holds float32 copies of a few of these at a time.
    transient = 2 * (4 * config.n_embd + 3 * config.n_ff)
    kept = config.n_embd * config.n_layer + block if checkpointing else block * config.n_layer
    return int((kept + transient) * n_tokens * item * _HEAP_SHARE)


def memory_bytes(model: Llama, config: FinetuneConfig, dtype: torch.dtype, trained: int) -> int:
    """Predicted peak of the process: what it holds now, the optimizer, activations, one decoded matrix, logits."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    shape, item = model.config, dtype.itemsize
    activations = activation_bytes(
        shape,
        n_tokens=config.batch * config.ctx,
        ctx=config.ctx,
        checkpointing=config.use_checkpointing,
        item=item,
    )
    packed = [layer.dense_bytes(dtype) for layer in linear_layers(model) if layer.is_packed(dtype)]
    decoded = min(max(packed, default=0), SLAB_WEIGHTS * item)
    logits = min(_CHUNK_LOGITS, config.batch * config.ctx) * shape.n_vocab * item
    return resident + trained * (_BYTES_PER_TRAINED + item) + activations + decoded + logits


def measured_s(runs: int, work: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def efficiency(shape: ModelConfig) -> float:
    """Share of a step's time that its products take."""
    return shape.n_embd / (shape.n_embd + _EVEN_EMBD)


def step_seconds(model: Llama, config: FinetuneConfig, dtype: torch.dtype, device: torch.device) -> float:
    """Predicted seconds of one iteration: 4 operations per weight and token (forward, and back to the input), two
    more with checkpointing, and the decoding of weights that are not kept decoded."""
    shape, layer = model.config, linear_layers(model)[0]
    n_tokens = config.batch * config.ctx
    rows = min(n_tokens, 512)
    x: Tensor = torch.zeros(rows, layer.shape[1], dtype=dtype, device=device)
    n_weights = layer.shape[0] * layer.shape[1]
    decode = measured_s(2, lambda: layer.dense(dtype)) if layer.is_packed(dtype) else 0.0
    rate = 2 * rows * n_weights / max(measured_s(3, lambda: layer.product(x)) - decode, 1e-9)
    attention = 2 * config.ctx * shape.n_head * shape.head_dim * shape.n_layer  # causal: half of 4
    passes = 6 if config.use_checkpointing else 4
    seconds = n_tokens * passes * (shape.n_matmul + attention) / (rate * efficiency(shape))
    seconds += decode / n_weights * shape.n_matmul * passes / 2
    return seconds * config.grad_acc


def make_plan(
    model: Llama,
    config: FinetuneConfig,
    *,
    dtype: torch.dtype,
    dtype_name: str,
    device: torch.device,
    trained: int,
) -> Plan:
    """The prediction for a run that is about to begin. trained: LoRA parameters."""
    return Plan(
        device=device.type,
        dtype=dtype_name,
        threads=torch.get_num_threads(),
        weights_kept_dense=not any(layer.is_packed(dtype) for layer in linear_layers(model)),
        memory_bytes=memory_bytes(model, config, dtype, trained),
        step_s=step_seconds(model, config, dtype, device),
        n_steps=config.adam_iter,
    )
