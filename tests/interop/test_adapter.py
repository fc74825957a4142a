"""Adapters that we train, in llama.cpp: the same greedy text as here, and a lower perplexity on the packed file."""

import math

import numpy as np
import pytest
import torch

from llamakit.formats.adapter import read_adapter
from llamakit.formats.open import open_model
from llamakit.inference.completion import generate
from llamakit.inference.config import GenerateConfig
from llamakit.model import attach, load_model
from llamakit.tokenizer import load_tokenizer
from tests.interop.llama_server import LlamaServer
from tests.smollm import smollm2_f32, smollm2_path
from tests.tiny import cached_tiny_gguf, tiny_text
from tests.training.runs import run

pytestmark = pytest.mark.interop


def greedy(path, prompts, n, adapter):
    """The continuation of each prompt; the model is loaded once."""
    with open_model(path) as file:
        model, tokenizer = load_model(file, dtype=torch.float32), load_tokenizer(file)
    attach(model, adapter)
    config = GenerateConfig(n_predict=n, temperature=0.0)
    return ["".join(report.text for report in generate(model, tokenizer, prompt, config)) for prompt in prompts]


@pytest.mark.parametrize(
    "options",
    [
        {"adam_alpha": 2e-2},
        {"adam_alpha": 2e-2, "lora_alpha": 16.0, "rank_wq": 2, "rank_tok_embd": 3, "rank_out": 2},
    ],
    ids=str,
)
def test_a_trained_adapter_writes_the_same_text_there_as_here(tmp_path, options):
    path = cached_tiny_gguf()
    run(tmp_path, model_base=str(path), adam_iter=20, save_every=0, batch=4, **options)
    file = tmp_path / "lora-LATEST.bin"
    adapter, changed = read_adapter(file), 0
    base, tuned = LlamaServer(path), LlamaServer(path, lora=[(file, 1.0)])
    prompts = ("The old king", "A river", "The quiet")
    for prompt, here in zip(prompts, greedy(path, prompts, 24, adapter), strict=True):
        there = tuned.greedy(prompt, 24)
        assert here == there
        changed += there != base.greedy(prompt, 24)
    assert changed


PROMPTS = ("To be, or not to be", "The king said", "My lord,", "Once upon a time", "What news from")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("prompts", "n", "every", "steps"),
    [
        pytest.param(
            PROMPTS[1:2], 16, 56, {"adam_iter": 3, "batch": 2, "adam_alpha": 6e-3, "warmup": 1}, marks=pytest.mark.slow
        ),
        pytest.param(PROMPTS, 64, 6, {"adam_iter": 12, "batch": 4}, marks=pytest.mark.prove),
    ],
    ids=["one", "all"],
)
def test_on_the_real_model(tmp_path, prompts, n, every, steps):
    """F32 copy: base and adapter give llama.cpp's text. Packed file: its perplexity on held-out text falls."""
    packed, copy = smollm2_path(), smollm2_f32()
    (tmp_path / "text.txt").write_text(tiny_text(12000, 5))
    run(tmp_path, model_base=str(packed), save_every=0, ctx=48, dtype="auto", **steps)
    file = tmp_path / "lora-LATEST.bin"
    adapter = read_adapter(file)
    base, tuned = LlamaServer(copy), LlamaServer(copy, lora=[(file, 1.0)])
    n_changed = 0
    for prompt, here in zip(prompts, greedy(copy, prompts, n, adapter), strict=True):
        there = tuned.greedy(prompt, n)
        assert here == there
        n_changed += there != base.greedy(prompt, n)
    assert n_changed
    text = load_tokenizer(open_model(packed)).encode(tiny_text(1500, 99))[:120]
    before, after = (_perplexity(LlamaServer(packed, lora=lora), text, every) for lora in ([], [(file, 1.0)]))
    assert after < 0.9 * before


def _perplexity(server, tokens, every):
    losses = [-server.log_probs(tokens[:n], 49152)[tokens[n]] for n in range(8, len(tokens), every)]
    return math.exp(np.mean(losses))
