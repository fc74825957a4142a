from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamakit.errors import FormatError, UnsupportedError
from llamakit.formats.gguf import GGUFValueType, Typed, typed_metadata
from llamakit.formats.huggingface_vocab import read_vocabulary, write_vocabulary
from llamakit.formats.open import open_model
from llamakit.formats.vocabulary import vocabulary_only
from tests.formats.vocabulary_folders import EXTRAS, make_folder
from tests.smollm import smollm2_path
from tests.tokenizer.vocabularies import (
    CONTROL,
    UNUSED,
    USER,
    bpe_metadata,
    load,
    random_text,
    shared,
    spm_metadata,
)

PIECES = [
    ("\u2581", -9.0),
    ("a", -9.5),
    ("b", -9.6),
    ("\u2581a", -2.0),
    ("ab", -3.0),
    ("\u2581ab", -1.0),
    ("\u00e9", -9.0),
]
SPECIAL = [("<|x|>", CONTROL), ("[INST]", USER), (" y", USER), ("[PAD269]", UNUSED)]
SPM = spm_metadata(PIECES, SPECIAL)
SPM["tokenizer.ggml.scores"][-4:] = (0.0, -1000.0, -1000.0, -10000.0)
BPE = bpe_metadata(["a b", "ab c"], [("<|x|>", CONTROL), ("[INST]", USER), ("[PAD260]", UNUSED)], pre="glm4")
#: as convert_hf_to_gguf.py leaves a folder whose tokenizer_config.json lists the first three, <unk> as a control token
LISTED = SPM | {k: SPM[k].copy() for k in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")}
LISTED["tokenizer.ggml.scores"][:3], LISTED["tokenizer.ggml.token_type"][:3] = -1000.0, CONTROL
KEYS = {
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 3,
    "tokenizer.ggml.eot_token_id": 4, "tokenizer.ggml.fim_pre_token_id": 5, "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True,
    "tokenizer.ggml.add_space_prefix": False,
    "tokenizer.chat_template": "{{ x }}", "tokenizer.chat_template.tool": "t", "tokenizer.chat_templates": ["tool"],
}  # fmt: skip


def plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The vocabulary's keys, comparable."""
    return {
        key: v.tolist()
        if isinstance(v, np.ndarray)
        else v
        if isinstance(v, str) or not hasattr(v, "__len__")
        else list(v)
        for key, v in metadata.items()
        if key.startswith("tokenizer.")
    }


def there_and_back(directory: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    directory.mkdir(exist_ok=True)
    write_vocabulary(directory, metadata)
    return read_vocabulary(directory, len(plain(metadata)["tokenizer.ggml.tokens"]))


@pytest.mark.parametrize("metadata", [SPM, SPM | KEYS, LISTED, BPE, BPE | {"tokenizer.ggml.add_bos_token": False}])
def test_everything_comes_back(tmp_path: Path, metadata: dict[str, Any]) -> None:
    assert plain(there_and_back(tmp_path, metadata)) == plain(metadata)


def test_bpe_with_every_key(tmp_path: Path) -> None:
    ids = dict.fromkeys(("bos", "eos", "padding", "eot"), 258)  # transformers makes a control token of what it names
    metadata = BPE | KEYS | {f"tokenizer.ggml.{k}_token_id": id for k, id in ids.items()}
    metadata = {k: v for k, v in metadata.items() if "unknown" not in k} | {"tokenizer.ggml.pre": "lfm2"}
    found = plain(there_and_back(tmp_path, metadata))
    assert found == plain(metadata)
    assert json.loads((tmp_path / "special_tokens_map.json").read_text())["pad_token"] == "<|x|>"


@pytest.mark.parametrize("number", range(12))
@pytest.mark.parametrize("extra", ["", "wide"])
def test_folders_come_back(tmp_path: Path, number: int, extra: str) -> None:
    make_folder(number, tmp_path / "a", extra)
    metadata = read_vocabulary(tmp_path / "a")
    types = metadata["tokenizer.ggml.token_type"]
    found = there_and_back(tmp_path / "b", metadata)
    lost = {i for i in range(len(types)) if found["tokenizer.ggml.token_type"][i] != types[i]}
    # a spelling that looks like a control token's, or one that is named as a special token
    assert all(found["tokenizer.ggml.token_type"][i] == CONTROL for i in lost)
    a, b = plain(metadata), plain(found)
    for key in a.keys() | b.keys():
        if key not in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
            assert a.get(key) == b.get(key), key
    assert EXTRAS["wide"] == 300 and len(lost) <= 3


def test_typed_values_and_the_context(tmp_path: Path) -> None:
    u32 = GGUFValueType.UINT32
    typed = {"general.architecture": Typed("llama", GGUFValueType.STRING), "llama.context_length": Typed(77, u32)}
    write_vocabulary(tmp_path, SPM | typed | {"tokenizer.ggml.bos_token_id": Typed(1, u32)})
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["model_max_length"], config["add_bos_token"]) == ("<s>", 77, True)


@pytest.mark.parametrize(
    ("metadata", "reason", "error"),
    [
        ({}, "tokenizer.ggml.model is None", UnsupportedError),
        (SPM | {"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert'", UnsupportedError),
        (SPM | {"tokenizer.ggml.tokens": ["a", "a"]}, "has 'a' twice", FormatError),
        (SPM | {"tokenizer.ggml.tokens": ["a", "\udcff"]}, "tokens[1] is '\\udcff', which is no UTF-8", UnsupportedError),
        (SPM | {"tokenizer.ggml.token_type": np.array([2, 9] + [1] * 268)}, "token_type[1] is 9", UnsupportedError),
        (SPM | {"tokenizer.ggml.token_type": np.array([2, 6] + [1] * 268)}, "has 1 byte tokens", UnsupportedError),
        (SPM | {"tokenizer.ggml.token_type": np.array([2, 6])}, "has 2 values for 270 tokens", FormatError),
        (SPM | {"tokenizer.ggml.scores": np.full(270, np.nan)}, "has no number at 0", FormatError),
        (SPM | {"tokenizer.chat_template": "\udc80"}, "tokenizer.chat_template is no UTF-8", UnsupportedError),
        (BPE | {"tokenizer.ggml.merges": ["a b", "a c"]}, "merges[1] needs the token 'ac'", UnsupportedError),
        (BPE | {"tokenizer.ggml.merges": ["ab"]}, "merges[0] is no pair", UnsupportedError),
        (BPE | {"tokenizer.ggml.merges": []}, "merges is missing or empty", FormatError),
        (BPE | {"tokenizer.ggml.pre": "kimi-k2"}, "pre 'kimi-k2' has no form", UnsupportedError),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, metadata: dict[str, Any], reason: str, error: type[Exception]) -> None:
    with pytest.raises(error) as raised:
        write_vocabulary(tmp_path, metadata)
    assert reason in str(raised.value)


def _real(name: str) -> Mapping[str, Any]:
    if name == "smollm2":
        return typed_metadata(open_model(smollm2_path()))
    return vocabulary_only(shared(name))


def _values(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.value if isinstance(v, Typed) else v for k, v in metadata.items()}


REAL = (
    "smollm2",
    "models/llama2-tokenizer.model",
    "models/ggml-vocab-llama-spm.gguf",
    "models/ggml-vocab-llama-bpe.gguf",
)


@pytest.mark.interop
@pytest.mark.parametrize("source", [SPM | KEYS, SPM, LISTED, BPE | {"tokenizer.ggml.pre": "qwen2"}, *REAL])
def test_transformers_gives_the_same_ids(tmp_path: Path, source: Any) -> None:
    transformers = pytest.importorskip("transformers")
    metadata = _values(_real(source) if isinstance(source, str) else source)
    metadata = {k: v for k, v in metadata.items() if k.startswith("tokenizer.")}
    assert plain(there_and_back(tmp_path, metadata)) == plain(metadata)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = {k: v for k, v in spm_metadata().items() if not k.startswith("tokenizer.")}
    ours = load(
        tmp_path / "v.gguf",
        model | {k: list(v) if k.endswith(("tokens", "merges")) else v for k, v in metadata.items()},
    )
    rng = random.Random(3)
    for _ in range(200):
        text = random_text(rng)
        assert ours.encode(text) == theirs.encode(text), ascii(text)
    if metadata["tokenizer.ggml.model"] == "llama":
        pytest.importorskip("sentencepiece").SentencePieceProcessor().LoadFromFile(str(tmp_path / "tokenizer.model"))
    assert theirs.chat_template is None or "tokenizer.chat_template" in metadata
    bos = None if theirs.bos_token is None else theirs.bos_token_id
    assert bos in (None, ours.bos_id) and theirs.eos_token_id in (None, ours.eos_id)


@pytest.mark.slow
def test_scores_from_merges_give_the_same_ids(tmp_path: Path) -> None:
    """Without tokenizer.model, the merges that were made of the scores become scores again."""
    metadata = vocabulary_only(shared("models/llama2-tokenizer.model"))
    write_vocabulary(tmp_path, metadata)
    (tmp_path / "tokenizer.model").unlink()
    again = read_vocabulary(tmp_path)
    assert not np.array_equal(again["tokenizer.ggml.scores"], metadata["tokenizer.ggml.scores"])
    model = {k: v for k, v in spm_metadata().items() if not k.startswith("tokenizer.")}
    first, second = (load(tmp_path / f"{i}.gguf", model | m) for i, m in enumerate((metadata, again)))
    rng = random.Random(4)
    for _ in range(300):
        text = random_text(rng)
        assert first.encode(text) == second.encode(text), ascii(text)
