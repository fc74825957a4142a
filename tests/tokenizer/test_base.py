from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamakit.errors import UsageError
from llamakit.tokenizer import Tokenizer, TokenStream
from llamakit.tokenizer.base import _take_out, clean_spaces
from llamakit.tokenizer.vocabulary import Attr
from tests.tokenizer.vocabularies import bpe_metadata, load


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(tmp_path_factory.mktemp("vocabulary") / "bpe.gguf", bpe_metadata(special=[("<|end|>", 3)], pre="qwen2"))


@settings(max_examples=50)
@given(st.lists(st.integers(0, 256)))
def test_a_stream_says_what_decoding_says(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = tokenizer.stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids)


@settings(max_examples=50)
@given(st.text())
def test_a_stream_never_halves_a_character(tokenizer: Tokenizer, text: str) -> None:
    stream = tokenizer.stream()
    said = [stream.push(i) for i in tokenizer.encode(text, parse_special=False)]
    assert "".join(said) == text and stream.finish() == ""
    for piece in said:
        assert piece == "" or len(piece) == 1


def test_the_end_of_a_stream(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    assert isinstance(stream, TokenStream)
    first, *_ = tokenizer.encode("😀")
    assert stream.push(first) == "" and stream.finish() == "\ufffd"
    a, end = tokenizer.encode("a<|end|>")
    assert stream.push(a) == "a" and stream.push(end) == "" and stream.finish() == ""
    assert stream.push(first) == "" and stream.push(a) == "\ufffda"
    with pytest.raises(UsageError):
        stream.push(10**6)


def test_taking_out_tokens() -> None:
    assert _take_out("a<x>b<x><x>", "<x>", 7, 0) == ["a", 7, "b", 7, 7]
    assert _take_out("none", "<x>", 7, 0) == ["none"]
    assert _take_out("a \n<x> \tb <x>", "<x>", 7, Attr.LSTRIP) == ["a", 7, " \tb", 7]
    assert _take_out("a <x> \tb <x> ", "<x>", 7, Attr.RSTRIP) == ["a ", 7, "b ", 7]
    assert _take_out(" <x>\u00a0<x>", "<x>", 7, Attr.RSTRIP | Attr.LSTRIP) == [7, "\u00a0", 7]


def test_clean_spaces() -> None:
    assert clean_spaces(b" . ") == b". " and clean_spaces(b"a  ?") == b"a ?"
    assert clean_spaces(b"a ' ' b") == b"a'' b" and clean_spaces(b"he 's 'se 'll") == b"he's'se 'll"
