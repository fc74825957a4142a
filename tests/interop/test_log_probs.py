"""The module's log-probabilities against llama.cpp and transformers, in float32: under 1e-4 apart."""

import numpy as np
import pytest
import torch

from llamakit.formats.open import open_model
from llamakit.model import load_model
from tests.interop.llama_server import LlamaServer
from tests.model.test_llama import VARIANTS as TINY_VARIANTS
from tests.smollm import smollm2_f32
from tests.tiny import cached_tiny_gguf

pytestmark = pytest.mark.interop
TOLERANCE = 1e-4
VARIANTS = TINY_VARIANTS | {"wide": {"n_embd": 128, "n_head": 8, "n_head_kv": 4, "n_ff": 320, "n_layer": 3}}


def ours(path, tokens):
    """(T, V) float64 log-probabilities."""
    with open_model(path) as file, torch.no_grad():
        model = load_model(file, dtype=torch.float32)
        return model.logits(model(torch.tensor([tokens])))[0].double().log_softmax(-1).numpy()


def tokens_of(path, n=48):
    n_vocab = open_model(path).tensors["token_embd.weight"].shape[0]
    return [1, *np.random.default_rng(0).integers(3, n_vocab, n - 1).tolist()]


def assert_near(mine, theirs):
    # Where llama.cpp says -inf or a vanishing probability there is nothing left to compare.
    seen = np.isfinite(theirs) & (theirs > -50)
    assert seen.sum() > 10
    assert np.abs(mine - theirs)[seen].max() < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_agrees_on(variant):
    path = cached_tiny_gguf(**VARIANTS[variant])
    tokens = tokens_of(path)
    mine, server = ours(path, tokens), LlamaServer(path)
    # The server reports nothing where the greedy token ends the text or is no whole character (a byte token).
    places = [n for n in range(1, len(tokens) + 1) if mine[n - 1].argmax() > 258]
    assert len(places) >= 3
    for n in {places[0], places[len(places) // 2], places[-1]}:
        assert_near(mine[n - 1], server.log_probs(tokens[:n], mine.shape[1]))


def transformers_model(path):
    """The same weights in transformers' Llama, q and k rows in its order."""
    hf = pytest.importorskip("transformers", reason="transformers is not installed (extra [interop])")
    file = open_model(path)
    model = load_model(file, dtype=torch.float32)
    c = model.config
    rope = {"rope_type": "default", "rope_theta": c.rope_base}
    kind = c.rope_scaling.type
    if kind == "linear":
        rope = {"rope_type": "linear", "factor": c.rope_scaling.factor, "rope_theta": c.rope_base}
    if kind == "yarn":
        rope = {"rope_type": "yarn", "factor": c.rope_scaling.factor, "rope_theta": c.rope_base,
                "original_max_position_embeddings": c.rope_scaling.original_ctx}  # fmt: skip
    config = hf.LlamaConfig(
        vocab_size=c.n_vocab, hidden_size=c.n_embd, intermediate_size=c.n_ff, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_head_kv, head_dim=c.head_dim, rms_norm_eps=c.rms_eps,
        max_position_embeddings=c.n_ctx, rope_parameters=rope, tie_word_embeddings=c.tied_output,
        attention_bias=False, mlp_bias=False, attn_implementation="eager",
    )  # fmt: skip
    theirs = hf.LlamaForCausalLM(config).eval()
    dense = {n: m.dense(torch.float32) for n, m in model.named_modules() if hasattr(m, "dense")}

    def split_halves(w, heads):
        return w.view(heads, c.head_dim // 2, 2, -1).transpose(1, 2).reshape(w.shape)

    state = {"model.embed_tokens.weight": dense["token_embd"], "lm_head.weight": dense["output"],
             "model.norm.weight": model.output_norm.weight}  # fmt: skip
    for i, block in enumerate(model.blk):
        here, there = f"blk.{i}.", f"model.layers.{i}."
        state |= {
            f"{there}self_attn.q_proj.weight": split_halves(dense[f"{here}attn_q"], c.n_head),
            f"{there}self_attn.k_proj.weight": split_halves(dense[f"{here}attn_k"], c.n_head_kv),
            f"{there}self_attn.v_proj.weight": dense[f"{here}attn_v"],
            f"{there}self_attn.o_proj.weight": dense[f"{here}attn_output"],
            f"{there}mlp.gate_proj.weight": dense[f"{here}ffn_gate"],
            f"{there}mlp.up_proj.weight": dense[f"{here}ffn_up"],
            f"{there}mlp.down_proj.weight": dense[f"{here}ffn_down"],
            f"{there}input_layernorm.weight": block.attn_norm.weight,
            f"{there}post_attention_layernorm.weight": block.ffn_norm.weight,
        }
    theirs.load_state_dict(state, strict=True)
    return theirs


@pytest.mark.parametrize("variant", ["gqa", "mqa", "tied", "head_dim", "linear", "yarn", "theta", "wide"])
@pytest.mark.filterwarnings("ignore")
def test_transformers_agrees_on(variant):
    path = cached_tiny_gguf(**VARIANTS[variant])
    tokens = tokens_of(path)
    with torch.no_grad():
        theirs = transformers_model(path)(torch.tensor([tokens])).logits[0].double().log_softmax(-1).numpy()
    assert np.abs(ours(path, tokens) - theirs).max() < TOLERANCE


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_both_agree_on_the_real_model():
    path = smollm2_f32()
    tokens = tokens_of(path, 33)
    mine = ours(path, tokens)
    with torch.no_grad():
        theirs = transformers_model(path)(torch.tensor([tokens])).logits[0].double().log_softmax(-1).numpy()
    assert np.abs(mine - theirs).max() < TOLERANCE
    assert_near(mine[-1], LlamaServer(path).log_probs(tokens, mine.shape[1]))
