import pytest

from llamakit.cli.prompt import framed_ids, read_prompt
from llamakit.errors import UsageError
from llamakit.files import process_escapes
from llamakit.formats.open import open_model
from llamakit.tokenizer import load_tokenizer
from tests.tiny import cached_tiny_gguf


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"a\nb\tc\rd", "a\nb\tc\rd"),
        (r"\'\"\\n", "'\"\\n"),
        (r"\x41\xc3\xa9", "Aé"),
        (r"\q \x4 \xzz", r"\q \x4 \xzz"),
        ("ends in \\", "ends in \\"),
        ("é → 😀", "é → 😀"),
    ],
)
def test_escapes(text, expected):
    assert process_escapes(text) == expected


@pytest.mark.parametrize("text", [r"\xff", "\udc80"])
def test_what_is_no_utf8_is_refused(text):
    with pytest.raises(UsageError, match="not UTF-8"):
        process_escapes(text)


def test_sources(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("a\\n\n\n", encoding="utf-8")
    assert read_prompt(r"a\n", None, None, escape=True, use_stdin=False) == "a\n"
    assert read_prompt(None, r"a\n", None, escape=False, use_stdin=False) == r"a\n"
    assert read_prompt(None, "", None, escape=True, use_stdin=True) == ""
    assert read_prompt(None, None, file, escape=True, use_stdin=False) == "a\\n\n", "a file is verbatim"
    assert read_prompt(None, None, None, escape=True, use_stdin=False) is None
    with pytest.raises(UsageError, match="PROMPT and -f"):
        read_prompt("a", None, file, escape=True, use_stdin=False)
    with pytest.raises(UsageError, match="No such file"):
        read_prompt(None, None, tmp_path / "none", escape=True, use_stdin=False)


def test_a_framed_prompt_is_three_texts_behind_a_bos():
    tokenizer = load_tokenizer(open_model(cached_tiny_gguf()))
    ids = framed_ids(tokenizer, "<s>A", "b</s>", "</s>")
    assert ids[:2] == [tokenizer.bos_id, tokenizer.bos_id]
    assert ids.count(tokenizer.eos_id) == 1
    assert ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(ids).replace(" ", "") == "Ab</s>"
    assert framed_ids(tokenizer, "", "", "") == [tokenizer.bos_id]
