"""Conversations: the prompt is the template's, a turn costs its new tokens alone, and a full context is no crash."""

import subprocess
from contextlib import closing
from itertools import islice, takewhile

import numpy as np
import pytest

from llamakit.errors import FormatError, LlamakitError, MismatchError, UnsupportedError, UsageError
from llamakit.formats.adapter import Adapter
from llamakit.formats.open import open_model
from llamakit.inference.completion import generate
from llamakit.inference.config import GenerateConfig
from llamakit.inference.continuation import Done, Token
from llamakit.inference.conversation import Conversation, Dropped, Folded
from llamakit.inference.engine import TorchEngine
from llamakit.model import load_model
from llamakit.tokenizer import chat, load_tokenizer
from llamakit.tokenizer.chat import encode_chat, render_chat
from llamakit.tokenizer.chat_templates import CHAT_TEMPLATES
from tests.helpers import render_in_this_process
from tests.tiny import cached_tiny_gguf

CHATML = CHAT_TEMPLATES["chatml"]
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '\n' }}{% endfor %}"
)
SILENT = "{% for m in messages if m.role != 'system' %}{{ '<' + m.role + '>' + m.content + '\n' }}{% endfor %}"
SHORT = "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}"
IN_A_PROCESS = chat._run
GREEDY = GenerateConfig(temperature=0, n_predict=6)


@pytest.fixture(autouse=True)
def _quick_templates(monkeypatch):
    render_in_this_process(monkeypatch)


class Counting:
    """An engine that notes how many tokens it is fed; failure: what it raises instead of computing."""

    def __init__(self, file) -> None:
        self._engine = TorchEngine(load_model(file))
        self.config, self.fed, self.failure = self._engine.config, [], None

    def context(self, n_ctx):
        return self._engine.context(n_ctx)

    def feed(self, context, tokens):
        self.fed.append(len(tokens))
        if self.failure is not None:
            raise self.failure
        return self._engine.feed(context, tokens)

    def set_adapters(self, adapters):
        self._engine.set_adapters(adapters)


@pytest.fixture
def talk():
    def start(config=GREEDY, template=CHATML, *, system="", n_ctx=256):
        file = open_model(cached_tiny_gguf(chat_template=template, n_ctx=n_ctx))
        engine, tokenizer = Counting(file), load_tokenizer(file)
        return Conversation(engine, tokenizer, config, system=system), engine, tokenizer

    return start


def answer(reports):
    """(text, Done) of an answer."""
    *others, done = reports
    assert isinstance(done, Done)
    return "".join(r.text for r in (*others, done) if isinstance(r, Token | Done)), done


def expected(engine, tokenizer, messages, config=GREEDY):
    """The answer of a model that has never seen the conversation before."""
    return answer(generate(engine, tokenizer, encode_chat(tokenizer, messages), config))[0]


def test_each_answer_is_that_of_the_whole_prompt_and_costs_only_its_new_tokens(talk):
    conversation, engine, tokenizer = talk(system="Be brief.", n_ctx=512)
    held, prompt = [], []
    for text in ("Who is the king?", "And\nthe queen?", "Why?"):
        before, prompt = prompt, encode_chat(tokenizer, [*conversation.messages, {"role": "user", "content": text}])
        engine.fed.clear()
        reports = list(conversation.say(text))
        said, done = answer(reports)
        assert conversation.messages[-1] == {"role": "assistant", "content": said}
        n_common = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(held, prompt, strict=False))))
        assert engine.fed == [len(prompt) - n_common] + [1] * (done.n_generated - 1)
        assert done.n_prompt == engine.fed[0] and n_common >= len(before)
        held = prompt + [report.id for report in reports[:-2]]
        assert conversation.n_past == len(held)
        assert said == expected(engine, tokenizer, conversation.messages[:-1])
    assert [m["role"] for m in conversation.messages] == ["system"] + ["user", "assistant"] * 3


def test_another_answer_computes_one_token_and_draws_with_another_seed(talk):
    config = GenerateConfig(temperature=5, n_predict=8, seed=2**32 - 2, min_p=0, top_p=1, top_k=0)
    conversation, engine, tokenizer = talk(config)
    first, done = answer(conversation.say("hello"))
    question = conversation.messages[:1]
    engine.fed.clear()
    second, again = answer(conversation.say_again())
    assert engine.fed[0] == 1 and first != second and done.seed == 2**32 - 2
    assert conversation.messages == [*question, {"role": "assistant", "content": second}]
    third, last = answer(conversation.say_again())
    assert last.seed == 0 and third != second
    assert third == expected(engine, tokenizer, question, GenerateConfig(**{**vars(config), "seed": 0}))
    assert again.seed != done.seed
    assert answer(conversation.say("hello"))[1].seed == config.seed


def test_undo_clear_and_system(talk):
    conversation, _, _ = talk()
    for method in (conversation.undo, conversation.say_again):
        with pytest.raises(UsageError):
            method()
    conversation.set_system("one")
    answer(conversation.say("a"))
    answer(conversation.say("b"))
    assert conversation.undo() == "b"
    conversation.set_system("two")
    assert [m["content"] for m in conversation.messages[:2]] == ["two", "a"] and conversation.system == "two"
    conversation.set_system("")
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] and conversation.system == ""
    assert conversation.undo() == "a" and conversation.messages == []
    conversation.set_system("three")
    answer(conversation.say("c"))
    conversation.clear()
    assert conversation.messages == [{"role": "system", "content": "three"}]


def test_a_loaded_question_is_answered(talk):
    conversation, engine, tokenizer = talk()
    conversation.messages = [{"role": "user", "content": "hi"}]
    assert answer(conversation.say_again())[0] == expected(engine, tokenizer, conversation.messages[:1])


def test_an_answer_that_is_not_taken_to_its_end_stays_as_far_as_it_came(talk):
    conversation, engine, tokenizer = talk()
    with closing(conversation.say("hello")) as reports:
        started = "".join(report.text for report in islice(reports, 3))
    assert conversation.messages[-1] == {"role": "assistant", "content": started}
    said, _ = answer(conversation.say("go on"))
    assert said == expected(engine, tokenizer, conversation.messages[:-1])
    engine.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        list(conversation.say("stop"))
    assert [m["content"] for m in conversation.messages[-2:]] == ["stop", ""]
    engine.failure = None
    said, _ = answer(conversation.say_again())
    assert said == expected(engine, tokenizer, conversation.messages[:-1])


def test_an_answer_that_cannot_be_computed_was_never_asked_for(talk):
    conversation, engine, tokenizer = talk()
    answer(conversation.say("hello"))
    before = list(conversation.messages)
    engine.failure = LlamakitError("not finite")
    with pytest.raises(LlamakitError, match="not finite"):
        list(conversation.say("again"))
    assert conversation.messages == before
    engine.failure = None
    assert answer(conversation.say("again"))[0] == expected(engine, tokenizer, conversation.messages[:-1])


def test_a_conversation_that_outgrows_the_context_loses_its_oldest_turns_and_says_how_many(talk):
    conversation, engine, tokenizer = talk(system="Be brief.", n_ctx=256, template=SHORT)
    dropped = 0
    for i in range(9):
        before = list(conversation.messages)
        reports = list(conversation.say(f"message number {i}"))
        if isinstance(reports[0], Dropped):
            dropped += 1
            n = reports[0].n_messages
            assert conversation.messages[:-2] == [before[0], *before[1 + n :]]
            assert len(encode_chat(tokenizer, conversation.messages[:-1])) <= conversation.n_ctx // 2
        assert conversation.messages[0] == {"role": "system", "content": "Be brief."}
        assert conversation.messages[1]["role"] == "user"
        assert conversation.messages[-1]["content"] == expected(engine, tokenizer, conversation.messages[:-1])
    assert 1 <= dropped <= 4  # and not with each message


def test_a_message_longer_than_the_context_is_refused_and_a_full_context_ends_an_answer(talk):
    conversation, _, _ = talk(GenerateConfig(temperature=0, ignore_eos=True, context_shift=True), n_ctx=64)
    for before in ([], [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]):
        conversation.messages = list(before)
        with pytest.raises(UsageError, match=r"prompt of \d+ tokens, the context holds 64"):
            list(conversation.say("far too long " * 20))
        assert conversation.messages == before
    _, done = answer(conversation.say("hi"))
    assert done.reason == "context" and conversation.n_past == 64
    first, *_ = conversation.say("and then?")
    assert isinstance(first, Dropped)


@pytest.mark.parametrize("template", [NO_SYSTEM, SILENT])
def test_a_system_text_goes_into_the_first_message_where_the_template_takes_none(template, talk):
    conversation, _, tokenizer = talk(template=template, system="Be brief.")
    first, *rest = conversation.say("hello")
    assert first == Folded() and not any(isinstance(report, Folded) for report in rest)
    prompt = render_chat(tokenizer, [{"role": "user", "content": "Be brief.\n\nhello"}])
    assert conversation.n_past == len(tokenizer.encode(prompt)) + GREEDY.n_predict - 1
    assert conversation.messages[0] == {"role": "system", "content": "Be brief."}
    assert not any(isinstance(report, Folded) for report in conversation.say("more"))


def test_a_template_that_fails_leaves_the_conversation_as_it_was(talk):
    template = "{% if messages | length > 2 %}{{ raise_exception('too many') }}{% endif %}" + CHATML
    conversation, _, _ = talk(template=template)
    answer(conversation.say("one"))
    before = list(conversation.messages)
    with pytest.raises(FormatError, match="too many"):
        list(conversation.say("two"))
    assert conversation.messages == before
    with pytest.raises(UnsupportedError, match="no chat template"):
        list(talk(template=None)[0].say("x"))


def test_one_process_renders_a_turn(talk, monkeypatch):
    monkeypatch.setattr(chat, "_run", IN_A_PROCESS)
    started, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **kw: started.append(args) or run(*args, **kw))
    conversation, _, _ = talk(system="Be brief.")
    answer(conversation.say("one"))
    answer(conversation.say("two"))
    assert len(started) == 2


def test_other_adapters_make_the_context_be_computed_anew(talk):
    conversation, engine, tokenizer = talk()
    rng = np.random.default_rng(0)
    a, b = (rng.normal(0, 0.5, shape).astype(np.float32) for shape in ((4, 64), (64, 4)))
    adapter = Adapter(4.0, {"blk.0.attn_q.weight": (a, b)})
    plain, _ = answer(conversation.say("hello"))
    conversation.set_adapters([(adapter, 2.0)])
    changed, _ = answer(conversation.say_again())
    assert changed != plain and changed == expected(engine, tokenizer, conversation.messages[:1])
    with pytest.raises(LlamakitError, match=r"blk\.9"):
        conversation.set_adapters([(Adapter(4.0, {"blk.9.attn_q.weight": (a, b)}), 1.0)])
    assert answer(conversation.say_again())[0] == changed
    conversation.set_adapters([])
    assert answer(conversation.say_again())[0] == plain


def test_another_models_tokenizer_is_refused():
    file = open_model(cached_tiny_gguf())
    tokenizer = load_tokenizer(open_model(cached_tiny_gguf(tokenizer="bpe")))
    with pytest.raises(MismatchError, match="vocabulary"):
        Conversation(TorchEngine(load_model(file)), tokenizer)
