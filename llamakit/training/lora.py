"""Which tensors get a LoRA pair, how the pairs start, and how they get into the model.

Shapes: R rank, I n_in, O n_out.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llamakit.dataset.order import counter_normal
from llamakit.errors import MismatchError, UsageError
from llamakit.model import Llama, ModelConfig
from llamakit.model.layers import Dropout
from llamakit.model.lora import make_lora_leaf
from llamakit.training.state import Weights

Pair = tuple[Tensor, Tensor]


def trained_tensors(model: ModelConfig, ranks: dict[str, int]) -> dict[str, tuple[int, int, int]]:
    """Every tensor that gets a LoRA pair: name -> (rank, n_out, n_in). Raises UsageError for a rank that cannot be.

    A norm counts as a matrix of one row.
    """
    chosen = {}
    for name, shape in model.tensor_shapes().items():
        kind = name.removesuffix(".weight").rpartition(".")[2]
        rank = ranks[kind]
        n_out, n_in = shape if len(shape) == 2 else (1, shape[0])
        if rank > max(n_out, n_in):
            raise UsageError(f"rank {rank} for {kind} is larger than the matrix, {n_out} x {n_in}")
        if rank:
            chosen[name] = (rank, n_out, n_in)
    return chosen


def initial_weights(model: ModelConfig, ranks: dict[str, int], seed: int) -> dict[str, Weights]:
    """LoRA's start: B = 0, A ~ clamp(N(0, 1), -1, 1) / sqrt(rank + n_in), as the old tool's, from a counter."""
    order = {name: i for i, name in enumerate(model.tensor_shapes())}
    weights = {}
    for name, (rank, n_out, n_in) in trained_tensors(model, ranks).items():
        normal = counter_normal(seed, -1 - order[name], rank * n_in).clip(-1, 1) / np.sqrt(rank + n_in)
        a = normal.astype(np.float32).reshape(rank, n_in)
        weights[name] = Weights(a, np.zeros((n_out, rank), dtype=np.float32))
    return weights


def attach_trainable(model: Llama, weights: dict[str, Weights], alpha: float, dropout: Dropout) -> dict[str, Pair]:
    """Put a trainable LoRA leaf on every tensor of `weights`; returns the parameters (A, B), float32, by name."""
    pairs = {}
    for number, (name, pair) in enumerate(weights.items()):
        path = name.removesuffix(".weight")
        base = model.get_submodule(path)
        device = next(base.parameters()).device
        a, b = (torch.from_numpy(x).to(device) for x in (pair.a, pair.b))
        leaf = make_lora_leaf(base, a, b, alpha / len(pair.a), dropout=dropout, number=number)
        model.set_submodule(path, leaf)
        pairs[name] = (leaf.lora_a, leaf.lora_b)
    return pairs


def check_shapes(saved: dict[str, Weights], expected: dict[str, Weights], path: str) -> None:
    """Raises MismatchError, naming the tensor and both shapes, unless a checkpoint's pairs are those of this run."""
    if saved.keys() != expected.keys():
        names = sorted(saved.keys() ^ expected.keys())
        raise MismatchError(f"checkpoint and run train different tensors: {', '.join(names[:3])}", path=path)
    for name, pair in expected.items():
        for mine, theirs in ((pair.a, saved[name].a), (pair.b, saved[name].b)):
            if mine.shape != theirs.shape:
                raise MismatchError(
                    f"{name} has LoRA shape {list(theirs.shape)} in the checkpoint, and {list(mine.shape)} in this run",
                    path=path,
                )


def rank_field(kind: str) -> str:
    """The config field that sets the rank of a tensor kind."""
    special = {"attn_q": "wq", "attn_k": "wk", "attn_v": "wv", "attn_output": "wo", "attn_norm": "att_norm",
               "token_embd": "tok_embd", "output": "out", "output_norm": "out_norm"}  # fmt: skip
    return "rank_" + special.get(kind, kind)
