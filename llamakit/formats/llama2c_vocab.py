"""llama2.c's tokenizer.bin: read as tokens and scores or as GGUF metadata, and written.

Layout (llama2.c tokenizer.py:42-70): u32 longest token in bytes; for each token f32 score, u32 length, bytes. The
file does not say how many tokens it holds: the model does. Spaces are spaces; <s> and </s> stand as lines. run.c
takes it for granted that these are tokens 1 and 2, after <unk>, and that the bytes follow from 3 on.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llamakit.errors import FormatError, UnsupportedError
from llamakit.files import atomic_path, escape_control
from llamakit.formats.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN
from llamakit.formats.source import FileSource
from llamakit.formats.vocabulary_keys import VocabularyKeys, read_keys

UNK, BOS, EOS, FIRST_BYTE = 0, 1, 2, 3
MIN_TOKENS = FIRST_BYTE + 256
_MAX_FILE_BYTES = 1 << 28
_SPACE = "\u2581"
_NAMES = {UNK: ("<unk>", UNKNOWN), BOS: ("<s>", CONTROL), EOS: ("</s>", CONTROL)}
_LINES = {BOS: "\n<s>\n", EOS: "\n</s>\n"}
_BYTES = [f"<0x{b:02X}>" for b in range(256)]


def read_llama2c_tokens(path: str | os.PathLike[str], n_vocab: int) -> tuple[list[str], np.ndarray]:
    """Tokens as they are spelled there, and their scores (n_vocab,) float32, for a model of `n_vocab` tokens.

    Raises UsageError for a file that cannot be read, and FormatError, with the offset, for one that does not hold
    exactly that many tokens, the byte tokens from 3 on and a token for the space among them.
    """
    with FileSource(path) as source:
        if source.size > _MAX_FILE_BYTES:
            reason = f"is no llama2.c vocabulary: {source.size} bytes (expected at most {_MAX_FILE_BYTES})"
            raise FormatError(reason, path=path)
        data = source.read(0, source.size).tobytes()
    tokens, scores = _parse(data, n_vocab, source.path)
    _check(tokens, source.path)
    return tokens, scores


def read_llama2c_vocabulary(path: str | os.PathLike[str], n_vocab: int) -> dict[str, Any]:
    """The `tokenizer.*` keys of a tokenizer.bin, as an SPM vocabulary: spaces as U+2581, the first three tokens by
    their usual names. Raises as `read_llama2c_tokens`, and FormatError for a spelling that is there twice, which GGUF
    does not allow.
    """
    spelled, scores = read_llama2c_tokens(path, n_vocab)
    tokens, types = [], []
    first: dict[str, int] = {}
    for i, text in enumerate(spelled):
        plain = (text.replace(" ", _SPACE), CONTROL if not text else BYTE if text in _BYTES else NORMAL)
        token, type = _NAMES.get(i, plain)
        if token and first.setdefault(token, i) != i:
            reason = f"has {token[:80]!r} twice, as {first[token]} and {i}, which GGUF does not allow"
            raise FormatError(escape_control(reason), path=path)
        tokens.append(token)
        types.append(type)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.ggml.unknown_token_id": UNK,
    }


def write_llama2c_vocabulary(path: str | os.PathLike[str], metadata: Mapping[str, Any]) -> None:
    """Write an SPM vocabulary as tokenizer.bin, in the bytes of llama2.c's tokenizer.py: whole or not at all.

    metadata: GGUF's keys. Kinds of tokens, chat templates and special tokens other than the first three have no place
    in the file. Raises UnsupportedError, naming the key, for a vocabulary that run.c could not use, FormatError for
    one that contradicts itself, SaveError when the disk refuses.
    """
    keys = read_keys(metadata)
    if keys.model != "llama":
        raise UnsupportedError("tokenizer.ggml.model is 'gpt2' (expected 'llama'): llama2.c only knows SPM")
    texts = _texts(keys)
    encoded = [text.encode() for text in texts]
    parts = [struct.pack("<I", max(map(len, encoded)))]
    for text, score in zip(encoded, keys.scores.tolist(), strict=True):
        parts += (struct.pack("<fI", score, len(text)), text)
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"".join(parts))


def _texts(keys: VocabularyKeys) -> list[str]:
    """How llama2.c spells the tokens."""
    for name, id in (("bos", BOS), ("eos", EOS)):
        if keys.special_id(name) != id:
            reason = f"tokenizer.ggml.{name}_token_id is {keys.special_id(name)} (expected {id})"
            raise UnsupportedError(f"{reason}: run.c knows no other")
    if keys.tokens[FIRST_BYTE:MIN_TOKENS] != _BYTES:
        raise UnsupportedError(
            "tokenizer.ggml.tokens has no byte tokens <0x00> to <0xFF> from 3 on, as run.c needs them"
        )
    texts = [_LINES.get(i, token.replace(_SPACE, " ")) for i, token in enumerate(keys.tokens)]
    texts = ["" if text == f"[EMPTY_{i}]" else text for i, text in enumerate(texts)]
    if " " not in texts:
        raise UnsupportedError("tokenizer.ggml.tokens has no token for the space, as run.c needs it")
    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        if text and first.setdefault(text, i) != i:
            reason = f"tokenizer.ggml.tokens has {text[:80]!r} twice once U+2581 is a space, as {first[text]} and {i}"
            raise UnsupportedError(escape_control(reason))
    return texts


def _parse(data: bytes, n_vocab: int, path: Path) -> tuple[list[str], np.ndarray]:
    if len(data) < 4 + 8 * n_vocab:
        raise FormatError(
            f"holds {len(data)} bytes, too few for {n_vocab} tokens", path=path, hint="is it this model's vocabulary?"
        )
    (longest,) = struct.unpack_from("<I", data)
    tokens, scores, at = [], np.zeros(n_vocab, np.float32), 4
    for i in range(n_vocab):
        if at + 8 > len(data):
            raise FormatError(f"ends in token {i} of {n_vocab}", path=path, offset=at)
        scores[i], length = struct.unpack_from("<fI", data, at)
        at += 8
        if length > min(longest, len(data) - at):
            room = f"the longest has {longest}, and {len(data) - at} are left"
            raise FormatError(f"token {i} has {length} bytes ({room})", path=path, offset=at - 4)
        tokens.append(data[at : at + length].decode("utf-8", "surrogateescape"))
        at += length
    if at != len(data):
        reason = f"goes on after token {n_vocab - 1} ({len(data) - at} bytes more)"
        raise FormatError(reason, path=path, offset=at, hint="is it this model's vocabulary?")
    if np.isnan(scores).any():
        raise FormatError(f"the score of token {int(np.isnan(scores).argmax())} is not a number", path=path)
    return tokens, scores


def _check(tokens: list[str], path: Path) -> None:
    if len(tokens) < MIN_TOKENS:
        raise FormatError(f"has {len(tokens)} tokens (expected at least {MIN_TOKENS}: the bytes)", path=path)
    for byte in range(256):
        token = tokens[FIRST_BYTE + byte]
        if token != _BYTES[byte]:
            reason = f"token {FIRST_BYTE + byte} is {token!r} (expected {_BYTES[byte]!r})"
            raise FormatError(escape_control(reason), path=path)
    if " " not in tokens:
        raise FormatError("has no token for the space", path=path)
