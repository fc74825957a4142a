"""LoRA on a loaded model: put the leaves of an adapter in, take them out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from llamakit.errors import MismatchError
from llamakit.formats.adapter import Adapter, refuse_replaced
from llamakit.model.config import ModelConfig
from llamakit.model.layers import (
    Dropout,
    Embedding,
    LoraEmbedding,
    LoraLinear,
    LoraNorm,
    QuantizedLinear,
    RMSNorm,
)
from llamakit.model.llama import Llama

LoraLeaf = LoraLinear | LoraEmbedding | LoraNorm


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32).copy()).to(device)


def make_lora_leaf(
    base: nn.Module,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    dropout: Dropout | None = None,
    number: int = 0,
) -> LoraLeaf:
    """The leaf for whatever the base is: a matrix, the embedding, or a norm."""
    if isinstance(base, QuantizedLinear):
        return LoraLinear(base, lora_a, lora_b, scale, dropout=dropout, number=number)
    if isinstance(base, Embedding):
        return LoraEmbedding(base, lora_a, lora_b, scale)
    assert isinstance(base, RMSNorm)
    return LoraNorm(base, lora_a, lora_b, scale)


def _joined(leaf: LoraLeaf, lora_a: Tensor, lora_b: Tensor, scale: float) -> LoraLeaf:
    """A second adapter on the same leaf is one adapter of both ranks: s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2]."""
    a = torch.cat([leaf.lora_a.data, lora_a])
    b = torch.cat([leaf.lora_b.data * leaf.scale, lora_b * scale], dim=1)
    return make_lora_leaf(leaf.base, a, b, 1.0)


def check_fits(adapter: Adapter, config: ModelConfig) -> None:
    """Raises MismatchError for a tensor that the model lacks or that has another shape, UnsupportedError for an adapter
    that replaces whole tensors."""
    refuse_replaced(adapter)
    shapes = config.tensor_shapes()
    for name, (a, b) in adapter.tensors.items():
        if name not in shapes:
            raise MismatchError(f"the adapter changes {name}, which this model does not have")
        shape = shapes[name] if len(shapes[name]) == 2 else (1, *shapes[name])  # a norm counts as one row
        if (b.shape[0], a.shape[1]) != shape:
            raise MismatchError(f"the adapter's {name} is for {[b.shape[0], a.shape[1]]} (the model has {list(shape)})")


def attach(model: Llama, adapter: Adapter, scale: float = 1.0) -> None:
    """Put an adapter on the model, in addition to those that it has; frozen, for inference.

    scale multiplies the adapter's own alpha / rank. Raises as `check_fits`; the model is then unchanged.
    """
    check_fits(adapter, model.config)
    for name, (a, b) in adapter.tensors.items():
        path = name.removesuffix(".weight")
        leaf = model.get_submodule(path)
        device = next(leaf.parameters()).device
        lora_a, lora_b = _tensor(a, device), _tensor(b, device)
        put_on = _joined if isinstance(leaf, LoraLeaf) else make_lora_leaf
        leaf = put_on(leaf, lora_a, lora_b, adapter.scale(name, scale))  # pyright: ignore[reportArgumentType]
        model.set_submodule(path, leaf.requires_grad_(False))


def detach(model: Llama) -> None:
    """Take every adapter off."""
    for path, module in [(p, m) for p, m in model.named_modules() if isinstance(m, LoraLeaf)]:
        model.set_submodule(path, module.base)


@contextmanager
def without_adapters(model: Llama) -> Iterator[None]:
    """The model as it is without its adapters, for a while."""
    leaves = {path: module for path, module in model.named_modules() if isinstance(module, LoraLeaf)}
    for path, leaf in leaves.items():
        model.set_submodule(path, leaf.base)
    try:
        yield
    finally:
        for path, leaf in leaves.items():
            model.set_submodule(path, leaf)
