from __future__ import annotations

import random
from pathlib import Path

import pytest

from llamakit.errors import UnsupportedError
from llamakit.tokenizer.pre import PRE_NAMES, find_pre_tokenizer
from tests.tokenizer.vocabularies import bpe_metadata, load, random_text


@pytest.mark.parametrize("name", PRE_NAMES)
def test_words_make_up_the_text(name: str) -> None:
    pre, rng = find_pre_tokenizer(name), random.Random(0)
    for _ in range(20):
        text = random_text(rng)
        assert "".join(pre.split(text)) == text and all(pre.split(text))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt-2", "I| don|'t| know|:| 12345|  | x|\n"),
        ("llama-bpe", "I| don|'t| know|:| |123|45|  | x|\n"),
        ("qwen2", "I| don|'t| know|:| |1|2|3|4|5|  | x|\n"),
        ("smollm", "I| don|'t| know|:| |1|2|3|4|5|  | x|\n"),
        ("tekken", "I| don|'t| know|:| |1|2|3|4|5|  | x|\n"),
        ("superbpe", "I don't know: |12|345|   x\n"),
        ("bloom", "I| don't| know:| 12345|  | x|\n"),
        ("tiny_aya", "I| don't| know|:| |12|345|  | x|\n"),
        ("default", "I| don|'|t| know|:| |123|45|  | x|\n"),
    ],
)
def test_words(name: str, words: str) -> None:
    assert find_pre_tokenizer(name).split(words.replace("|", "")) == words.split("|")


def test_capitals() -> None:
    assert find_pre_tokenizer("tekken").split("HTMLParser camelCase éÉ") == ["HTMLParser", " camel", "Case", " éÉ"]
    assert find_pre_tokenizer("llama4").split("It'S éÉ") == ["It'S", " éÉ"]


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="'nonesuch' is unknown") as error:
        load(tmp_path / "a.gguf", bpe_metadata(pre="nonesuch"))
    assert error.value.path == tmp_path / "a.gguf" and "llama-bpe" in (error.value.hint or "")
    for name in ("kimi-k2", "afmoe", "gemma4"):
        with pytest.raises(UnsupportedError, match=f"'{name}' needs code of its own"):
            find_pre_tokenizer(name)


def test_no_name_is_the_default_with_a_warning(tmp_path: Path) -> None:
    tokenizer = load(tmp_path / "a.gguf", bpe_metadata(pre=None))
    assert tokenizer.pre == "default" and "tokenizer.ggml.pre is missing" in tokenizer.warnings[0]


@pytest.mark.slow
def test_long_texts_take_no_time_squared() -> None:
    for pre in {p.expressions: p for p in map(find_pre_tokenizer, PRE_NAMES)}.values():
        for unit in ("a", " ", "A", "é", "1 ", "!", "'"):
            assert "".join(pre.split(unit * 20000)) == unit * 20000


def test_what_a_name_brings_along(tmp_path: Path) -> None:
    facts = {
        name: (p.ignore_merges, p.add_bos, p.clean_spaces, p.has_bos)
        for name, p in ((name, find_pre_tokenizer(name)) for name in ("llama-bpe", "tekken", "smollm", "glm4"))
    }
    assert facts["llama-bpe"] == (True, True, True, True) and facts["tekken"] == (True, True, False, True)
    assert facts["smollm"] == (False, False, False, True) and facts["glm4"] == (False, False, True, False)
    assert load(tmp_path / "a.gguf", bpe_metadata(pre="glm4")).bos_id is None
