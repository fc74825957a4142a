"""OpenAI's API, through OpenAI's own client."""

from __future__ import annotations

import json
import math

import jsonschema
import openai
import pytest

from llamakit.inference.completion import generate
from llamakit.inference.config import GenerateConfig
from llamakit.tokenizer.chat import encode_chat
from tests.server.serving import Served

MESSAGES = [{"role": "user", "content": "Tell me of the river."}]


@pytest.fixture
def client(served: Served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def expected(served: Served, **config) -> str:
    """What `generate` makes of the messages."""
    ids = encode_chat(served.service.tokenizer, MESSAGES)
    reports = generate(served.slots._engine, served.service.tokenizer, ids, GenerateConfig(**config))
    return "".join(report.text for report in reports)


def test_a_chat_is_what_generate_writes(served: Served, client) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=12, temperature=0)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert choice.message.content == expected(served, n_predict=12, temperature=0)
    n_prompt = len(encode_chat(served.service.tokenizer, MESSAGES))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (n_prompt, 12)
    assert answer.usage.total_tokens == n_prompt + 12


def test_a_seed_gives_the_same_text_and_generates(served: Served, client) -> None:
    texts = [
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=12, seed=7).choices[0]
        for _ in range(2)
    ]
    assert texts[0].message.content == texts[1].message.content == expected(served, n_predict=12, seed=7)


def test_a_stream_has_the_same_text_and_usage(client) -> None:
    options = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 12 and not chunks[-1].choices
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_choices_count_their_seeds_up(served: Served, client) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, seed=3, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [c.message.content for c in answer.choices] == [expected(served, n_predict=8, seed=3 + i) for i in range(3)]
    assert answer.usage.completion_tokens == sum(1 for _ in answer.choices) * 8


def test_a_stop_ends_the_text_and_is_not_in_it(served: Served, client) -> None:
    whole = expected(served, n_predict=40, temperature=0)
    stop = whole[6:9]
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=40, temperature=0, stop=[stop, "never there"]
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == whole[: whole.index(stop)]


def test_logprobs_are_those_of_the_tokens(client) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 5
    for entry in entries:  # greedy: the token is the likeliest
        assert entry.logprob == entry.top_logprobs[0].logprob and entry.token == entry.top_logprobs[0].token
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True) and sum(map(math.exp, values)) < 1
        assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token


def test_a_schema_is_satisfied(client) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["river", "forest"]}, "deep": {"type": "boolean"}},
        "required": ["name", "deep"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=120, seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": schema}},
    )  # fmt: skip
    jsonschema.validate(json.loads(answer.choices[0].message.content), schema)
    assert answer.choices[0].finish_reason == "stop"


def test_extras_of_llama_server_are_understood(served: Served, client) -> None:
    more = {"top_k": 3, "min_p": 0.2, "repeat_penalty": 1.3, "samplers": ["top_k", "temperature"], "mirostat": 0}
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=10, seed=5, temperature=1.5, extra_body=more
    )
    config = {"top_k": 3, "min_p": 0.2, "repeat_penalty": 1.3, "samplers": "top_k;temperature", "temperature": 1.5}
    assert answer.choices[0].message.content == expected(served, n_predict=10, seed=5, **config)
    with_grammar = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=10, extra_body={"grammar": 'root ::= "yes" | "no"'}
    )
    assert with_grammar.choices[0].message.content in ("yes", "no")


def test_completions_of_texts_and_ids(served: Served, client) -> None:
    tokenizer = served.service.tokenizer
    prompts = ["The old sailor", "A quiet queen"]
    texts = client.completions.create(model="tiny", prompt=prompts, max_tokens=6, temperature=0, echo=True)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    same = client.completions.create(model="tiny", prompt=ids, max_tokens=6, temperature=0)
    for prompt, text, of_ids in zip(prompts, texts.choices, same.choices, strict=True):
        assert text.text == prompt + of_ids.text
    assert texts.usage.prompt_tokens == sum(map(len, ids))


def test_legacy_logprobs(client) -> None:
    answer = client.completions.create(model="tiny", prompt="The old", max_tokens=4, temperature=0, logprobs=2)
    found = answer.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 4
    assert all(len(top) == 2 for top in found.top_logprobs) and found.text_offset[0] == 0
    streamed = list(
        client.completions.create(model="tiny", prompt="The old", max_tokens=4, temperature=0, logprobs=2, stream=True)
    )
    logprobs = [p for chunk in streamed if chunk.choices[0].logprobs for p in chunk.choices[0].logprobs.token_logprobs]
    assert logprobs == found.token_logprobs
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text


def test_biases_of_tokens(served: Served, client) -> None:
    (id,) = served.service.tokenizer.encode("q", add_special=False)
    bias = {str(id): 100}
    answer = client.completions.create(model="tiny", prompt="The", max_tokens=5, temperature=0, logit_bias=bias)
    assert answer.choices[0].text == "qqqqq"


def test_models(client) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="known: tiny"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "messages is missing"),
        ({"messages": [{"role": "king", "content": "x"}]}, r"messages\[0\].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text alone"),
        ({"max_tokens": 257}, "max_tokens is 257"),
        ({"n": 9}, "n is 9"),
        ({"temperature": "hot"}, "temperature"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop has 17"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"messages": [{"role": "user", "content": "long " * 500}]}, "the context holds 256"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"tools": [{"type": "function"}]}, "tools are not supported"),
        ({"grammar": "root ::= ("}, "grammar"),
    ],
)
def test_what_cannot_be_is_a_400_that_says_so(served: Served, change: dict, message: str) -> None:
    answer = served.post("/v1/chat/completions", {"model": "tiny", "messages": MESSAGES, **change})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error["message"])


def test_an_unknown_model_is_a_404(client) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
