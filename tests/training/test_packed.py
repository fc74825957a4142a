"""Samples that share a row: losses and gradients are those of each sample alone, whatever computes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llamakit.dataset.chat_data import ChatData, Piece, joined
from llamakit.dataset.packing import ChatBatch, ChatBatches
from llamakit.formats.open import open_model
from llamakit.kernels import train
from llamakit.model import Llama, load_model
from llamakit.model.attention import causal_attention, masked_attention, segment_starts
from llamakit.model.layers import Dropout
from llamakit.training.lora import attach_trainable, initial_weights, named_pairs
from llamakit.training.loss import backpropagate, evaluate_loss, rows_of
from tests.tiny import cached_tiny_gguf

CPU = torch.device("cpu")
KINDS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
REST = ("token_embd", "output", "output_norm", "attn_norm", "ffn_norm")


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The C kernels, or torch in their place."""
    if request.param == "torch":
        monkeypatch.setattr(train, "usable", lambda *_tensors: False)
    return request.param


def samples(n_vocab: int, sizes: tuple[int, ...] = (9, 3, 7, 12, 2)) -> ChatData:
    generator = np.random.default_rng(1)
    pieces = []
    for size in sizes:
        trained = generator.random(size) < 0.5
        trained[0], trained[-1] = False, True
        tokens = generator.integers(0, n_vocab, size).astype(np.int32)
        pieces.append(Piece(tokens, trained, f"a:{len(pieces)}"))
    return joined(pieces)


def model_of(**options: int) -> tuple[Llama, dict[str, Tensor]]:
    model = load_model(open_model(cached_tiny_gguf(type="Q8_0", **options)), dtype=torch.float32)
    ranks: dict[str, int] = {kind: 2 if kind in KINDS else 0 for kind in (*KINDS, *REST)}
    weights = initial_weights(model.config, ranks, seed=1)
    generator = np.random.default_rng(0)
    for pair in weights.values():
        pair.b[:] = generator.normal(size=pair.b.shape) * 0.05
    return model.train(), named_pairs(attach_trainable(model, weights, 4.0, Dropout(0.0)))


def gradients(model: Llama, named: dict[str, Tensor], batches: list[ChatBatch]) -> tuple[float, dict[str, Tensor]]:
    for tensor in named.values():
        tensor.grad = None
    n_trained = sum(batch.n_trained for batch in batches)
    loss = sum(backpropagate(model, rows_of(batch, CPU), 1 / n_trained) for batch in batches) / n_trained
    return loss, {name: tensor.grad.clone() for name, tensor in named.items() if tensor.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("n_head_kv", [1, 2, 4])
def test_packed_is_as_alone(kernels: str, n_head_kv: int, checkpointing: bool) -> None:
    model, named = model_of(n_head_kv=n_head_kv)
    model.use_checkpointing = checkpointing
    data = samples(model.config.n_vocab)
    alone = list(ChatBatches(data, ctx=24, pack=False, pad=0).in_order(1))
    packed = list(ChatBatches(data, ctx=24, pack=True, pad=0).in_order(2))
    assert [batch.packed for batch in packed] == [True] and len(packed[0].inputs) == 2
    loss, mine = gradients(model, named, packed)
    expected, theirs = gradients(model, named, alone)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert mine.keys() == theirs.keys() == named.keys()
    for name, gradient in theirs.items():
        assert float((mine[name] - gradient).abs().max()) < 1e-5 * float(gradient.abs().max()), name
    total = sum(evaluate_loss(model, rows_of(batch, CPU)) for batch in packed)
    assert total / data.n_trained == pytest.approx(expected, rel=1e-5)


def test_the_loss_is_that_of_each_trained_token_after_what_stands_before_it() -> None:
    """Written out: every sample by itself, the loss of token i from the logits at i - 1."""
    model, _named = model_of()
    data = samples(model.config.n_vocab)
    expected = []
    with torch.no_grad():
        for i in range(data.count):
            tokens, trained = (torch.from_numpy(x) for x in data.sample(i))
            logits = model.logits(model(tokens[None].long()))[0]
            expected += [F.cross_entropy(logits[j - 1], tokens[j].long()) for j in range(1, len(tokens)) if trained[j]]
    (batch,) = ChatBatches(data, ctx=24, pack=True, pad=0).in_order(2)
    assert batch.n_trained == len(expected) == data.n_trained
    assert evaluate_loss(model, rows_of(batch, CPU)) == pytest.approx(float(sum(expected)), rel=1e-5)


def test_without_segments_packing_would_leak() -> None:
    """The test above would not see a mask that does nothing if samples did not change each other without one."""
    model, _named = model_of()
    data = samples(model.config.n_vocab)
    (batch,) = ChatBatches(data, ctx=24, pack=True, pad=0).in_order(2)
    rows = rows_of(batch, CPU)
    assert rows.segments is not None
    with torch.no_grad():
        apart = model(rows.tokens, rows.positions, segments=rows.segments)
        together = model(rows.tokens, rows.positions)
    assert float((apart - together).abs().max()) > 1e-2


@pytest.mark.parametrize("t", [130, 1030], ids=["kept", "recomputed"])
def test_attention_over_several_tiles(kernels: str, t: int) -> None:
    generator = torch.Generator().manual_seed(3)
    segments = torch.randint(0, 2, (2, t), generator=generator).mul(torch.rand(2, t, generator=generator) < 0.02)
    segments = segments.cumsum(1)
    q = torch.randn(2, t, 4, 8, generator=generator).requires_grad_()
    k, v = (torch.randn(2, t, 2, 8, generator=generator).requires_grad_() for _ in range(2))
    out = causal_attention(q, k, v, segment_starts(segments))
    seen = (segments[:, :, None] == segments[:, None]) & torch.ones(t, t, dtype=torch.bool).tril()
    k_each, v_each = (x.repeat_interleave(2, 2).transpose(1, 2) for x in (k, v))
    scores = (q.transpose(1, 2) @ k_each.transpose(2, 3) / 8**0.5).masked_fill(~seen[:, None], -torch.inf)
    expected = (scores.softmax(-1) @ v_each).transpose(1, 2).reshape(2, t, -1)
    assert torch.allclose(out, expected, atol=1e-5)
    assert torch.allclose(masked_attention(q, k, v, segment_starts(segments)), expected, atol=1e-5)
    weight = torch.randn(out.shape, generator=generator)
    mine = torch.autograd.grad((out * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_where_segments_begin() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 1, -1], [0, 1, 1, 1, 2, 3]])
    assert segment_starts(segments).tolist() == [[0, 0, 2, 2, 2, 5], [0, 1, 1, 1, 4, 5]]
