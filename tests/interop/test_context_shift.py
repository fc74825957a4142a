"""What follows a shift of the context: llama.cpp's own shift as the judge."""

from __future__ import annotations

import pytest

from llamakit.formats.open import open_model
from llamakit.inference.completion import Token, generate
from llamakit.inference.config import GenerateConfig
from llamakit.model import load_model
from llamakit.tokenizer import load_tokenizer
from tests.interop.llama_context import LlamaContext
from tests.tiny import cached_tiny_gguf

pytestmark = pytest.mark.interop
N_CTX, N_PREDICT = 48, 150


def _llama_cpp(path, ids: list[int], n_vocab: int, n_keep: int) -> tuple[list[int], float]:
    """Greedy tokens by the loop of llama.cpp's completion tool, and how near the two likeliest came to each other."""
    tokens, nearest, pending = [], float("inf"), ids
    with LlamaContext(path, N_CTX) as context:
        for _ in range(N_PREDICT):
            if context.n_past + len(pending) >= N_CTX:
                context.shift(n_keep, (context.n_past - n_keep) // 2)
            logits = context.feed(pending, n_vocab)
            second, first = sorted(logits.tolist())[-2:]
            nearest = min(nearest, first - second)
            tokens.append(int(logits.argmax()))
            pending = tokens[-1:]
    return tokens, nearest


# YaRN is missing: llama.cpp multiplies the keys by its magnitude once more with each shift.
@pytest.mark.parametrize("keep", [0, 5, -1])
@pytest.mark.parametrize(
    "options",
    [{}, {"tokenizer": "bpe"}, {"rope": "llama3", "head_dim": 32}, {"rope": "linear", "n_head_kv": 1}],
    ids=str,
)
def test_greedy_tokens_after_several_shifts_are_llama_cpps(options, keep):
    path = cached_tiny_gguf(**options)
    file = open_model(path)
    model, tokenizer = load_model(file), load_tokenizer(file)
    tokenizer.eog_ids = frozenset()
    ids = tokenizer.encode("The old king watched")
    n_keep = len(ids) if keep < 0 else keep + tokenizer.add_bos
    config = GenerateConfig(temperature=0, n_predict=N_PREDICT, ctx=N_CTX, context_shift=True, keep=keep)
    ours = [report.id for report in generate(model, tokenizer, ids, config) if isinstance(report, Token)]
    theirs, nearest = _llama_cpp(path, ids, tokenizer.n_vocab, n_keep)
    assert nearest > 1e-4, "no tie decides"
    assert ours == theirs
