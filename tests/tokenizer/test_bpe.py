from __future__ import annotations

from pathlib import Path

import pytest

from llamakit.tokenizer import Tokenizer
from tests.tokenizer.vocabularies import BYTE, CONTROL, LETTERS, UNUSED, USER, bpe_metadata, letters, load, shared

SPACE = LETTERS[0x20]
MERGES = ["h e", "l l", "he ll", "hell o", f"{SPACE} w", "o r", f"{SPACE}w or"]
SPECIAL = [("<|im_end|>", CONTROL), ("<mark>", USER), ("<0x07>", BYTE), ("spare", UNUSED)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load(tmp_path / "bpe.gguf", bpe_metadata(MERGES, SPECIAL))


def pieces(tokenizer: Tokenizer, text: str, **options: bool) -> list[bytes]:
    return [tokenizer.piece(i, special=True) for i in tokenizer.encode(text, **options)]


def test_facts(tokenizer: Tokenizer) -> None:
    assert (tokenizer.model, tokenizer.pre, tokenizer.bos_id, tokenizer.eos_id) == ("gpt2", "gpt-2", 11, 11)
    assert not tokenizer.add_bos and tokenizer.unk_id is None and not tokenizer.warnings
    assert tokenizer.eog_ids == {11, tokenizer.vocabulary.ids["<|im_end|>"]}


def test_merges_by_rank_within_words(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, "hello world") == [b"hello", b" wor", b"l", b"d"]
    assert pieces(tokenizer, "lllo") == [b"ll", b"l", b"o"]
    assert pieces(tokenizer, "hel lo") == [b"he", b"l", b" ", b"l", b"o"]


def test_a_long_word_is_no_special_case(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, "hello" * 300) == [b"hello"] * 300


def test_bytes(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, "é\0") == [b"\xc3", b"\xa9", b"\0"]
    assert tokenizer.piece(tokenizer.vocabulary.ids["<0x07>"]) == b"\a"
    assert tokenizer.piece(tokenizer.vocabulary.ids["spare"]) == b""
    assert tokenizer.decode(tokenizer.encode("é中😀\0\r\n")) == "é中😀\0\r\n"
    assert tokenizer.encode("") == []


def test_special_tokens(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, "h<|im_end|>e") == [b"h", b"<|im_end|>", b"e"]
    assert b"<|im_end|>" not in pieces(tokenizer, "<|im_end|>", parse_special=False)
    assert pieces(tokenizer, "<mark>", parse_special=False) == [b"<mark>"]


def test_a_word_that_is_a_token_stays_whole(tmp_path: Path) -> None:
    metadata = bpe_metadata(MERGES, [("held", 1)], pre="llama-bpe")
    assert pieces(load(tmp_path / "a.gguf", metadata), "held", add_special=False) == [b"held"]
    metadata = bpe_metadata(MERGES, [("held", 1)], pre="qwen2")
    assert pieces(load(tmp_path / "b.gguf", metadata), "held", add_special=False) == [b"he", b"l", b"d"]


def test_merges_without_tokens(tmp_path: Path) -> None:
    """A merge works without a token of its own; what is no token in the end falls to bytes, or away."""
    metadata = bpe_metadata(["h e", "he l"])
    tokens = [t for t in metadata["tokenizer.ggml.tokens"] if t not in ("he", LETTERS[0x00])]
    tokenizer = load(tmp_path / "a.gguf", metadata | {"tokenizer.ggml.tokens": tokens})
    assert pieces(tokenizer, "hel") == [b"hel"]
    assert pieces(tokenizer, "hex\0y") == [b"h", b"e", b"x", b"y"]
    tokens.remove("Q")
    tokenizer = load(tmp_path / "b.gguf", metadata | {"tokenizer.ggml.tokens": tokens})
    assert pieces(tokenizer, "hQ") == [b"h"] and "1 bytes" in tokenizer.warnings[0]


def test_equal_merges_count_once_the_first(tmp_path: Path) -> None:
    tokenizer = load(tmp_path / "a.gguf", bpe_metadata(["a b", "b c", "a b", "nothing", " d"]))
    assert pieces(tokenizer, "abc") == [b"ab", b"c"]


def test_a_token_that_is_not_spelled_in_byte_letters(tmp_path: Path) -> None:
    tokenizer = load(tmp_path / "a.gguf", bpe_metadata(special=[("a 中", 1)]))
    assert tokenizer.piece(256) == "a[UNK_BYTE_0x20a 中][UNK_BYTE_0xe4b8ada 中]".encode()


def test_spaces_are_cleaned_up(tmp_path: Path) -> None:
    text = "I 'm here , isn 't it ? ' so ' we 've . \" . . '"
    cleaned = "I'm here, isn 't it?'so'we've. \".. '"
    assert load(tmp_path / "a.gguf", bpe_metadata()).decode([LETTERS.index(c) for c in letters(text)]) == cleaned
    tokenizer = load(tmp_path / "b.gguf", bpe_metadata(pre="qwen2"))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_known_ids_of_llama_3() -> None:
    path = shared("models/ggml-vocab-llama-bpe.gguf")
    tokenizer = load(path)
    texts = path.with_name(path.name + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = path.with_name(path.name + ".out").read_text().splitlines()
    assert len(expected) > 40 and tokenizer.bos_id == 128000
    for text, line in zip(texts, expected, strict=False):
        assert tokenizer.encode(text, add_special=False, parse_special=False) == list(map(int, line.split())), text
