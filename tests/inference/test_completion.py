import numpy as np
import pytest
import torch

from llamakit.errors import LlamakitError, MismatchError, UsageError
from llamakit.formats.adapter import Adapter
from llamakit.formats.open import open_model
from llamakit.inference.completion import Done, Token, encode_prompt, generate, generate_batch
from llamakit.inference.config import GenerateConfig
from llamakit.model import attach, load_model
from llamakit.tokenizer import load_tokenizer
from tests.interop.llama_server import LlamaServer
from tests.smollm import smollm2_f32
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
    token = next(generate(model, tokenizer, prompt, GenerateConfig(temperature=0, logprobs=2)))
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


PROMPTS = [
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):\n",
    "To be, or not to be: that is the question.\n",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
]


@pytest.mark.interop
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("prompts", "n"),
    [
        pytest.param(PROMPTS[2:4], 24, marks=pytest.mark.slow),
        pytest.param(PROMPTS, 64, marks=pytest.mark.prove),
    ],
    ids=["two", "all"],
)
def test_greedy_text_of_smollm2_is_llama_cpps(prompts, n):
    file = open_model(smollm2_f32())
    model, tokenizer = load_model(file), load_tokenizer(file)
    server = LlamaServer(smollm2_f32(), n_threads=2)
    for prompt in prompts:
        ids = encode_prompt(tokenizer, prompt)
        ours = _run(model, tokenizer, ids, GenerateConfig(temperature=0, n_predict=n))
        assert ours[1] == server.greedy(prompt, n), prompt
        assert len(ours[0]) == n or ours[2].reason == "end"


def _text(model, tokenizer, **settings):
    return _run(model, tokenizer, "The old king", GenerateConfig(temperature=0, n_predict=30, **settings))


def test_a_stop_across_the_border_of_tokens_ends_the_text_before_it():
    model, tokenizer = _load()
    whole = _text(model, tokenizer)[1]
    stop = whole[6:13]
    ids, text, done = _text(model, tokenizer, stop=(stop, "not there"))
    assert text == whole[: whole.index(stop)]
    assert (done.reason, done.stop, done.n_generated) == ("stop", stop, len(ids))
    assert len(ids) < 30
    kept = _text(model, tokenizer, reverse_prompt=(stop,))
    assert kept[1].startswith(text + stop)
    assert whole.startswith(kept[1])
    assert (kept[2].reason, kept[2].stop) == ("stop", stop)


def test_what_is_held_back_at_the_end_is_text_after_all():
    model, tokenizer = _load()
    whole = _text(model, tokenizer)[1]
    *_, _, done = generate(
        model, tokenizer, "The old king", GenerateConfig(temperature=0, n_predict=30, stop=(whole[-3:] + "x",))
    )
    assert isinstance(done, Done)
    assert (done.reason, done.stop) == ("length", None)
    assert done.text
    assert _text(model, tokenizer, stop=(whole[-3:] + "x",))[1] == whole


def test_the_likeliest_tokens_come_with_their_log_probabilities():
    model, tokenizer = _load()
    prompt = encode_prompt(tokenizer, "The")
    token = next(generate(model, tokenizer, prompt, GenerateConfig(seed=5, temperature=2.0, logprobs=3)))
    assert isinstance(token, Token)
    with torch.no_grad():
        expected = model.logits(model(torch.tensor([prompt])))[0, -1].log_softmax(-1)
    values, ids = expected.topk(3)
    assert [id for id, _ in token.top] == ids.tolist()
    assert [logprob for _, logprob in token.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-5)
    bare = next(generate(model, tokenizer, prompt, GenerateConfig(logprobs=0)))
    assert isinstance(bare, Token)
    assert (bare.logprob is None, bare.top) == (False, ())


@pytest.mark.parametrize("parallel", [1, 2, 7])
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"seed": 9, "temperature": 1.5}], ids=str)
def test_each_prompt_of_a_batch_gets_the_text_that_it_gets_alone(parallel, settings):
    model, tokenizer = _load()
    prompts = ["The old king", "", "A", tiny_text(150, 3), "The queen of the sea"]
    config = GenerateConfig(n_predict=12, stop=("e",), parallel=parallel, **settings)
    reports = [[] for _ in prompts]
    for number, report in generate_batch(model, tokenizer, prompts, config):
        reports[number].append(report)
    for prompt, (*tokens, done) in zip(prompts, reports, strict=True):
        ids, text, alone = _run(model, tokenizer, prompt, config)
        assert [token.id for token in tokens] == ids
        assert "".join(r.text for r in (*tokens, done)) == text
        assert (done.reason, done.n_generated, done.n_decoded) == (alone.reason, alone.n_generated, alone.n_decoded)
        assert done.prefill_s > 0


def test_a_batch_refuses_a_prompt_before_it_computes_one():
    model, tokenizer = _load(n_ctx=32)
    with pytest.raises(UsageError, match="33 tokens"):
        generate_batch(model, tokenizer, [[1], [1] * 33])
    assert list(generate_batch(model, tokenizer, [])) == []
    nothing = [report for _, report in generate_batch(model, tokenizer, ["a", "b"], GenerateConfig(n_predict=0))]
    assert [report.reason for report in nothing if isinstance(report, Done)] == ["length"] * 2


def test_a_shifted_context_goes_on_beyond_its_end():
    model, tokenizer = _load(n_ctx=32)
    tokenizer.eog_ids = frozenset()
    config = GenerateConfig(temperature=0, n_predict=90, context_shift=True, keep=2)
    ids, _, done = _run(model, tokenizer, [1, 70, 80], config)
    assert (len(ids), done.reason, done.n_decoded) == (90, "length", 89)
    with pytest.raises(UsageError, match="--keep keeps 30 tokens of a context of 32"):
        generate(model, tokenizer, [1] * 30, GenerateConfig(context_shift=True, keep=-1))
    assert _run(model, tokenizer, [1] * 30, GenerateConfig(context_shift=True, keep=-1, n_predict=2))[0]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("n", [pytest.param(6, marks=pytest.mark.slow), pytest.param(24, marks=pytest.mark.prove)])
def test_greedy_texts_of_smollm2_do_not_depend_on_their_neighbours(n):
    file = open_model(smollm2_f32())
    model, tokenizer = load_model(file), load_tokenizer(file)
    config = GenerateConfig(temperature=0, n_predict=n, parallel=3)
    together: list[list[int]] = [[] for _ in PROMPTS]
    for number, report in generate_batch(model, tokenizer, PROMPTS, config):
        if isinstance(report, Token):
            together[number].append(report.id)
    assert together == [_run(model, tokenizer, prompt, config)[0] for prompt in PROMPTS]
