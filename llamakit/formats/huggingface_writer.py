"""Writes a Llama as the folder that transformers loads: config.json, generation_config.json, safetensors, vocabulary.

The architecture is always LlamaForCausalLM, which is what GGUF's `llama` is. The bytes depend on the arguments alone.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from llamakit.errors import UnsupportedError
from llamakit.files import atomic_directory
from llamakit.formats.base import TensorData, read_back
from llamakit.formats.fields import Fields
from llamakit.formats.gguf_writer import Typed
from llamakit.formats.huggingface import HuggingFaceModel
from llamakit.formats.huggingface_config import (
    check_tensors,
    generation_of_metadata,
    shape_of_metadata,
    special_tokens,
)
from llamakit.formats.names import huggingface_name, rope_rows_back, rotary_heads
from llamakit.formats.safetensors import tensor_parts, write_safetensors
from llamakit.ggml import FLOAT_TYPES, GGMLType, row_bytes

_ROPE_FREQS = "rope_freqs.weight"
_DTYPES = {GGMLType.F32: "float32", GGMLType.F16: "float16", GGMLType.BF16: "bfloat16"}
#: what transformers reads to see that a file is PyTorch's
_NOTES = {"format": "pt"}


def write_huggingface(
    directory: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any],
    tensors: Iterable[TensorData],
    max_shard_bytes: int = 5_000_000_000,
    verify: Callable[[HuggingFaceModel], None] | None = None,
) -> None:
    """Write a model folder that must not exist yet, or be empty: whole or not at all.

    metadata: GGUF's keys; without a vocabulary among them, none is written. tensors: GGUF's names and row order, each
    F32, F16 or BF16; `rope_freqs.weight` becomes rope_scaling. max_shard_bytes: more than this in one file only where
    one tensor needs it. verify: called with the opened result before the rename; what it raises leaves nothing behind.

    Raises UsageError where the folder is occupied, UnsupportedError for what transformers' Llama cannot have,
    FormatError naming a key or tensor at fault, SaveError when the disk refuses.
    """
    path, given = Path(directory), list(tensors)
    plain = {key: value.value if isinstance(value, Typed) else value for key, value in metadata.items()}
    freqs = next((_as_float32(t, path) for t in given if t.name == _ROPE_FREQS), None)
    given = [t for t in given if t.name != _ROPE_FREQS]
    shapes = {t.name: tuple(t.shape) for t in given}
    shape = shape_of_metadata(plain, shapes, freqs, path)
    check_tensors(shape, shapes, path)
    keys = Fields(plain, path)
    tokens = special_tokens(keys)
    config = shape.config(dtype=_dtype(given, path), tokens=tokens)
    generation = generation_of_metadata(keys, tokens)
    translated = [_translated(t, shape.n_head, shape.n_head_kv) for t in given]

    def check(temporary: Path) -> None:
        with read_back(HuggingFaceModel, temporary, "folder") as model:
            if model.tensors.keys() - {_ROPE_FREQS} != shapes.keys():
                raise OSError(errno.EIO, "the folder reads back with other tensors than were written")
            if verify is not None:
                verify(model)

    with atomic_directory(path, check) as temporary:
        _write_json(temporary / "config.json", config)
        _write_json(temporary / "generation_config.json", generation)
        _write_weights(temporary, _shards(translated, max_shard_bytes))
        if "tokenizer.ggml.tokens" in plain:
            _write_vocabulary(temporary, plain)


def _write_vocabulary(directory: Path, metadata: Mapping[str, Any]) -> None:
    from llamakit.formats.huggingface_vocab import write_vocabulary

    write_vocabulary(directory, metadata)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _as_float32(tensor: TensorData, path: Path) -> np.ndarray:
    if tensor.type is not GGMLType.F32:
        raise UnsupportedError(f"tensor {tensor.name} is {tensor.type.name} (expected F32)", path=path)
    return np.concatenate(list(tensor_parts(tensor))).view("<f4")


def _dtype(tensors: Sequence[TensorData], path: Path) -> str:
    """config.json's dtype: that of all matrices, float32 where they differ. Norms may be wider."""
    for tensor in tensors:
        if tensor.type not in FLOAT_TYPES:
            raise UnsupportedError(
                f"tensor {tensor.name} is {tensor.type.name}, which safetensors cannot hold (expected F32, F16, BF16)",
                path=path,
                hint="convert it to f16, or from the original model: what quantization lost does not come back",
            )
    types = {tensor.type for tensor in tensors if len(tensor.shape) == 2}
    return _DTYPES[types.pop()] if len(types) == 1 else "float32"


def _translated(tensor: TensorData, n_head: int, n_head_kv: int) -> TensorData:
    """The tensor under Hugging Face's name and with its rows in Hugging Face's order."""
    heads = rotary_heads(tensor.name, n_head, n_head_kv)
    data = tensor.data if heads is None else lambda: _rotated_parts(tensor, heads)
    return tensor._replace(name=huggingface_name(tensor.name) or tensor.name, data=data)


def _rotated_parts(tensor: TensorData, n_heads: int) -> Iterator[np.ndarray]:
    """The bytes of q or k with the halves of each head apart, some whole heads at a time."""
    n_bytes = row_bytes(tensor.shape[-1], tensor.type) if len(tensor.shape) == 2 else row_bytes(1, tensor.type)
    head = tensor.shape[0] // n_heads
    left = np.empty(0, np.uint8)
    for part in tensor_parts(tensor):
        left = np.concatenate((left, part)) if left.size else part
        n = len(left) // (head * n_bytes)
        if n:
            whole = left[: n * head * n_bytes].reshape(n * head, n_bytes)
            yield whole[rope_rows_back(n * head, n)]
        left = left[n * head * n_bytes :]
    yield left


def _shards(tensors: Sequence[TensorData], max_shard_bytes: int) -> list[list[TensorData]]:
    """Filled one after the other, in the order given."""
    shards: list[list[TensorData]] = [[]]
    size = 0
    for tensor in tensors:
        n_bytes = _n_bytes(tensor)
        if shards[-1] and size + n_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += n_bytes
    return shards


def _n_bytes(tensor: TensorData) -> int:
    return row_bytes(prod(tensor.shape), tensor.type)


def _write_weights(directory: Path, shards: Sequence[Sequence[TensorData]]) -> None:
    """model.safetensors, or model-00001-of-0000N.safetensors and the index that says where each tensor is."""
    if len(shards) == 1:
        write_safetensors(directory / "model.safetensors", tensors=shards[0], metadata=_NOTES)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / name, tensors=shard, metadata=_NOTES)
        weight_map |= dict.fromkeys((t.name for t in shard), name)
    everything = [t for shard in shards for t in shard]
    sizes = {
        "total_parameters": sum(prod(t.shape) for t in everything),
        "total_size": sum(_n_bytes(t) for t in everything),
    }
    index = {"metadata": sizes, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(directory / "model.safetensors.index.json", index)
