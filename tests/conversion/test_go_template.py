"""Chat templates in Go's language: the prompts are those that a model's own template writes."""

from __future__ import annotations

from functools import cache

import pytest

from llamakit.conversion.go_template import GoTemplate, go_template
from llamakit.errors import FormatError, UnsupportedError
from llamakit.formats.open import open_model
from llamakit.tokenizer import Tokenizer, load_tokenizer
from llamakit.tokenizer.chat import render_chat, render_chats
from tests.conversion.go import render
from tests.helpers import render_in_this_process
from tests.smollm import smollm2_path
from tests.tiny import cached_tiny_gguf

# Templates that write as the models of these families are used; kept short, and not the ones that came with them.
CHATML = """{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
CHATML_DEFAULT = """{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe {{kind}}.<|im_end|>\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA3 = """{% for m in messages %}
{%- if loop.first %}{{ bos_token }}{% endif %}
{{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ m.content | trim ~ '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
LLAMA31 = """{{- bos_token }}{% set ns = namespace(rest=messages, system='') %}
{%- if messages[0].role == 'system' %}{% set ns.rest = messages[1:] %}
{%- set ns.system = messages[0].content | trim %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n' ~ ns.system ~ '<|eot_id|>' }}
{%- for m in ns.rest %}
{{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ m.content | trim ~ '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
LLAMA2 = """{% set ns = namespace(n=0, system='') %}{% for m in messages %}
{%- if m.role == 'system' %}{% set ns.system = '<<SYS>>\n' ~ m.content ~ '\n<</SYS>>\n\n' %}
{%- elif (m.role == 'user') != (ns.n % 2 == 0) %}{{ raise_exception('user and assistant must take turns') }}
{%- elif m.role == 'user' %}{{ bos_token ~ '[INST] ' ~ (ns.system ~ m.content) | trim ~ ' [/INST]' }}
{%- set ns.system = '' %}{% else %}{{ ' ' ~ m.content | trim ~ ' ' ~ eos_token }}{% endif %}
{%- if m.role != 'system' %}{% set ns.n = ns.n + 1 %}{% endif %}{% endfor %}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}{{ '[INST] ' ~ m.content ~ ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{ m.content ~ eos_token }}
{%- else %}{{ raise_exception('no system message, please') }}{% endif %}{% endfor %}"""
MISTRAL_LAST = """{% set ns = namespace(system='') %}{{ bos_token }}{% for m in messages %}
{%- if m.role == 'system' %}{% set ns.system = m.content ~ '\n\n' %}
{%- elif m.role == 'user' %}{{ '[INST] ' ~ (ns.system if loop.last else '') ~ m.content ~ '[/INST]' }}
{%- else %}{{ ' ' ~ m.content ~ eos_token }}{% endif %}{% endfor %}"""
ZEPHYR = """{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ eos_token ~ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
PHI3 = """{{ bos_token }}{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
PLAIN = """{% for m in messages %}{{ m.role | upper ~ ': ' ~ m.content ~ '\n' }}{% endfor %}ASSISTANT:"""

FAMILIES = {
    "Llama-2": LLAMA2, "Llama-3": LLAMA3, "Llama-3 of 2024": LLAMA31, "ChatML": CHATML, "ChatML with one": CHATML_DEFAULT,
    "Mistral": MISTRAL, "Mistral, system last": MISTRAL_LAST, "Zephyr": ZEPHYR, "Phi-3": PHI3, "none": PLAIN,
}  # fmt: skip

S, U, A, V = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
    {"role": "user", "content": "Ah.\n\n- {{ .Name }} \u65e5"},
)
#: written by hand: what these models were trained with for [S, U, A, V], after the BOS
PROMPTS = {
    "Llama-2": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhy? [/INST] So. </s><s>[INST] Ah.\n\n- {{ .Name }} \u65e5 [/INST]",
    "Llama-3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nSo.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nAh.\n\n- {{ .Name }} \u65e5<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "ChatML": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
    "<|im_start|>assistant\nSo.<|im_end|>\n<|im_start|>user\nAh.\n\n- {{ .Name }} \u65e5<|im_end|>\n"
    "<|im_start|>assistant\n",
    "Mistral, system last": "[INST] Why?[/INST] So.</s>[INST] Be brief.\n\nAh.\n\n- {{ .Name }} \u65e5[/INST]",
    "Zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nWhy?</s>\n<|assistant|>\nSo.</s>\n"
    "<|user|>\nAh.\n\n- {{ .Name }} \u65e5</s>\n<|assistant|>\n",
}


@pytest.fixture(autouse=True)
def _templates_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    render_in_this_process(monkeypatch)


def tokenizer_with(jinja: str | None, kind: str = "spm") -> Tokenizer:
    return load_tokenizer(open_model(cached_tiny_gguf(chat_template=jinja, tokenizer=kind)))


@cache
def translated(name: str) -> GoTemplate:
    return go_template(tokenizer_with(FAMILIES[name]))


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_as_they_are_known(name: str) -> None:
    assert render(translated(name).text, [S, U, A, V]) == PROMPTS[name]


@pytest.mark.parametrize(("name", "kind"), [*((n, "spm") for n in FAMILIES), ("Llama-2", "bpe"), ("Llama-3", "bpe")])
def test_prompts_are_the_chat_template_s(name: str, kind: str) -> None:
    """The BOS is left to a tokenizer that adds it (spm), and written for one that does not (bpe)."""
    tokenizer = tokenizer_with(FAMILIES[name], kind)
    go = translated(name) if kind == "spm" else go_template(tokenizer)
    bos = tokenizer.piece(tokenizer.bos_id, special=True).decode() if kind == "spm" else ""
    conversations = [[U], [U, A, V], [U, A, V, A, U]]
    conversations += [[S, *c] for c in conversations] if go.takes_system else []
    for messages, prompt in zip(
        conversations, render_chats(tokenizer, [(c, True) for c in conversations]), strict=True
    ):
        assert isinstance(prompt, str) and render(go.text, messages) == prompt.removeprefix(bos)


def test_families() -> None:
    names = {name: go.family and go.family.name for name in FAMILIES if (go := translated(name))}
    expected = {name: name.partition(" ")[0].rstrip(",") for name in FAMILIES} | {"none": None}
    assert names == expected
    assert [name for name in FAMILIES if not translated(name).takes_system] == ["Mistral"]


def test_the_text_is_what_people_write() -> None:
    assert translated("ChatML").text == (
        "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}'
        "{{ if not $last }}<|im_end|>\n{{ end }}{{ end }}"
        '{{ if and $last (ne .Role "assistant") }}<|im_start|>assistant\n{{ end }}{{ end }}'
    )


def test_the_assistant_may_go_on() -> None:
    """Ollama leaves a last message of the assistant open."""
    assert render(translated("ChatML").text, [U, A]).endswith("<|im_start|>assistant\nSo.")
    assert render(translated("Llama-2").text, [S, U, A]).endswith("Why? [/INST] So.")


def test_what_is_left_of_a_long_conversation() -> None:
    """Ollama drops the oldest messages, and keeps the system's."""
    tokenizer = tokenizer_with(ZEPHYR)
    conversations = [[A, V], [S, A, V], [U, A, S, V]]
    for messages, prompt in zip(
        conversations, render_chats(tokenizer, [(c, True) for c in conversations]), strict=True
    ):
        assert render(translated("Zephyr").text, messages) == prompt
    assert "<<SYS>>\nBe brief." in render(translated("Llama-2").text, [S, A, V])


def test_notes() -> None:
    assert translated("ChatML").notes == ()
    assert translated("Llama-3").notes == ("the chat template strips the spaces around a message, Ollama's cannot",)
    assert translated("Mistral").notes == ("the chat template takes no system message: Ollama will leave one out",)
    assert "tool calls" in go_template(tokenizer_with(CHATML + "{% if tools %}{{ tools }}{% endif %}")).notes[-1]
    picky = "{% if messages[0].role != 'assistant' %}* {% endif %}" + CHATML
    assert "begins with the assistant" in go_template(tokenizer_with(picky)).notes[0]


@pytest.mark.parametrize(
    ("jinja", "reason"),
    [
        (None, "the model has no chat template"),
        ("{{ strftime_now('%Y') }}" + CHATML, "today's date"),
        ("{{ messages[0].content }}", "does not show every message"),
        (CHATML.replace("m.content", "m.content.split('</think>')[-1]"), "more than can be translated"),
        (CHATML.replace("m.content", "m.content | replace('\\t', ' ')"), "more than can be translated"),
        (CHATML + "{{ messages | length }}", "conversation of 1 message would come out differently"),
        (CHATML + "\udc80", "not UTF-8"),
    ],
)
def test_what_is_not_known_to_be_the_same(jinja: str | None, reason: str) -> None:
    tokenizer = tokenizer_with(CHATML)
    tokenizer.chat_template = jinja
    with pytest.raises(UnsupportedError, match=reason):
        go_template(tokenizer)


def test_a_template_that_fails() -> None:
    with pytest.raises(FormatError, match="only pictures"):
        go_template(tokenizer_with("{{ raise_exception('only pictures') }}"))


@pytest.mark.parametrize("text", ["{{ x }}", "{", "}}{{", '"""', 'a"""\nb""""', "\u3000\u200d\U0001f468", '\\n{{"\\'])
def test_text_that_go_or_a_modelfile_would_take_for_something_else(text: str) -> None:
    tokenizer = tokenizer_with("{% for m in messages %}{{ bos_token ~ TEXT ~ m.content ~ TEXT }}{% endfor %}")
    quoted = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    tokenizer.chat_template = tokenizer.chat_template.replace("TEXT", f'"{quoted}"')  # type: ignore[union-attr]
    go = go_template(tokenizer)
    assert render(go.text, [U]) == f"{text}Why?{text}" and '"""' not in go.text
    assert all(c.isprintable() or c == "\n" for c in go.text)


@pytest.mark.slow
def test_a_real_model() -> None:
    tokenizer = load_tokenizer(open_model(smollm2_path()))
    go = go_template(tokenizer)
    assert go.family is not None and go.family.name == "ChatML" and go.notes == ()
    for messages in ([U], [S, U, A, V], [A, V]):
        assert render(go.text, messages) == render_chat(tokenizer, messages)
