"""Chat templates: rendered as Hugging Face's sandbox renders them, and held to limits."""

import pytest

from llamakit.cli import run
from llamakit.errors import FormatError, UnsupportedError
from llamakit.formats.open import open_model
from llamakit.tokenizer import load_tokenizer
from llamakit.tokenizer.chat import encode_chat, render_chat, render_chats
from tests.tiny import cached_tiny_gguf

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "hello"}]


def tokenizer_with(template):
    return load_tokenizer(open_model(cached_tiny_gguf(chat_template=template)))


def test_messages_become_the_prompt_of_the_template():
    tokenizer = tokenizer_with(CHATML)
    assert render_chat(tokenizer, HELLO) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert render_chat(tokenizer, HELLO, add_generation_prompt=False) == "<|im_start|>user\nhello<|im_end|>\n"


def test_a_bos_of_the_template_is_not_doubled():
    ids = encode_chat(tokenizer_with("{{ bos_token }}{{ messages[0]['content'] }}"), HELLO)
    assert ids.count(1) == 1 and ids[0] == 1
    assert encode_chat(tokenizer_with("{{ messages[0]['content'] }}"), HELLO) == ids


def test_several_conversations_and_the_error_of_each():
    template = "{% if messages | length > 1 %}{{ raise_exception('too many') }}{% endif %}" + CHATML
    short, long, open_end = render_chats(tokenizer_with(template), [(HELLO, True), (HELLO * 2, True), (HELLO, False)])
    assert short == f"{open_end}<|im_start|>assistant\n" and open_end.endswith("<|im_end|>\n")
    assert isinstance(long, FormatError) and "too many" in long.reason


def test_what_hugging_face_adds_to_jinja():
    looped = (
        "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}"
    )
    assert render_chat(tokenizer_with(looped), HELLO * 3) == "hello|"


def test_no_template_is_said():
    with pytest.raises(UnsupportedError, match="no chat template"):
        render_chat(tokenizer_with(None), HELLO)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ raise_exception('only users') }}", "only users"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError|unsafe|undefined"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "SecurityError|unsafe|undefined"),
        ("{{ ('a' * 900000000) | length }}", "memory"),
        pytest.param(
            "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
            "limits",
            marks=pytest.mark.slow,  # it waits for the limit on processor time
        ),
        ("{{ 'a' * 5000000 }}", "characters"),
    ],
)
def test_a_template_that_fails_or_never_ends_is_an_error_of_one_line(template, reason):
    with pytest.raises(FormatError, match=reason) as caught:
        render_chat(tokenizer_with(template), HELLO)
    assert "\n" not in str(caught.value)


def test_generate_applies_it_with_cnv_only(capsys):
    path = str(cached_tiny_gguf(chat_template=CHATML))
    arguments = ["generate", "-m", path, "-p", "hello", "-n", "4", "-t", "0"]
    assert run(arguments) == 0
    plain = capsys.readouterr()
    assert plain.out.startswith("hello") and "llamakit chat" in plain.err
    assert run([*arguments, "-cnv", "--single-turn"]) == 0
    chat = capsys.readouterr()
    assert not chat.out.startswith("hello") and "hint" not in chat.err
