from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamakit.errors import UnsupportedError, UsageError
from llamakit.tokenizer import Tokenizer, TokenStream, base
from llamakit.tokenizer.base import _take_out, clean_spaces
from llamakit.tokenizer.pre import PRE_NAMES
from llamakit.tokenizer.vocabulary import Attr
from tests.tokenizer.vocabularies import bpe_metadata, letters, load, random_merges, random_text, spm_metadata


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


@pytest.mark.parametrize("kind", ["spm", "bpe"])
def test_where_each_token_ends(kind: str, tmp_path: Path) -> None:
    """The bytes up to there are those that the tokens so far stand for."""
    special = [("<|x|>", 3), ("<|user|>", 4)]
    pieces = [("\u2581", -1.0), ("a", -2.0), ("\u2581a", -1.5), ("aa", -1.2), ("\u2581\u2581", -3.0)]
    metadata = spm_metadata(pieces, special) if kind == "spm" else bpe_metadata(random_merges(300), special)
    tokenizer = load(tmp_path / "v.gguf", metadata)
    rng = random.Random(kind)
    for text in ("", "a", "<|x|>", "<|x|> a<|x|>", "\u2581a \u2581", *(random_text(rng) for _ in range(300))):
        ids, ends = tokenizer.encode_with_ends(text)
        data = text.encode()
        assert ids == tokenizer.encode(text) and len(ends) == len(ids) and ends == sorted(ends)
        assert not ends or ends[-1] == len(data)
        for id, begin, end in zip(ids, [0, *ends], ends, strict=False):
            written = data[begin:end].replace(b"\xe2\x96\x81", b" ") if kind == "spm" else data[begin:end]
            piece = tokenizer.piece(id, special=True)
            if id != tokenizer.bos_id:
                assert piece in (written, b" " + written), (text, piece, written)


def test_a_token_that_takes_spaces_away_has_them(tmp_path: Path) -> None:
    tokenizer = load(tmp_path / "v.gguf", bpe_metadata(special=[("<|end|>", 3)]))
    tokenizer.vocabulary.attrs[256] |= Attr.LSTRIP | Attr.RSTRIP
    ids, ends = tokenizer.encode_with_ends("a  <|end|> b", add_special=False)
    assert (ids, ends) == ([97, 256, 98], [1, 10, 12])


def test_what_a_vocabulary_cannot_say_cannot_be_traced(tmp_path: Path) -> None:
    tokenizer = load(tmp_path / "v.gguf", spm_metadata([("a", -1.0)], with_bytes=False))
    assert tokenizer.encode_with_ends("<s>", add_special=False) == ([1], [3])
    with pytest.raises(UnsupportedError, match="cannot be traced"):
        tokenizer.encode_with_ends("b")


_CUT_TEXTS = st.text(
    st.sampled_from("aAbZ'sS019 . ,!?-#\"“。不é\u00a0\t\r\n\n\n\n  {}/$+^_😀٣ก้"), min_size=3, max_size=40
)


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Tokenizer]:
    """The tokenizer of a name of BPE's expressions, or of SPM; its merges join whatever stands beside a line break."""
    folder = tmp_path_factory.mktemp("cut")

    @cache
    def make(name: str | None) -> Tokenizer:
        if name is None:
            pieces = [("\n\n", -1.0), ("\na", -2.0), (".\n", -3.0), ("\u2581a", -4.0)]
            return load(folder / "spm.gguf", spm_metadata([*pieces, *((c, -9.0) for c in "a\nA.")]))
        pairs = [(a, b) for a in "aAs1 .!?-#\t\r\n{/$_" for b in "aAs1 .!?-#\t\r\n{/$_" if "\n" in a + b]
        return load(folder / f"{name}.gguf", bpe_metadata([f"{letters(a)} {letters(b)}" for a, b in pairs], pre=name))

    return make


@settings(max_examples=300, deadline=None)
@given(text=_CUT_TEXTS, name=st.sampled_from([None, *PRE_NAMES]))
def test_where_a_text_may_be_cut_no_token_changes(
    named: Callable[[str | None], Tokenizer], text: str, name: str | None
) -> None:
    tokenizer = named(name)
    for at in range(1, len(text)):
        if "\n" in text[at - 1 : at + 1] and tokenizer.may_cut(text, at):
            before = tokenizer.encode(text[:at], add_special=False)
            after = tokenizer.encode(text[at:], add_special=False, continued=True)
            assert before + after == tokenizer.encode(text, add_special=False), (name, at)


def test_common_texts_may_be_cut_somewhere(named: Callable[[str | None], Tokenizer]) -> None:
    for name in (None, *PRE_NAMES):
        for text in ("One line.\nAnother one.\n", "A paragraph.\n\nBut"):
            found = [
                at for at in range(1, len(text)) if "\n" in text[at - 1 : at + 1] and named(name).may_cut(text, at)
            ]
            assert bool(found) == (name != "superbpe"), (name, text)


def test_what_is_remembered_of_words_is_bounded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server reads new words for as long as it runs."""
    text = " ".join(f"a{number}" for number in range(300))
    expected = tokenizer.encode(text)
    monkeypatch.setattr(base, "_CACHED_PARTS", 8)
    tokenizer._cache.clear()
    assert tokenizer.encode(text) == expected
    assert 0 < len(tokenizer._cache) <= 8
