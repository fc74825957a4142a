"""Names and row order, against transformers' own rotary embedding and a formula written out."""

import numpy as np
import pytest

from llamakit.formats.names import gguf_name, huggingface_name, rope_rows, rope_rows_back, rotary_heads


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight"),
        ("model.layers.12.self_attn.q_proj.bias", "blk.12.attn_q.bias"),
        ("model.layers.3.self_attn.o_proj.weight", "blk.3.attn_output.weight"),
        ("model.layers.3.post_attention_layernorm.weight", "blk.3.ffn_norm.weight"),
        ("model.layers.79.mlp.down_proj.weight", "blk.79.ffn_down.weight"),
    ],
)
def test_names_go_both_ways(theirs, ours):
    assert gguf_name(theirs) == ours
    assert huggingface_name(ours) == theirs


@pytest.mark.parametrize(
    "name",
    [
        "", "weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.01.mlp.up_proj.weight",
        "model.layers.-1.mlp.up_proj.weight", "model.layers.0.mlp.experts.0.up_proj.weight", "lm_head.weight.weight",
        "model.embed_tokens", "model.layers.99999999.mlp.up_proj.weight",
    ],
)  # fmt: skip
def test_what_no_llama_has_has_no_name(name):
    assert gguf_name(name) is None


def test_only_rotated_rows_are_moved():
    assert rotary_heads("blk.3.attn_q.weight", 8, 2) == 8
    assert rotary_heads("blk.3.attn_k.bias", 8, 2) == 2
    assert rotary_heads("blk.3.attn_v.weight", 8, 2) is None
    assert huggingface_name("rope_freqs.weight") is None


@pytest.mark.parametrize(("n_heads", "head_dim"), [(1, 2), (3, 4), (8, 64)])
def test_the_halves_of_a_head_come_side_by_side(n_heads, head_dim):
    rows = rope_rows(n_heads * head_dim, n_heads)
    for head in range(n_heads):
        for i in range(head_dim // 2):
            for s in range(2):
                assert rows[head * head_dim + 2 * i + s] == head * head_dim + s * head_dim // 2 + i
    back = rope_rows_back(n_heads * head_dim, n_heads)
    assert np.array_equal(rows[back], np.arange(n_heads * head_dim))
    assert np.array_equal(back[rows], np.arange(n_heads * head_dim))
