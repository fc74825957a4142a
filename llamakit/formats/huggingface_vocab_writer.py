"""Writes a vocabulary from GGUF metadata as the files that transformers' AutoTokenizer loads.

tokenizer.json makes the ids: transformers takes it as it is, since tokenizer_config.json names the class
PreTrainedTokenizerFast (LlamaTokenizer would be built anew, from other parts). For SPM, tokenizer.model stands beside
it for programs that read that.

What these files have no place for: scores of SPM's user-defined tokens, which are read back as -1000; of BPE, types
other than control and user-defined (padding, [PADi], excepted), that a token is user-defined where it is named as a
special one or spelled like a control token, and a U+2581 in it, which is read back as a space; ids outside the
vocabulary, which stand for none; and a tokenizer's other data, such as `tokenizer.ggml.precompiled_charsmap`. `pre`,
which several names of the same cuts share, ids of tokens for the end of a turn and for filling in, and which defaults
the metadata left unsaid are kept under a name of our own in tokenizer_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llamakit.errors import UnsupportedError
from llamakit.files import escape_control
from llamakit.formats.byte_letters import spelled_text
from llamakit.formats.huggingface_special import looks_special
from llamakit.formats.pre_tokenizers import CLEAN_SPACES, IGNORE_MERGES, structure_of
from llamakit.formats.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    SentencePieceModel,
    write_sentencepiece_model,
)
from llamakit.formats.vocabulary_keys import VocabularyKeys, read_keys

#: tokenizer_config.json's name for what transformers has no name for: {"pre": "glm4", "token_ids": {"eot": 32010}}
KEPT = "gguf"
#: keys that may be missing, and are then made explicit
UNSAID = ("pre", "bos_token_id", "eos_token_id", "add_bos_token")
ADDED_SCORE = -1000.0
#: transformers' way to say that there is no limit
_NO_LIMIT = int(1e30)
#: GGUF's name of a special token -> transformers'
_NAMES = {"bos": "bos", "eos": "eos", "unknown": "unk", "seperator": "sep", "padding": "pad", "mask": "mask"}
_SPACE = "\u2581"


def write_vocabulary(directory: Path, metadata: Mapping[str, Any]) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json, for SPM tokenizer.model too, into a
    folder that exists.

    metadata: GGUF's keys; others than `tokenizer.*` and the context length are ignored. Raises UnsupportedError for a
    vocabulary that these files cannot hold and FormatError for one that contradicts itself, both naming the key,
    OSError and SaveError when the disk refuses.
    """
    keys = read_keys(metadata)
    special = _special_ids(keys)
    config: dict[str, Any] = {f"add_{name}_token": value for name, value in keys.add.items()}
    if keys.adds_bos and "bos" in special:
        config["add_bos_token"] = True
    if keys.add_space_prefix is not None:
        config["add_prefix_space"] = keys.add_space_prefix
    if keys.model == "llama":
        tokenizer = _spm_json(keys, special)
        apart = _listed_apart(keys)
        config["added_tokens_decoder"] = {str(i): _flags(keys, i) for i in _added_decoder(keys) if i not in apart}
        if apart:
            _write_json(directory / "added_tokens.json", {keys.tokens[i]: i for i in apart})
        write_sentencepiece_model(directory / "tokenizer.model", _sentencepiece(keys))
    else:
        tokenizer = _bpe_json(keys, special)
    named = {f"{_NAMES[name]}_token": keys.tokens[id] for name, id in special.items()}
    config |= named
    if keys.templates:
        config["chat_template"] = _templates(keys.templates)
    config["clean_up_tokenization_spaces"] = keys.model == "gpt2" and keys.pre in CLEAN_SPACES
    config[KEPT] = _kept(keys, metadata)
    config["model_max_length"] = _context_length(metadata)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name, value in (("tokenizer", tokenizer), ("tokenizer_config", config), ("special_tokens_map", named)):
        _write_json(directory / f"{name}.json", value)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _kept(keys: VocabularyKeys, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Which of several names for the same cuts it was, ids of tokens that transformers has no name for, and which keys
    are only written since a default holds."""
    ids = {name: id for name, id in keys.ids.items() if name not in _NAMES}
    unsaid = [name for name in UNSAID if f"tokenizer.ggml.{name}" not in metadata]
    return {"pre": keys.pre} | ({"token_ids": ids} if ids else {}) | ({"unsaid": unsaid} if unsaid else {})


def _special_ids(keys: VocabularyKeys) -> dict[str, int]:
    """GGUF's names of the special tokens that are written -> their ids: those that are stated, and those that stand
    around a text."""
    found = {name: keys.ids[name] for name in _NAMES if name in keys.ids}
    for name, wanted in (("bos", keys.adds_bos), ("eos", keys.add.get("eos", False))):
        id = keys.special_id(name)
        if wanted and id is not None:
            found[name] = id
    return found


def _context_length(metadata: Mapping[str, Any]) -> int:
    key = f"{_plain(metadata.get('general.architecture'))}.context_length"
    value = _plain(metadata.get(key))
    return value if type(value) is int and value > 0 else _NO_LIMIT


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _templates(templates: Mapping[str, str]) -> str | list[dict[str, str]]:
    if list(templates) == [""]:
        return templates[""]
    return [{"name": name or "default", "template": template} for name, template in templates.items()]


def _flags(keys: VocabularyKeys, id: int, *, normalized: bool = False) -> dict[str, Any]:
    """What transformers wants to know about an added token."""
    return {
        "content": keys.tokens[id],
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": normalized,
        "special": keys.types[id] != USER_DEFINED,
    }


def _tokenizer_json(keys: VocabularyKeys, special: Mapping[str, int], added: Iterable[int]) -> dict[str, Any]:
    """What both kinds have in common."""
    ids, padding = sorted({*added, *special.values()}), keys.padding()
    # A token in letters of bytes would be read back as what these spell, unless it is marked as normalized.
    normalized = {i: keys.model == "gpt2" and spelled_text(keys.tokens[i]) != keys.tokens[i] for i in ids}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **_flags(keys, i, normalized=normalized[i])} for i in ids],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": _post_processor(keys, special),
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(keys.tokens) if i not in padding},
            "merges": [],
        },
    }


def _post_processor(keys: VocabularyKeys, special: Mapping[str, int]) -> dict[str, Any] | None:
    """BOS before a text and EOS after it, where they are wanted."""
    first = special.get("bos") if keys.adds_bos else None
    last = special.get("eos") if keys.add.get("eos") else None
    if first is None and last is None:
        return None

    def around(*texts: str) -> list[dict[str, Any]]:
        before, after = (
            [] if id is None else [{"SpecialToken": {"id": keys.tokens[id], "type_id": 0}}] for id in (first, last)
        )
        return [*before, *({"Sequence": {"id": text, "type_id": i}} for i, text in enumerate(texts)), *after]

    used = {keys.tokens[id]: id for id in (first, last) if id is not None}
    return {
        "type": "TemplateProcessing",
        "single": around("A"),
        "pair": around("A", "B"),
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]} for token, id in used.items()},
    }


def _bpe_json(keys: VocabularyKeys, special: Mapping[str, int]) -> dict[str, Any]:
    found = _tokenizer_json(keys, special, keys.of_type(CONTROL, USER_DEFINED, UNKNOWN))
    found["pre_tokenizer"] = structure_of(keys.pre)
    found["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    found["model"]["ignore_merges"] = keys.pre in IGNORE_MERGES
    found["model"]["merges"] = _bpe_merges(keys)
    return found


def _bpe_merges(keys: VocabularyKeys) -> list[tuple[str, str]]:
    known = set(keys.tokens)
    pairs = []
    for i, merge in enumerate(keys.merges):
        at = merge.find(" ", 1)
        left, right = merge[:at], merge[at + 1 :]
        missing = next((part for part in (left, right, left + right) if part not in known), None)
        if at < 0 or missing is not None:
            what = f"needs the token {ascii(missing)[:80]}, which is missing" if at > 0 else "is no pair"
            raise UnsupportedError(f"tokenizer.ggml.merges[{i}] {what}: a tokenizer.json cannot hold that")
        pairs.append((left, right))
    return pairs


def _spm_json(keys: VocabularyKeys, special: Mapping[str, int]) -> dict[str, Any]:
    """SentencePiece's BPE: a space before every part between special tokens, as llama.cpp puts it."""
    found = _tokenizer_json(keys, special, keys.of_type(CONTROL, USER_DEFINED, UNKNOWN))
    prefixed = keys.add_space_prefix is not False
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    found["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace] if prefixed else [replace]}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefixed:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    found["decoder"] = {"type": "Sequence", "decoders": decoders}
    unknown = keys.special_id("unknown")
    found["model"] |= {
        "unk_token": None if unknown is None else keys.tokens[unknown],
        "fuse_unk": True,
        "byte_fallback": True,
        "merges": _spm_merges(keys, found["model"]["vocab"]),
    }
    return found


def _spm_merges(keys: VocabularyKeys, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, by the score of the token, as transformers derives them."""
    found: list[tuple[float, int, int, str, str]] = []
    for token, id in vocab.items():
        if keys.types[id] not in (CONTROL, UNKNOWN):
            score = float(keys.scores[id])
            for at in range(1, len(token)):
                left = token[:at]
                if left in vocab and token[at:] in vocab:
                    found.append((-score, -at, at - len(token), left, token[at:]))
    found.sort(key=lambda merge: merge[:3])
    return [merge[3:] for merge in found]


def _unknown(keys: VocabularyKeys) -> int:
    """The one unknown piece that a SentencePiece file must have."""
    stated = keys.of_type(UNKNOWN)
    id = stated[0] if stated else keys.special_id("unknown")
    if id is None:
        raise UnsupportedError("the vocabulary has no unknown token, which a SentencePiece file must have")
    return id


def _added_decoder(keys: VocabularyKeys) -> list[int]:
    """Tokens whose type is not in tokenizer.model, or that have the score that the listing here gives."""
    unknown = _unknown(keys)
    control = [i for i in keys.of_type(CONTROL) if float(keys.scores[i]) == ADDED_SCORE or i == unknown]
    return sorted([*control, *keys.of_type(USER_DEFINED)])


def _listed_apart(keys: VocabularyKeys) -> list[int]:
    """User-defined tokens that tokenizer_config.json would change: added_tokens.json takes them as they are."""
    return [i for i in keys.of_type(USER_DEFINED) if _SPACE in keys.tokens[i] or looks_special(keys.tokens[i])]


def _sentencepiece(keys: VocabularyKeys) -> SentencePieceModel:
    unknown, n_bytes = _unknown(keys), len(keys.of_type(BYTE))
    if n_bytes not in (0, 256):
        reason = f"tokenizer.ggml.token_type has {n_bytes} byte tokens (expected 256 or none)"
        raise UnsupportedError(f"{reason}: a SentencePiece file cannot hold that")
    odd = next((i for i, type in enumerate(keys.types) if not NORMAL <= type <= BYTE), None)
    if odd is not None:
        raise UnsupportedError(
            f"tokenizer.ggml.token_type[{odd}] is {escape_control(str(keys.types[odd]))}, an unknown type"
        )
    types = [CONTROL if type == UNKNOWN else type for type in keys.types]
    types[unknown] = UNKNOWN
    rows = zip(keys.tokens, keys.scores.tolist(), types, strict=True)
    return SentencePieceModel(
        [Piece(*row) for row in rows],
        byte_fallback=n_bytes == 256,
        add_dummy_prefix=keys.add_space_prefix is not False,
        bos_id=keys.special_id("bos"),
        eos_id=keys.special_id("eos"),
        pad_id=keys.ids.get("padding"),
    )
