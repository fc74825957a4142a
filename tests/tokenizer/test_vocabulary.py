from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamakit.errors import FormatError, UnsupportedError
from llamakit.formats.gguf import GGUFValueType, Typed
from llamakit.tokenizer.vocabulary import Attr
from tests.tokenizer.vocabularies import BYTE, CONTROL, USER, bpe_metadata, load, spm_metadata


def refused(tmp_path: Path, metadata: dict[str, Any], key: str, reason: str) -> None:
    with pytest.raises(FormatError) as error:
        load(tmp_path / "bad.gguf", metadata)
    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'bad.gguf'}: {key} ") and reason in text and "\n" not in text


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("tokenizer.ggml.tokens", None, "is missing"),
        ("tokenizer.ggml.tokens", Typed([], GGUFValueType.ARRAY, GGUFValueType.STRING), "is empty"),
        ("tokenizer.ggml.tokens", "abc", "is no array of strings (str)"),
        ("tokenizer.ggml.tokens", np.zeros(3, np.float32), "is no array of strings (array of float32)"),
        ("tokenizer.ggml.tokens", ["a", "b", "\x1b[1m", "\x1b[1m"], "has '\\x1b[1m' twice, as 2 and 3"),
        ("tokenizer.ggml.token_type", np.zeros(3, np.int32), "has 3 values for"),
        ("tokenizer.ggml.token_type", np.zeros(900, np.float32), "is no array of numbers (array of float32)"),
        ("tokenizer.ggml.token_type", 1, "is no array of numbers (int)"),
        ("tokenizer.ggml.scores", ["a"], "is no array of numbers"),
        ("tokenizer.ggml.scores", np.zeros(2, np.float32), "has 2 values for"),
        ("tokenizer.ggml.bos_token_id", "1", "is no token id (str)"),
        ("tokenizer.ggml.bos_token_id", True, "is no token id (bool)"),
        ("tokenizer.ggml.eos_token_id", 1.5, "is no token id (float)"),
        ("tokenizer.ggml.add_bos_token", 1, "is neither true nor false (int)"),
        ("tokenizer.ggml.add_space_prefix", "yes", "is neither true nor false (str)"),
        ("tokenizer.chat_template", ["a"], "is no string"),
    ],
)
def test_broken_values_are_refused_by_key(tmp_path: Path, key: str, value: Any, reason: str) -> None:
    for metadata in (spm_metadata(), bpe_metadata()):
        refused(tmp_path, metadata | {key: value}, key, reason)


def test_byte_tokens_are_spelled_in_hexadecimal(tmp_path: Path) -> None:
    for token in ("<unk>", "<0xG0>", "<0x0>"):
        metadata = bpe_metadata(special=[(token, BYTE)])
        reason = f"has {token!r} as byte token {len(metadata['tokenizer.ggml.tokens']) - 1} (expected <0xNN>)"
        refused(tmp_path, metadata, "tokenizer.ggml.tokens", reason)


def test_what_one_kind_alone_needs(tmp_path: Path) -> None:
    refused(tmp_path, bpe_metadata() | {"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges", "is missing")
    refused(tmp_path, bpe_metadata() | {"tokenizer.ggml.merges": "a b"}, "tokenizer.ggml.merges", "no array of strings")
    refused(tmp_path, bpe_metadata() | {"tokenizer.ggml.pre": 3}, "tokenizer.ggml.pre", "is no string (int)")
    scores = np.zeros(259, np.float32)
    scores[7] = np.nan
    refused(tmp_path, spm_metadata() | {"tokenizer.ggml.scores": scores}, "tokenizer.ggml.scores", "no number at 7")
    refused(
        tmp_path, bpe_metadata(pre="glm4", tokenizer__ggml__add_bos_token=True), "tokenizer.ggml.add_bos_token", "no"
    )


def test_other_kinds_of_tokenizers_are_named(tmp_path: Path) -> None:
    refused(tmp_path, spm_metadata() | {"tokenizer.ggml.model": None}, "tokenizer.ggml.model", "is missing")
    with pytest.raises(UnsupportedError, match=r"tokenizer\.ggml\.model is 'bert'"):
        load(tmp_path / "a.gguf", spm_metadata() | {"tokenizer.ggml.model": "bert"})


def test_ids_out_of_range(tmp_path: Path) -> None:
    keys = {"tokenizer.ggml.bos_token_id": 0xFFFFFFFF, "tokenizer.ggml.eos_token_id": 259}
    tokenizer = load(tmp_path / "a.gguf", spm_metadata() | keys)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)  # the defaults of SPM
    assert tokenizer.warnings == [
        "tokenizer.ggml.eos_token_id is 259, outside the vocabulary of 259 tokens; it is ignored"
    ]


def test_empty_tokens_get_a_name(tmp_path: Path) -> None:
    tokenizer = load(tmp_path / "a.gguf", spm_metadata([("", 0)]))
    assert tokenizer.vocabulary.tokens[259] == "[EMPTY_259]" and "token 259 is empty" in tokenizer.warnings[0]


def test_scores_and_types_may_be_longer_or_whole_numbers(tmp_path: Path) -> None:
    metadata = spm_metadata([("\u2581", 0), ("a", 0), ("aa", 3)])
    n = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.scores"] = np.arange(n + 5, dtype=np.int32)
    metadata["tokenizer.ggml.token_type"] = np.append(metadata["tokenizer.ggml.token_type"], [99, 99]).astype(np.int32)
    tokenizer = load(tmp_path / "a.gguf", metadata)
    assert tokenizer.encode("aa", add_special=False) == [259, 261]


def test_a_vocabulary_without_scores_and_types(tmp_path: Path) -> None:
    metadata = spm_metadata([("\u2581", 0), ("ab", 9), ("bc", 99)])
    metadata |= {"tokenizer.ggml.scores": None, "tokenizer.ggml.token_type": None}
    tokenizer = load(tmp_path / "a.gguf", metadata)
    assert tokenizer.encode("abc", add_special=False)[1] == 260  # no scores: from the left


def test_tokens_that_end_a_generation(tmp_path: Path) -> None:
    special = [
        ("<|im_end|>", CONTROL),
        ("<|endoftext|>", 1),
        ("<|file_sep|>", CONTROL),
        ("<|fim_pad|>", 1),
        ("stop", 1),
    ]
    tokenizer = load(tmp_path / "a.gguf", spm_metadata(special=special, tokenizer__ggml__eot_token_id=263))
    assert tokenizer.eog_ids == {2, 259, 260, 261, 262, 263}
    assert tokenizer.vocabulary.attrs[260] & Attr.CONTROL and not tokenizer.vocabulary.attrs[263] & Attr.CONTROL
    assert tokenizer.piece(262) == b""


def test_the_end_of_a_message_is_not_the_end(tmp_path: Path) -> None:
    special = [(t, CONTROL) for t in ("<|return|>", "<|call|>", "<|end|>", "<|channel|>")]
    tokenizer = load(tmp_path / "a.gguf", bpe_metadata(special=special, pre="gpt-4o"))
    ids = tokenizer.vocabulary.ids
    assert ids["<|end|>"] not in tokenizer.eog_ids and ids["<|return|>"] in tokenizer.eog_ids
    assert tokenizer.piece(ids["<|end|>"]) == b"<|end|>" and tokenizer.piece(ids["<|channel|>"]) == b"<|channel|>"


def test_phi_3_swallows_spaces_after_special_tokens(tmp_path: Path) -> None:
    metadata = spm_metadata([("\u2581", 0)], [("<|user|>", CONTROL), ("<|endoftext|>", CONTROL)], general__name="Phi-3")
    tokenizer = load(tmp_path / "a.gguf", metadata)
    assert tokenizer.encode("<|user|> \n <|endoftext|> \n", add_special=False) == [260, 261, 259, 259, 13]


def test_the_longest_special_token_wins(tmp_path: Path) -> None:
    tokenizer = load(tmp_path / "a.gguf", bpe_metadata(special=[("<a>", USER), ("b<a>", USER), ("<a>c<a>", USER)]))
    assert tokenizer.encode("b<a>c<a>") == [ord("b"), 258]
    assert tokenizer.encode("b<a>") == [257]


def test_the_template_is_kept(tmp_path: Path) -> None:
    tokenizer = load(tmp_path / "a.gguf", spm_metadata(tokenizer__chat_template="{{ x }}"))
    assert tokenizer.chat_template == "{{ x }}"


def test_many_useless_merges(tmp_path: Path) -> None:
    merges = ["", " ", "  ", "x", "a  b", *(f"{i} {i}" for i in range(20000))]
    tokenizer = load(tmp_path / "a.gguf", bpe_metadata() | {"tokenizer.ggml.merges": merges})
    assert len(tokenizer.encode("11 22 33 ab" * 200)) > 1000
