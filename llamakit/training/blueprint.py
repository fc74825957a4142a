"""What a model is before it is trained: its shape, its metadata, its first weights; and how it is written.

Shapes: V n_vocab, C n_embd.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from llamakit.conversion.file_types import parse_file_type
from llamakit.conversion.outtype import uniform_type
from llamakit.errors import UnsupportedError
from llamakit.formats.base import ModelFile, TensorData, TensorInfo
from llamakit.formats.gguf import typed_metadata, write_gguf
from llamakit.ggml import GGMLType
from llamakit.model import Llama, ModelConfig, load_config
from llamakit.model.layers import RMSNorm
from llamakit.model.trained import TrainedEmbedding, TrainedLinear
from llamakit.quant import dequantize, first_bad_block
from llamakit.quant.encode import quantize
from llamakit.training.config import Outtype
from llamakit.training.train_config import TrainConfig

_STD = 0.02
_INTO_RESIDUAL = ("attn_output", "ffn_up")
_FILE_TYPE_F32 = 0
#: a table, which is part of a file and is not trained
ROPE_FREQS = "rope_freqs.weight"


class First(Protocol):
    """Where the first weights come from."""

    def __call__(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor of a name, or some of its rows, float32, made anew with each call."""
        ...


@dataclass(frozen=True)
class Blueprint:
    """shape: hyper-parameters. metadata: the keys of its GGUF file. first: its first weights. names: of all tensors,
    with their shapes, in the order of the file."""

    shape: ModelConfig
    metadata: Mapping[str, Any]
    names: Mapping[str, tuple[int, ...]]
    first: First


def from_scratch(config: TrainConfig, vocabulary: Mapping[str, Any], n_vocab: int, seed: int) -> Blueprint:
    """A new model with llama2.c's start (model.py): norms 1, matrices N(0, 0.02), those that llama2.c scales by
    1 / sqrt(2 n_layer). vocabulary: the `tokenizer.*` keys. Each tensor has a generator of its own."""
    metadata = {
        "general.architecture": "llama",
        "general.name": Path(config.out_dir).absolute().name,
        "general.file_type": _FILE_TYPE_F32,
        "llama.vocab_size": n_vocab,
        "llama.context_length": config.ctx,
        "llama.embedding_length": config.embd,
        "llama.block_count": config.layer,
        "llama.feed_forward_length": config.n_ff,
        "llama.attention.head_count": config.head,
        "llama.attention.head_count_kv": config.n_head_kv,
        "llama.rope.dimension_count": config.embd // config.head,
        "llama.rope.freq_base": float(config.rope_freq_base),
        "llama.attention.layer_norm_rms_epsilon": float(config.norm_rms_eps),
        **{key: value for key, value in vocabulary.items() if key.startswith("tokenizer.")},
    }
    shape = ModelConfig(
        n_vocab=n_vocab, n_ctx=config.ctx, n_embd=config.embd, n_head=config.head, n_head_kv=config.n_head_kv,
        head_dim=config.embd // config.head, n_layer=config.layer, n_ff=config.n_ff, rms_eps=config.norm_rms_eps,
        rope_base=config.rope_freq_base, tied_output=config.tie,
    )  # fmt: skip
    names = shape.tensor_shapes()
    order = {name: i for i, name in enumerate(names)}

    def first(name: str, start: int = 0, stop: int | None = None) -> Tensor:
        if len(names[name]) == 1:
            return torch.ones(names[name])[start:stop]
        kind = name.removesuffix(".weight").rpartition(".")[2]
        std = _STD / math.sqrt(2 * shape.n_layer) if kind in _INTO_RESIDUAL else _STD
        generator = torch.Generator().manual_seed((seed * 1_000_003 + order[name]) & (2**63 - 1))
        whole = torch.empty(names[name]).normal_(0.0, std, generator=generator)  # some rows are what they are in it
        return whole if (start, stop) == (0, None) else whole[start:stop].clone()

    return Blueprint(shape, metadata, names, first)


def from_file(file: ModelFile, vocabulary: Mapping[str, Any]) -> Blueprint:
    """The model of a file, decoded to float32, trained on. vocabulary: `tokenizer.*` keys for a file that has none."""
    shape = load_config(file)
    names = {name: info.shape for name, info in file.tensors.items()}
    metadata = {key: value for key, value in typed_metadata(file).items() if not key.startswith("split.")}
    if "tokenizer.ggml.tokens" not in metadata:
        metadata |= {key: value for key, value in vocabulary.items() if key.startswith("tokenizer.")}
    metadata["general.file_type"] = _FILE_TYPE_F32

    def first(name: str, start: int = 0, stop: int | None = None) -> Tensor:
        info = file.tensors[name]
        packed = torch.from_numpy(file.read(name, start, stop))
        return dequantize(packed, info.type, torch.float32).view(-1, *info.shape[1:])

    return Blueprint(shape, metadata, names, first)


def build(blueprint: Blueprint, device: torch.device, dtype: torch.dtype) -> tuple[Llama, dict[str, Tensor]]:
    """The model, every tensor of it trained, and the tensors by name; rope_freqs, which is a table, is not trained."""
    named = {n: nn.Parameter(blueprint.first(n).to(device)) for n in blueprint.names if n != ROPE_FREQS}
    model = assemble(blueprint, named, dtype)
    if blueprint.shape.tied_output:
        model.output = TrainedLinear(named["token_embd.weight"])
    return model, dict(named)


def assemble(blueprint: Blueprint, named: Mapping[str, nn.Parameter], dtype: torch.dtype) -> Llama:
    """The model of these parameters, which computes in dtype; without an output matrix where that is tied."""
    frequencies = blueprint.first(ROPE_FREQS) if ROPE_FREQS in blueprint.names else None
    model = Llama(blueprint.shape, frequencies)
    for name, parameter in named.items():
        path, _, kind = name.rpartition(".")
        if kind != "bias":
            leaf = _leaf(path, parameter, named.get(f"{path}.bias"), blueprint.shape, dtype)
            model.set_submodule(path, leaf)
    return model


def _leaf(
    path: str, parameter: nn.Parameter, bias: nn.Parameter | None, shape: ModelConfig, dtype: torch.dtype
) -> nn.Module:
    if path == "token_embd":
        return TrainedEmbedding(parameter, dtype)
    if path.endswith("norm"):
        norm = RMSNorm(parameter.data, shape.rms_eps)
        norm.weight = parameter
        return norm
    return TrainedLinear(parameter, bias)


def write_model(path: Path, arrays: Mapping[str, np.ndarray], blueprint: Blueprint, outtype: Outtype = "f32") -> None:
    """Write trained tensors as a GGUF model, matrices in outtype, vectors F32; other names in `arrays` are left out.

    Raises UnsupportedError for a weight beyond F16, SaveError.
    """
    file_type = parse_file_type(outtype)
    assert file_type.default is not None, "each of them is a tensor type"
    tensors = [
        _written(TensorInfo(name, shape, GGMLType.F32, 0), arrays, blueprint, file_type.default)
        for name, shape in blueprint.names.items()
    ]
    write_gguf(path, metadata={**blueprint.metadata, "general.file_type": file_type.number}, tensors=tensors)


def _written(info: TensorInfo, arrays: Mapping[str, np.ndarray], blueprint: Blueprint, wanted: GGMLType) -> TensorData:
    kind = uniform_type(info, wanted)

    def data() -> np.ndarray:
        values = arrays[info.name] if info.name in arrays else blueprint.first(info.name).numpy()
        return values if kind is GGMLType.F32 else rounded(torch.from_numpy(values), kind, info.name).numpy()

    return TensorData(info.name, info.shape, kind, data)


def rounded(weights: Tensor, kind: GGMLType, name: str) -> Tensor:
    """Float32 weights packed as F16 or BF16, uint8 rows. Raises UnsupportedError for what F16 cannot hold."""
    packed = quantize(weights, kind)
    if kind is GGMLType.F16 and first_bad_block(packed, kind) is not None:
        hint = "write the model as bf16 or f32: --outtype"
        raise UnsupportedError(f"tensor {name} has weights that F16 cannot hold", hint=hint)
    return packed
