from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest

from llamakit.errors import UnsupportedError
from llamakit.formats.huggingface_vocab import write_vocabulary
from llamakit.formats.pre_tokenizers import IGNORE_MERGES, PRE_NAMES, names_of, structure_of
from llamakit.tokenizer.pre import PRE_NAMES as CUT_NAMES
from tests.tokenizer.vocabularies import CONTROL, FRAGMENTS, bpe_metadata, load, random_merges

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = BYTES | {"use_regex": True}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def split(expression: str, **flags: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False} | flags


def row(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def test_every_name_that_is_cut_has_a_structure() -> None:
    assert PRE_NAMES == CUT_NAMES
    for name in PRE_NAMES:
        assert name in names_of(structure_of(name))


DIGITS = {"type": "Digits", "individual_digits": True}
HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


@pytest.mark.parametrize(
    ("structure", "name"),
    [
        (GPT2, "gpt-2"),
        ({"type": "ByteLevel", "add_prefix_space": False}, "gpt-2"),
        (row(DIGITS, GPT2), "smollm"),
        (row(row(DIGITS), row(row(GPT2))), "smollm"),
        (row(split(r"\p{N}"), split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), BYTES), "smollm"),
        (row(split(LLAMA3), BYTES), "llama-bpe"),
        (row(split(LLAMA3, behavior="Removed", invert=True), BYTES), "llama-bpe"),
        (row(split(LLAMA3.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])")), BYTES), "llama-bpe"),
        (row(split(LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")), BYTES), "qwen2"),
        (row({"type": "Punctuation", "behavior": "Contiguous"}, GPT2, DIGITS), "falcon3"),
        (row({"type": "Punctuation", "behavior": "Contiguous"}, GPT2, DIGITS | {"individual_digits": False}, split("[0-9][0-9][0-9]")), "falcon"),
        (row(split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split(HAN), DIGITS, BYTES), "deepseek-coder"),
        (row(split(r"\p{N}{1,3}"), split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"), split(r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^""" + "\r\n" + r"""\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[""" + "\r\n" + r"""]*|\s*[""" + "\r\n" + r"""]+|\s+(?!\S)|\s+"""), BYTES), "deepseek-v3"),
    ],
)  # fmt: skip
def test_structures_of_real_models(structure: dict[str, Any], name: str) -> None:
    assert names_of(structure)[0] == name


@pytest.mark.parametrize(
    ("structure", "reason"),
    [
        (None, "is missing"),
        ([], "is no object"),
        (row(), "has 0 ByteLevel steps"),
        (row(GPT2, BYTES), "has 2 ByteLevel steps"),
        (GPT2 | {"add_prefix_space": True}, "puts a space before every text"),
        (row({"type": "Whitespace"}, GPT2), "has a step 'Whitespace'"),
        (row({"type": "Punctuation", "behavior": "Isolated"}, GPT2), "has a step 'Punctuation'"),
        (row({"type": "Split", "pattern": {"String": "a"}}, BYTES), "without a regular expression"),
        (row(split("a", behavior="Removed"), BYTES), "drops or joins"),
        (row(split(r"a|\s+", behavior="Removed"), BYTES), "drops or joins"),
        (row(split("a", invert=True), BYTES), "drops or joins"),
        ({"type": "Sequence", "pretokenizers": 5}, "without its pretokenizers"),
    ],
)  # fmt: skip
def test_what_llama_cpp_cannot_do(structure: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        names_of(structure)


def test_unknown_expressions_and_names() -> None:
    assert names_of(row(split(LLAMA3 + "|x"), BYTES)) == ()
    assert names_of(row(split(LLAMA3), DIGITS, BYTES)) == ()
    with pytest.raises(UnsupportedError, match="'nonesuch' has no form"):
        structure_of("nonesuch")
    deep = GPT2
    for _ in range(50):
        deep = row(copy.deepcopy(deep))
    with pytest.raises(ValueError, match="pretokenizers"):
        names_of(deep)


#: families -> the texts in which llama.cpp cuts as the model's own tokenizer.json
EXACT = (
    "gpt-2", "smollm", "starcoder", "command-r", "llama-bpe", "smaug-bpe", "glm4", "qwen2", "qwen35", "ufakzeka",
    "laguna", "minicpm5", "jais-2", "seed-coder", "bailingmoe", "exaone-moe", "deepseek-v3", "spark2_5", "bloom",
    "viking", "default", "chameleon",
)  # fmt: skip
ASCII = ("tekken", "gpt-4o", "llama4", "granite-embed-multi-97m", "deepseek-coder")
LOWER = ("tiny_aya", "youtu", "deepseek-llm", "superbpe")
#: deepseek-llm's digits stay together in llama.cpp, tiny_aya's are grouped before a letter, too
_LOWER = "abcdefghijklmnop      \n\n.,;:!?-'()"
_ODD = {"\u017f", "\u2028", "\u3000", "\U00011f04", "\u20dd", "\u1680", "\x85"}


def _text(rng: random.Random, family: str) -> str:
    if family in LOWER:
        return "".join(
            rng.choices(_LOWER + ("" if family in ("deepseek-llm", "tiny_aya") else "0123456789"), k=rng.randint(1, 40))
        )
    fragments = [f for f in FRAGMENTS if f.isascii() or (family in EXACT and f not in _ODD)]
    return "".join(rng.choice(fragments) for _ in range(rng.randint(1, 14)))


@pytest.mark.interop
@pytest.mark.parametrize("family", [*EXACT, *ASCII, *LOWER])
def test_the_tokenizers_library_gives_the_same_ids(tmp_path: Path, family: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    metadata = bpe_metadata(random_merges(20000), [("<|x|>", CONTROL)], pre=family)
    metadata["tokenizer.ggml.bos_token_id"] = len(metadata["tokenizer.ggml.tokens"]) - 1
    write_vocabulary(tmp_path, metadata)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = load(tmp_path / "v.gguf", metadata)
    assert (theirs.model.ignore_merges is True) == (family in IGNORE_MERGES)
    rng = random.Random(family)
    for _ in range(200):
        text = _text(rng, family)
        assert ours.encode(text) == theirs.encode(text).ids, ascii(text)
