"""Llama 3's `tokenizer.model`: tiktoken's list of tokens, a line each, in base64 and with its rank, as GGUF's BPE.

tiktoken joins the neighbours that make the token of the lowest rank. GGUF wants pairs: so every way in which a token
falls into two others is a merge, in the order of the ranks, which is what Hugging Face's converter makes of it too. The
256 special tokens are no part of the file. Their spelling: llama3/tokenizer.py and the later list of llama-models.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from typing import Any

import numpy as np

from llamakit.errors import FormatError, MismatchError
from llamakit.formats.byte_letters import LETTERS
from llamakit.formats.sentencepiece_model import CONTROL, NORMAL
from llamakit.formats.source import FileSource

_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) ([0-9]{1,7})")
_MAX_FILE_BYTES, _MAX_TOKEN_BYTES = 1 << 25, 1024
_N_SPECIAL = 256
_LLAMA3 = ("begin_of_text", "end_of_text", "", "", "", "", "start_header_id", "end_header_id", "", "eot_id")
_LLAMA31 = (
    "begin_of_text", "end_of_text", "", "", "finetune_right_pad_id", "", "start_header_id", "end_header_id", "eom_id",
    "eot_id", "python_tag",
)  # fmt: skip


def is_tiktoken(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as tiktoken's do. Raises UsageError when it cannot be read."""
    with FileSource(path) as source:
        head = source.read(0, min(source.size, 2 * _MAX_TOKEN_BYTES)).tobytes()
    return _LINE.fullmatch(head.partition(b"\n")[0].rstrip(b"\r")) is not None


def read_tiktoken_vocabulary(path: str | os.PathLike[str], n_vocab: int | None, *, tools: bool) -> dict[str, Any]:
    """The `tokenizer.*` keys of Llama 3's vocabulary.

    n_vocab: rows of the model's embedding, of which the last 256 are special tokens; None: unknown. tools: their names
    since Llama 3.1 (<|eom_id|>, <|python_tag|>). BOS is <|begin_of_text|>, EOS <|end_of_text|>, the end of a turn
    <|eot_id|>.
    Raises FormatError, with its line, for a broken file, MismatchError for another number of tokens.
    """
    tokens = _read_tokens(path)
    n = len(tokens)
    if n_vocab not in (None, n + _N_SPECIAL):
        raise MismatchError(
            f"has {n} tokens and {_N_SPECIAL} special ones (expected {n_vocab}, the model's)", path=path
        )
    special = _special(tools)
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [_spelled(token) for token in tokens] + special,
        "tokenizer.ggml.token_type": np.array([NORMAL] * n + [CONTROL] * _N_SPECIAL, np.int32),
        "tokenizer.ggml.merges": _merges(tokens),
    }
    ids = {"bos": "begin_of_text", "eos": "end_of_text", "eot": "eot_id"}
    if tools:
        ids |= {"eom": "eom_id", "padding": "finetune_right_pad_id"}
    return keys | {f"tokenizer.ggml.{kind}_token_id": n + special.index(f"<|{name}|>") for kind, name in ids.items()}


def _special(tools: bool) -> list[str]:
    """The special tokens, those without a use numbered in a row."""
    names = list(_LLAMA31 if tools else _LLAMA3)
    found, reserved = [], 0
    for name in names + [""] * (_N_SPECIAL - len(names)):
        found.append(f"<|{name or f'reserved_special_token_{reserved}'}|>")
        reserved += not name
    return found


def _read_tokens(path: str | os.PathLike[str]) -> list[bytes]:
    """Every token at its rank."""
    with FileSource(path) as source:
        if source.size > _MAX_FILE_BYTES:
            raise FormatError(f"is too large (expected at most {_MAX_FILE_BYTES} bytes, got {source.size})", path=path)
        lines = source.read(0, source.size).tobytes().splitlines()
    found: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        token = _decoded(match[1]) if match else b""
        if match is None or not 1 <= len(token) <= _MAX_TOKEN_BYTES:
            raise FormatError("is no token in base64 and its rank", path=path, line=number)
        if int(match[2]) != number - 1:
            raise FormatError(f"has the rank {int(match[2])} (expected {number - 1})", path=path, line=number)
        if found.setdefault(token, number) != number:
            raise FormatError(f"has the token of line {found[token]} again", path=path, line=number)
    missing = next((b for b in range(256) if bytes([b]) not in found), None)
    if missing is not None:
        raise FormatError(f"has no token for the byte {missing}", path=path)
    return list(found)


def _decoded(text: bytes) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return b""


def _spelled(token: bytes) -> str:
    return "".join(LETTERS[b] for b in token)


def _merges(tokens: list[bytes]) -> list[str]:
    """ "left right" of every split of a token into two, by its rank, then by theirs."""
    rank = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = sorted((rank[a], rank[b]) for a, b in halves if a in rank and b in rank)
        merges += [f"{_spelled(tokens[a])} {_spelled(tokens[b])}" for a, b in pairs]
    return merges
