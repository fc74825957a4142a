"""config.json and GGUF's keys: what is read, what is refused by name, and that both ways meet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamakit.errors import FormatError, LlamakitError, UnsupportedError
from llamakit.formats.fields import Fields
from llamakit.formats.gguf import GGUFValueType, Typed
from llamakit.formats.huggingface_config import (
    generation_of_metadata,
    sampling_metadata,
    shape_of_config,
    shape_of_metadata,
    special_tokens,
)
from tests.hf import VARIANTS, hf_config

PATH = Path("config.json")

#: what config.json must say
NEEDED = (
    "architectures",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)


@pytest.mark.parametrize("key", NEEDED)
def test_what_is_absent_is_refused_by_name(key: str) -> None:
    for change in ({}, {key: None}):
        with pytest.raises(FormatError, match=f"config.json: {key} is missing"):
            shape_of_config({k: v for k, v in hf_config().items() if k != key} | change, PATH)


def test_what_the_classes_define_themselves() -> None:
    config = hf_config()
    for key in ("num_key_value_heads", "rope_parameters", "tie_word_embeddings", "attention_bias", "hidden_act"):
        del config[key]
    shape = shape_of_config(config, PATH)
    assert (shape.n_head_kv, shape.head_dim, shape.rope.theta, shape.tied_output) == (4, 8, 10000.0, False)
    mistral = hf_config(architecture="MistralForCausalLM", n_head=16)
    assert shape_of_config(mistral | {"num_key_value_heads": None}, PATH).n_head_kv == 16
    del mistral["num_key_value_heads"]
    assert shape_of_config(mistral, PATH).n_head_kv == 8


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM"])
def test_transformers_defines_them_the_same(tmp_path: Path, architecture: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [interop])")
    config = hf_config(architecture=architecture, n_head=8)
    for key in ("num_key_value_heads", "rope_parameters", "tie_word_embeddings", "hidden_act"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs, ours = transformers.AutoConfig.from_pretrained(tmp_path), shape_of_config(config, PATH)
    assert theirs.num_key_value_heads == ours.n_head_kv
    assert theirs.head_dim == ours.head_dim
    assert theirs.rope_parameters["rope_theta"] == ours.rope.theta
    assert theirs.tie_word_embeddings == ours.tied_output
    assert theirs.hidden_act == "silu"


#: change of a config -> (error, what is said)
REFUSED: dict[str, tuple[dict[str, Any], type[LlamakitError], str]] = {
    "Qwen": ({"architectures": ["Qwen2ForCausalLM"]}, UnsupportedError, "architecture 'Qwen2ForCausalLM' is not supp"),
    "Gemma": ({"architectures": ["GemmaForCausalLM"]}, UnsupportedError, "architecture 'GemmaForCausalLM'"),
    "Mixtral": ({"architectures": ["MixtralForCausalLM"]}, UnsupportedError, "architecture 'MixtralForCausalLM'"),
    "base model": ({"architectures": ["LlamaModel"]}, UnsupportedError, "architecture 'LlamaModel'"),
    "none": ({"architectures": []}, UnsupportedError, r"architecture \[\]"),
    "text": ({"architectures": "LlamaForCausalLM"}, UnsupportedError, "architecture 'LlamaForCausalLM' is not"),
    "hostile": ({"architectures": ["\x1b[31m"]}, UnsupportedError, r"architecture '\\x1b"),
    "two minds": ({"model_type": "qwen2"}, FormatError, "model_type is 'qwen2'"),
    "fp8": (
        {"quantization_config": {"quant_method": "fp8"}}, UnsupportedError,
        "quantization_config: weights quantized with 'fp8'"),
    "quantized": ({"quantization_config": []}, UnsupportedError, "quantization_config"),
    "gelu": ({"hidden_act": "gelu"}, UnsupportedError, "hidden_act is 'gelu'"),
    "experts": ({"num_local_experts": 8}, UnsupportedError, "num_local_experts"),
    "encoder": ({"is_causal": False}, UnsupportedError, "is_causal"),
    "negative": ({"hidden_size": -32}, FormatError, "hidden_size is -32"),
    "bool": ({"hidden_size": True}, FormatError, "hidden_size is True"),
    "float": ({"hidden_size": 32.0}, FormatError, "hidden_size is 32.0"),
    "huge": ({"vocab_size": 2**40}, FormatError, "vocab_size is 1099511627776"),
    "layers": ({"num_hidden_layers": 100_000}, FormatError, "num_hidden_layers is 100000"),
    "heads": ({"num_attention_heads": 5}, FormatError, "hidden_size is 32"),
    "shared heads": ({"num_key_value_heads": 3}, FormatError, "4 heads do not share 3"),
    "odd heads": ({"head_dim": 7}, FormatError, "the head dimension is 7"),
    "epsilon": ({"rms_norm_eps": 0}, FormatError, "rms_norm_eps is 0"),
    "flag": ({"tie_word_embeddings": "no"}, FormatError, "tie_word_embeddings is 'no'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    change, error, reason = REFUSED[name]
    with pytest.raises(error, match=reason):
        shape_of_config(hf_config() | change, PATH)


@pytest.mark.parametrize("name", VARIANTS)
def test_there_and_back(name: str) -> None:
    options = {k: v for k, v in VARIANTS[name].items() if k not in ("n_shards", "generation_config")}
    shape = shape_of_config(hf_config(**options), PATH)
    shapes = shape.shapes()
    metadata = shape.metadata(name="x", file_type=0, generation={})
    freqs = shape.rope.freqs(shape.head_dim)
    assert shape_of_metadata(metadata, shapes, freqs, PATH) == shape
    # What a GGUF file keeps is float32, and yet the numbers come back as they were.
    kept = {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in metadata.items()}
    assert shape_of_metadata(kept, shapes, freqs, PATH) == shape
    again = shape.config(dtype="float32", tokens={"bos_token_id": 1})
    assert shape_of_config(again, PATH) == shape
    assert (again["torch_dtype"], again["bos_token_id"], list(again)) == ("float32", 1, sorted(again))


#: change of the metadata (None: gone) -> (error, what is said)
REFUSED_METADATA: dict[str, tuple[dict[str, Any], type[LlamakitError], str]] = {
    "architecture": ({"general.architecture": "qwen2"}, UnsupportedError, "general.architecture is 'qwen2'"),
    "experts": ({"llama.expert_count": 8}, UnsupportedError, "llama.expert_count"),
    "absent": ({"llama.context_length": None}, FormatError, "llama.context_length is missing"),
    "heads": ({"llama.attention.head_count": 5}, UnsupportedError, "is no multiple of llama.attention.head_count 5"),
    "partial": ({"llama.rope.dimension_count": 4}, UnsupportedError, "llama.rope.dimension_count is 4"),
    "values": ({"llama.attention.value_length": 4}, UnsupportedError, "llama.attention.value_length is 4"),
    "layers": ({"llama.block_count": 5000}, FormatError, "llama.block_count is 5000"),
    "per layer": (
        {"llama.attention.head_count_kv": np.array([2, 4], "<u4")}, UnsupportedError, "head_count_kv differs between"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_METADATA)
def test_metadata_that_transformers_cannot_have(name: str) -> None:
    change, error, reason = REFUSED_METADATA[name]
    shape = shape_of_config(hf_config(), PATH)
    metadata = shape.metadata(name="x", file_type=0, generation={}) | change
    with pytest.raises(error, match=reason):
        shape_of_metadata(metadata, shape.shapes(), None, PATH)


def test_metadata_in_the_types_of_a_gguf_file() -> None:
    shape = shape_of_config(hf_config(), PATH)
    metadata: dict[str, Any] = shape.metadata(name="x", file_type=0, generation={})
    metadata["llama.block_count"] = Typed(2, GGUFValueType.UINT32)
    metadata["llama.attention.head_count_kv"] = np.array([2, 2], "<u4")
    assert shape_of_metadata(metadata, shape.shapes(), None, PATH) == shape


def test_how_to_sample_comes_back() -> None:
    generation = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}
    metadata = sampling_metadata(generation | {"do_sample": True, "eos_token_id": [1, 2]}, PATH)
    assert metadata["general.sampling.top_k"] == Typed(20, GGUFValueType.INT32)
    assert list(metadata) == [f"general.sampling.{k}" for k in ("top_k", "top_p", "min_p", "temp", "penalty_repeat")]
    assert generation_of_metadata(Fields(metadata, PATH), {}) == generation | {"do_sample": True}
    assert sampling_metadata({"temperature": None}, PATH) == {}


def test_every_end_of_a_turn_ends_the_text() -> None:
    keys = Fields({f"tokenizer.ggml.{k}_token_id": v for k, v in {"bos": 1, "eos": 2, "eot": 3}.items()}, PATH)
    tokens = special_tokens(keys)
    assert tokens == {"bos_token_id": 1, "eos_token_id": 2}
    assert generation_of_metadata(keys, tokens) == {"bos_token_id": 1, "eos_token_id": [2, 3]}
    assert special_tokens(Fields({}, PATH)) == {"bos_token_id": None, "eos_token_id": None}
