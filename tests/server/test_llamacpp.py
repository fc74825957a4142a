"""What llama-server has besides."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from llamakit.formats.adapter import Adapter
from tests.server.serving import Served, serving


def adapter(seed: int) -> Adapter:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0, 0.3, (4, 64)).astype(np.float32), rng.normal(0, 0.3, (64, 4)).astype(np.float32)
    return Adapter(4.0, {"blk.0.attn_q.weight": (a, b), "blk.1.attn_output.weight": (a, b)})


def test_health_and_props(served: Served) -> None:
    assert served.get("/health").json() == {"status": "ok"}
    props = served.get("/props").json()
    assert props["total_slots"] == 4 and props["default_generation_settings"]["n_ctx"] == 256
    assert props["bos_token"] == "<|im_start|>" and "/" not in props["model_path"]


def test_tokens_there_and_back(served: Served) -> None:
    ids = served.post("/tokenize", {"content": "The old sailor<|im_end|>"}).json()["tokens"]
    assert ids[-1] == 2
    assert served.post("/detokenize", {"tokens": ids}).json() == {"content": "The old sailor<|im_end|>"}
    pieces = served.post("/tokenize", {"content": "The", "with_pieces": True}).json()["tokens"]
    assert "".join(piece["piece"] for piece in pieces) == "The"
    assert served.post("/detokenize", {"tokens": [10**6]}).status_code == 400


def test_a_template_is_applied(served: Served) -> None:
    prompt = served.post("/apply-template", {"messages": [{"role": "user", "content": "Hi"}]}).json()["prompt"]
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def events(served: Served, body: dict[str, object]) -> list[dict[str, Any]]:
    answer = served.post("/completion", {**body, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n") if line]
    assert all(line.startswith("data: {") for line in lines)  # no [DONE]
    return [json.loads(line[6:]) for line in lines]


def test_a_completion_whole_and_in_pieces(served: Served) -> None:
    body = {"prompt": "The old", "n_predict": 12, "temperature": 0, "ignore_eos": True}
    whole = served.post("/completion", {**body, "return_tokens": True, "n_probs": 2}).json()
    assert whole["stop"] is True and whole["stop_type"] == "limit" and whole["prompt"] == "The old"
    assert whole["tokens_predicted"] == len(whole["tokens"]) == whole["timings"]["predicted_n"] == 12
    assert whole["generation_settings"]["n_predict"] == 12 and whole["model"] == "tiny" and not whole["truncated"]
    probabilities = whole["completion_probabilities"]
    assert [item["id"] for item in probabilities] == whole["tokens"]
    assert all(item["top_logprobs"][0]["id"] == item["id"] and len(item["top_logprobs"]) == 2 for item in probabilities)
    openai = served.post(
        "/v1/completions", {"prompt": "The old", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    )
    assert whole["content"] == openai.json()["choices"][0]["text"]
    *pieces, last = events(served, body)
    assert "".join(piece["content"] for piece in [*pieces, last]) == whole["content"]
    assert [piece["tokens"] for piece in pieces] == [[id] for id in whole["tokens"]]
    assert not any(piece["stop"] for piece in pieces) and last["stop"]
    assert (last["stop_type"], last["tokens_evaluated"]) == ("limit", whole["tokens_evaluated"])
    assert last["tokens_cached"] == last["tokens_evaluated"] + 11


def test_a_completion_says_why_it_ended(served: Served) -> None:
    body = {"prompt": "The old", "n_predict": 12, "temperature": 0, "ignore_eos": True}
    word = served.post("/completion", body).json()["content"][2:5]
    ended = served.post("/completion", {**body, "stop": [word]}).json()
    assert (ended["stop_type"], ended["stopping_word"]) == ("word", word) and word not in ended["content"]
    biased = {
        **body,
        "ignore_eos": False,
        "logit_bias": [[served.post("/tokenize", {"content": "<|im_end|>"}).json()["tokens"][0], 100]],
    }
    assert served.post("/completion", biased).json()["stop_type"] == "eos"


def test_completions_of_several_prompts_and_of_ids(served: Served) -> None:
    body = {"n_predict": 5, "temperature": 0}
    ids = served.post("/tokenize", {"content": "The old"}).json()["tokens"]
    two = served.post("/completions", {**body, "prompt": ["The old", "A letter"]}).json()
    assert [value["index"] for value in two] == [0, 1]
    assert served.post("/completion", {**body, "prompt": ids}).json()["content"] == two[0]["content"]
    for wrong in ({}, {"prompt": 1}, {"prompt": "a", "n_predict": "x"}, {"prompt": "a", "id_slot": 9}):
        assert served.post("/completion", wrong).status_code == 400
    refused = served.post("/completion", {"prompt": "a", "t_max_predict_ms": 5})
    assert refused.status_code == 400 and "time limits" in refused.json()["error"]["message"]


def test_a_completion_says_how_it_was_made(served: Served) -> None:
    """All that llama-server's README has in generation_settings and timings, and that a text model has."""
    asked = {
        "temperature": 0.5, "typical_p": 0.9, "dynatemp_exponent": 2.0, "mirostat_tau": 4.0, "xtc_probability": 0.1,
        "dry_sequence_breakers": [","], "logit_bias": [[5, False]], "samplers": ["top_k", "temperature"],
        "n_predict": 3, "stop": ["zzz"], "seed": 7, "ignore_eos": True,
    }  # fmt: skip
    value = served.post("/completion", {"prompt": "The old sailor", **asked, "n_probs": 1}).json()
    settings = value["generation_settings"]
    assert settings["logit_bias"] == [{"token": 5, "bias": None}]
    assert {name: settings[name] for name in asked} == asked | {"logit_bias": settings["logit_bias"]}
    assert (settings["max_tokens"], settings["n_probs"], settings["n_keep"], settings["grammar"]) == (3, 1, 0, "")
    assert settings["top_n_sigma"] == -1 and settings["dry_allowed_length"] == 2
    timings = value["timings"]
    assert timings["cache_n"] + timings["prompt_n"] == value["tokens_evaluated"]
    assert timings["prompt_per_token_ms"] * timings["prompt_n"] == pytest.approx(timings["prompt_ms"], abs=0.01)
    params = served.get("/props").json()["default_generation_settings"]["params"]
    assert params.keys() == settings.keys() and params["temperature"] == 0.8


def test_chosen_fields_of_a_completion(served: Served) -> None:
    """Each under its whole name, as llama-server gives them; pieces of a stream stay whole."""
    body = {
        "prompt": "The old", "n_predict": 3, "temperature": 0,
        "response_fields": ["content", "generation_settings/n_predict", "no/such", "timings"],
    }  # fmt: skip
    value = served.post("/completion", body).json()
    assert list(value) == ["content", "generation_settings/n_predict", "timings"]
    assert value["generation_settings/n_predict"] == 3
    first, *_, last = events(served, body)
    assert "index" in first and list(last) == list(value)
    assert served.post("/completion", {**body, "response_fields": 5}).status_code == 400


def test_models_say_what_they_are(served: Served) -> None:
    (model,) = served.get("/v1/models").json()["data"]
    assert model["meta"]["n_ctx"] == 256 and model["meta"]["n_embd"] == 64 and model["meta"]["n_params"] > 1000
    assert served.get("/props").json()["model_ftype"] == model["meta"]["ftype"]


def test_slots_say_who_is_busy(served: Served) -> None:
    free = served.get("/slots").json()
    assert [slot["id"] for slot in free] == [0, 1, 2, 3] and free[0]["n_ctx"] == 256
    assert served.get("/slots?fail_on_no_slot=1").status_code == 200


def test_adapters_by_name_by_number_and_for_all() -> None:
    with serving(adapters={"one": adapter(1), "two": adapter(2)}) as served:

        def text(**more: object) -> str:
            answer = served.post("/v1/completions", {"prompt": "The", "temperature": 0, "max_tokens": 16, **more})
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["text"]

        assert [m["id"] for m in served.get("/v1/models").json()["data"]] == [
            "tiny",
            "tiny:base",
            "tiny:one",
            "tiny:two",
        ]
        both, base, one, two = (text(model=name) for name in ("tiny", "tiny:base", "tiny:one", "tiny:two"))
        assert len({both, base, one, two}) == 4
        assert text(lora=[]) == base and text(lora=[{"id": 0, "scale": 1}]) == one
        assert text(lora=[{"name": "two"}]) == two
        assert text(lora=[{"name": "one"}, {"name": "two", "scale": 1.0}]) == both
        assert served.post("/v1/completions", {"prompt": "a", "lora": [{"name": "three"}]}).status_code == 400
        listed = served.get("/lora-adapters").json()
        assert [(item["id"], item["name"], item["scale"]) for item in listed] == [(0, "one", 1.0), (1, "two", 1.0)]
        assert served.post("/lora-adapters", [{"id": 1, "scale": 1.0}]).json() == {"success": True}
        assert text() == two
        assert served.post("/lora-adapters", [{"id": 7}]).status_code == 400
