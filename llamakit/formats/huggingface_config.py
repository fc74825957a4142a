"""Hyper-parameters of a Llama as Hugging Face's config.json and as GGUF metadata say them, and the way between both.

LlamaForCausalLM and MistralForCausalLM are the same architecture in GGUF. Mistral's sliding window has no place there:
llama.cpp and convert_hf_to_gguf.py attend to the whole context, and so does what is written back. The order and the
types of the keys are those of convert_hf_to_gguf.py with transformers 5; facts: llama.cpp's conversion/base.py and
conversion/llama.py, transformers' configuration_llama.py and configuration_mistral.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llamakit.errors import FormatError, UnsupportedError
from llamakit.files import escape_control
from llamakit.formats.fields import Fields
from llamakit.formats.gguf_values import GGUFValueType
from llamakit.formats.gguf_writer import Typed
from llamakit.formats.huggingface_rope import Rope, rope_of_config, rope_of_metadata, shortest

_MAX_LAYERS = 1024
#: architecture -> (model_type, heads of keys and values where the config is silent: None is as many as of queries)
_CLASSES: dict[str, tuple[str, int | None]] = {
    "LlamaForCausalLM": ("llama", None),
    "LLaMAForCausalLM": ("llama", None),  # as some of the first conversions spelled it
    "MistralForCausalLM": ("mistral", 8),
}
_QUANTIZATION_VERSION = 2
_BIASED = {"attention_bias": ("attn_q", "attn_k", "attn_v", "attn_output"),
           "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down")}  # fmt: skip
#: general.sampling.* -> (names in generation_config.json, is it a whole number?), in the order of convert_hf_to_gguf.py
_SAMPLING: dict[str, tuple[tuple[str, ...], bool]] = {
    "top_k": (("top_k",), True),
    "top_p": (("top_p",), False),
    "min_p": (("min_p",), False),
    "xtc_probability": (("xtc_probability",), False),
    "xtc_threshold": (("xtc_threshold",), False),
    "temp": (("temperature",), False),
    "penalty_last_n": (("penalty_last_n",), True),
    "penalty_repeat": (("penalty_repeat", "repetition_penalty"), False),
    "mirostat": (("mirostat",), True),
    "mirostat_tau": (("mirostat_tau",), False),
    "mirostat_eta": (("mirostat_eta",), False),
}
#: what transformers' GenerationConfig knows of these
_TRANSFORMERS_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """The hyper-parameters that both sides know, checked. biases: `attention_bias`, `mlp_bias`."""

    n_vocab: int
    n_ctx: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_layer: int
    rms_eps: float
    rope: Rope
    tied_output: bool
    biases: frozenset[str] = frozenset()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the model needs, by GGUF's names, rows first."""
        c, q, kv = self.n_embd, self.n_head * self.head_dim, self.n_head_kv * self.head_dim
        matrices = {
            "attn_q": (q, c), "attn_k": (kv, c), "attn_v": (kv, c), "attn_output": (c, q),
            "ffn_gate": (self.n_ff, c), "ffn_up": (self.n_ff, c), "ffn_down": (c, self.n_ff),
        }  # fmt: skip
        found: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.n_vocab, c), "output_norm.weight": (c,)}
        if not self.tied_output:
            found["output.weight"] = (self.n_vocab, c)
        for i in range(self.n_layer):
            found |= {f"blk.{i}.{norm}.weight": (c,) for norm in ("attn_norm", "ffn_norm")}
            found |= {f"blk.{i}.{name}.weight": shape for name, shape in matrices.items()}
            biased = [name for kind in self.biases for name in _BIASED[kind]]
            found |= {f"blk.{i}.{name}.bias": matrices[name][:1] for name in biased}
        return found

    def metadata(self, *, name: str, file_type: int, generation: Mapping[str, Any]) -> dict[str, Any]:
        """GGUF's keys without the tokenizer's, in the order of convert_hf_to_gguf.py.

        generation: what `sampling_metadata` made of generation_config.json. Of general.*, which says where a model
        comes from, only the name is written.
        """
        return {
            "general.architecture": "llama",
            "general.type": "model",
            **generation,
            "general.name": name,
            "llama.block_count": self.n_layer,
            "llama.context_length": self.n_ctx,
            "llama.embedding_length": self.n_embd,
            "llama.feed_forward_length": self.n_ff,
            "llama.attention.head_count": self.n_head,
            "llama.attention.head_count_kv": self.n_head_kv,
            **self.rope.metadata(),
            "llama.attention.layer_norm_rms_epsilon": self.rms_eps,
            "llama.attention.key_length": self.head_dim,
            "llama.attention.value_length": self.head_dim,
            "general.file_type": file_type,
            "llama.vocab_size": self.n_vocab,
            "llama.rope.dimension_count": self.head_dim,
            "general.quantization_version": _QUANTIZATION_VERSION,
        }

    def config(self, *, dtype: str, tokens: Mapping[str, int | None]) -> dict[str, Any]:
        """config.json of a LlamaForCausalLM, in the spelling that transformers 4 and 5 both understand.

        tokens: `bos_token_id` and the like, from `special_tokens`.
        """
        found = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "vocab_size": self.n_vocab,
            "max_position_embeddings": self.n_ctx,
            "hidden_size": self.n_embd,
            "intermediate_size": self.n_ff,
            "num_attention_heads": self.n_head,
            "num_key_value_heads": self.n_head_kv,
            "head_dim": self.head_dim,
            "num_hidden_layers": self.n_layer,
            "rms_norm_eps": self.rms_eps,
            "tie_word_embeddings": self.tied_output,
            "torch_dtype": dtype,
            **{kind: kind in self.biases for kind in _BIASED},
            **self.rope.config(),
            **tokens,
        }
        return dict(sorted(found.items()))


def shape_of_config(config: Mapping[str, Any], path: str | os.PathLike[str]) -> LlamaShape:
    """The hyper-parameters in a config.json, of transformers' old generation or the one since version 5.

    What is absent is refused by name, except what the class itself defines: as many heads of keys and values as of
    queries (8 for a Mistral), head_dim, silu, no biases, an output matrix of its own, theta 10000.
    Raises UnsupportedError for what is no plain Llama, FormatError naming the field at fault.
    """
    fields = Fields(config, path)
    model_type, n_head_kv = _class_of(config, fields)
    _refuse_what_changes_the_model(config, fields)
    n_head, n_embd = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    if n_embd % n_head and "head_dim" not in fields:
        raise fields.wrong("hidden_size", f"a multiple of num_attention_heads, {n_head}")
    silent = None if "num_key_value_heads" in config else n_head_kv
    n_ctx = fields.integer("max_position_embeddings")
    return _checked(
        LlamaShape(
            n_vocab=fields.integer("vocab_size"),
            n_ctx=n_ctx,
            n_embd=n_embd,
            n_ff=fields.integer("intermediate_size"),
            n_head=n_head,
            n_head_kv=fields.integer("num_key_value_heads", silent or n_head),
            head_dim=fields.integer("head_dim", n_embd // n_head),
            n_layer=fields.integer("num_hidden_layers", most=_MAX_LAYERS),
            rms_eps=fields.positive("rms_norm_eps"),
            rope=rope_of_config(config, n_ctx, path),
            tied_output=fields.flag("tie_word_embeddings", False),
            biases=frozenset(kind for kind in _BIASED if model_type == "llama" and fields.flag(kind, False)),
        ),
        path,
    )


def _class_of(config: Mapping[str, Any], fields: Fields) -> tuple[str, int | None]:
    names = config.get("architectures")
    if names is None:
        raise FormatError("architectures is missing", path=fields.path)
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in _CLASSES:
        shown = escape_control(repr(names if name is None else name)[:80])
        raise UnsupportedError(
            f"architecture {shown} is not supported (expected LlamaForCausalLM or MistralForCausalLM)",
            path=fields.path,
        )
    expected = _CLASSES[name][0]
    if fields.text("model_type", expected) != expected:
        raise fields.wrong("model_type", f"{expected}, by the architecture {name}")
    return _CLASSES[name]


def _refuse_what_changes_the_model(config: Mapping[str, Any], fields: Fields) -> None:
    if config.get("quantization_config") is not None or config.get("compression_config") is not None:
        stated = config.get("quantization_config") or config.get("compression_config")
        method = stated.get("quant_method") if isinstance(stated, dict) else None
        raise UnsupportedError(
            f"quantization_config: weights quantized with {escape_control(repr(method)[:80])} are not supported",
            path=fields.path,
            hint="get the original model in float16 or bfloat16, and quantize it as GGUF",
        )
    if fields.text("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedError(f"hidden_act is '{escape_control(config['hidden_act'])}' (expected silu)",
                               path=fields.path)  # fmt: skip
    if fields.integer("num_local_experts", 0, least=0):
        raise UnsupportedError("num_local_experts: mixture-of-experts models are not supported", path=fields.path)
    if not fields.flag("is_causal", True):
        raise UnsupportedError("is_causal is false: only causal models are supported", path=fields.path)


def _checked(shape: LlamaShape, path: str | os.PathLike[str]) -> LlamaShape:
    if shape.n_head % shape.n_head_kv:
        raise FormatError(f"{shape.n_head} heads do not share {shape.n_head_kv} heads of keys and values", path=path)
    if shape.head_dim % 2:
        raise FormatError(f"the head dimension is {shape.head_dim} (expected an even number)", path=path)
    return shape


def sampling_metadata(generation: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """`general.sampling.*` of a generation_config.json, in the order of convert_hf_to_gguf.py.

    Raises FormatError for what is no number.
    """
    fields = Fields(generation, path)
    found: dict[str, Any] = {}
    if "sequence" in fields:
        found["general.sampling.sequence"] = fields.text("sequence")
    for ours, (theirs, whole) in _SAMPLING.items():
        name = next((name for name in theirs if name in fields), None)
        if name is not None and whole:
            value = fields.integer(name, least=-(2**31))
            found[f"general.sampling.{ours}"] = Typed(value, GGUFValueType.INT32)
        elif name is not None:
            found[f"general.sampling.{ours}"] = fields.number(name)
    return found


def generation_of_metadata(keys: Fields, tokens: Mapping[str, int | None]) -> dict[str, Any]:
    """generation_config.json: the ids of `special_tokens` (every end of a turn ends the text), and how to sample."""
    found: dict[str, Any] = {name: token for name, token in tokens.items() if token is not None}
    ends = [keys.raw(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    if len(ends) > 1:
        found["eos_token_id"] = ends
    sampling = {}
    for ours, (theirs, whole) in _SAMPLING.items():
        key = f"general.sampling.{ours}"
        if key in keys and theirs[-1] in _TRANSFORMERS_SAMPLING:
            sampling[theirs[-1]] = keys.integer(key, least=0) if whole else shortest(keys.number(key))
    return found | sampling | ({"do_sample": True} if sampling else {})


def special_tokens(keys: Fields) -> dict[str, int | None]:
    """config.json's ids of the first, last and filling token; None where the vocabulary has none."""
    found: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None}
    for ours, theirs in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        key = f"tokenizer.ggml.{ours}_token_id"
        if key in keys:
            found[theirs] = keys.integer(key, least=0)
    return found


def shape_of_metadata(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, ...]],
    freqs: np.ndarray | None,
    path: str | os.PathLike[str],
) -> LlamaShape:
    """The hyper-parameters in GGUF metadata, as far as transformers' LlamaForCausalLM can have them.

    tensors: name -> shape, rows first; freqs: `rope_freqs.weight` as float32, None where there is none.
    Raises UnsupportedError for what it cannot have, FormatError naming the key or the tensor at fault.
    """
    keys = Fields(metadata, path)
    if keys.text("general.architecture") != "llama":
        raise UnsupportedError(f"general.architecture is {escape_control(keys.text('general.architecture'))!r}: only "
                               "'llama' models are supported", path=path)  # fmt: skip
    if keys.integer("llama.expert_count", 0, least=0):
        raise UnsupportedError("llama.expert_count: mixture-of-experts models are not supported", path=path)
    embedding = tensors.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise FormatError("token_embd.weight is missing or no matrix", path=path)
    n_head, n_embd = keys.integer("llama.attention.head_count"), keys.integer("llama.embedding_length")
    if n_embd % n_head:
        raise UnsupportedError(f"llama.embedding_length {n_embd} is no multiple of llama.attention.head_count {n_head},"
                               " which transformers' Llama needs", path=path)  # fmt: skip
    head_dim = keys.integer("llama.attention.key_length", n_embd // n_head)
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if keys.integer(key, head_dim) != head_dim:
            raise UnsupportedError(f"{key} is {keys.raw(key)} (expected the head dimension, {head_dim})", path=path)
    if freqs is not None and freqs.shape != (head_dim // 2,):
        raise FormatError(f"rope_freqs.weight has shape {list(freqs.shape)} (expected [{head_dim // 2}])", path=path)
    n_ctx = keys.integer("llama.context_length")
    shape = LlamaShape(
        n_vocab=embedding[0],
        n_ctx=n_ctx,
        n_embd=n_embd,
        n_ff=keys.integer("llama.feed_forward_length"),
        n_head=n_head,
        n_head_kv=keys.integer("llama.attention.head_count_kv", n_head),
        head_dim=head_dim,
        n_layer=keys.integer("llama.block_count", most=_MAX_LAYERS),
        rms_eps=shortest(keys.positive("llama.attention.layer_norm_rms_epsilon")),
        rope=rope_of_metadata(keys, n_ctx, freqs),
        tied_output="output.weight" not in tensors,
        biases=_biases(tensors),
    )
    return _checked(shape, path)


def _biases(tensors: Collection[str]) -> frozenset[str]:
    """Which of both kinds of biases there are; that all of a kind are there is checked with the shapes."""
    parts = {name.removesuffix(".bias").rpartition(".")[2] for name in tensors if name.endswith(".bias")}
    return frozenset(kind for kind, names in _BIASED.items() if parts.intersection(names))


def check_tensors(
    shape: LlamaShape,
    tensors: Mapping[str, tuple[int, ...]],
    path: str | os.PathLike[str],
    shown: Callable[[str], str | None] = str,
) -> None:
    """Exactly the tensors of the model, each of its shape; `rope_freqs.weight` aside.

    tensors: GGUF name -> shape, rows first. shown: a name as the user of the file knows it.
    Raises FormatError naming the first that is missing, of another shape, or too many.
    """
    expected = shape.shapes()
    for name, wanted in expected.items():
        if name not in tensors:
            raise FormatError(f"tensor {shown(name)} is missing", path=path)
        there = list(tensors[name])
        if there != list(wanted):
            raise FormatError(f"tensor {shown(name)} has shape {there[:8]} (expected {list(wanted)})", path=path)
    for name in tensors:
        if name not in expected and name != "rope_freqs.weight":
            raise FormatError(f"tensor {escape_control(str(shown(name))[:100])} has no place in this Llama", path=path)
