from pathlib import Path

import numpy as np
import pytest
import torch

from llamakit.errors import LlamakitError, MismatchError, UsageError
from llamakit.formats.adapter import Adapter
from llamakit.formats.open import open_model
from llamakit.inference.completion import Done, Token, encode_prompt, generate
from llamakit.inference.config import GenerateConfig
from llamakit.model import attach, load_model
from llamakit.tokenizer import load_tokenizer
from tests.interop.llama_server import LlamaServer
from tests.tiny import cached_tiny_gguf, tiny_text

GREEDY = GenerateConfig(temperature=0, n_predict=30)
VARIANTS = [
    {},
    {"tokenizer": "bpe"},
    {"tied": True, "biases": True, "rope": "yarn"},
    {"rope": "llama3", "head_dim": 32},
    {"rope": "linear", "n_head_kv": 1},
]


def _load(**options):
    file = open_model(cached_tiny_gguf(**options))
    return load_model(file), load_tokenizer(file)


def _run(model, tokenizer, prompt, config=GREEDY):
    """(ids, text, Done) of one generation."""
    *tokens, done = generate(model, tokenizer, prompt, config)
    assert isinstance(done, Done)
    assert all(isinstance(token, Token) for token in tokens)
    return [token.id for token in tokens], "".join(r.text for r in (*tokens, done)), done


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_greedy_follows_the_model_computed_without_cache_or_chunks(options):
    model, tokenizer = _load(**options)
    ids = encode_prompt(tokenizer, "The old king")
    expected = list(ids)
    with torch.no_grad():
        for _ in range(8):
            logits = model.logits(model(torch.tensor([expected])))[0, -1]
            expected.append(int(logits.argmax()))
    config = GenerateConfig(temperature=0, n_predict=8, prefill_chunk=2)
    assert _run(model, tokenizer, ids, config)[0] == expected[len(ids) :]


def test_reports_count_what_happened():
    model, tokenizer = _load()
    ids, _, done = _run(model, tokenizer, "The old king", GenerateConfig(temperature=0, n_predict=5, seed=3))
    assert len(ids) == done.n_generated == 5
    assert done.n_decoded == 4
    assert done.n_prompt == len(tokenizer.encode("The old king"))
    assert (done.reason, done.seed) == ("length", 3)
    assert done.prefill_tok_per_s > 0
    assert done.decode_tok_per_s > 0


def test_joined_pieces_are_the_decoded_text():
    model, tokenizer = _load()
    prompt = encode_prompt(tokenizer, "The queen")
    ids, text, _ = _run(model, tokenizer, prompt, GenerateConfig(temperature=2, seed=5, n_predict=200))
    assert tokenizer.decode(prompt) + text == tokenizer.decode(prompt + ids)
    assert "\ufffd" in text, "random bytes are seldom UTF-8"


def test_no_prompt_starts_from_bos_and_equals_it():
    model, tokenizer = _load()
    assert encode_prompt(tokenizer, "") == encode_prompt(tokenizer, []) == [tokenizer.bos_id]
    assert _run(model, tokenizer, "")[0] == _run(model, tokenizer, [tokenizer.bos_id])[0]
    bpe = load_tokenizer(open_model(cached_tiny_gguf(tokenizer="bpe")))
    assert encode_prompt(bpe, "") == [bpe.bos_id], "also where the model does not ask for a BOS"


def test_special_tokens_in_the_text_are_read_as_such():
    _, tokenizer = _load()
    assert encode_prompt(tokenizer, "a</s>")[-1] == tokenizer.eos_id


def test_the_context_ends_the_text():
    model, tokenizer = _load(n_ctx=32)
    _, _, done = _run(model, tokenizer, [1, 70, 80], GenerateConfig(temperature=0))
    assert (done.reason, done.n_generated, done.n_decoded) == ("context", 30, 29)
    _, _, done = _run(model, tokenizer, [1, 70, 80], GenerateConfig(temperature=0, ctx=8))
    assert (done.reason, done.n_generated) == ("context", 6)
    _, _, done = _run(model, tokenizer, [1] * 8, GenerateConfig(temperature=0, ctx=8, n_predict=1))
    assert (done.reason, done.n_generated) == ("length", 1)


def test_end_tokens_end_the_text_and_are_not_part_of_it():
    model, tokenizer = _load()
    ids, _, _ = _run(model, tokenizer, "The old king")
    stop = next(i for i in range(1, 30) if ids[i] not in ids[:i])
    tokenizer.eog_ids = frozenset({ids[stop]})
    stopped, _, done = _run(model, tokenizer, "The old king")
    assert stopped == ids[:stop]
    assert (done.reason, done.n_generated, done.n_decoded) == ("end", stop, stop)


def test_nothing_is_generated_where_nothing_is_asked_for():
    model, tokenizer = _load()
    assert _run(model, tokenizer, "a", GenerateConfig(n_predict=0))[0] == []


def test_a_seed_repeats_the_text_and_the_reported_one_too():
    model, tokenizer = _load()
    ids, _, done = _run(model, tokenizer, "The", GenerateConfig(n_predict=20))
    again, _, _ = _run(model, tokenizer, "The", GenerateConfig(n_predict=20, seed=done.seed))
    other, _, _ = _run(model, tokenizer, "The", GenerateConfig(n_predict=20, seed=done.seed ^ 1))
    assert ids == again != other


def test_logprobs_are_those_of_the_model():
    model, tokenizer = _load()
    prompt = encode_prompt(tokenizer, "The")
    token = next(generate(model, tokenizer, prompt, GenerateConfig(temperature=0, logprobs=True)))
    with torch.no_grad():
        expected = model.logits(model(torch.tensor([prompt])))[0, -1].log_softmax(-1).max()
    assert isinstance(token, Token)
    assert token.logprob == pytest.approx(float(expected), abs=1e-5)


def test_prompts_that_cannot_be_are_refused_at_once():
    model, tokenizer = _load(n_ctx=32)
    with pytest.raises(UsageError, match="the prompt has 33 tokens, the context holds 32"):
        generate(model, tokenizer, [1] * 33)
    with pytest.raises(UsageError, match="token id 100000"):
        generate(model, tokenizer, [1, 100000])
    _, other = _load(tokenizer="bpe")
    with pytest.raises(MismatchError, match=f"{other.n_vocab} tokens, the model {tokenizer.n_vocab}"):
        generate(model, other, [1])


def test_weights_that_are_not_finite_are_named():
    model, tokenizer = _load()
    model.output_norm.weight.data[3] = np.nan
    with pytest.raises(LlamakitError, match="logit"):
        next(generate(model, tokenizer, "a", GREEDY))


def test_the_callers_gradient_mode_is_left_alone():
    model, tokenizer = _load()
    reports = generate(model, tokenizer, "a", GREEDY)
    next(reports)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_an_adapter_changes_the_text_and_zero_scale_does_not():
    file = open_model(cached_tiny_gguf())
    tokenizer = load_tokenizer(file)
    rng = np.random.default_rng(0)
    a, b = (rng.normal(0, 0.5, shape).astype(np.float32) for shape in ((4, 64), (64, 4)))
    adapter = Adapter(4.0, {"blk.0.attn_q.weight": (a, b)})
    texts = []
    for scale in (None, 0.0, 1.0):
        model = load_model(file)
        if scale is not None:
            attach(model, adapter, scale)
        texts.append(_run(model, tokenizer, "The old king")[1])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.interop
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_greedy_text_is_llama_cpps_on_every_variant(options):
    path = cached_tiny_gguf(**options)
    model, tokenizer = _load(**options)
    server = LlamaServer(path)
    for seed in range(3):
        prompt = tiny_text(40, seed)
        ids = encode_prompt(tokenizer, prompt)
        assert _run(model, tokenizer, ids)[1] == server.greedy(ids, 30)


@pytest.fixture(scope="module")
def smollm2_f32(tmp_path_factory) -> Path:
    from tests.smollm import f32_copy, smollm2_path

    return f32_copy(smollm2_path(), tmp_path_factory.mktemp("smollm2") / "f32.gguf")


PROMPTS = [
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):\n",
    "To be, or not to be: that is the question.\n",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
]


@pytest.mark.slow
@pytest.mark.interop
@pytest.mark.timeout(300)
def test_greedy_text_of_smollm2_is_llama_cpps_for_64_tokens(smollm2_f32):
    file = open_model(smollm2_f32)
    model, tokenizer = load_model(file), load_tokenizer(file)
    server = LlamaServer(smollm2_f32, n_threads=2)
    for prompt in PROMPTS:
        ids = encode_prompt(tokenizer, prompt)
        ours = _run(model, tokenizer, ids, GenerateConfig(temperature=0, n_predict=64))
        assert ours[1] == server.greedy(prompt, 64), prompt
        assert len(ours[0]) == 64 or ours[2].reason == "end"
