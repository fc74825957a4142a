"""Bodies that nobody meant: whatever comes is answered with a status of the client's own mistake, and nothing breaks."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import pytest

from tests.server.serving import WAIT_S, Served, serving
from tests.server.test_app import until
from tests.server.test_llamacpp import adapter

ALLOWED = {200, 400, 404, 413, 415, 422}
MESSAGES = [{"role": "user", "content": "Tell me."}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
LLAMA = {
    "top_k": 5, "min_p": 0.1, "typical_p": 0.9, "repeat_penalty": 1.1, "repeat_last_n": 10, "mirostat": 2,
    "mirostat_tau": 5, "mirostat_eta": 0.1, "dry_multiplier": 0.8, "dry_base": 1.75, "dry_allowed_length": 2,
    "xtc_probability": 0.5, "xtc_threshold": 0.1, "samplers": ["top_k", "temperature"], "ignore_eos": True,
    "grammar": 'root ::= "a" | "b"', "json_schema": SCHEMA, "dynatemp_range": 0.3, "top_n_sigma": 1.0,
    "dry_sequence_breakers": ["\n"], "lora": [{"id": 0, "scale": 0.5}], "logit_bias": [[5, -1], ["a", False]],
    "adaptive_target": 0.5, "adaptive_decay": 0.9, "dynatemp_exponent": 1.0, "dry_penalty_last_n": -1,
}  # fmt: skip
OPENAI = {
    "model": "tiny", "temperature": 0.5, "top_p": 0.9, "max_tokens": 4, "n": 2, "seed": 3, "stop": ["x", "yy"],
    "presence_penalty": 0.1, "frequency_penalty": 0.1, "stream": True, "stream_options": {"include_usage": True},
    "user": "me", "logit_bias": {"5": 1}, "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
}  # fmt: skip
OPTIONS = {"num_predict": 3, "temperature": 0, "seed": 4, "stop": ["q"], "num_ctx": 128, "top_k": 3}
OLLAMA = {"model": "tiny", "options": OPTIONS, "stream": False, "format": SCHEMA, "logprobs": True, "top_logprobs": 2}
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {**OPENAI, **LLAMA, "messages": MESSAGES, "logprobs": True, "top_logprobs": 2}),
    ("/v1/completions", {**OPENAI, **LLAMA, "prompt": ["a", "b"], "logprobs": 2, "echo": True, "best_of": 2}),
    ("/api/chat", {**OLLAMA, "messages": MESSAGES}),
    ("/api/generate", {**OLLAMA, "prompt": "a", "system": "b", "raw": False, "context": [5, 6]}),
    ("/api/show", {"model": "tiny"}),
    ("/completion", {"prompt": "Hi", "n_predict": 4, "n_probs": 2, "return_tokens": True, "stop": ["x"]}),
    ("/tokenize", {"content": "Hi there", "add_special": True, "with_pieces": True}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
    ("/apply-template", {"messages": MESSAGES}),
    ("/lora-adapters", {"adapters": [{"id": 0, "scale": 1.0}]}),
]
CONTROL = {"prompt": "The old sailor", "temperature": 0, "max_tokens": 12, "lora": []}


def strange(rng: random.Random) -> Any:
    """A value that fits few fields."""
    return rng.choice(
        [
            None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e308, -1e308, 10**30, -(10**400), 2**31, 2**32 - 1, 2**63, 0.1,
            "", "a", "tiny", "x" * 3000, "\ud800", "\x00", "🦙" * 5, "<|im_end|>", [], {}, [[]], [None], [1, "a"],
            {"a": {"b": []}}, {"type": "string"}, {"$ref": "#"}, {"type": "object", "minProperties": 9}, [1, 2, 3],
            "root ::= root", "root ::= [", "user", {"role": "user", "content": "x"}, [{"role": "user"}], -5, 1000,
            [{"type": "text", "text": "y"}], {"type": "json_object"}, {"0": 1e3}, [[1, 2]], [["a", -1e9]], "json",
        ]
    )  # fmt: skip


def mutant(rng: random.Random) -> tuple[str, Any]:
    """A path, and a body in which a few fields are missing, strange or somewhere else."""
    path, whole = rng.choice(REQUESTS)
    needed = {"messages", "prompt", "content", "tokens", "adapters"}
    body = {key: value for key, value in whole.items() if key in needed or rng.random() < 0.3}
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        place = body
        if rng.random() < 0.3:
            places = [value for value in body.values() if isinstance(value, dict) and value]
            place = rng.choice(places) if places else body
        key = rng.choice(list(place) + (list(whole) if place is body else [])) if place or place is body else "a"
        copied = json.loads(json.dumps(place.get(key)))
        if isinstance(copied, list) and copied and rng.random() < 0.5:
            copied[rng.randrange(len(copied))] = strange(rng)
            place[key] = copied
        elif rng.random() < 0.1:
            place.pop(key, None)
        else:
            place[key] = strange(rng)
        body = json.loads(json.dumps(body))
    return path, strange(rng) if rng.random() < 0.02 else body


def broken(rng: random.Random, data: bytes) -> bytes:
    """Sometimes no JSON any more."""
    if rng.random() > 0.05 or not data:
        return data
    at = rng.randrange(len(data))
    return rng.choice([data[:at], data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :], data + data])


def survives(served: Served, n: int, seed: int) -> dict[int, int]:
    """How often each status came; raises for one that must not be, and where the server answers otherwise than before."""
    rng, found = random.Random(seed), dict[int, int]()
    before = served.post("/v1/completions", CONTROL).json()["choices"]
    with httpx.Client(base_url=served.url, timeout=WAIT_S) as client:
        for number in range(n):
            path, body = mutant(rng)
            data = broken(rng, json.dumps(body).encode())
            answer = client.post(path, content=data, headers={"content-type": "application/json"})
            assert answer.status_code in ALLOWED, (number, path, data, answer.status_code, answer.text)
            found[answer.status_code] = found.get(answer.status_code, 0) + 1
            assert "Traceback" not in answer.text and "internal error" not in answer.text, (path, data, answer.text)
            if answer.status_code != 200:
                assert answer.json()["error"], (path, data)
    assert served.post("/v1/completions", CONTROL).json()["choices"] == before
    until(lambda: served.slots.n_running == served.slots.n_waiting == 0)  # an answer ends a moment before its slot
    return found


def test_strange_bodies() -> None:
    with serving(adapters={"one": adapter(1)}, n_ctx=64) as served:
        found = survives(served, 300, seed=1)
    assert found[200] > 50 and found[400] > 50


@pytest.mark.prove
@pytest.mark.timeout(1800)
def test_5000_strange_bodies(record_property) -> None:
    with serving(adapters={"one": adapter(1)}, n_ctx=64) as served:
        found = survives(served, 5000, seed=2)
    record_property("statuses of 5,000 strange bodies", found)
