"""What llama-server has besides."""

from __future__ import annotations

import numpy as np

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
