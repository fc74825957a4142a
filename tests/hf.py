"""Tiny random Hugging Face folders of every variant, written without transformers: same options and seed, same bytes."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

#: parameters of each rope type, as config.json has them beside `rope_type`
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-all": {
        "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.25, "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
}  # fmt: skip

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mistral": {"architecture": "MistralForCausalLM"},
    "mha": {"n_head_kv": 4},
    "tied": {"tied": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 16},
    "theta": {"theta": 500000.0},
    "no theta": {"theta": None, "generation": 4},
    "linear": {"rope": "linear"},
    "yarn": {"rope": "yarn"},
    "yarn-all": {"rope": "yarn-all"},
    "llama3": {"rope": "llama3", "theta": 500000.0, "head_dim": 16},
    "sharded": {"n_shards": 3},
    "sampling": {"generation_config": {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}},
}


#: what the real converter is held against: every variant in both generations, and the half types
CONVERTED: dict[str, dict[str, Any]] = {
    **{
        f"{name}, generation {g}": {"generation": g, **options}
        for name, options in VARIANTS.items()
        for g in (4, 5)
        if options.get("generation", g) == g
    },
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16", "attention_bias": True},
}


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 -> the nearest bfloat16, as uint16."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def hf_weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Hugging Face name -> random float32 weights, in the order of transformers' state_dict."""
    rng = np.random.default_rng(seed)
    c, f = config["hidden_size"], config["intermediate_size"]
    d = config.get("head_dim") or c // config["num_attention_heads"]
    q, kv = d * config["num_attention_heads"], d * config.get("num_key_value_heads", config["num_attention_heads"])
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], c)}
    parts = {
        "self_attn.q_proj": (q, c), "self_attn.k_proj": (kv, c), "self_attn.v_proj": (kv, c),
        "self_attn.o_proj": (c, q), "mlp.gate_proj": (f, c), "mlp.up_proj": (f, c), "mlp.down_proj": (c, f),
        "input_layernorm": (c,), "post_attention_layernorm": (c,),
    }  # fmt: skip
    for i in range(config["num_hidden_layers"]):
        for part, shape in parts.items():
            shapes[f"model.layers.{i}.{part}.weight"] = shape
            if config.get({"s": "attention_bias", "m": "mlp_bias"}.get(part[0], "")):
                shapes[f"model.layers.{i}.{part}.bias"] = shape[:1]
    shapes["model.norm.weight"] = (c,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], c)
    weights = {}
    for name, shape in shapes.items():
        scale = 3 / math.sqrt(c) if len(shape) == 2 else 0.2
        weights[name] = ((2 * rng.random(shape) - 1) * scale + (1.0 if "norm" in name else 0)).astype("<f4")
    return weights


def hf_config(
    *,
    architecture: str = "LlamaForCausalLM",
    generation: int = 5,
    n_layer: int = 2,
    n_embd: int = 32,
    n_head: int = 4,
    n_head_kv: int = 2,
    head_dim: int | None = None,
    n_ff: int = 48,
    n_vocab: int = 40,
    n_ctx: int = 256,
    tied: bool = False,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    rope: str = "default",
    theta: float | None = 10000.0,
    dtype: str = "float32",
    **more: Any,
) -> dict[str, Any]:
    """A config.json of transformers 4's generation (rope_theta, rope_scaling, torch_dtype) or of 5's; `more` on top."""
    config: dict[str, Any] = {
        "architectures": [architecture], "model_type": architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": n_vocab, "hidden_size": n_embd, "intermediate_size": n_ff, "num_hidden_layers": n_layer,
        "num_attention_heads": n_head, "num_key_value_heads": n_head_kv, "max_position_embeddings": n_ctx,
        "rms_norm_eps": 1e-05, "hidden_act": "silu", "tie_word_embeddings": tied, "attention_bias": attention_bias,
        "mlp_bias": mlp_bias, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if architecture == "MistralForCausalLM":
        config = {k: v for k, v in config.items() if not k.endswith("_bias")} | {"sliding_window": 128}
    if head_dim is not None:
        config["head_dim"] = head_dim
    parameters = {"rope_type": rope.partition("-")[0], **ROPES.get(rope, {})}
    stated = {} if theta is None else {"rope_theta": theta}
    if generation == 5:
        config |= {"dtype": dtype, "rope_parameters": {**parameters, **stated}}
    else:
        config |= {"torch_dtype": dtype, "rope_scaling": parameters if rope != "default" else None, **stated}
    return config | more


def safetensors_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    """A safetensors file: float32, float16, and bfloat16 as uint16."""
    header, data, end = {}, b"", 0
    names = {"<f4": "F32", "<f2": "F16", "<u2": "BF16"}
    for name, array in tensors.items():
        entry = {"dtype": names[array.dtype.str], "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        header[name], data, end = entry, data + array.tobytes(), end + array.nbytes
    raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def stored(weights: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """The same weights in a dtype of config.json's."""
    make = {"float32": lambda w: w, "float16": lambda w: w.astype("<f2"), "bfloat16": to_bf16}[dtype]
    return {name: make(weight) for name, weight in weights.items()}


def tiny_hf(
    directory: Path,
    *,
    seed: int = 0,
    n_shards: int = 1,
    generation_config: dict[str, Any] | None = None,
    dtype: str = "float32",
    **options: Any,
) -> Path:
    """Write a random model and return its folder, without a vocabulary. options: those of `hf_config`."""
    directory.mkdir(parents=True, exist_ok=True)
    config = hf_config(dtype=dtype, **options)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    if generation_config is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation_config))
    write_weights(directory, stored(hf_weights(config, seed), dtype), n_shards)
    return directory


def write_weights(directory: Path, tensors: dict[str, np.ndarray], n_shards: int = 1) -> None:
    """model.safetensors, or shards and their index."""
    if n_shards == 1:
        (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return
    names, weight_map = list(tensors), {}
    for i in range(n_shards):
        file_name = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        part = names[i * len(names) // n_shards : (i + 1) * len(names) // n_shards]
        (directory / file_name).write_bytes(safetensors_bytes({n: tensors[n] for n in part}))
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
