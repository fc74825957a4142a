"""llama2.c's vocabulary, encoded and decoded as its run.c does. The file: formats/llama2c_vocab.py."""

from __future__ import annotations

import os
from collections.abc import Iterable

from llamakit.formats.llama2c_vocab import BOS, EOS, FIRST_BYTE, MIN_TOKENS, UNK, read_llama2c_tokens
from llamakit.tokenizer.base import Fragment, Tokenizer
from llamakit.tokenizer.merge import NO_MERGE, cut_apart, merge
from llamakit.tokenizer.spm import joined_pairs, merge_ranks
from llamakit.tokenizer.vocabulary import BYTE_TOKEN, Attr, Vocabulary

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
        grows = any("<0x" in token for token in vocabulary.tokens[MIN_TOKENS:])
        self._joined = None if grows else joined_pairs(vocabulary.tokens)

    def piece_after(self, previous: int | None, id: int) -> bytes:
        """A token's bytes; the first one after BOS loses the space that encoding put before it."""
        piece = self.piece(id)
        return piece.removeprefix(b" ") if previous == BOS else piece

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of some ids; without the leading space of what follows BOS. special: BOS is written out, too."""
        pieces, previous = [], None
        for id in ids:
            pieces.append(self.piece(id, special=True) if special and id == BOS else self.piece_after(previous, id))
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
        return (self.vocabulary.tokens[FIRST_BYTE + byte] for byte in letter.encode())

    def _fragments(self, text: str, parse_special: bool) -> list[Fragment]:
        return [text] if text else []

    def _text_of(self, text: str) -> bytes:
        return text.encode("utf-8", "surrogateescape")


def load_llama2c_tokenizer(path: str | os.PathLike[str], n_vocab: int) -> Llama2cTokenizer:
    """llama2.c's vocabulary of `n_vocab` tokens (the model's number of them).

    Raises UsageError for a file that cannot be read, and FormatError, with the offset, for one that does not hold
    exactly that many tokens, the byte tokens from 3 on and a token for the space among them.
    """
    tokens, scores = read_llama2c_tokens(path, n_vocab)
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        ids.setdefault(token, i)
    attrs = [Attr.BYTE if BYTE_TOKEN.fullmatch(token) else Attr.NORMAL for token in tokens]
    attrs[BOS] = Attr.CONTROL
    return Llama2cTokenizer(
        Vocabulary(
            tokens, ids, attrs, scores, bos_id=BOS, eos_id=EOS, unk_id=UNK, add_bos=True, eog_ids=frozenset({BOS})
        )
    )
