"""The chat page, in a browser without a window; skipped where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from llamakit.inference.completion import generate
from llamakit.inference.config import GenerateConfig
from llamakit.tokenizer.chat import encode_chat
from tests.server.serving import Served, serving
from tests.server.test_app import Slow, until
from tests.server.test_llamacpp import adapter

pytestmark = pytest.mark.slow
PROGRAMS = ("chromium-headless-shell", "chromium", "google-chrome", "chromium-browser")
#: the page's own rules forbid to evaluate scripts in it: what is waited for is the button
ENDED, RUNS = "#again:not([disabled])", "#stop:not([disabled])"


@pytest.fixture
def page() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install '.[page]')")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("there is no Chromium")
    errors: list[str] = []
    with api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "console",
            lambda message: (
                errors.append(message.text) if message.type == "error" and "401" not in message.text else None
            ),
        )
        yield page
        browser.close()
    assert not errors


def say(page: Any, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def greedy(page: Any, n: int) -> None:
    page.wait_for_selector("#temperature")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", str(n))


def answer(served: Served, messages: list[dict[str, str]], n: int) -> str:
    ids = encode_chat(served.service.tokenizer, messages)
    config = GenerateConfig(temperature=0, n_predict=n)
    return "".join(r.text for r in generate(served.slots._engine, served.service.tokenizer, ids, config))


def shown(page: Any) -> list[str]:
    return [box.text_content() for box in page.query_selector_all(".answer span")]


def test_a_conversation_and_another_answer(served: Served, page: Any) -> None:
    page.goto(served.url)
    greedy(page, 8)
    page.fill("#system", "Be brief.")
    say(page, "Hello")
    page.wait_for_selector(ENDED)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    first = answer(served, messages, 8)
    assert shown(page) == [first]
    page.click("#again")
    page.wait_for_selector(ENDED)
    assert shown(page) == [first]
    say(page, "And now?")
    page.wait_for_selector(ENDED)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And now?"}]
    assert shown(page) == [first, answer(served, messages, 8)]
    page.click("#clear")
    assert shown(page) == [] and page.is_visible("#empty")


def test_base_and_tuned_side_by_side(page: Any) -> None:
    with serving(adapters={"poet": adapter(1)}) as served:
        page.goto(served.url)
        greedy(page, 12)
        page.fill("#adapter0", "2")
        page.check("#sides")
        say(page, "Hello")
        page.wait_for_selector(ENDED)
        base, tuned = shown(page)
        assert [box.text_content() for box in page.query_selector_all(".answer b")] == ["base", "tuned"]
        body = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 12}
        for text, lora in ((base, []), (tuned, [{"name": "poet", "scale": 2}])):
            same = served.post("/v1/chat/completions", {**body, "lora": lora}).json()
            assert text == same["choices"][0]["message"]["content"]
        assert base != tuned


def test_stop_frees_the_slot(page: Any) -> None:
    with serving(engine=Slow) as served:
        page.goto(served.url)
        greedy(page, 200)
        say(page, "Go on")
        page.wait_for_selector(RUNS)
        until(lambda: served.slots.n_running == 1)
        page.click("#stop")
        until(lambda: served.slots.n_running == 0)
        page.wait_for_selector(ENDED)
        assert page.text_content(".answer small") == "stopped"


def test_markup_stays_text(served: Served, page: Any) -> None:
    page.goto(served.url)
    greedy(page, 1)
    say(page, "<img onerror=alert(1)><script>alert(2)</script>")
    page.wait_for_selector(ENDED)
    assert page.text_content(".user").startswith("<img onerror") and not page.query_selector("#log img")


def test_the_key_is_asked_for(page: Any) -> None:
    with serving(keys=["sesame"]) as served:
        page.goto(served.url)
        page.wait_for_selector("#keybox:not([hidden])")
        page.fill("#key", "sesame")
        page.press("#key", "Tab")
        greedy(page, 2)
        say(page, "Hello")
        page.wait_for_selector(ENDED)
        assert len(shown(page)) == 1
