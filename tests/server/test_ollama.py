"""Ollama's API, through Ollama's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator

import ollama
import pytest

from tests.server.serving import Served

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the boat?"}]
GREEDY = {"temperature": 0, "num_predict": 10}


@pytest.fixture
def client(served: Served) -> Iterator[ollama.Client]:
    client = ollama.Client(served.url)
    yield client
    client._client.close()


def test_a_chat_and_its_stream(served: Served, client: ollama.Client) -> None:
    whole = client.chat("tiny", MESSAGES, options=GREEDY)
    parts = list(client.chat("tiny", MESSAGES, options=GREEDY, stream=True))
    assert whole.done and whole.done_reason == "length" and whole.message.role == "assistant"
    assert "".join(part.message.content for part in parts) == whole.message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert whole.eval_count == 10 and whole.eval_duration > 0 and whole.total_duration > 0
    same = served.post(
        "/v1/chat/completions", {"model": "tiny:latest", "messages": MESSAGES, "temperature": 0, "max_tokens": 10}
    ).json()
    assert same["choices"][0]["message"]["content"] == whole.message.content
    assert same["usage"]["prompt_tokens"] == whole.prompt_eval_count


def test_generate_goes_on_from_its_context(client: ollama.Client) -> None:
    first = client.generate("tiny", "Where is the boat?", system="Be brief.", options=GREEDY)
    chat = client.chat("tiny", MESSAGES, options=GREEDY)
    assert first.response == chat.message.content
    assert len(first.context) == first.prompt_eval_count + first.eval_count
    second = client.generate("tiny", "And the king?", context=first.context, options=GREEDY)
    assert second.prompt_eval_count > first.prompt_eval_count + first.eval_count


def test_raw_prompts_have_no_template(served: Served, client: ollama.Client) -> None:
    raw = client.generate("tiny", "The old sailor", raw=True, options=GREEDY)
    same = served.post("/v1/completions", {"prompt": "The old sailor", "temperature": 0, "max_tokens": 10}).json()
    assert raw.response == same["choices"][0]["text"]


def test_formats_and_logprobs(client: ollama.Client) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    answer = client.generate("tiny", "x", format=schema, options={"num_predict": 100})
    assert set(json.loads(answer.response)) == {"a"}
    answer = client.generate("tiny", "x", options=GREEDY, logprobs=True, top_logprobs=2)
    assert len(answer.logprobs) == 10 and len(answer.logprobs[0].top_logprobs) == 2


def test_what_there_is(client: ollama.Client) -> None:
    (model,) = client.list().models
    assert model.model == "tiny:latest" and model.size > 1000 and model.details.family == "llama"
    shown = client.show("tiny")
    assert shown.modelinfo["llama.block_count"] == 2 and "im_start" in shown.template
    assert client.ps().models[0].model == "tiny:latest"
    assert client.generate("tiny", "").done_reason == "load"
    with pytest.raises(ollama.ResponseError, match="not found") as caught:
        client.chat("other", MESSAGES)
    assert caught.value.status_code == 404


def test_errors_have_ollamas_form(served: Served) -> None:
    answer = served.post("/api/chat", {"messages": MESSAGES, "options": {"temperature": "hot"}})
    assert answer.status_code == 400 and list(answer.json()) == ["error"]
    assert answer.json()["error"].startswith("options.temperature")
    assert served.post("/api/nothing", {}).status_code == 404
    assert isinstance(served.post("/api/nothing", {}).json()["error"], str)
