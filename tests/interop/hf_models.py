"""A GGUF model as transformers' Llama: the same weights, q and k with their rows in Hugging Face's order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llamakit.formats.names import huggingface_name, rope_rows_back, rotary_heads
from llamakit.formats.open import open_model
from llamakit.quant import dequantize


def hf_weights(path: Path) -> dict[str, torch.Tensor]:
    """Hugging Face's name -> float32 weights."""
    weights = {}
    with open_model(path) as file:
        heads = (int(file.metadata[f"llama.attention.head_count{kv}"]) for kv in ("", "_kv"))
        n_head, n_head_kv = heads
        for name, info in file.tensors.items():
            theirs = huggingface_name(name)
            if theirs is None:
                continue
            values = dequantize(torch.from_numpy(file.read(name)), info.type).view(info.shape)
            turned = rotary_heads(name, n_head, n_head_kv)
            weights[theirs] = values if turned is None else values[rope_rows_back(len(values), turned)]
    return weights


def hf_model(path: Path) -> Any:
    """LlamaForCausalLM in float32."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [interop])")
    weights = hf_weights(path)
    with open_model(path) as file:
        m = file.metadata
        config = transformers.LlamaConfig(
            vocab_size=file.tensors["token_embd.weight"].shape[0],
            hidden_size=m["llama.embedding_length"],
            intermediate_size=m["llama.feed_forward_length"],
            num_hidden_layers=m["llama.block_count"],
            num_attention_heads=m["llama.attention.head_count"],
            num_key_value_heads=m["llama.attention.head_count_kv"],
            max_position_embeddings=m["llama.context_length"],
            rms_norm_eps=m["llama.attention.layer_norm_rms_epsilon"],
            tie_word_embeddings="output.weight" not in file.tensors,
        )
    model = transformers.LlamaForCausalLM(config).eval()
    missing = set(model.state_dict()) - set(weights) - {"lm_head.weight"}
    assert not missing, missing
    model.load_state_dict(weights, strict=False)
    return model
