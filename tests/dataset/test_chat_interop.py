"""The answers that are found by asking a template, beside those that transformers finds by the tags in it.

`{% generation %}` tags say in a template which part the model writes. llamakit reads over them, and has to find the
same characters by itself, whatever the messages hold.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from llamakit.dataset.chat import ChatSample, read_samples
from llamakit.dataset.chat_records import Record
from llamakit.dataset.schemas import Message
from tests.helpers import render_in_this_process
from tests.tokenizer.vocabularies import CONTROL, bpe_metadata, load, random_text

_SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>")

TEMPLATES = {
    "ChatML": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "Llama-3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '\n\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant\n\n' }}{% endif %}"
    ),
    "Llama-2": (
        "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set s = messages[0].content %}"
        "{% else %}{% set rest = messages %}{% set s = false %}{% endif %}{% for m in rest %}"
        "{% if loop.index0 == 0 and s is not false %}{% set c = '<<SYS>>\n' + s + '\n<</SYS>>\n\n' + m.content %}"
        "{% else %}{% set c = m.content %}{% endif %}{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + c.strip() + ' [/INST]' }}{% else %}"
        "{% generation %}{{ ' ' + c.strip() + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    ),
    "Gemma": (
        "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim + '<end_of_turn>' }}{% endgeneration %}"
        "{{ '\n' }}{% else %}{{ m.content | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "thinking": (
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
        "{% endif %}{% endfor %}{% for m in messages %}{% set c = m.content %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{% if loop.index0 < ns.last and '</think>' in c %}"
        "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{% generation %}{{ c + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ c + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}  # fmt: skip


def _text(rng: random.Random) -> str:
    text = random_text(rng) + rng.choice(["", "", "<think>hm</think>", " \n", "assistant\n", "{{ x }}", "[/INST]"])
    for token in _SPECIAL:  # a special token in a message is a turn to any reader: data check warns of it
        text = text.replace(token, "")
    return text


def _conversation(rng: random.Random) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": _text(rng) or "s"}] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 3)):
        answer = rng.choice(["", "\n ", "<think>\na\n</think>\n\n"]) + _text(rng)
        messages += [{"role": "user", "content": _text(rng)}, {"role": "assistant", "content": answer + "."}]
    return messages


@pytest.mark.interop
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_same_characters_as_by_tags(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    render_in_this_process(monkeypatch)
    metadata = bpe_metadata(
        (), [(token, CONTROL) for token in _SPECIAL], tokenizer__chat_template=TEMPLATES[name],
        tokenizer__ggml__bos_token_id=256, tokenizer__ggml__eos_token_id=257, tokenizer__ggml__add_bos_token=False,
    )  # fmt: skip
    tokenizer = load(tmp_path / "v.gguf", metadata)
    rng = random.Random(name)
    talks = [_conversation(rng) for _ in range(300)]
    (texts, spans) = render_jinja_template(
        talks, chat_template=TEMPLATES[name], return_assistant_tokens_mask=True, bos_token="<s>", eos_token="</s>"
    )
    records = [
        Record("a", i, "messages", tuple(Message(m["role"], m["content"]) for m in talk))
        for i, talk in enumerate(talks)
    ]
    n_checked = 0
    for sample, text, answers in zip(read_samples(tokenizer, records, "assistant"), texts, spans, strict=True):
        assert isinstance(sample, ChatSample), sample
        assert sample.tokens.tolist() == tokenizer.encode(text, add_special=False)
        expected = [False] * len(sample.tokens)
        ends = tokenizer.encode_with_ends(text, add_special=False)[1]
        for begin, end in answers:
            first, last = len(text[:begin].encode()), len(text[:end].encode())
            expected = [e or first < at <= last for e, at in zip(expected, ends, strict=True)]
        assert sample.trained.tolist() == expected, text
        n_checked += sum(expected)
    assert n_checked > 1000
