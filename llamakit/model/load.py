"""From an opened file to a model in memory: every tensor stays packed as it is in the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from llamakit.errors import FormatError, LlamakitError, UnsupportedError
from llamakit.files import available_memory_bytes
from llamakit.formats.base import ModelFile
from llamakit.model.config import ModelConfig
from llamakit.model.device import can_prepack
from llamakit.model.layers import Embedding, QuantizedLinear, RMSNorm, Scratch
from llamakit.model.llama import Llama
from llamakit.quant import QTensor, can_decode, dequantize

WeightCache = Literal["auto", "bf16", "none"]
# A cache may take this share of the memory that is free: the rest is for activations and the system.
CACHE_SHARE = 0.6


def load_config(file: ModelFile) -> ModelConfig:
    """The checked hyper-parameters of a file. Raises FormatError or UnsupportedError, naming the file."""
    try:
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
    except LlamakitError as error:
        error.path = error.path or file.path
        raise
    for name, info in file.tensors.items():
        if not can_decode(info.type):
            raise UnsupportedError(f"tensor {name} has type {info.type.name}, which has no decoder", path=file.path)
    vocabulary = file.metadata.get("tokenizer.ggml.tokens", ())
    if not isinstance(vocabulary, (Sequence, np.ndarray)) or isinstance(vocabulary, str):
        raise FormatError("tokenizer.ggml.tokens is no list", path=file.path)
    if len(vocabulary) not in (0, config.n_vocab):
        raise FormatError(
            f"tokenizer.ggml.tokens has {len(vocabulary)} entries (token_embd.weight has {config.n_vocab} rows)",
            path=file.path,
        )
    return config


def load_model(
    file: ModelFile,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    weight_cache: WeightCache = "auto",
    config: ModelConfig | None = None,
    for_training: bool = False,
    n_sharing: int = 1,
    packed: Callable[[ModelFile, str, torch.device | str], QTensor] | None = None,
) -> Llama:
    """Read a model; its matrices stay packed, decoded to dtype for every product, or once (weight_cache).

    dtype: what activations and products are computed in. weight_cache: "bf16" keeps every matrix decoded in dtype,
    "none" decodes for each use, "auto" keeps them when they take at most 60 % of the free memory; on a CPU, where they
    fit, in the layout that products are fastest with, for_training in a second one for the gradients' products.
    config: hyper-parameters to use instead of the file's own. n_sharing: processes that load it into this machine's
    memory, each its own copy. packed: gives a matrix of a name, for who does not want the whole of it.
    Raises FormatError or UnsupportedError, naming the file and the tensor or key.
    """
    config = config or load_config(file)
    model = Llama(config, load_vector(file, "rope_freqs.weight") if "rope_freqs.weight" in file.tensors else None)
    packed, scratch = packed or _packed, Scratch()
    embedding = packed(file, "token_embd.weight", device)
    model.token_embd = Embedding(embedding, dtype)
    for name in config.tensor_shapes():
        if name != "token_embd.weight":
            leaf = load_leaf(file, name, config, scratch, device, packed)
            model.set_submodule(name.removesuffix(".weight"), leaf)
    if config.tied_output:
        model.output = QuantizedLinear(embedding, scratch=scratch)
    _keep_decoded(model, dtype, weight_cache, for_training, n_sharing)
    return model.eval().requires_grad_(False)


def load_leaf(
    file: ModelFile,
    name: str,
    config: ModelConfig,
    scratch: Scratch,
    device: torch.device | str = "cpu",
    packed: Callable[[ModelFile, str, torch.device | str], QTensor] | None = None,
) -> RMSNorm | QuantizedLinear:
    """The module of one tensor, a norm or a matrix with its bias where the file has one; the matrix stays packed, as
    `packed` gives it."""
    path = name.removesuffix(".weight")
    if path.endswith("norm"):
        return RMSNorm(load_vector(file, name).to(device), config.rms_eps)
    bias = f"{path}.bias"
    bias_vector = load_vector(file, bias).to(device) if bias in file.tensors else None
    return QuantizedLinear((packed or _packed)(file, name, device), bias_vector, scratch)


def _packed(file: ModelFile, name: str, device: torch.device | str) -> QTensor:
    info = file.tensors[name]
    return QTensor(torch.from_numpy(file.read(name)).to(device), info.type, info.shape)


def load_vector(file: ModelFile, name: str) -> Tensor:
    """A one-dimensional tensor, float32 (n,). Raises FormatError for one with more axes."""
    info = file.tensors[name]
    if len(info.shape) != 1:
        raise FormatError(f"tensor {name} has {len(info.shape)} dimensions (expected 1)", path=file.path)
    return dequantize(torch.from_numpy(file.read(name)), info.type, torch.float32)[0]


def linear_layers(model: Llama) -> list[QuantizedLinear]:
    """Every packed matrix that takes part in products, LoRA or not."""
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


def _keep_decoded(
    model: Llama, dtype: torch.dtype, weight_cache: WeightCache, for_training: bool, n_sharing: int
) -> None:
    layers = linear_layers(model)
    device = layers[0].weight.device
    if weight_cache == "none":
        return
    n_bytes = sum(layer.shape[0] * layer.shape[-1] * dtype.itemsize for layer in layers)
    free = free_bytes(device)
    room = math.inf if free is None else CACHE_SHARE * free / (1 if device.type == "cuda" else n_sharing)
    if weight_cache == "auto" and can_prepack(device, dtype) and (1 + for_training) * n_bytes <= room:
        _prepack(layers, dtype, for_training)
    elif weight_cache == "bf16" or sum(layer.dense_bytes(dtype) for layer in layers) <= room:
        for layer in layers:
            layer.keep_dense(dtype)


def _prepack(layers: Sequence[QuantizedLinear], dtype: torch.dtype, for_training: bool) -> None:
    scratch = Scratch()
    for layer in layers:
        layer.prepack(dtype)
        if for_training:
            layer.prepack_back(dtype, scratch)


def free_bytes(device: torch.device) -> int | None:
    """Memory that a model could be put into; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory_bytes()
