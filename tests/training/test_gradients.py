"""Gradients of every base type against a plain torch model of the decoded weights, written out here."""

import math

import pytest
import torch
import torch.nn.functional as F

from llamakit.formats.open import open_model
from llamakit.model import load_model
from llamakit.model.layers import Dropout
from llamakit.quant import dequantize
from llamakit.training.lora import attach_trainable, initial_weights
from llamakit.training.loss import Rows, backpropagate, evaluate_loss
from tests.tiny import ALL_TYPES, cached_tiny_gguf

ALPHA, RANK = 6.0, 2
KINDS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def ranks(rank=RANK, **others):
    zero = dict.fromkeys(("token_embd", "output", "output_norm", "attn_norm", "ffn_norm"), 0)
    return dict.fromkeys(KINDS, rank) | zero | others


def decoded(file):
    """Every tensor in float64, from the file."""
    return {
        name: dequantize(torch.from_numpy(file.read(name)), info.type).double().view(info.shape)
        for name, info in file.tensors.items()
    }


def plain_loss(w, c, lora, tokens, targets):
    """Mean cross entropy of a Llama written with nothing but torch functions, in float64."""

    def matrix(name):
        a, b = lora.get(name, (None, None))
        return w[name] if a is None else w[name] + ALPHA / a.shape[0] * (b @ a).view_as(w[name])

    def norm(x, name):
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + c.rms_eps) * matrix(name)

    def turn(x):
        t, d = x.shape[1], c.head_dim
        angle = torch.arange(t).double()[:, None] * c.rope_base ** (-torch.arange(0, d, 2).double() / d)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    x = matrix("token_embd.weight")[tokens]
    b, t = tokens.shape
    for i in range(c.n_layer):
        p = f"blk.{i}."
        h = norm(x, p + "attn_norm.weight")
        q, k, v = (
            (h @ matrix(f"{p}attn_{n}.weight").T + w.get(f"{p}attn_{n}.bias", 0)).view(b, t, -1, c.head_dim)
            for n in "qkv"
        )
        q, k = turn(q), turn(k)
        k, v = (z.repeat_interleave(c.n_head // c.n_head_kv, 2) for z in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(c.head_dim)
        scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -torch.inf).softmax(-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores, v).reshape(b, t, -1)
        x = x + mixed @ matrix(p + "attn_output.weight").T + w.get(f"{p}attn_output.bias", 0)
        h = norm(x, p + "ffn_norm.weight")
        gate = h @ matrix(p + "ffn_gate.weight").T + w.get(f"{p}ffn_gate.bias", 0)
        up = h @ matrix(p + "ffn_up.weight").T + w.get(f"{p}ffn_up.bias", 0)
        x = x + (F.silu(gate) * up) @ matrix(p + "ffn_down.weight").T + w.get(f"{p}ffn_down.bias", 0)
    output = matrix("output.weight") if "output.weight" in w else w["token_embd.weight"]
    logits = norm(x, "output_norm.weight") @ output.T
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def setup(path, rank_of, dtype=torch.float32, weight_cache="none"):
    """A model with LoRA of random A and B, its parameters, tokens and targets."""
    file = open_model(path)
    model = load_model(file, dtype=dtype, weight_cache=weight_cache)
    weights = initial_weights(model.config, rank_of, seed=1)
    generator = torch.Generator().manual_seed(0)
    for pair in weights.values():
        pair.b[:] = torch.randn(pair.b.shape, generator=generator).numpy() * 0.05
    pairs = attach_trainable(model, weights, ALPHA, Dropout(0.0))
    tokens, targets = torch.randint(0, model.config.n_vocab, (2, 3, 9), generator=generator)
    return file, model.train(), pairs, tokens, targets


def gradients(model, pairs, tokens, targets, parts=1):
    for pair in pairs.values():
        for p in pair:
            p.grad = None
    total = 0.0
    for rows in tokens.tensor_split(parts), targets.tensor_split(parts):
        assert len(rows) == parts
    for x, y in zip(tokens.tensor_split(parts), targets.tensor_split(parts), strict=True):
        total += backpropagate(model, Rows(x, y), 1 / tokens.numel())
    return total / tokens.numel(), {n: (a.grad.clone(), b.grad.clone()) for n, (a, b) in pairs.items()}


def expected_gradients(file, model, pairs, tokens, targets):
    lora = {n: tuple(p.detach().double().requires_grad_() for p in pair) for n, pair in pairs.items()}
    loss = plain_loss(decoded(file), model.config, lora, tokens, targets)
    loss.backward()
    return float(loss.detach()), {n: (a.grad, b.grad) for n, (a, b) in lora.items()}


def assert_close(mine, theirs, tolerance):
    for name, pair in theirs.items():
        for a, b in zip(mine[name], pair, strict=True):
            scale = float(b.abs().max()) + 1e-12
            assert float((a.double() - b).abs().max()) / scale < tolerance, name


@pytest.mark.parametrize("type_name", ALL_TYPES)
def test_every_type_trains(type_name):
    file, model, pairs, tokens, targets = setup(cached_tiny_gguf(type=type_name), ranks())
    loss, mine = gradients(model, pairs, tokens, targets)
    expected, theirs = expected_gradients(file, model, pairs, tokens, targets)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_close(mine, theirs, 2e-4)
    model.use_checkpointing = True
    again, recomputed = gradients(model, pairs, tokens, targets)
    assert again == loss
    assert all(torch.equal(a, b) for n in mine for a, b in zip(mine[n], recomputed[n], strict=True))
    model.use_checkpointing = False
    _, accumulated = gradients(model, pairs, tokens, targets, parts=3)
    assert_close(accumulated, theirs, 2e-4)


@pytest.mark.parametrize("options", [{"tied": True}, {"biases": True}, {"n_head_kv": 1}, {"n_head_kv": 4}], ids=str)
def test_every_variant_trains(options):
    file, model, pairs, tokens, targets = setup(cached_tiny_gguf(type="Q8_0", **options), ranks())
    loss, mine = gradients(model, pairs, tokens, targets)
    expected, theirs = expected_gradients(file, model, pairs, tokens, targets)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_close(mine, theirs, 2e-4)


def test_embedding_output_and_norms_train():
    everything = ranks(token_embd=2, output=3, output_norm=1, attn_norm=1, ffn_norm=2)
    file, model, pairs, tokens, targets = setup(cached_tiny_gguf(type="Q8_0"), everything)
    loss, mine = gradients(model, pairs, tokens, targets)
    expected, theirs = expected_gradients(file, model, pairs, tokens, targets)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_close(mine, theirs, 2e-4)


def test_bf16_is_near_float32():
    file, model, pairs, tokens, targets = setup(cached_tiny_gguf(type="Q8_0"), ranks(), dtype=torch.bfloat16)
    loss, mine = gradients(model, pairs, tokens, targets)
    expected, theirs = expected_gradients(file, model, pairs, tokens, targets)
    assert loss == pytest.approx(expected, rel=0.02)
    for name, pair in theirs.items():
        for a, b in zip(mine[name], pair, strict=True):
            assert F.cosine_similarity(a.double().flatten(), b.flatten(), 0) > 0.99, name


def test_a_vocabulary_larger_than_a_tile_gives_the_same_loss(monkeypatch):
    from llamakit.training import loss as module

    _file, model, pairs, tokens, targets = setup(cached_tiny_gguf(type="Q8_0"), ranks())
    whole, mine = gradients(model, pairs, tokens, targets)
    monkeypatch.setattr(module, "_TILE_LOGITS", 7)
    monkeypatch.setattr(module, "CHUNK_TOKENS", 5)
    parts, theirs = gradients(model, pairs, tokens, targets)
    assert parts == pytest.approx(whole, rel=1e-6)
    assert_close(mine, {n: (a.double(), b.double()) for n, (a, b) in theirs.items()}, 1e-4)
    assert evaluate_loss(model, Rows(tokens, targets)) / tokens.numel() == pytest.approx(whole, rel=1e-6)


def test_dropout_is_drawn_anew_for_each_key_and_is_the_same_when_recomputed():
    _, model, pairs, tokens, targets = setup(cached_tiny_gguf(type="Q8_0"), ranks())
    dropout = Dropout(0.3)
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = dropout
    results = {}
    for key in (1, 2):
        dropout.key = key
        results[key] = gradients(model, pairs, tokens, targets)
        model.use_checkpointing = True
        again = gradients(model, pairs, tokens, targets)
        model.use_checkpointing = False
        assert again[0] == results[key][0]
        assert all(torch.equal(a, b) for n in pairs for a, b in zip(again[1][n], results[key][1][n], strict=True))
    assert results[1][0] != results[2][0]
    model.eval()
    dropout.key = 1
    assert evaluate_loss(model, Rows(tokens, targets)) != pytest.approx(results[1][0] * tokens.numel(), rel=1e-6)
