import numpy as np
import pytest

from llamakit.formats.open import open_model
from llamakit.inference.config import GenerateConfig
from llamakit.inference.continuation import Continuation, n_keep
from llamakit.inference.sampling import Sampler
from llamakit.tokenizer import load_tokenizer
from tests.tiny import cached_tiny_gguf


class CountingContext:
    """A context that computes nothing, and remembers how it was shifted."""

    def __init__(self, n_ctx: int) -> None:
        self.n_ctx, self.n_past = n_ctx, 0
        self.shifts: list[tuple[int, int, int]] = []

    def truncate(self, n_past: int) -> None:
        self.n_past = min(self.n_past, n_past)

    def shift(self, keep: int, discard: int) -> None:
        self.shifts.append((self.n_past, keep, discard))
        self.n_past -= discard


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(open_model(cached_tiny_gguf()))


def _run(tokenizer, config: GenerateConfig, *, n_prompt: int, n_ctx: int, most: int = 500):
    """(Continuation, its context) after its end, or after so many tokens; token 70 is always the likeliest."""
    context = CountingContext(n_ctx)
    continuation = Continuation(tokenizer, context, [1] * n_prompt, config, Sampler(config))
    logits = np.zeros(tokenizer.n_vocab, np.float32)
    logits[70] = 1
    for _ in range(most):
        context.n_past += len(continuation.pending)
        assert context.n_past <= n_ctx
        if continuation.reason is None:
            continuation.take(logits)
        if continuation.reason is not None:
            break
    return continuation, context


def test_a_full_context_is_shifted_where_llama_cpp_shifts_it(tokenizer):
    shifting = GenerateConfig(temperature=0, context_shift=True, keep=3, n_predict=100)
    continuation, context = _run(tokenizer, shifting, n_prompt=6, n_ctx=32)
    assert (continuation.reason, continuation.done().n_generated) == ("length", 100)
    # n_past + 1 >= n_ctx; BOS and 3 stay, half of the other 27 goes
    assert context.shifts == [(31, 4, 13)] * 5 + [(31, 4, 13)]


def test_without_end_means_without_end_and_minus_two_until_the_context_is_full(tokenizer):
    endless, context = _run(tokenizer, GenerateConfig(temperature=0, context_shift=True), n_prompt=6, n_ctx=32)
    assert endless.reason is None
    assert len(context.shifts) > 20
    for options in ({"n_predict": -2, "context_shift": True}, {}, {"n_predict": -2}):
        config = GenerateConfig(temperature=0, **options)
        full, context = _run(tokenizer, config, n_prompt=6, n_ctx=32)
        assert (full.reason, full.done().n_generated, context.shifts) == ("context", 27, [])


@pytest.mark.parametrize(
    ("keep", "n_prompt", "kept"), [(0, 9, 1), (4, 9, 5), (9, 9, 10), (10, 9, 9), (-1, 9, 9), (0, 1, 1)]
)
def test_bos_is_kept_beside_what_is_asked_for(keep, n_prompt, kept):
    assert n_keep(keep, n_prompt, add_bos=True) == kept
    assert n_keep(keep, n_prompt, add_bos=False) == (kept - 1 if 0 <= keep <= n_prompt else kept)


def test_where_nothing_can_go_the_context_is_the_end(tokenizer):
    config = GenerateConfig(temperature=0, context_shift=True, keep=-1)
    continuation, context = _run(tokenizer, config, n_prompt=31, n_ctx=32)
    assert (continuation.reason, context.shifts) == ("context", [])
