from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamakit.errors import FormatError, UnsupportedError, UsageError
from llamakit.formats.huggingface_vocab import read_vocabulary
from llamakit.formats.pre_tokenizers import structure_of
from llamakit.formats.sentencepiece_model import Piece, SentencePieceModel, write_sentencepiece_model
from tests.formats.vocabulary_folders import fingerprint, make_folder, pieces, write_json
from tests.tokenizer.vocabularies import LETTERS

#: what convert_hf_to_gguf.py (llama.cpp 0c1e5709, transformers 5.23) writes for these folders
CONVERTED = {
    (0, ""): "a09bf8faee26", (1, ""): "34b7b2593cfa", (2, ""): "bd3c1cfd5eed", (3, ""): "5bead545f5e4",
    (4, ""): "0aef406a46e7", (5, ""): "595e60dfbc76", (6, ""): "b5d5eb1c0eb8", (7, ""): "c6724e284ade",
    (8, ""): "cce6e8eeb3b7", (9, ""): "61c1cbc3cb57", (10, ""): "50b930b06411", (11, ""): "923133254df3",
    (12, ""): "6ee10c65eee9", (13, ""): "98888657d943", (14, ""): "c42aa1d12e91", (15, ""): "74184e97647f",
    (16, ""): "559b986f8734", (17, ""): "a5cb4bb18138", (18, ""): "a8203cb12257", (19, ""): "88591063ba59",
    (20, ""): "78053afd6f0c", (21, ""): "626f589c93a3", (22, ""): "8d48ea71951f", (23, ""): "ea56761ec1e9",
    (100, "code-llama"): "bcd989a7e00a", (101, "code-llama"): "424d7556a7af", (102, "code-llama"): "55379d2d4cb1",
    (103, "code-llama"): "edbe7a54fe0e", (100, "granite"): "18417c0be2eb", (101, "granite"): "c3728ba75f8e",
    (102, "granite"): "566b44d11841", (100, "wide"): "b20a837cb3aa", (101, "wide"): "155c5b357654",
    (102, "wide"): "83a63c7d9472", (103, "wide"): "2b6d3b2253fd", (104, "wide"): "f889fe7effd7",
    (105, "wide"): "03ce49160329", (100, "narrow"): "acea4f5a4190", (101, "narrow"): "17decf878e3a",
    (102, "narrow"): "4bd910bab8aa", (103, "narrow"): "dc12df653a38", (104, "narrow"): "f534c784884c",
    (105, "narrow"): "5cd0bc39c66b",
}  # fmt: skip


@pytest.mark.parametrize(("number", "extra"), CONVERTED)
def test_the_keys_of_convert_hf_to_gguf(tmp_path: Path, number: int, extra: str) -> None:
    make_folder(number, tmp_path / "model", extra)
    assert fingerprint(read_vocabulary(tmp_path / "model")) == CONVERTED[number, extra]


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def bpe(**changes: Any) -> dict[str, Any]:
    """A byte-level tokenizer.json; names with __ reach into the model."""
    vocab = {token: i for i, token in enumerate([*LETTERS, "ab", "abc"])}
    model = {"type": "BPE", "byte_fallback": False, "ignore_merges": True, "vocab": vocab, "merges": ["a b", "ab c"]}
    found = {
        "added_tokens": [{"id": 258, "content": "<|eot|>", "special": True, "normalized": False}],
        "normalizer": None, "pre_tokenizer": structure_of("llama-bpe"), "decoder": BYTE_LEVEL, "model": model,
    }  # fmt: skip
    for key, value in changes.items():
        (model if key.startswith("model__") else found)[key.removeprefix("model__")] = value
    return found


def spm_like(**changes: Any) -> dict[str, Any]:
    """SentencePiece's BPE as transformers converts it."""
    prepend, replace = (
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    )
    vocab = {piece.text: i for i, piece in enumerate(pieces())}
    merges = ["\u2581 a", "a b", "\u2581 ab", "\u2581a b", "b c", "ab c", "a bc"]
    found = bpe(model__vocab=vocab, model__merges=merges, model__byte_fallback=True, model__ignore_merges=False)
    found |= {"normalizer": {"type": "Sequence", "normalizers": [prepend, replace]}, "pre_tokenizer": None}
    found |= {"decoder": {"type": "Sequence", "decoders": []}}
    found["added_tokens"] = [{"id": i, "content": t, "special": True} for i, t in enumerate(("<unk>", "<s>", "</s>"))]
    found["added_tokens"].append({"id": len(vocab), "content": "[INST]", "special": False})
    return found | changes


def folder(tmp_path: Path, tokenizer: Any = None, tokenizer_config: Any = None, **files: Any) -> Path:
    if tokenizer is not None:
        write_json(tmp_path / "tokenizer.json", tokenizer)
    if tokenizer_config is not None:
        write_json(tmp_path / "tokenizer_config.json", tokenizer_config)
    for name, value in files.items():
        write_json(tmp_path / f"{name}.json", value)
    return tmp_path


def test_byte_level_bpe_in_full(tmp_path: Path) -> None:
    found = read_vocabulary(folder(tmp_path, bpe(), {"eos_token": "<|eot|>", "add_bos_token": False}), 260)
    assert found["tokenizer.ggml.tokens"][255:] == [LETTERS[255], "ab", "abc", "<|eot|>", "[PAD259]"]
    assert found["tokenizer.ggml.token_type"].tolist()[256:] == [1, 1, 3, 5]
    assert found["tokenizer.ggml.token_type"].dtype == np.int32
    rest = {k: v for k, v in found.items() if k.rpartition(".")[2] not in ("tokens", "token_type")}
    assert list(rest.items()) == [
        ("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "llama-bpe"),
        ("tokenizer.ggml.merges", ["a b", "ab c"]), ("tokenizer.ggml.eos_token_id", 258),
        ("tokenizer.ggml.add_bos_token", False),
    ]  # fmt: skip


def test_sentencepiece_in_a_tokenizer_json(tmp_path: Path) -> None:
    found = read_vocabulary(folder(tmp_path, spm_like(), {"bos_token": "<s>", "eos_token": {"content": "</s>"}}), 272)
    tokens, scores = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"]
    assert tokens[259:] == [p.text for p in pieces()[259:]] + ["[INST]", "[PAD271]"]
    score = dict(zip(tokens, scores.tolist(), strict=True))
    # in the order in which the merges make them; what no merge makes comes last
    assert [score[t] for t in ("\u2581a", "ab", "\u2581ab", "bc", "abc", "a")] == [0.0, -1.0, -2.0, -4.0, -5.0, -7.0]
    assert found["tokenizer.ggml.token_type"].tolist()[:4] == [3, 3, 3, 6]
    assert found["tokenizer.ggml.token_type"].tolist()[-2:] == [4, 5]
    assert found["tokenizer.ggml.bos_token_id"] == 1 and found["tokenizer.ggml.eos_token_id"] == 2
    assert "tokenizer.ggml.add_space_prefix" not in found


METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "prefix"),
    [
        (None, METASPACE, None),
        (None, METASPACE | {"prepend_scheme": "never"}, False),
        ({"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}, None, False),
    ],
)
def test_the_space_before_a_text(tmp_path: Path, normalizer: Any, pre_tokenizer: Any, prefix: bool | None) -> None:
    found = read_vocabulary(folder(tmp_path, spm_like(normalizer=normalizer, pre_tokenizer=pre_tokenizer)))
    assert found.get("tokenizer.ggml.add_space_prefix") is prefix


def test_a_model_without_a_dummy_prefix(tmp_path: Path) -> None:
    write_sentencepiece_model(tmp_path / "tokenizer.model", SentencePieceModel(pieces(), add_dummy_prefix=False))
    assert read_vocabulary(tmp_path)["tokenizer.ggml.add_space_prefix"] is False
    write_json(tmp_path / "tokenizer_config.json", {"add_prefix_space": True})
    assert next(iter(read_vocabulary(tmp_path).items())) == ("tokenizer.ggml.add_space_prefix", True)


def test_tokenizer_model_goes_first_and_added_tokens_replace_pieces(tmp_path: Path) -> None:
    folder(tmp_path, bpe(), {"added_tokens_decoder": {"2": {"content": "<|im_end|>"}, "900": {"content": "far"}}})
    write_sentencepiece_model(tmp_path / "tokenizer.model", SentencePieceModel([*pieces(), Piece("[U]", 0.0, 4)]))
    write_json(tmp_path / "added_tokens.json", {"<new>": 271, "<far>": 5000})
    found = read_vocabulary(tmp_path, 273)
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.tokens"][2] == "<|im_end|>" and found["tokenizer.ggml.tokens"][270:] == [
        "[U]",
        "<new>",
        "[PAD272]",
    ]
    assert found["tokenizer.ggml.token_type"].tolist()[270:] == [1, 4, 5]
    assert found["tokenizer.ggml.scores"].tolist()[270:] == [0.0, -1000.0, -10000.0]


@pytest.mark.parametrize(
    ("changes", "config", "name"),
    [
        ({}, {}, "llama-bpe"),
        ({"model__ignore_merges": False}, {}, "smaug-bpe"),
        ({"pre_tokenizer": structure_of("qwen2"), "normalizer": {"type": "NFC"}}, {}, "qwen2"),
        ({"pre_tokenizer": structure_of("tekken"), "model__ignore_merges": False}, {}, "tekken"),
        ({"pre_tokenizer": structure_of("smollm"), "model__ignore_merges": False}, {}, "smollm"),
        ({"pre_tokenizer": structure_of("smollm")}, {"clean_up_tokenization_spaces": True}, "starcoder"),
        ({"pre_tokenizer": structure_of("smollm"), "normalizer": {"type": "NFC"}}, {}, "command-r"),
        ({"pre_tokenizer": structure_of("gpt-2")}, {"gguf": {"pre": "olmo"}}, "olmo"),
        ({"pre_tokenizer": structure_of("gpt-2")}, {"gguf": {"pre": "llama-bpe"}}, "gpt-2"),
    ],
)
def test_how_words_are_cut(tmp_path: Path, changes: Any, config: Any, name: str) -> None:
    assert read_vocabulary(folder(tmp_path, bpe(**changes), config))["tokenizer.ggml.pre"] == name


WHITESPACE = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}]}
UNREACHED = {token: i for i, token in enumerate([*LETTERS, "ab", "abc", "xyz"])}
STRAY = [{"id": 300, "content": "x"}]


@pytest.mark.parametrize(
    ("tokenizer", "reason", "error"),
    [
        (bpe(pre_tokenizer=WHITESPACE), "pre_tokenizer has 0 ByteLevel steps", UnsupportedError),
        (bpe(pre_tokenizer=None), "pre_tokenizer is missing", UnsupportedError),
        (bpe(pre_tokenizer=structure_of("qwen2"), model__vocab=UNREACHED, added_tokens=None), "model.ignore_merges is true, which qwen2", UnsupportedError),
        (bpe(normalizer={"type": "Lowercase"}), "normalizer is ['Lowercase']", UnsupportedError),
        (bpe(model__type="Unigram"), "model.type is 'Unigram'", UnsupportedError),
        (bpe(model__dropout=0.1), "model.dropout is 0.1", UnsupportedError),
        (bpe(model__end_of_word_suffix="</w>"), "model.end_of_word_suffix is '</w>'", UnsupportedError),
        (bpe(model=5), "model is missing or no object", FormatError),
        (bpe(model__vocab=["a"]), "model.vocab is missing, empty or no object", FormatError),
        (bpe(model__vocab={"a": 0, "b": 0}), "model.vocab has the id 0 twice, for 'a' and 'b'", FormatError),
        (bpe(model__vocab={"a": -1}), "model.vocab['a'] is -1", FormatError),
        (bpe(model__vocab={"a": True}), "model.vocab['a'] is True", FormatError),
        (bpe(model__vocab={"a": 10**30}), "(expected an id from 0 to 4194303)", FormatError),
        (bpe(model__merges=[]), "model.merges is missing, empty", FormatError),
        (bpe(model__merges=["a b", ["ab", "c"]]), "model.merges[1] is ['ab', 'c'] (expected two tokens)", FormatError),
        (bpe(model__merges=["a b c"]), "model.merges[0] is 'a b c'", FormatError),
        (bpe(model__merges=[["a", ""]]), "model.merges[0] is ['a', '']", FormatError),
        (bpe(model__merges=["b a"]), "model.merges[0] needs the token 'ba', which is missing", FormatError),
        (bpe(added_tokens={}), "added_tokens is no list", FormatError),
        (bpe(added_tokens=[5]), "added_tokens[0] is no object", FormatError),
        (bpe(added_tokens=[{"id": "1"}]), "added_tokens[0].id is 1", FormatError),
        (bpe(added_tokens=[{"id": 258, "content": ""}]), "added_tokens[0].content is no text", FormatError),
        (bpe(added_tokens=[{"id": 0, "content": "x"}]), "added_tokens[0] is 'x' with the id 0, which is another", FormatError),
        (bpe(added_tokens=[*STRAY, {"id": 301, "content": "x"}]), "added_tokens[0] is 'x' with the id 300, and not in", FormatError),
        (bpe(added_tokens=[{"id": 258, "content": "y", "special": 1}]), "neither true nor false", FormatError),
        (spm_like(pre_tokenizer=METASPACE), "are not SentencePiece's", UnsupportedError),
        (spm_like(normalizer=None, pre_tokenizer=METASPACE | {"split": True}), "pre_tokenizer is", UnsupportedError),
        ("[]", "no object", FormatError),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, tokenizer: Any, reason: str, error: type[Exception]) -> None:
    with pytest.raises(error) as raised:
        read_vocabulary(folder(tmp_path, tokenizer))
    assert reason in str(raised.value) and str(raised.value).startswith(str(tmp_path / "tokenizer.json"))


def test_pre_overrides(tmp_path: Path) -> None:
    found = read_vocabulary(folder(tmp_path, bpe(pre_tokenizer=WHITESPACE)), pre="qwen2")
    assert found["tokenizer.ggml.pre"] == "qwen2"


@pytest.mark.parametrize(
    ("config", "files", "reason"),
    [
        ({"add_prefix_space": "yes"}, {}, "add_prefix_space is neither"),
        ({"added_tokens_decoder": []}, {}, "added_tokens_decoder is no object"),
        ({"added_tokens_decoder": {"x": {}}}, {}, "added_tokens_decoder['x'] is no token"),
        ({"added_tokens_decoder": {"1": {"content": "zz"}}}, {}, "is 'zz', which is not that token"),
        ({"gguf": {"token_ids": {"eot": 999}}}, {}, "token_ids has ('eot', 999)"),
        ({"chat_template": [{"name": 5}]}, {}, "chat_template[0] is no template with a name"),
        ({}, {"config": {"vocab_size": "many"}}, "vocab_size is many"),
        ({}, {"config": {"vocab_size": 10**12}}, "vocab_size is 1000000000000"),
        ({}, {"config": {"vocab_size": 200}}, "has the id 258, but the model only has 200 tokens"),
        ({}, {"config": {"bos_token_id": -1}}, "the bos token has the id -1"),
    ],
)
def test_what_cannot_be_said(tmp_path: Path, config: Any, files: Any, reason: str) -> None:
    with pytest.raises(FormatError) as raised:
        read_vocabulary(folder(tmp_path, bpe(), config, **files))
    assert reason in str(raised.value) and str(raised.value).startswith(str(tmp_path))


def test_templates_in_files(tmp_path: Path) -> None:
    folder(tmp_path, bpe(), {})
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert read_vocabulary(tmp_path)["tokenizer.chat_template"] == "{{ messages }}"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("t")
    found = read_vocabulary(tmp_path)
    assert list(found.items())[-3:] == [
        ("tokenizer.chat_template.tool_use", "t"), ("tokenizer.chat_templates", ["tool_use"]),
        ("tokenizer.chat_template", "{{ messages }}"),
    ]  # fmt: skip
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": "c"})
    assert read_vocabulary(tmp_path)["tokenizer.chat_template"] == "c"


def test_spellings_that_clash_and_files_that_are_none(tmp_path: Path) -> None:
    write_sentencepiece_model(tmp_path / "tokenizer.model", SentencePieceModel(pieces()))
    write_json(tmp_path / "added_tokens.json", {"ab": 270})
    with pytest.raises(FormatError, match="the token 'ab' is there twice, as 266 and 270"):
        read_vocabulary(tmp_path, 271)
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(bpe())[:-1])
    with pytest.raises(FormatError, match="is no sound JSON"):
        read_vocabulary(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").symlink_to("/etc/passwd")
    with pytest.raises(FormatError, match="is a link that leaves the folder"):
        read_vocabulary(tmp_path)
    with pytest.raises(UsageError, match=r"no tokenizer\.model and no tokenizer\.json"):
        read_vocabulary(tmp_path / "nonesuch")
