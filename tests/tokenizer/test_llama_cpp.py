"""Our ids, pieces and texts against llama.cpp's own, vocabulary by vocabulary."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from llamakit.tokenizer import Tokenizer
from llamakit.tokenizer.pre import PRE_NAMES, find_pre_tokenizer
from tests.oracle import LlamaVocab, llama_vocab
from tests.tokenizer.vocabularies import (
    CONTROL,
    FRAGMENTS,
    UNUSED,
    USER,
    bpe_metadata,
    load,
    random_merges,
    random_text,
    shared,
    spm_metadata,
    write_vocabulary,
)

pytestmark = pytest.mark.interop

#: one name of each way of cutting
CUTS = list({find_pre_tokenizer(name).expressions: name for name in PRE_NAMES}.values())
SPECIAL = [("<|x|>", CONTROL), (" <|user|> ", USER), ("<|user|>", USER), ("<|unused|>", CONTROL), ("spare", UNUSED)]

#: tokens across words, tokens that special tokens and bytes grow out of, a letter in the middle of nothing
ODD_PIECES = [
    ("\u2581", -3.0), ("a", -4), ("b", -4), ("\u2581a", -5), ("a\u2581", -5), ("a\u2581b", -2), ("aa", -5), ("é", -1),
    ("<", -9), ("s", -9), (">", -9), ("<s", -8), ("0", -9), ("x", -9), ("<0", -7), ("<0x", -7), ("1", -9), ("12", -5),
    ("23", -5), ("\n", -9), ("\n\n", -1), ("\u2581\u2581", -1), ("\u2581\u2581\u2581\u2581", 0), ("中", -2), ("中文", -3),
    (" ", -3), ("it", -4), ("t'", -4), ("'s", -4), ("don", -4), ("do", -6), ("on", -6), (".", float("-inf")), ("..", 1),
]  # fmt: skip


def both(path: Path, metadata: dict[str, Any]) -> tuple[Tokenizer, LlamaVocab]:
    write_vocabulary(path, metadata)
    return load(path), llama_vocab(path)


def assert_same(ours: Tokenizer, theirs: LlamaVocab, text: str) -> None:
    for add_special, parse_special in ((True, True), (False, False)):
        ids = ours.encode(text, add_special=add_special, parse_special=parse_special)
        assert ids == theirs.tokenize(text, add_special, parse_special), ascii(text)
    for special in (True, False):
        assert ours.decode(ids, special=special) == theirs.detokenize(ids, special).decode("utf-8", "replace")


def assert_same_vocabulary(ours: Tokenizer, theirs: LlamaVocab) -> None:
    assert ours.n_vocab == theirs.n_vocab
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_id, theirs.eos_id)
    assert (ours.add_bos, ours.add_eos) == (theirs.add_bos, theirs.add_eos)
    for id in range(ours.n_vocab):
        assert ours.vocabulary.attrs[id] == theirs.attr(id), ours.vocabulary.tokens[id]
        assert (id in ours.eog_ids) == theirs.is_eog(id), ours.vocabulary.tokens[id]
        for special in (True, False):
            assert ours.piece(id, special=special) == theirs.piece(id, special)


def compare(ours: Tokenizer, theirs: LlamaVocab, n: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(n):
        assert_same(ours, theirs, random_text(rng))


@pytest.mark.parametrize("pre", PRE_NAMES)
def test_every_pre(tmp_path: Path, pre: str) -> None:
    ours, theirs = both(tmp_path / "a.gguf", bpe_metadata(random_merges(3000), SPECIAL, pre=pre))
    assert (ours.bos_id, ours.eos_id, ours.add_bos) == (theirs.bos_id, theirs.eos_id, theirs.add_bos)
    compare(ours, theirs, 60, seed=1)


@pytest.mark.parametrize("pre", CUTS)
def test_every_fragment(tmp_path: Path, pre: str) -> None:
    ours, theirs = both(tmp_path / "a.gguf", bpe_metadata(random_merges(20000), SPECIAL, pre=pre))
    for fragment in FRAGMENTS:
        for text in (fragment, f" {fragment}", f"a{fragment}a", f"1{fragment}1", f"{fragment}\n{fragment} {fragment}!"):
            assert_same(ours, theirs, text)


def test_spm(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path / "a.gguf", spm_metadata(ODD_PIECES, SPECIAL))
    assert_same_vocabulary(ours, theirs)
    compare(ours, theirs, 300, seed=2)
    rng = random.Random(3)
    for _ in range(300):
        assert_same(ours, theirs, "".join(rng.choices("aab  b\n1230<sx>.中文é", k=rng.randint(1, 60))))
    assert_same(ours, theirs, "".join(rng.choices("aab  b\n123.", k=20000)))


@pytest.mark.parametrize(
    "keys",
    [
        {"add_space_prefix": False},
        {"add_bos_token": False, "add_eos_token": True},
        {"bos_token_id": 5, "eos_token_id": 0xFFFFFFFF, "unknown_token_id": 7},
        {"bos_token_id": 999999, "eot_token_id": 10, "eom_token_id": 11, "fim_pad_token_id": 12},
    ],
)
def test_keys(tmp_path: Path, keys: dict[str, Any]) -> None:
    keys = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    for name, metadata in (("spm", spm_metadata(ODD_PIECES, SPECIAL)), ("bpe", bpe_metadata(["a b"], SPECIAL))):
        ours, theirs = both(tmp_path / f"{name}.gguf", metadata | keys)
        assert_same_vocabulary(ours, theirs)
        compare(ours, theirs, 30, seed=4)


@pytest.mark.parametrize(
    "tokens",
    [
        [
            "<|eot_id|>",
            "<|eom_id|>",
            "<|endoftext|>",
            "<EOT>",
            "_<EOT>",
            "[EOT]",
            "[EOS]",
            "<eos>",
            "<end_of_utterance>",
        ],
        ["<|fim_prefix|>", "<fim_suffix>", "<MID>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|unused_1|>"],
        ["<|return|>", "<|call|>", "<|end|>", "<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"],
        ["<|flush|>", "<|calls|>", "<|end|>"],
        ["<|end|>", "<|call|>", "<turn|>", "[e~[", "<｜end▁of▁sentence｜>", "<｜fim▁begin｜>", "▁<SUF>"],
        ["<|tool_response>", "<end_of_turn>", "<|im_end|>", "<|end_of_text|>"],
    ],
)
@pytest.mark.parametrize("type", [1, CONTROL, USER])
def test_tokens_known_by_their_spelling(tmp_path: Path, tokens: list[str], type: int) -> None:
    special = [(token, type) for token in tokens]
    assert_same_vocabulary(*both(tmp_path / "spm.gguf", spm_metadata(special=special)))
    assert_same_vocabulary(*both(tmp_path / "bpe.gguf", bpe_metadata(special=special)))


@pytest.mark.parametrize(
    ("names", "pre"),
    [({"general.name": "Phi-3 mini"}, "gpt-2"), ({"general.name": "modern-bert"}, "gpt-2"), ({}, "jina-v2-de")],
)
def test_tokens_that_swallow_spaces(tmp_path: Path, names: dict[str, str], pre: str) -> None:
    special = [(t, CONTROL) for t in ("<|x|>", "<mask>", "[MASK]", "<s>", "</s>", "<unk>", "<|endoftext|>")]
    ours, theirs = both(tmp_path / "a.gguf", bpe_metadata(special=special, pre=pre) | names)
    assert_same_vocabulary(ours, theirs)
    rng = random.Random(6)
    for _ in range(100):
        assert_same(ours, theirs, "".join(rng.choices([t for t, _ in special] + list(" \n\ta\xa0") * 2, k=12)))


def test_the_real_vocabularies() -> None:
    for name in ("spm", "bpe"):
        path = shared(f"models/ggml-vocab-llama-{name}.gguf")
        compare(load(path), llama_vocab(path), 300, seed=7)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("smollm2", marks=pytest.mark.slow),
        pytest.param("models/ggml-vocab-llama-spm.gguf", marks=pytest.mark.prove),
        pytest.param("models/ggml-vocab-llama-bpe.gguf", marks=pytest.mark.prove),
    ],
)
def test_the_whole_of_shakespeare(name: str) -> None:
    from tests.smollm import smollm2_path

    text = shared("data/tinyshakespeare.txt").read_text(encoding="utf-8")
    path = smollm2_path() if name == "smollm2" else shared(name)
    ours, theirs = load(path), llama_vocab(path)
    assert_same(ours, theirs, text)
    assert_same_vocabulary(ours, theirs)


@pytest.mark.prove
@pytest.mark.timeout(1800)
def test_random_texts(tmp_path: Path) -> None:
    """10,000 texts for each of the real vocabularies and for each way of cutting."""
    from tests.smollm import smollm2_path

    models = shared("models")
    for path in (models / "ggml-vocab-llama-spm.gguf", models / "ggml-vocab-llama-bpe.gguf", smollm2_path()):
        compare(load(path), llama_vocab(path), 10_000, seed=8)
    for pre in CUTS:
        compare(*both(tmp_path / "a.gguf", bpe_metadata(random_merges(20000), SPECIAL, pre=pre)), 10_000, seed=9)
    compare(*both(tmp_path / "b.gguf", spm_metadata(ODD_PIECES, SPECIAL)), 10_000, seed=10)


@pytest.mark.prove
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("pre", CUTS)
def test_every_character(tmp_path: Path, pre: str) -> None:
    """Each code point up to the last assigned plane, between letters, digits and spaces, for each way of cutting."""
    ours, theirs = both(tmp_path / "a.gguf", bpe_metadata(random_merges(20000), pre=pre))
    codepoints = [c for c in (*range(1, 0x32400), *range(0xE0000, 0xE0200), 0x10FFFF) if not 0xD800 <= c < 0xE000]
    for i in range(0, len(codepoints), 100):
        text = "".join(f"b{c}A {c}{c}1 !{c}.\n" for c in map(chr, codepoints[i : i + 100]))
        assert ours.encode(text) == theirs.tokenize(text), f"near U+{codepoints[i]:04X}"
