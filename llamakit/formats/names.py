"""Names and row order of other dialects, turned into GGUF's and back.

Hugging Face's names are those of transformers' LlamaForCausalLM and MistralForCausalLM. Its checkpoints keep the two
halves of every rotary pair half a head apart; GGUF keeps them side by side (`rope_rows`). Meta's and llama2.c's rows
already stand in GGUF's order.
"""

from __future__ import annotations

import re

import numpy as np

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_OF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
#: Meta's, of the published checkpoints; llama2.c has them too
_META_TOP = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
_META_OF_LAYER = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}
_TOP_BACK = {ours: theirs for theirs, ours in _TOP.items()}
_OF_LAYER_BACK = {ours: theirs for theirs, ours in _OF_LAYER.items()}
# At most six digits: a number is a layer, not a way to make the reader work.
_HF_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.(.+)\.(weight|bias)")
_META_LAYER = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.(.+)\.weight")
_GGUF_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)\.(weight|bias)")


def gguf_name(hf_name: str) -> str | None:
    """GGUF's name of a Hugging Face tensor, None for one that a Llama does not have."""
    match = _HF_LAYER.fullmatch(hf_name)
    if match:
        part = _OF_LAYER.get(match[2])
        return f"blk.{match[1]}.{part}.{match[3]}" if part else None
    module, _, kind = hf_name.rpartition(".")
    return f"{_TOP[module]}.{kind}" if module in _TOP and kind in ("weight", "bias") else None


def name_of_meta(meta_name: str) -> str | None:
    """GGUF's name of a tensor of Meta's or llama2.c's checkpoints, None for one that a Llama does not have."""
    match = _META_LAYER.fullmatch(meta_name)
    if match:
        part = _META_OF_LAYER.get(match[2])
        return f"blk.{match[1]}.{part}.weight" if part else None
    module, _, kind = meta_name.rpartition(".")
    return f"{_META_TOP[module]}.weight" if module in _META_TOP and kind == "weight" else None


def huggingface_name(gguf_name: str) -> str | None:
    """Hugging Face's name of a GGUF tensor, None for one that its Llama does not have (`rope_freqs.weight`)."""
    match = _GGUF_LAYER.fullmatch(gguf_name)
    if match:
        part = _OF_LAYER_BACK.get(match[2])
        return f"model.layers.{match[1]}.{part}.{match[3]}" if part else None
    module, _, kind = gguf_name.rpartition(".")
    return f"{_TOP_BACK[module]}.{kind}" if module in _TOP_BACK and kind in ("weight", "bias") else None


def rotary_heads(gguf_name: str, n_head: int, n_head_kv: int) -> int | None:
    """Heads of a tensor whose rows the rotary embedding turns (attn_q and attn_k, biases too), None for the others."""
    part = gguf_name.rpartition(".")[0].rpartition(".")[2]
    return {"attn_q": n_head, "attn_k": n_head_kv}.get(part)


def rope_rows(n_rows: int, n_heads: int) -> np.ndarray:
    """Which Hugging Face row stands in each GGUF row, int64 (n_rows,): gguf = hf[rope_rows(...)].

    In every head of d rows, GGUF's row 2 i + s is Hugging Face's s d/2 + i (llama.cpp, conversion/llama.py). n_rows
    must be n_heads times an even number.
    """
    half = n_rows // n_heads // 2
    return np.arange(n_rows).reshape(n_heads, 2, half).swapaxes(1, 2).reshape(-1)


def rope_rows_back(n_rows: int, n_heads: int) -> np.ndarray:
    """The inverse of `rope_rows`: hf = gguf[rope_rows_back(...)], int64 (n_rows,)."""
    half = n_rows // n_heads // 2
    return np.arange(n_rows).reshape(n_heads, half, 2).swapaxes(1, 2).reshape(-1)
