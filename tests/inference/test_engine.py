import numpy as np
import pytest
import torch

from llamakit.formats.open import open_model
from llamakit.inference.engine import TorchEngine
from llamakit.model import load_model
from tests.tiny import cached_tiny_gguf

PROMPTS = [[1, 70, 80, 90, 75], [1], [1, 60, 61, 62, 63, 64, 65, 66]]


@pytest.fixture(scope="module")
def model():
    return load_model(open_model(cached_tiny_gguf()))


@pytest.mark.parametrize("chunk", [512, 3, 1])
def test_a_batch_gives_each_sequence_the_logits_that_it_has_alone(model, chunk):
    alone, engine = TorchEngine(model), TorchEngine(model, prefill_chunk=chunk)
    ours, theirs = ([e.context(20) for _ in PROMPTS] for e in (engine, alone))
    for tokens in (PROMPTS, [[5], [6, 7], [8]]):
        batch = engine.feed_batch(list(zip(ours, tokens, strict=True)))
        for logits, context, ids in zip(batch, theirs, tokens, strict=True):
            np.testing.assert_allclose(logits, alone.feed(context, ids), rtol=1e-4, atol=1e-4)
    assert [c.n_past for c in ours] == [6, 3, 9]


def test_matrices_see_the_tokens_of_all_sequences_at_once(model):
    engine = TorchEngine(model)
    seen = []
    hook = model.blk[0].ffn_down.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[:2])))
    engine.feed_batch([(engine.context(20), ids) for ids in PROMPTS])
    hook.remove()
    assert seen == [(1, 14)]


def test_a_shifted_context_forgets_and_goes_on(model):
    engine = TorchEngine(model)
    context = engine.context(16)
    engine.feed(context, list(range(60, 76)))
    context.shift(1, 7)
    assert (context.n_past, context.n_ctx) == (9, 16)
    logits = engine.feed(context, [3])
    assert np.isfinite(logits).all()
    assert context.n_past == 10
    assert not torch.is_inference_mode_enabled()
