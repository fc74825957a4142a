"""The hyper-parameters of a Llama, read from a file's metadata and checked before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llamakit.errors import FormatError, UnsupportedError
from llamakit.formats.base import TensorInfo

_MAX_LAYERS = 1024


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How positions beyond the trained context are mapped (GGUF `llama.rope.scaling.*`)."""

    type: Literal["none", "linear", "yarn"] = "none"
    factor: float = 1.0
    original_ctx: int = 0
    attn_factor: float = 1.0
    ext_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Hyper-parameters under the field's names. Build it with `from_metadata`, which validates."""

    n_vocab: int
    n_ctx: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_layer: int
    n_ff: int
    rms_eps: float
    rope_base: float
    rope_scaling: RopeScaling = RopeScaling()
    tied_output: bool

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> ModelConfig:
        """Read and check `llama.*` (GGUF specification), and every tensor's presence and shape.

        Raises UnsupportedError for what is not a plain Llama, FormatError naming the key or tensor at fault.
        """
        arch = metadata.get("general.architecture")
        if arch != "llama":
            raise UnsupportedError(f"general.architecture is {arch!r}: only 'llama' models are supported")
        keys = _Keys(metadata)
        n_head, n_embd = keys.integer("llama.attention.head_count"), keys.integer("llama.embedding_length")
        if n_embd % n_head and "llama.attention.key_length" not in metadata:
            raise FormatError(
                f"llama.embedding_length {n_embd} is not a multiple of llama.attention.head_count {n_head}"
            )
        head_dim = keys.integer("llama.attention.key_length", n_embd // n_head)
        embedding = tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise FormatError("token_embd.weight is missing or not a matrix: this file holds no Llama model")
        config = cls(
            n_vocab=embedding.shape[0],
            n_ctx=keys.integer("llama.context_length"),
            n_embd=n_embd,
            n_head=n_head,
            n_head_kv=keys.integer("llama.attention.head_count_kv", n_head),
            head_dim=head_dim,
            n_layer=keys.integer("llama.block_count"),
            n_ff=keys.integer("llama.feed_forward_length"),
            rms_eps=keys.number("llama.attention.layer_norm_rms_epsilon"),
            rope_base=keys.number("llama.rope.freq_base", 10000.0),
            rope_scaling=_rope_scaling(keys),
            tied_output="output.weight" not in tensors,
        )
        config._check(keys)
        config._check_tensors(tensors)
        return config

    def _check(self, keys: _Keys) -> None:
        if self.n_head % self.n_head_kv:
            raise FormatError(
                f"llama.attention.head_count {self.n_head} is not a multiple of head_count_kv {self.n_head_kv}"
            )
        if self.n_layer > _MAX_LAYERS:
            raise FormatError(f"llama.block_count is {self.n_layer} (expected at most {_MAX_LAYERS})")
        if self.head_dim % 2:
            raise FormatError(f"the head dimension is {self.head_dim} (expected an even number)")
        for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
            value = keys.integer(key, self.head_dim)
            if value != self.head_dim:
                raise UnsupportedError(f"{key} is {value} (expected the head dimension, {self.head_dim})")
        if not (self.rms_eps > 0 and np.isfinite(self.rms_eps)):
            raise FormatError(f"llama.attention.layer_norm_rms_epsilon is {self.rms_eps} (expected a positive number)")
        if not (self.rope_base > 0 and np.isfinite(self.rope_base)):
            raise FormatError(f"llama.rope.freq_base is {self.rope_base} (expected a positive number)")
        if keys.integer("llama.expert_count", 0, least=0):
            raise UnsupportedError("llama.expert_count: mixture-of-experts models are not supported")

    def _check_tensors(self, tensors: Mapping[str, TensorInfo]) -> None:
        for name, shape in self.tensor_shapes().items():
            info = tensors.get(name)
            if info is None:
                fused = ".attn_q." in name and name.replace("attn_q", "attn_qkv") in tensors
                if fused:
                    raise UnsupportedError("attn_qkv: fused attention tensors are not supported")
                raise FormatError(f"tensor {name} is missing")
            if info.shape != shape:
                raise FormatError(f"tensor {name} has shape {list(info.shape)} (expected {list(shape)})")
        for name, size in self.bias_sizes().items():
            info = tensors.get(name)
            if info is not None and info.shape != (size,):
                raise FormatError(f"tensor {name} has shape {list(info.shape)} (expected [{size}])")
        freqs = tensors.get("rope_freqs.weight")
        if freqs is not None and freqs.shape != (self.head_dim // 2,):
            raise FormatError(f"rope_freqs.weight has shape {list(freqs.shape)} (expected [{self.head_dim // 2}])")

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """The seven matrices of one block: short name -> (n_out, n_in)."""
        q, kv = self.n_head * self.head_dim, self.n_head_kv * self.head_dim
        return {
            "attn_q": (q, self.n_embd),
            "attn_k": (kv, self.n_embd),
            "attn_v": (kv, self.n_embd),
            "attn_output": (self.n_embd, q),
            "ffn_gate": (self.n_ff, self.n_embd),
            "ffn_up": (self.n_ff, self.n_embd),
            "ffn_down": (self.n_embd, self.n_ff),
        }

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every required tensor with its shape, rows first."""
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.n_vocab, self.n_embd)}
        for i in range(self.n_layer):
            for norm in ("attn_norm", "ffn_norm"):
                shapes[f"blk.{i}.{norm}.weight"] = (self.n_embd,)
            for name, shape in self.linear_shapes().items():
                shapes[f"blk.{i}.{name}.weight"] = shape
        shapes["output_norm.weight"] = (self.n_embd,)
        if not self.tied_output:
            shapes["output.weight"] = (self.n_vocab, self.n_embd)
        return shapes

    def bias_sizes(self) -> dict[str, int]:
        """Every tensor that may be there as a bias, with its size."""
        return {
            f"blk.{i}.{name}.bias": shape[0]
            for i in range(self.n_layer)
            for name, shape in self.linear_shapes().items()
        }

    @property
    def n_matmul(self) -> int:
        """Weights that take part in matrix products per token, the output matrix included."""
        block = sum(rows * columns for rows, columns in self.linear_shapes().values())
        return self.n_layer * block + self.n_vocab * self.n_embd


class _Keys:
    """Typed access to metadata; every complaint names its key."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata

    def _get(self, key: str, default: float | str | None) -> Any:
        value = self._metadata.get(key, default)
        if value is None:
            raise FormatError(f"metadata key {key} is missing")
        if isinstance(value, np.ndarray) and value.size and np.all(value == value.flat[0]):
            return value.flat[0].item()  # per-layer arrays are fine as long as every layer agrees
        return value

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self._get(key, default)
        if isinstance(value, np.ndarray):
            raise UnsupportedError(f"{key} differs between layers, which is not supported")
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            raise FormatError(f"{key} is {value!r} (expected an integer of at least {least})")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
            raise FormatError(f"{key} is {value!r} (expected a number)")
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise FormatError(f"{key} is {value!r} (expected a string)")
        return value


def _rope_scaling(keys: _Keys) -> RopeScaling:
    """GGUF `llama.rope.scaling.*`, with llama.cpp's defaults: type linear, factor from the old scale_linear."""
    prefix = "llama.rope.scaling."
    kind = keys.text(prefix + "type", "linear")
    factor = keys.number(prefix + "factor", keys.number("llama.rope.scale_linear", 0.0))
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedError(f"{prefix}type is {kind!r} (expected none, linear or yarn)")
    if factor < 0:
        raise FormatError(f"{prefix}factor is {factor} (expected a positive number)")
    if kind == "none" or factor in (0.0, 1.0):
        return RopeScaling()
    if kind == "linear":
        return RopeScaling(type="linear", factor=factor)
    return RopeScaling(
        type="yarn",
        factor=factor,
        original_ctx=keys.integer(prefix + "original_context_length", keys.integer("llama.context_length")),
        attn_factor=keys.number(prefix + "attn_factor", 1.0),
        ext_factor=keys.number(prefix + "yarn_ext_factor", 1.0),
        beta_fast=keys.number(prefix + "yarn_beta_fast", 32.0),
        beta_slow=keys.number(prefix + "yarn_beta_slow", 1.0),
    )
