from __future__ import annotations

from pathlib import Path

import pytest

from llamakit.errors import UnsupportedError, UsageError
from llamakit.tokenizer import Tokenizer
from tests.tokenizer.vocabularies import CONTROL, UNUSED, USER, load, shared, spm_metadata

PIECES = [("\u2581", -1), ("a", -2), ("b", -3), ("\u2581a", -4), ("ab", -5), ("\u2581ab", -6), ("é", -7), ("aa", -5)]
SPECIAL = [("<|user|>", CONTROL), ("<mark>", USER), ("<|x", CONTROL), ("spare", UNUSED)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load(tmp_path / "spm.gguf", spm_metadata(PIECES, SPECIAL))


def pieces(tokenizer: Tokenizer, text: str, **options: bool) -> list[str]:
    ids = tokenizer.encode(text, **options)
    return [tokenizer.vocabulary.tokens[i] for i in ids]


def test_facts(tokenizer: Tokenizer) -> None:
    assert (tokenizer.model, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == ("llama", 1, 2, 0)
    assert tokenizer.add_bos and not tokenizer.add_eos and tokenizer.eog_ids == {2}
    assert tokenizer.n_vocab == 259 + len(PIECES) + len(SPECIAL)
    assert tokenizer.chat_template is None and tokenizer.pre is None and not tokenizer.warnings


def test_the_best_score_merges_first(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, "aab", add_special=False) == ["\u2581a", "ab"]  # not (a, a): (space, a) scores higher
    assert pieces(tokenizer, "ab") == ["<s>", "\u2581ab"]


def test_equal_scores_merge_from_the_left(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, "\nab aab", add_special=False)[2:] == ["ab", "\u2581a", "ab"]
    assert pieces(tokenizer, "\naaa", add_special=False)[2:] == ["aa", "a"]


def test_bytes_for_what_is_no_token(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, "é中\0", add_special=False) == [
        "\u2581", "é", "<0xE4>", "<0xB8>", "<0xAD>", "<0x00>",
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer.encode("é中\0", add_special=False)) == "é中\0"


def test_empty_text(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, "") == ["<s>"]
    assert pieces(tokenizer, "", add_special=False) == []
    assert tokenizer.decode([]) == ""


def test_spaces(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, " a", add_special=False) == ["\u2581", "\u2581a"]
    assert pieces(tokenizer, "\u2581a", add_special=False) == ["\u2581", "\u2581a"]  # the mark itself is a space


def test_special_tokens_in_the_text(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, "a<|user|>a</s>") == ["<s>", "\u2581a", "<|user|>", "\u2581a", "</s>"]
    assert pieces(tokenizer, "<|user|>", add_special=False) == ["<|user|>"]
    assert "<|user|>" not in pieces(tokenizer, "a<|user|>", parse_special=False)
    assert pieces(tokenizer, "a<mark>a", add_special=False, parse_special=False) == ["\u2581a", "<mark>", "\u2581a"]
    assert "spare" not in pieces(tokenizer, "spare")


def test_no_space_where_the_file_says_so(tmp_path: Path) -> None:
    metadata = spm_metadata(PIECES, SPECIAL, tokenizer__ggml__add_space_prefix=False)
    tokenizer = load(tmp_path / "spm.gguf", metadata)
    assert pieces(tokenizer, "ab<|user|>a", add_special=False) == ["ab", "<|user|>", "a"]
    assert tokenizer.decode(tokenizer.encode(" a", add_special=False)) == " a"


def test_eos_where_the_file_says_so(tmp_path: Path) -> None:
    keys = {"tokenizer__ggml__add_eos_token": True, "tokenizer__ggml__add_bos_token": False}
    tokenizer = load(tmp_path / "spm.gguf", spm_metadata(PIECES, **keys))
    assert pieces(tokenizer, "a") == ["\u2581a", "</s>"]


def test_decoding_hides_control_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|user|>b", add_special=False)
    assert tokenizer.decode(ids) == "a b" and tokenizer.decode(ids, special=True) == "a<|user|> b"
    spare = tokenizer.vocabulary.ids["spare"]
    assert tokenizer.piece(1) == b"" and tokenizer.piece(1, special=True) == b"<s>"
    assert tokenizer.piece(spare) == b"" and tokenizer.piece(3) == b"\0"
    for id in (-1, tokenizer.n_vocab):
        with pytest.raises(UsageError, match="no token"):
            tokenizer.piece(id)


def test_a_vocabulary_without_bytes(tmp_path: Path) -> None:
    tokenizer = load(tmp_path / "spm.gguf", spm_metadata(PIECES, with_bytes=False))
    assert tokenizer.encode("c", add_special=False)[1:] == [0]
    assert "254 of the 256 bytes" in tokenizer.warnings[0]
    metadata = spm_metadata([("\u2581", 0), ("x", 0)], with_bytes=False)
    metadata["tokenizer.ggml.tokens"] = metadata["tokenizer.ggml.tokens"][3:]
    keys = {"bos_token_id": 0xFFFFFFFF, "add_bos_token": False}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    metadata["tokenizer.ggml.unknown_token_id"] = None
    tokenizer = load(tmp_path / "small.gguf", metadata)
    assert tokenizer.unk_id == 0  # llama.cpp's default, as long as there is a token 0


def test_no_unknown_token(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.unk_id, tokenizer._byte_ids = None, [None] * 256  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedError, match="byte 0x63"):
        tokenizer.encode("c")


def test_a_text_that_is_no_unicode(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b", add_special=False)) == "a\ufffdb"


def test_known_ids_of_llama_2() -> None:
    path = shared("models/ggml-vocab-llama-spm.gguf")
    tokenizer = load(path)
    texts = path.with_name(path.name + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = path.with_name(path.name + ".out").read_text().splitlines()
    assert len(expected) > 40
    for text, line in zip(texts, expected, strict=False):
        assert tokenizer.encode(text, add_special=False, parse_special=False) == list(map(int, line.split())), text
