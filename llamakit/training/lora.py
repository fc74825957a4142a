"""Which tensors get a LoRA pair, how the pairs start, and how they get into the model.

Shapes: R rank, I n_in, O n_out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from llamakit.dataset.order import counter_normal
from llamakit.errors import UsageError
from llamakit.formats.adapter import Adapter
from llamakit.model import Llama, ModelConfig
from llamakit.model.layers import Dropout
from llamakit.model.lora import make_lora_leaf

Pair = tuple[Tensor, Tensor]
_SUFFIXES = (".lora_a", ".lora_b")


@dataclass(frozen=True)
class Weights:
    """One LoRA pair, A (R, I) and B (O, R) float32."""

    a: np.ndarray
    b: np.ndarray


def kind_of(name: str) -> str:
    """blk.3.attn_q.weight -> attn_q."""
    return name.removesuffix(".weight").rpartition(".")[2]


def targeted(
    model: ModelConfig, ranks: Mapping[str, int], targets: Sequence[tuple[str, int | None]], rank: int
) -> dict[str, int]:
    """Tensor name -> rank, 0 where it is not trained, by patterns of kinds or names; the last that fits decides.

    Norms are meant where they are named without a wildcard alone, since llama.cpp ignores adapters of them.

    ranks: by kind, where a pattern has none of its own; rank: where that is 0. Raises UsageError for a pattern that
    fits nothing.
    """
    found = dict.fromkeys(model.tensor_shapes(), 0)
    for pattern, own in targets:
        plain = pattern.removesuffix(".weight")
        matrices = [n for n in found if not n.endswith("_norm.weight")] if any(c in plain for c in "*?[") else found
        fits = [n for n in matrices if fnmatchcase(n.removesuffix(".weight"), plain) or fnmatchcase(kind_of(n), plain)]
        if not fits:
            kinds = ", ".join(dict.fromkeys(map(kind_of, found)))
            raise UsageError(f"--lora-targets {pattern} fits no tensor", hint=f"kinds of tensors: {kinds}")
        found |= {name: own or ranks[kind_of(name)] or rank for name in fits}
    return found


def trained_tensors(model: ModelConfig, ranks: Mapping[str, int]) -> dict[str, tuple[int, int, int]]:
    """Every tensor that gets a LoRA pair: name -> (rank, n_out, n_in). Raises UsageError for a rank that cannot be.

    ranks: by the tensor's name where that is there, else by its kind. A norm counts as a matrix of one row.
    """
    chosen = {}
    for name, shape in model.tensor_shapes().items():
        kind = kind_of(name)
        rank = ranks[name] if name in ranks else ranks[kind]
        n_out, n_in = shape if len(shape) == 2 else (1, shape[0])
        if rank > max(n_out, n_in):
            raise UsageError(f"rank {rank} for {kind} is larger than the matrix, {n_out} x {n_in}")
        if rank:
            chosen[name] = (rank, n_out, n_in)
    return chosen


def initial_weights(model: ModelConfig, ranks: Mapping[str, int], seed: int) -> dict[str, Weights]:
    """LoRA's start: B = 0, A ~ clamp(N(0, 1), -1, 1) / sqrt(rank + n_in), as the old tool's, from a counter."""
    order = {name: i for i, name in enumerate(model.tensor_shapes())}
    weights = {}
    for name, (rank, n_out, n_in) in trained_tensors(model, ranks).items():
        normal = counter_normal(seed, -1 - order[name], rank * n_in).clip(-1, 1) / np.sqrt(rank + n_in)
        a = normal.astype(np.float32).reshape(rank, n_in)
        weights[name] = Weights(a, np.zeros((n_out, rank), dtype=np.float32))
    return weights


def scale_of(rank: int, alpha: float, *, rslora: bool = False) -> float:
    """The factor of B A: alpha / rank, or with rsLoRA alpha / sqrt(rank)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def continued(adapter: Adapter, alpha: float, *, rslora: bool) -> dict[str, Weights]:
    """An adapter's pairs as the start of a run, B scaled so that the run's own scale gives the same change."""
    weights = {}
    for name, (a, b) in adapter.tensors.items():
        factor = adapter.scale(name) / scale_of(len(a), alpha, rslora=rslora)
        weights[name] = Weights(a.astype(np.float32), (b * factor).astype(np.float32))
    return weights


def as_adapter(arrays: Mapping[str, np.ndarray], alpha: float, *, rslora: bool) -> Adapter:
    """Trained pairs as an adapter, whose files know alpha / rank alone: rsLoRA's scale goes into alpha, and where ranks
    differ into B."""
    pairs = paired(arrays)
    if not rslora:
        return Adapter(alpha=alpha, tensors=pairs)
    most = max(len(a) for a, _ in pairs.values())
    scaled = {
        name: (a, b if len(a) == most else (b * math.sqrt(len(a) / most)).astype(np.float32))
        for name, (a, b) in pairs.items()
    }
    return Adapter(alpha=alpha * math.sqrt(most), tensors=scaled)


def attach_trainable(
    model: Llama, weights: dict[str, Weights], alpha: float, dropout: Dropout, *, rslora: bool = False
) -> dict[str, Pair]:
    """Put a trainable LoRA leaf on every tensor of `weights`; returns the parameters (A, B), float32, by name."""
    pairs = {}
    for number, (name, pair) in enumerate(weights.items()):
        path = name.removesuffix(".weight")
        base = model.get_submodule(path)
        device = next(base.parameters()).device
        a, b = (torch.from_numpy(x).to(device) for x in (pair.a, pair.b))
        scale = scale_of(len(pair.a), alpha, rslora=rslora)
        leaf = make_lora_leaf(base, a, b, scale, dropout=dropout, number=number)
        model.set_submodule(path, leaf)
        pairs[name] = (leaf.lora_a, leaf.lora_b)
    return pairs


T = TypeVar("T")


def named_pairs(pairs: Mapping[str, tuple[T, T]]) -> dict[str, T]:
    """The members of all pairs under their names in files: the base tensor's, then `.lora_a` or `.lora_b`."""
    return {name + suffix: x for name, pair in pairs.items() for suffix, x in zip(_SUFFIXES, pair, strict=True)}


def paired(named: Mapping[str, T]) -> dict[str, tuple[T, T]]:
    """What `named_pairs` took apart; other names are left out."""
    a, b = _SUFFIXES
    names = [name.removesuffix(a) for name in named if name.endswith(a)]
    return {name: (named[name + a], named[name + b]) for name in names}


def rank_field(kind: str) -> str:
    """The config field that sets the rank of a tensor kind."""
    special = {"attn_q": "wq", "attn_k": "wk", "attn_v": "wv", "attn_output": "wo", "attn_norm": "att_norm",
               "token_embd": "tok_embd", "output": "out", "output_norm": "out_norm"}  # fmt: skip
    return "rank_" + special.get(kind, kind)
