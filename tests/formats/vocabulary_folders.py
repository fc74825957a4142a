"""Vocabularies of Hugging Face folders, made from a number: the same number, the same files."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamakit.formats.pre_tokenizers import structure_of
from llamakit.formats.sentencepiece_model import Piece, SentencePieceModel, write_sentencepiece_model
from tests.tokenizer.vocabularies import LETTERS

#: what a folder may be: vocab_size of special models, more or fewer rows than tokens
EXTRAS = {"code-llama": 32016, "granite": 49152, "wide": 300, "narrow": 268}
_NAMED = ("<|x|>", "<pad>", "[INST]", "  ", "\u2581\u2581x", "<|d\u00e9but|>", "\u0120\u00e9", "plain", "<unused1>")
_TEMPLATES = (
    "{{x}}", None, [{"name": "default", "template": "d"}, {"name": "tool use", "template": "t"}],
    [{"name": "rag", "template": "r"}],
)  # fmt: skip


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def pieces(rng: random.Random | None = None) -> list[Piece]:
    """<unk> <s> </s>, the bytes, letters and what they make; sometimes a piece of each other kind."""
    texts = ["\u2581", "a", "b", "c", "\u00e9", "\u4e2d", "\u2581a", "ab", "\u2581ab", "abc", "bc"]
    found = [Piece("<unk>", 0.0, 2), Piece("<s>", 0.0, 3), Piece("</s>", 0.0, 3)]
    found += [Piece(f"<0x{b:02X}>", 0.0, 6) for b in range(256)]
    found += [Piece(text, -float(i), 1) for i, text in enumerate(texts)]
    for piece in (Piece("<ctl>", 0.0, 3), Piece("[USR]", 0.0, 4), Piece("spare", 0.0, 5)):
        if rng is not None and rng.random() < 0.3:
            found.append(piece)
    return found


def bpe_json(rng: random.Random) -> dict[str, Any]:
    """A byte-level tokenizer.json with both spellings of merges."""
    merges = ["a b", "b c", "ab c", "\u0120 a"]
    special = [] if rng.random() < 0.5 else ["<unk>", "<s>", "</s>"]
    tokens = dict.fromkeys([*special, *LETTERS, *(m.replace(" ", "") for m in merges), "<ctl>"])
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [m.split(" ") for m in merges] if rng.random() < 0.5 else merges,
    }  # fmt: skip
    if rng.random() < 0.5:
        model["ignore_merges"] = rng.random() < 0.5
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "pre_tokenizer": structure_of("llama-bpe"),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": model,
    }  # fmt: skip


def _added(rng: random.Random, vocab: Mapping[str, int]) -> list[dict[str, Any]]:
    found = [(vocab[c], c, True) for c in ("<s>", "</s>", "<unk>", "<ctl>") if c in vocab and rng.random() < 0.7]
    following = len(vocab)
    for content in _NAMED:
        if rng.random() < 0.35:
            found.append((following, content, rng.random() < 0.6))
            following += 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    return [
        {"id": i, "content": c, **flags, "normalized": rng.random() < 0.4 and not s, "special": s} for i, c, s in found
    ]


def _post_processor(rng: random.Random, tokens: Sequence[str]) -> dict[str, Any] | None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    kind = rng.random()
    if kind < 0.45:
        return None if kind < 0.3 else byte_level
    first, last = rng.choice(tokens), rng.choice(tokens)
    a, b = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    bos, eos = ({"SpecialToken": {"id": token, "type_id": 0}} for token in (first, last))
    single = [*([bos] if rng.random() < 0.7 else []), a, *([eos] if rng.random() < 0.4 else [])]
    pair = rng.choice([[bos, a, bos, b], [a, b], [bos, a, b], [a, eos, b, eos], [bos, a, eos, bos, b, eos]])
    used = {token: {"id": token, "ids": [0], "tokens": [token]} for token in (first, last)}
    template = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": used}
    return {"type": "Sequence", "processors": [byte_level, template]} if rng.random() < 0.3 else template


def _token(rng: random.Random, text: str) -> Any:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": text, **flags} if rng.random() < 0.3 else text


def _configs(rng: random.Random, directory: Path, added: Sequence[Mapping[str, Any]], n_vocab: int) -> None:
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": n_vocab}
    for kind in ("bos", "eos", "pad", "unk"):
        if rng.random() < 0.4:
            config[f"{kind}_token_id"] = rng.choice([1, 2, [2, 3]] if kind == "eos" else [0, 1, None, n_vocab + 100])
    write_json(directory / "config.json", config)
    if rng.random() < 0.2:
        (directory / "chat_template.jinja").write_text("jinja {{y}}\n")
    if rng.random() < 0.2:
        write_json(directory / "chat_template.json", {"chat_template": "cj"})
    if rng.random() < 0.15:
        return
    found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    names = [token["content"] for token in added if token["special"]] or ["a"]
    chances = {"bos": 0.7, "eos": 0.7, "unk": 0.5, "pad": 0.4, "sep": 0.06, "cls": 0.06, "mask": 0.06}
    for kind, chance in chances.items():
        if rng.random() < chance:
            found[f"{kind}_token"] = _token(rng, rng.choice(names))
    for kind in ("bos", "eos", "sep"):
        if rng.random() < 0.3:
            found[f"add_{kind}_token"] = rng.choice([True, False])
    if rng.random() < 0.3:
        found["add_prefix_space"] = rng.choice([True, False, None])
    if rng.random() < 0.4:
        found["chat_template"] = rng.choice(_TEMPLATES)
    if rng.random() < 0.5:
        found["added_tokens_decoder"] = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added}
    write_json(directory / "tokenizer_config.json", found)


def make_folder(number: int, directory: Path, extra: str = "") -> str:
    """Write a folder and say which kind it is: "spm" or "bpe"; extra: one of EXTRAS."""
    rng = random.Random(number)
    directory.mkdir(parents=True)
    if rng.random() < 0.5:
        vocabulary = pieces(rng)
        write_sentencepiece_model(directory / "tokenizer.model", SentencePieceModel(vocabulary))
        vocab = {piece.text: i for i, piece in enumerate(vocabulary)}
        added = _added(rng, vocab)
        if rng.random() < 0.4:
            write_json(directory / "added_tokens.json", {t["content"]: t["id"] for t in added if t["id"] >= len(vocab)})
        if rng.random() < 0.5:
            post = _post_processor(rng, ["<s>", "</s>", "<unk>"])
            write_json(directory / "tokenizer.json", {"added_tokens": added, "post_processor": post})
        kind = "spm"
    else:
        tokenizer = bpe_json(rng)
        added = _added(rng, vocab := tokenizer["model"]["vocab"])
        post = _post_processor(rng, [token["content"] for token in added] or ["a"])
        write_json(directory / "tokenizer.json", {**tokenizer, "added_tokens": added, "post_processor": post})
        kind = "bpe"
    n_tokens = max(len(vocab), *(token["id"] + 1 for token in added)) if added else len(vocab)
    _configs(rng, directory, added, EXTRAS.get(extra, n_tokens + rng.choice([0, 0, 1, 5])))
    return kind


def fingerprint(metadata: Mapping[str, Any]) -> str:
    """Of all keys in their order, with their values; which name of equal cuts it is does not count."""
    plain = {key: v.tolist() if isinstance(v, np.ndarray) else v for key, v in metadata.items()}
    plain["tokenizer.ggml.pre"] = ""
    if "tokenizer.chat_templates" in plain:
        plain["tokenizer.chat_templates"] = sorted(plain["tokenizer.chat_templates"])
    return hashlib.sha256(json.dumps(list(plain.items())).encode()).hexdigest()[:12]
