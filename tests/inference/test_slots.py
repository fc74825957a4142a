"""Many prompts at once: every text is what `generate` writes alone, and slots are shared as they should."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import numpy as np
import pytest

from llamakit.cli.loading import load
from llamakit.errors import LlamakitError, UsageError
from llamakit.formats.adapter import Adapter
from llamakit.inference.completion import generate
from llamakit.inference.config import GenerateConfig
from llamakit.inference.continuation import Done, Token
from llamakit.inference.engine import TorchEngine
from llamakit.inference.native_engine import NativeEngine
from llamakit.inference.slots import Failed, Report, Slots, Started, n_common
from llamakit.model import load_model
from tests.tiny import cached_tiny_gguf, tiny_text

GREEDY = {"temperature": 0.0}


class Asked:
    """A task that was submitted, and what came of it."""

    def __init__(self, slots: Slots, prompt: Any, *, adapters=None, user="", timeout_s=None, **config: Any) -> None:
        self.reports: list[Report] = []
        self.task = slots.prepare(prompt, GenerateConfig(**config), adapters=adapters, user=user, timeout_s=timeout_s)
        self.ticket = slots.submit(self.task, self.reports.append)

    @property
    def text(self) -> str:
        return "".join(report.text for report in self.reports if isinstance(report, Token | Done))

    @property
    def started(self) -> Started:
        (found,) = [report for report in self.reports if isinstance(report, Started)]
        return found

    @property
    def is_done(self) -> bool:
        return bool(self.reports) and isinstance(self.reports[-1], Done | Failed)


def drive(slots: Slots) -> None:
    while slots.step():
        pass


@pytest.fixture(scope="module")
def loaded():
    return load(cached_tiny_gguf(), silent=True, threads=1)


def make(loaded: Any, **options: Any) -> Slots:
    return Slots(loaded.engine, loaded.tokenizer, **{"n_slots": 3, "n_ctx": 256, "max_waiting": 100, **options})


def alone(loaded: Any, prompt: Any, **config: Any) -> str:
    return "".join(r.text for r in generate(loaded.engine, loaded.tokenizer, prompt, GenerateConfig(**config)))


def test_every_text_is_what_it_is_alone(loaded) -> None:
    rng, slots = random.Random(5), make(loaded)
    asked = []
    for number in range(30):
        config = {"seed": number, "n_predict": rng.randint(0, 25), "temperature": rng.choice([0.0, 0.8])}
        if number % 4 == 0:
            config["stop"] = ("e", "The")
        prompt = tiny_text(rng.randint(1, 300), seed=number % 5)
        asked.append((prompt, config, Asked(slots, prompt, user=str(number % 3), **config)))
        for _ in range(rng.randint(0, 6)):
            slots.step()
    drive(slots)
    for prompt, config, one in asked:
        assert one.is_done and one.text == alone(loaded, prompt, **config), config
        (done,) = [report for report in one.reports if isinstance(report, Done)]
        assert done.n_prompt == len(one.task.ids) - one.started.n_cached
    assert slots.totals.n_prompt == sum(len(one.task.ids) for _, _, one in asked)
    assert 0 < slots.totals.n_cached < slots.totals.n_prompt
    assert slots.totals.n_generated == sum(isinstance(r, Token) for _, _, one in asked for r in one.reports)


def test_torch_serves_as_well(loaded) -> None:
    engine = TorchEngine(load_model(loaded.file))
    slots = Slots(engine, loaded.tokenizer, n_slots=2, n_ctx=256, max_waiting=9)
    prompt = tiny_text(200, seed=1)
    first = Asked(slots, prompt, n_predict=8, **GREEDY)
    drive(slots)
    again = [Asked(slots, prompt + more, n_predict=8, **GREEDY) for more in ("", " and", " but")]
    drive(slots)
    assert again[0].text == first.text and all(one.started.n_cached > 50 for one in again)


def test_a_conversation_goes_on_in_its_slot(loaded) -> None:
    slots = make(loaded)
    talks = [tiny_text(150, seed=seed) for seed in range(3)]
    for turn in range(3):
        asked = [Asked(slots, talk, n_predict=6, **GREEDY) for talk in talks]
        drive(slots)
        for i, one in enumerate(asked):
            assert one.text == alone(loaded, talks[i], n_predict=6, **GREEDY)
            n_before = one.task.ids and len(one.task.ids) - 12
            assert one.started.n_cached >= n_before - 12 if turn else one.started.n_cached < 20
            talks[i] += " go on"


def test_a_common_beginning_is_computed_once(loaded) -> None:
    slots = make(loaded, n_slots=3)
    system = tiny_text(250, seed=3)
    asked = [Asked(slots, system + end, n_predict=5, **GREEDY) for end in (" one", " two", " three")]
    drive(slots)
    cached = sorted(one.started.n_cached for one in asked)
    n_system = n_common(asked[0].task.ids, asked[1].task.ids)
    assert cached[0] == 0 and cached[1:] == [n_system, n_system]
    for end, one in zip((" one", " two", " three"), asked, strict=True):
        assert one.text == alone(loaded, system + end, n_predict=5, **GREEDY)


def test_a_long_prompt_keeps_nobody_waiting(loaded) -> None:
    slots = make(loaded, n_slots=2, n_ctx=250)
    slots._s_per_token = 1.0  # a slow machine: the least share of a prompt in a step
    writing = Asked(slots, "The", n_predict=100, **GREEDY)
    slots.step()
    long = Asked(slots, tiny_text(400, seed=2)[:600], n_predict=1, **GREEDY)
    n_before, steps = len(writing.reports), 0
    while not any(isinstance(report, Token) for report in long.reports):
        slots._s_per_token = 1.0
        slots.step()
        steps += 1
    assert steps >= len(long.task.ids) // 16
    assert len(writing.reports) == n_before + steps


def test_users_take_turns(loaded) -> None:
    slots, ended = make(loaded, n_slots=1), []
    many = [Asked(slots, f"Number {i}", user="many", n_predict=2) for i in range(4)]
    one = Asked(slots, "Alone", user="one", n_predict=2)
    while slots.step():
        ended += [name for name, a in (("one", one), *(("many", m) for m in many)) if a.is_done and a not in ended]
        if one.is_done:
            break
    assert sum(asked.is_done for asked in many) == 1


def adapter(seed: int, tensors: tuple[str, ...] = ("blk.0.attn_q.weight", "blk.1.attn_output.weight")) -> Adapter:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0, 0.3, (4, 64)).astype(np.float32), rng.normal(0, 0.3, (64, 4)).astype(np.float32)
    return Adapter(4.0, dict.fromkeys(tensors, (a, b)))


def test_each_text_has_its_own_adapters(loaded) -> None:
    adapters = {"one": adapter(1), "two": adapter(2)}
    wanted = [{}, {"one": 1.0}, {"two": 0.5}, {"one": 1.0, "two": -1.0}, {"one": 0.0}]
    slots = make(loaded, adapters=adapters)
    asked = [Asked(slots, "The old sailor", adapters=scales, n_predict=20, **GREEDY) for scales in wanted * 2]
    drive(slots)
    texts = []
    for scales, one in zip(wanted * 2, asked, strict=True):
        loaded.engine.set_adapters([(adapters[name], scale) for name, scale in scales.items()])
        texts.append(alone(loaded, "The old sailor", n_predict=20, **GREEDY))
        assert one.text == texts[-1]
    loaded.engine.set_adapters([])
    assert texts[0] == texts[4] and len(set(texts)) == 4


def test_an_adapter_that_does_not_fit_fails_its_texts_alone(loaded) -> None:
    slots = make(loaded, adapters={"bad": adapter(1, ("blk.9.attn_q.weight",))})
    bad, good = (Asked(slots, "The", adapters=scales, n_predict=3, **GREEDY) for scales in ({"bad": 1.0}, {}))
    drive(slots)
    assert isinstance(bad.reports[-1], Failed) and "blk.9" in str(bad.reports[-1].error)
    assert good.text == alone(loaded, "The", n_predict=3, **GREEDY)
    with pytest.raises(UsageError, match="no adapter 'other'"):
        slots.prepare("The", GenerateConfig(), adapters={"other": 1.0})


def test_a_text_that_fails_leaves_its_neighbours_alone(loaded) -> None:
    slots = make(loaded)
    bad = Asked(slots, "The", logit_bias=tuple((id, -np.inf) for id in range(loaded.tokenizer.n_vocab)))
    good = Asked(slots, "The old", n_predict=5, **GREEDY)
    drive(slots)
    assert isinstance(bad.reports[-1], Failed) and "no token is left" in bad.reports[-1].error.reason
    assert good.text == alone(loaded, "The old", n_predict=5, **GREEDY)


def test_what_is_cancelled_says_nothing_more(loaded) -> None:
    slots = make(loaded, n_slots=1)
    first, second, third = (Asked(slots, "The", ignore_eos=True, n_predict=n, **GREEDY) for n in (-1, 5, 3))
    for _ in range(4):
        slots.step()
    n_reports = len(first.reports)
    slots.cancel(first.ticket)
    slots.cancel(second.ticket)
    drive(slots)
    assert len(first.reports) == n_reports and not second.reports
    assert third.text == alone(loaded, "The", ignore_eos=True, n_predict=3, **GREEDY)
    slots.cancel(third.ticket)  # it has ended: nothing happens
    assert slots.n_running == slots.n_waiting == 0 and slots.totals.n_cancelled == 1


def test_a_full_queue_takes_nothing(loaded) -> None:
    slots = make(loaded, n_slots=1, max_waiting=2)
    asked = [Asked(slots, "The", n_predict=2, **GREEDY) for _ in range(4)]
    assert [one.ticket is None for one in asked] == [False, False, False, True]
    drive(slots)
    assert Asked(slots, "The", n_predict=1).ticket is not None


def test_what_is_late_ends(loaded) -> None:
    slots = make(loaded, n_slots=1)
    running = Asked(slots, "The", ignore_eos=True, timeout_s=0.05)
    waiting = Asked(slots, "The", timeout_s=0.01)
    slots.step()
    time.sleep(0.06)
    drive(slots)
    for one in (running, waiting):
        assert isinstance(one.reports[-1], Failed) and one.reports[-1].cause == "timeout"


def test_a_thread_runs_it_until_it_is_closed(loaded) -> None:
    slots = make(loaded, n_slots=1)
    thread = threading.Thread(target=slots.run)
    thread.start()
    first = Asked(slots, "The", n_predict=4, **GREEDY)
    while not first.is_done:
        time.sleep(0.001)
    rest = [Asked(slots, "The", ignore_eos=True, **GREEDY) for _ in range(2)]
    slots.close()
    thread.join(120)
    assert not thread.is_alive() and first.text == alone(loaded, "The", n_predict=4, **GREEDY)
    for one in rest:
        assert isinstance(one.reports[-1], Done | Failed)
    assert Asked(slots, "The").ticket is None


def test_a_mistake_of_ours_ends_what_it_happened_to(loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = make(loaded)
    asked = Asked(slots, "The", n_predict=4, **GREEDY)

    def broken(feeds):
        raise ZeroDivisionError("of the engine")

    with monkeypatch.context() as patch:
        patch.setattr(loaded.engine, "feed_batch", broken, raising=False)
        drive(slots)
    assert isinstance(asked.reports[-1], Failed) and "ZeroDivisionError" in asked.reports[-1].error.reason
    again = Asked(slots, "The", n_predict=4, **GREEDY)
    drive(slots)
    assert again.text == alone(loaded, "The", n_predict=4, **GREEDY) and isinstance(
        asked.reports[-1].error, LlamakitError
    )


def test_prompts_that_cannot_be(loaded) -> None:
    slots = make(loaded, n_ctx=32)
    with pytest.raises(UsageError, match="the context holds 32"):
        slots.prepare(tiny_text(400), GenerateConfig())
    with pytest.raises(UsageError, match="token id 9999"):
        slots.prepare([9999], GenerateConfig())


def test_common_beginnings() -> None:
    rng = random.Random(1)
    for _ in range(200):
        a = [rng.randint(0, 1) for _ in range(rng.randint(0, 700))]
        n = rng.randint(0, len(a))
        b = a[:n] + [2] * rng.randint(0, 5)
        assert n_common(a, b) == n and n_common(b, a) == n


def test_copies_hold_what_they_were_copied_from(loaded) -> None:
    assert isinstance(loaded.engine, NativeEngine)
    for engine in (loaded.engine, TorchEngine(load_model(loaded.file))):
        ids = loaded.tokenizer.encode(tiny_text(120, seed=4))
        source, target = engine.context(256), engine.context(256)
        engine.feed(target, ids[::-1])
        engine.feed(source, ids)
        for n in (1, 16, 17, len(ids) - 1):
            target.copy(source, n)
            assert target.n_past == n
            fresh = engine.context(256)
            engine.feed(fresh, ids[:n])
            copied, computed = engine.feed(target, [7]), engine.feed(fresh, [7])
            is_native = isinstance(engine, NativeEngine)
            assert np.array_equal(copied, computed) if is_native else np.allclose(copied, computed, atol=1e-4)
