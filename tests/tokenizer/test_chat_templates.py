"""Templates by name: what llama.cpp writes for the same conversation, to the character."""

import ctypes

import pytest

from llamakit.errors import UsageError
from llamakit.formats.open import open_model
from llamakit.tokenizer import load_tokenizer
from llamakit.tokenizer.chat import render_chats
from llamakit.tokenizer.chat_templates import CHAT_TEMPLATES, find_chat_template, use_chat_template
from tests.inference.llama_sampler import library
from tests.tiny import cached_tiny_gguf

_ROLES = {"s": "system", "u": "user", "a": "assistant"}
#: roles of the messages, in their order
CONVERSATIONS = ("u", "su", "uau", "suau", "suaua", "uaua", "sua", "usu", "uuaau")
#: spaces that some templates take away, what a template language might read, letters of more than one byte
TEXTS = ("  Hello,\nyou! ", "{{ 7 }} {% x %} @ \\n \"quoted\" 'single'", " schöne Grüße 日本 ", "\n")


class _Message(ctypes.Structure):
    _fields_ = [("role", ctypes.c_char_p), ("content", ctypes.c_char_p)]


def _messages(roles: str) -> list[dict[str, str]]:
    return [{"role": _ROLES[r], "content": TEXTS[i % len(TEXTS)]} for i, r in enumerate(roles)]


def _theirs(name: str, messages: list[dict[str, str]], ask: bool) -> str:
    chat = (_Message * len(messages))(*((m["role"].encode(), m["content"].encode()) for m in messages))
    buffer = ctypes.create_string_buffer(4096)
    apply = library().llama_chat_apply_template
    apply.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_bool, ctypes.c_char_p, ctypes.c_int32]
    apply.restype = ctypes.c_int32
    n_bytes = apply(name.encode(), chat, len(messages), ask, buffer, len(buffer))
    assert 0 <= n_bytes < len(buffer)
    return buffer.raw[:n_bytes].decode()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(open_model(cached_tiny_gguf()))


@pytest.mark.interop
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_named_template_writes_what_llama_cpp_writes(name, tokenizer):
    use_chat_template(tokenizer, find_chat_template(name))
    cases = [(_messages(roles), ask) for roles in CONVERSATIONS for ask in (True, False)]
    for (messages, ask), ours in zip(cases, render_chats(tokenizer, cases), strict=True):
        assert ours == _theirs(name, messages, ask), (messages, ask)


def test_one_of_them_by_heart(tokenizer):
    """What must not need llama.cpp to be known: https://github.com/openai/openai-python, chatml.md."""
    use_chat_template(tokenizer, find_chat_template("chatml"))
    (text,) = render_chats(tokenizer, [([{"role": "user", "content": "hi"}], True)])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_file_is_a_template_and_anything_else_is_refused_with_the_names(tokenizer, tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}")
    assert find_chat_template(str(tmp_path / "mine.jinja")) == "{{ messages[0].content }}"
    assert find_chat_template("{% set x = 1 %}") == "{% set x = 1 %}"  # llama.cpp takes the text itself, too
    for name in ("x" * 5000, "a\0b", ""):
        with pytest.raises(UsageError, match="unknown chat template"):
            find_chat_template(name)
    with pytest.raises(UsageError, match=r"unknown chat template 'chatnl' .*chatml, llama2, .*zephyr"):
        find_chat_template("chatnl")
    (tmp_path / "latin.jinja").write_bytes(b"\xff")
    for path in (tmp_path / "latin.jinja", tmp_path):
        with pytest.raises(UsageError, match=path.name):
            find_chat_template(str(path))
    with pytest.raises(UsageError, match="no chat template"):
        use_chat_template(load_tokenizer(open_model(cached_tiny_gguf())), None)
