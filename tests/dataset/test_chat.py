"""Which tokens a loss is taken on: exact for every family of templates, against labels made by hand.

A label is the text of a sample with the trained tokens in braces. Most vocabularies here have a token for each byte and
the special tokens, so that nothing hides in a merge; the merges that reach over a border have a test of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from llamakit.dataset.chat import ChatSample, ending_of, read_samples
from llamakit.dataset.chat_records import Problem, Record
from llamakit.dataset.schemas import Message
from llamakit.errors import FormatError, UnsupportedError
from llamakit.tokenizer import Tokenizer
from llamakit.tokenizer.chat_templates import CHAT_TEMPLATES
from tests.helpers import render_in_this_process
from tests.tokenizer.vocabularies import CONTROL, bpe_metadata, load, spm_metadata

_SPECIAL = (
    "<s>", "</s>", "[INST]", "[/INST]", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<|user|>", "<|assistant|>", "<|system|>", "<bos>", "<start_of_turn>",
    "<end_of_turn>",
)  # fmt: skip

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (  # the system message goes into the last question
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set s = messages[0].content %}"
    "{% else %}{% set rest = messages %}{% set s = '' %}{% endif %}{% set asked = rest | selectattr('role', 'equalto',"
    " 'user') | list %}{% for m in rest %}{% if m.role == 'user' %}{% if m == asked[-1] and s %}{{ '[INST] ' + s + '\n\n' + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (  # with newlines of its own
    "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + m['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n'"
    " + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
THINKING = (  # earlier reasoning is dropped, as soon as another question follows
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set c = m.content %}"
    "{% if m.role == 'assistant' and loop.index0 < ns.last and '</think>' in c %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TALK = (("system", "Be kind."), ("user", "Hi"), ("assistant", "Yo é"), ("user", "So?"), ("assistant", "Bye"))
#: name -> (template, BOS, EOS, whether the vocabulary adds BOS, the label)
CASES = {
    "Llama-2": (
        LLAMA2, "<s>", "</s>", True,
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST]{ Yo é </s>}<s>[INST] So? [/INST]{ Bye </s>}",
    ),
    "Llama-3": (
        LLAMA3, "<|begin_of_text|>", "<|eot_id|>", True,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{Yo é<|eot_id|>}"
        "<|start_header_id|>user<|end_header_id|>\n\nSo?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{Bye<|eot_id|>}",
    ),
    "ChatML": (
        CHATML, "<|im_start|>", "<|im_end|>", False,
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{Yo é<|im_end|>}"
        "\n<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n{Bye<|im_end|>}\n",
    ),
    "Mistral": (
        MISTRAL, "<s>", "</s>", True,
        "<s>[INST] Hi[/INST]{ Yo é</s>}[INST] Be kind.\n\nSo?[/INST]{ Bye</s>}",
    ),
    "Zephyr": (
        ZEPHYR, "<s>", "</s>", True,
        "<s><|system|>\nBe kind.</s>\n<|user|>\nHi</s>\n<|assistant|>\n{Yo é</s>}\n<|user|>\nSo?</s>\n"
        "<|assistant|>\n{Bye</s>}\n",
    ),
    "Gemma": (
        GEMMA, "<bos>", "<end_of_turn>", True,
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n{Yo é<end_of_turn>}\n"
        "<start_of_turn>user\nSo?<end_of_turn>\n<start_of_turn>model\n{Bye<end_of_turn>}\n",
    ),
}  # fmt: skip

Make = Callable[..., Tokenizer]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A tokenizer of bytes and special tokens, with this template."""
    render_in_this_process(monkeypatch)

    def build(
        template: str | None, bos: str = "<s>", eos: str = "</s>", add_bos: bool = True, **keys: object
    ) -> Tokenizer:
        ids = {token: 256 + i for i, token in enumerate(_SPECIAL)}
        settings = {
            "tokenizer__chat_template": template,
            "tokenizer__ggml__bos_token_id": ids[bos],
            "tokenizer__ggml__eos_token_id": ids[eos],
            "tokenizer__ggml__add_bos_token": add_bos,
            **keys,
        }
        return load(tmp_path / "v.gguf", bpe_metadata((), [(token, CONTROL) for token in _SPECIAL], **settings))

    return build


def record(messages: Sequence[tuple[str, str]]) -> Record:
    return Record("a.jsonl", 1, "messages", tuple(Message(*message) for message in messages))


def sample(tokenizer: Tokenizer, messages: Sequence[tuple[str, str]] | str, train_on: str = "assistant") -> ChatSample:
    one = Record("a.txt", 1, "text", text=messages) if isinstance(messages, str) else record(messages)
    (found,) = read_samples(tokenizer, [one], train_on)
    assert isinstance(found, ChatSample), found
    return found


def problem(tokenizer: Tokenizer, messages: Sequence[tuple[str, str]]) -> Problem:
    (found,) = read_samples(tokenizer, [record(messages)], "assistant")
    assert isinstance(found, Problem), found
    return found


def labelled(tokenizer: Tokenizer, label: str) -> tuple[list[int], list[bool]]:
    """Ids and mask of a label: tokens in braces are trained."""
    ids: list[int] = []
    mask: list[bool] = []
    for part in re.split(r"(\{.*?\})", label, flags=re.DOTALL):
        trained = part.startswith("{") and part.endswith("}")
        found = tokenizer.encode(part[1:-1] if trained else part, add_special=False)
        ids += found
        mask += [trained] * len(found)
    return ids, mask


def check(tokenizer: Tokenizer, found: ChatSample, label: str) -> None:
    ids, mask = labelled(tokenizer, label)
    assert found.tokens.tolist() == ids
    shown = "".join(
        f"{{{tokenizer.decode([i], special=True)}}}" if m else tokenizer.decode([i], special=True)
        for i, m in zip(ids, found.trained, strict=True)
    )
    assert found.trained.tolist() == mask, shown


@pytest.mark.parametrize("name", CASES)
def test_the_answers_and_their_end_tokens_are_trained_and_nothing_else(name: str, make: Make) -> None:
    template, bos, eos, add_bos, label = CASES[name]
    tokenizer = make(template, bos, eos, add_bos)
    found = sample(tokenizer, TALK[1:] if name == "Gemma" else TALK)
    check(tokenizer, found, label)
    assert found.ended and not found.double_bos and found.changed == 0
    # With a system message Mistral asked the first question in other words than it stands there in the end.
    assert found.unlike == (name == "Mistral") and found.dropped == 0


@pytest.mark.parametrize("name", CASES)
def test_the_last_answer_alone(name: str, make: Make) -> None:
    template, bos, eos, add_bos, label = CASES[name]
    tokenizer = make(template, bos, eos, add_bos)
    before, _, last = label.rpartition("{")
    found = sample(tokenizer, TALK[1:] if name == "Gemma" else TALK, "last")
    check(tokenizer, found, re.sub("[{}]", "", before) + "{" + last)


def test_all_tokens_but_the_first(make: Make) -> None:
    found = sample(make(CHATML, add_bos=False), TALK, "all")
    assert found.trained.tolist() == [False] + [True] * (len(found.tokens) - 1)


def test_spaces_of_an_answer_are_the_model_s_where_the_template_keeps_them(make: Make) -> None:
    kept = make(CHATML, "<|im_start|>", "<|im_end|>", add_bos=False)
    found = sample(kept, [("user", " q "), ("assistant", "\n a \n")])
    check(kept, found, "<|im_start|>user\n q <|im_end|>\n<|im_start|>assistant\n{\n a \n<|im_end|>}\n")
    stripped = make(LLAMA3, "<|begin_of_text|>", "<|eot_id|>")
    found = sample(stripped, [("user", " q "), ("assistant", "\n\n a \n")])
    check(
        stripped, found,
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{a<|eot_id|>}",
    )  # fmt: skip
    assert found.changed == 0


def test_an_answer_that_repeats_the_question_or_the_header(make: Make) -> None:
    tokenizer = make(CHATML, "<|im_start|>", "<|im_end|>", add_bos=False)
    found = sample(tokenizer, [("user", "assistant"), ("assistant", "assistant"), ("user", "x"), ("assistant", "x")])
    check(
        tokenizer, found,
        "<|im_start|>user\nassistant<|im_end|>\n<|im_start|>assistant\n{assistant<|im_end|>}\n"
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n{x<|im_end|>}\n",
    )  # fmt: skip


def test_earlier_reasoning_that_a_template_drops(make: Make) -> None:
    tokenizer = make(THINKING, "<|im_start|>", "<|im_end|>", add_bos=False)
    talk = [
        ("user", "q"),
        ("assistant", "<think>\nhm\n</think>\n\na"),
        ("user", "r"),
        ("assistant", "<think>h</think>b"),
    ]
    found = sample(tokenizer, talk)
    check(
        tokenizer, found,
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{a<|im_end|>}\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n{<think>h</think>b<|im_end|>}\n",
    )  # fmt: skip
    assert found.changed == 1 and found.unlike == 0


def test_what_the_generation_prompt_says_is_not_trained(make: Make) -> None:
    """A template that begins the reasoning itself, as some reasoning models' do."""
    begun = CHATML.replace("<|im_start|>assistant\\n' }}{% endif", "<|im_start|>assistant\\n<think>\\n' }}{% endif")
    begun = (
        CHATML[: CHATML.rindex("{{")] + "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
        if begun == CHATML
        else begun
    )
    tokenizer = make(begun, "<|im_start|>", "<|im_end|>", add_bos=False)
    found = sample(tokenizer, [("user", "q"), ("assistant", "<think>\nhm</think>a")])
    check(tokenizer, found, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n{hm</think>a<|im_end|>}\n")


def test_a_header_without_a_generation_prompt_is_the_template_s(make: Make) -> None:
    bare = CHATML[: CHATML.index("{% if add_generation_prompt")]
    tokenizer = make(bare, "<|im_start|>", "<|im_end|>", add_bos=False)
    found = sample(tokenizer, [("user", "q"), ("assistant", "a")])
    check(tokenizer, found, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{a<|im_end|>}\n")


def test_a_weight_of_zero_is_context(make: Make) -> None:
    tokenizer = make(CHATML, "<|im_start|>", "<|im_end|>", add_bos=False)
    messages = (Message("user", "q"), Message("assistant", "a", False), Message("user", "r"), Message("assistant", "b"))
    (found,) = read_samples(tokenizer, [Record("a", 1, "messages", messages)], "assistant")
    assert isinstance(found, ChatSample)
    check(
        tokenizer, found,
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n{b<|im_end|>}\n",
    )  # fmt: skip


def test_a_merge_over_the_border_belongs_to_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral's prompt ends in [/INST], and the first token of an answer is its first word with a space."""
    render_in_this_process(monkeypatch)
    pieces = [
        ("\u2581", -9.0),
        ("\u2581Yes", -1.0),
        ("Y", -9.0),
        ("e", -9.0),
        ("s", -9.0),
        ("Ye", -5.0),
        ("Yes", -3.0),
        ("\u2581\u2581", -8.0),
    ]
    metadata = spm_metadata(pieces, [("[INST]", CONTROL), ("[/INST]", CONTROL)], tokenizer__chat_template=MISTRAL)
    tokenizer = load(tmp_path / "v.gguf", metadata)
    names = metadata["tokenizer.ggml.tokens"]
    found = sample(tokenizer, [("user", "Yes"), ("assistant", "Yes")])
    shown = [(names[i], bool(t)) for i, t in zip(found.tokens, found.trained, strict=True)]
    # A space of the template and one that the vocabulary puts behind a special token.
    assert shown == [
        ("<s>", False), ("[INST]", False), ("\u2581", False), ("\u2581Yes", False), ("[/INST]", False),
        ("\u2581", True), ("\u2581Yes", True), ("</s>", True),
    ]  # fmt: skip
    tokenizer.chat_template = MISTRAL.replace("' ' + m.content", "m.content").replace("'[INST] '", "'[INST]'")
    found = sample(tokenizer, [("user", "Yes"), ("assistant", "Yes")])
    shown = [(names[i], bool(t)) for i, t in zip(found.tokens, found.trained, strict=True)]
    assert shown == [
        ("<s>", False), ("[INST]", False), ("\u2581Yes", False), ("[/INST]", False), ("\u2581Yes", True), ("</s>", True),
    ]  # fmt: skip
    found = sample(tokenizer, [("user", "Yes"), ("assistant", "\xe9")])  # the space has no byte of the text
    assert [names[i] for i in found.tokens[4:]] == ["\u2581", "<0xC3>", "<0xA9>", "</s>"]
    assert found.trained.tolist() == [False] * 4 + [True] * 4


def test_bos_is_there_once_whoever_writes_it(make: Make) -> None:
    for template in (CHATML, "{{ bos_token }}" + CHATML, "{{ bos_token + bos_token }}" + CHATML):
        found = sample(make(template), TALK)
        assert found.tokens.tolist().count(256) == 1 and found.tokens[0] == 256
        assert found.double_bos == template.startswith("{{ bos_token + ")
    assert sample(make(CHATML), "<s>Hi").tokens.tolist().count(256) == 1


def test_an_end_token_that_is_missing_is_found(make: Make) -> None:
    tokenizer = make(CHATML_WITHOUT_END, "<s>", "</s>")
    found = sample(tokenizer, [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")])
    assert not found.ended
    # What ends an answer instead is learnt: a text that stops the generation.
    check(tokenizer, found, "<s>### user: q\n\n### assistant: {a}\n\n### user: r\n\n### assistant: {b}\n\n")
    assert ending_of(tokenizer).token is None
    spelled = make(CHATML.replace("<|im_end|>", "<|stop|>"), "<s>", "</s>")
    found = sample(spelled, [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")])
    assert not found.ended and ending_of(spelled).text == "<|stop|>"
    check(
        spelled, found,
        "<s><|im_start|>user\nq<|stop|>\n<|im_start|>assistant\n{a<|stop|>}\n"
        "<|im_start|>user\nr<|stop|>\n<|im_start|>assistant\n{b<|stop|>}\n",
    )  # fmt: skip


CHATML_WITHOUT_END = (
    "{% for m in messages %}{{ '### ' + m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_every_named_template_can_be_aligned(name: str, make: Make) -> None:
    """The answer and the end that this family has, whatever stands around it."""
    tokenizer = make(CHAT_TEMPLATES[name], "<s>", "</s>")
    found = sample(tokenizer, [("user", "Why?"), ("assistant", "Because."), ("user", "So?"), ("assistant", "Yes.")])
    trained = [i for i, t in zip(found.tokens.tolist(), found.trained, strict=True) if t]
    text = tokenizer.decode(trained, special=True)
    end = ending_of(tokenizer).text
    assert [part.strip() for part in text.split(end)] == ["Because.", "Yes.", ""] if end else text == "Because.Yes."


def test_literal_marks_in_a_text(make: Make) -> None:
    tokenizer = make(None)
    text = "<s>[INST] Hi [/INST] Yo </s><s>[INST] So? [/INST] Bye </s>"
    check(tokenizer, sample(tokenizer, text), "<s>[INST] Hi [/INST]{ Yo </s>}<s>[INST] So? [/INST]{ Bye </s>}")
    check(tokenizer, sample(tokenizer, text, "last"), "<s>[INST] Hi [/INST] Yo </s><s>[INST] So? [/INST]{ Bye </s>}")
    plain = sample(tokenizer, "Once upon")
    check(tokenizer, plain, "<s>{Once upon</s>}")
    chatml = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    without = make(None, "<|im_start|>", "<|im_end|>", add_bos=False)
    check(
        without,
        sample(without, chatml),
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{a<|im_end|>}\n<|im_end|>",
    )
    (empty,) = read_samples(tokenizer, [Record("a", 3, "text", text="[INST] q [/INST] </s>")], "assistant")
    assert isinstance(empty, Problem) and empty.kind == "empty" and empty.line == 3


def test_what_cannot_be_proven_is_an_error_and_never_a_guess(make: Make) -> None:
    twice = "{% for m in messages %}{{ m.content + '|' + m.content + '\n' }}{% endfor %}"
    assert "2 times (expected once)" in problem(make(twice), TALK).reason
    gone = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    assert "0 times" in problem(make(gone), TALK).reason
    counted = (
        "{% for m in messages %}{{ m.content | length }}{{ m.content | upper | length }}:{{ m.content }}{% endfor %}"
    )
    assert "cannot be proven" in problem(make(counted), TALK).reason
    reversed_ = "{% for m in messages %}{{ m.content | reverse }}{% endfor %}"
    assert "cannot be proven" in problem(make(reversed_), TALK).reason


def test_a_message_that_the_template_leaves_out_is_counted(make: Make) -> None:
    deaf = CHATML.replace(
        "{{ '<|im_start|>' + m['role']", "{% if m['role'] != 'system' %}{{ '<|im_start|>' + m['role']"
    ).replace("}}{% endfor", "}}{% endif %}{% endfor")
    tokenizer = make(deaf, "<|im_start|>", "<|im_end|>", add_bos=False)
    assert sample(tokenizer, TALK).dropped == 1 and sample(tokenizer, TALK[1:]).dropped == 0
    assert sample(tokenizer, TALK[:3]).dropped == 1 and sample(tokenizer, TALK, "last").dropped == 1


def test_marks_that_change_a_question_do_not_hide_an_answer(make: Make) -> None:
    counted = (
        "{% for m in messages %}{% if m.role == 'user' %}({{ m.content | length }})"
        + "{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    tokenizer = make(counted)
    check(tokenizer, sample(tokenizer, [("user", "abc"), ("assistant", "d")]), "<s>(3)abc</s>{d</s>}")


def test_a_template_that_raises_names_the_record(make: Make) -> None:
    found = problem(make(LLAMA2), [("assistant", "a"), ("user", "q")])
    assert found.kind == "template" and "roles must alternate" in found.reason and found.line == 1
    with pytest.raises(UnsupportedError, match="no chat template") as caught:
        sample(make(None), TALK)
    assert "--chat-template" in (caught.value.hint or "")


def test_private_characters_in_the_data_are_data(make: Make) -> None:
    tokenizer = make(CHATML, "<|im_start|>", "<|im_end|>", add_bos=False)
    found = sample(tokenizer, [("user", "\U000f0001"), ("assistant", "\U000f0003")])
    check(tokenizer, found, "<|im_start|>user\n\U000f0001<|im_end|>\n<|im_start|>assistant\n{\U000f0003<|im_end|>}\n")
    assert "cannot be marked" in problem(tokenizer, [("user", "\U000f0001"), ("assistant", "\U00100000")]).reason


def test_many_records_keep_their_order_and_one_bad_one_is_alone(make: Make) -> None:
    tokenizer = make(GEMMA, "<bos>", "<end_of_turn>")
    records = [
        Record(
            "a",
            i,
            "messages",
            tuple(Message(*m) for m in (TALK if i == 70 else [("user", f"q{i}"), ("assistant", f"a{i}")])),
        )
        for i in range(1, 101)
    ]
    found = list(read_samples(tokenizer, records, "assistant"))
    assert [item.line for item in found] == list(range(1, 101))
    assert [item.line for item in found if isinstance(item, Problem)] == [70]


def test_a_template_that_never_ends_is_refused_soon(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from llamakit.dataset import render

    def exceeds(*_: object) -> list[str]:
        calls.append(1)
        raise FormatError("it exceeded its limits on time and memory")

    calls: list[int] = []
    tokenizer = make(CHATML)
    monkeypatch.setattr(render, "render_chats", exceeds)
    with pytest.raises(FormatError, match="limits"):
        list(render.render_records(tokenizer, [record(TALK)] * 500, "assistant"))
    assert len(calls) < 12
