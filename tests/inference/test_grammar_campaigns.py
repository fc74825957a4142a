"""Long runs of structured output: 200 continuations of each schema on the real model, and schemas that nobody chose."""

from __future__ import annotations

import json
from collections import deque
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamakit.cli.loading import Loaded, load
from llamakit.errors import LlamakitError
from llamakit.formats.open import open_model
from llamakit.inference.config import GenerateConfig
from llamakit.inference.continuation import Continuation
from llamakit.inference.grammar import open_grammar
from llamakit.inference.sampling import Sampler
from llamakit.tokenizer import Tokenizer, load_tokenizer
from llamakit.tokenizer.chat import encode_chat
from tests.inference.schemas import SCHEMAS, assert_valid
from tests.smollm import smollm2_path
from tests.tiny import cached_tiny_gguf

pytestmark = pytest.mark.prove
N_RUNS, AT_ONCE, LONGEST = 200, 50, 400


@pytest.fixture(scope="module")
def smollm2() -> Loaded:
    return load(smollm2_path(), threads=1)


def _continuations(model: Loaded, ids: list[int], schema: str) -> list[str | None]:
    """One for each seed below N_RUNS, AT_ONCE of them in each step, None where one has no end within LONGEST tokens.

    Who comes next takes over the context of who is done, and the prompt in it.
    """
    free = [model.engine.context(len(ids) + LONGEST) for _ in range(AT_ONCE)]
    texts, waiting = [""] * N_RUNS, deque(range(N_RUNS))
    running: list[tuple[int, Continuation]] = []
    ended: set[int] = set()
    while waiting or running:
        while waiting and free:
            config = GenerateConfig(json_schema=schema, seed=waiting.popleft(), n_predict=LONGEST)
            sampler = Sampler(config, ids, grammar=open_grammar(config, model.tokenizer))
            running.append((config.seed, Continuation(model.tokenizer, free.pop(), ids, config, sampler)))
        logits = model.engine.feed_batch([(run.context, run.pending) for _, run in running])
        for (seed, run), row in zip(running, logits, strict=True):
            token = run.take(row)
            texts[seed] += token.text if token is not None else ""
            if run.reason is not None:
                texts[seed] += run.done().text
                free.append(run.context)
                ended |= {seed} if run.reason == "end" else set()
        running = [(seed, run) for seed, run in running if run.reason is None]
    return [text if seed in ended else None for seed, text in enumerate(texts)]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SCHEMAS)
def test_two_hundred_texts_of_the_real_model_end_parse_and_validate(name, smollm2, record_property):
    schema = SCHEMAS[name]
    question = f"Give me an example of this JSON schema: {json.dumps(schema)[:200]}"
    ids = encode_chat(smollm2.tokenizer, [{"role": "user", "content": question}])
    texts = _continuations(smollm2, ids, json.dumps(schema))
    assert len(texts) == N_RUNS
    for text in texts:
        assert text is not None, "it came to no end"
        assert_valid(text, schema)
    record_property(f"structured output, {name}", f"{len(texts)} texts valid, {len(set(texts))} of them different")


_STRINGS = st.one_of(
    st.fixed_dictionaries({"type": st.just("string"), "maxLength": st.integers(0, 6)}),
    st.fixed_dictionaries({"type": st.just("string"), "minLength": st.integers(0, 5), "maxLength": st.integers(2, 9)}),
    st.sampled_from(["^[a-c]{1,3}$", "^(yes|no)?$", "^é{2}$", "^.{0,3}$", "^[^a-z]{2}$", "^\\d{1,3}-\\w$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
    st.sampled_from(["date", "time", "date-time", "uuid", "ipv4"]).map(lambda name: {"type": "string", "format": name}),
)
_BOUND = st.one_of(st.integers(-1000, 1000), st.floats(-100, 100, width=16))
_NUMBERS = st.fixed_dictionaries(
    {"type": st.sampled_from(["integer", "number"])},
    optional={"minimum": _BOUND, "maximum": _BOUND, "exclusiveMinimum": _BOUND, "multipleOf": st.sampled_from([2, 7, 0.5, 0.25])},
)  # fmt: skip
_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-9, 99), st.text(max_size=5))
_LEAVES = st.one_of(
    _STRINGS, _NUMBERS, st.just({"type": "boolean"}), st.just({"type": "null"}), _SCALARS.map(lambda v: {"const": v}),
    st.lists(_SCALARS, min_size=1, max_size=4).map(lambda values: {"enum": values}),
)  # fmt: skip
_KEYS = st.sampled_from(["a", "b", "kind", "é", "two words", 'qu"ote'])


def _object(properties: dict[str, Any], required: list[str], closed: bool | None) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": [key for key in required if key in properties]}
    return schema if closed is None else {**schema, "additionalProperties": False}


def _larger(part: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(
        st.builds(_object, st.dictionaries(_KEYS, part, max_size=4), st.lists(_KEYS, unique=True), st.sampled_from([None, False])),
        st.fixed_dictionaries({"type": st.just("array"), "items": part, "maxItems": st.integers(0, 3)}, optional={"minItems": st.integers(0, 3)}),
        st.lists(part, min_size=1, max_size=3).map(lambda parts: {"type": "array", "prefixItems": parts, "items": False}),
        st.lists(part, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts}),
        st.lists(part, min_size=1, max_size=3).map(lambda parts: {"oneOf": parts}),
    )  # fmt: skip


_ANY = st.recursive(_LEAVES, _larger, max_leaves=8)
_SCHEMAS = _ANY | _ANY.map(lambda part: {"$defs": {"x": part}, "anyOf": [{"$ref": "#/$defs/x"}, {"const": 0}]})


@pytest.fixture(scope="module", params=["spm", "bpe"])
def tokenizer(request) -> Tokenizer:
    return load_tokenizer(open_model(cached_tiny_gguf(tokenizer=request.param)))


@pytest.mark.timeout(1800)
def test_random_logits_follow_any_schema_to_its_end(tokenizer, record_property):
    refused: dict[bool, int] = {True: 0, False: 0}

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(_SCHEMAS, st.integers(0, 2**32 - 1))
    def check(schema: dict[str, Any], seed: int) -> None:
        config = GenerateConfig(json_schema=json.dumps(schema), seed=seed)
        try:
            grammar = open_grammar(config, tokenizer)
        except LlamakitError as error:
            assert error.exit_code == 2
            assert "\n" not in str(error)
            refused[True] += 1
            return
        refused[False] += 1
        sampler, rng, text = Sampler(config, grammar=grammar), np.random.default_rng(seed), b""
        for _ in range(3000):
            token = sampler.sample(rng.normal(0, 2, tokenizer.n_vocab).astype(np.float32))
            text += b"" if token in tokenizer.eog_ids else tokenizer.piece(token)
            if token in tokenizer.eog_ids or sampler.is_complete:
                break
        else:
            raise AssertionError("it came to no end")
        assert_valid(text.decode(), schema)

    check()
    assert refused[False] > 50  # the others contradict themselves, or have a oneOf that is not plainly one
    record_property(
        f"schemas that nobody chose, {tokenizer.model}", f"{refused[False]} followed, {refused[True]} refused"
    )
