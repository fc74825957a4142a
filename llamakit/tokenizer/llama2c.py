"""llama2.c's tokenizer.bin, encoded and decoded as its run.c does.

Layout (llama2.c tokenizer.py:42-70): u32 longest token in bytes; for each token f32 score, u32 length, bytes. The
file does not say how many tokens it holds: the model does. Spaces are spaces; <s> and </s> stand as lines.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from llamakit.errors import FormatError, UsageError
from llamakit.files import escape_control
from llamakit.tokenizer.base import Fragment, Tokenizer
from llamakit.tokenizer.merge import NO_MERGE, cut_apart, merge
from llamakit.tokenizer.spm import joined_pairs, merge_ranks
from llamakit.tokenizer.vocabulary import BYTE_TOKEN, Attr, Vocabulary

_BOS, _EOS, _FIRST_BYTE = 1, 2, 3
_MIN_TOKENS = _FIRST_BYTE + 256
_MAX_FILE_BYTES = 1 << 28
# run.c looks for the best score from here on.
_LOWEST_SCORE = -1e10


class Llama2cTokenizer(Tokenizer):
    """run.c's encode() and decode(): no special tokens in the text, a leading space before any text, bytes as +3."""

    model = "llama2c"

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        assert vocabulary.scores is not None
        ranks = merge_ranks(vocabulary.tokens, vocabulary.scores)
        for token, score in zip(vocabulary.tokens, vocabulary.scores.tolist(), strict=True):
            if score <= _LOWEST_SCORE:
                ranks.pop(token, None)
        self._rank_of = lambda a, b: ranks.get(a + b, NO_MERGE)
        # A token that holds a byte token's spelling could grow out of bytes: then nothing is known to stay apart.
        grows = any("<0x" in token for token in vocabulary.tokens[_MIN_TOKENS:])
        self._joined = None if grows else joined_pairs(vocabulary.tokens)

    def piece_after(self, previous: int | None, id: int) -> bytes:
        """A token's bytes; the first one after BOS loses the space that encoding put before it."""
        piece = self.piece(id)
        return piece.removeprefix(b" ") if previous == _BOS else piece

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of some ids; without the leading space of what follows BOS. special: BOS is written out, too."""
        pieces, previous = [], None
        for id in ids:
            pieces.append(self.piece(id, special=True) if special and id == _BOS else self.piece_after(previous, id))
            previous = id
        return b"".join(pieces).decode("utf-8", "replace")

    def _encode_text(self, text: str, after_special: bool) -> list[int]:
        ids: list[int] = []
        text = f" {text}"
        for part in [text] if self._joined is None else cut_apart(text, self._joined):
            symbols = merge([s for letter in part for s in self._symbols(letter)], self._rank_of)
            ids += map(self.vocabulary.ids.__getitem__, symbols)
        return ids

    def _symbols(self, letter: str) -> Iterable[str]:
        """A letter that is a token, or the byte tokens that spell it."""
        if letter in self.vocabulary.ids:
            return (letter,)
        return (self.vocabulary.tokens[_FIRST_BYTE + byte] for byte in letter.encode())

    def _fragments(self, text: str, parse_special: bool) -> list[Fragment]:
        return [text] if text else []

    def _text_of(self, text: str) -> bytes:
        return text.encode("utf-8", "surrogateescape")


def load_llama2c_tokenizer(path: str | os.PathLike[str], n_vocab: int) -> Llama2cTokenizer:
    """llama2.c's vocabulary of `n_vocab` tokens (the model's number of them).

    Raises UsageError for a file that cannot be read, and FormatError, with the offset, for one that does not hold
    exactly that many tokens, the byte tokens from 3 on and a token for the space among them.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= _MAX_FILE_BYTES else b""
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", path=path) from error
    if size > _MAX_FILE_BYTES:
        raise FormatError(f"is no llama2.c vocabulary: {size} bytes (expected at most {_MAX_FILE_BYTES})", path=path)
    tokens, scores = _read(data, n_vocab, path)
    _check(tokens, path)
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        ids.setdefault(token, i)
    attrs = [Attr.BYTE if BYTE_TOKEN.fullmatch(token) else Attr.NORMAL for token in tokens]
    attrs[_BOS] = Attr.CONTROL
    return Llama2cTokenizer(
        Vocabulary(
            tokens, ids, attrs, scores, bos_id=_BOS, eos_id=_EOS, unk_id=0, add_bos=True, eog_ids=frozenset({_BOS})
        )
    )


def _read(data: bytes, n_vocab: int, path: Path) -> tuple[list[str], np.ndarray]:
    """Tokens and scores (n_vocab,) float32."""
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
    if len(tokens) < _MIN_TOKENS:
        raise FormatError(f"has {len(tokens)} tokens (expected at least {_MIN_TOKENS}: the bytes)", path=path)
    for byte in range(256):
        token = tokens[_FIRST_BYTE + byte]
        if token != f"<0x{byte:02X}>":
            reason = f"token {_FIRST_BYTE + byte} is {token!r} (expected '<0x{byte:02X}>')"
            raise FormatError(escape_control(reason), path=path)
    if " " not in tokens:
        raise FormatError("has no token for the space", path=path)
