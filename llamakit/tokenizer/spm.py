"""SPM, `tokenizer.ggml.model = llama`: letters merged by the score of what they make, bytes for what is unknown.

llama.cpp's variant (llm_tokenizer_spm_session): every token of the vocabulary takes part in merging, whatever its
kind; there is no normalization; a space becomes U+2581. The `sentencepiece` package differs in all three points on
unusual vocabularies, so the merging is our own.
"""

from __future__ import annotations

import numpy as np

from llamakit.errors import UnsupportedError
from llamakit.tokenizer.base import Tokenizer
from llamakit.tokenizer.merge import NO_MERGE, cut_apart, merge
from llamakit.tokenizer.vocabulary import Vocabulary

SPACE = "\u2581"

# Parts of a text that were encoded before: words repeat. Long ones seldom do.


def merge_ranks(tokens: list[str], scores: np.ndarray | None) -> dict[str, int]:
    """Spelling -> rank of merging into it: 0 for the highest score; equal scores have equal ranks."""
    if scores is None:
        return dict.fromkeys(tokens, 0)
    _, ranks = np.unique(-scores.astype(np.float64), return_inverse=True)
    return dict(zip(tokens, ranks.tolist(), strict=True))


def joined_pairs(tokens: list[str]) -> set[str]:
    """Every pair of neighbouring characters within some token."""
    return {token[i : i + 2] for token in tokens for i in range(len(token) - 1)}


class SpmTokenizer(Tokenizer):
    """SentencePiece BPE as llama.cpp does it."""

    model = "llama"

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        ranks = merge_ranks(vocabulary.tokens, vocabulary.scores)
        self._rank_of = lambda a, b: ranks.get(a + b, NO_MERGE)
        self._joined = joined_pairs(vocabulary.tokens)
        self._byte_ids = [_byte_id(vocabulary.ids, b) for b in range(256)]
        missing = self._byte_ids.count(None)
        if missing:
            reads_as = "no text with them can be encoded" if self.unk_id is None else "they are encoded as <unk>"
            self.warnings.append(f"the vocabulary has no token for {missing} of the 256 bytes: {reads_as}")

    def _encode_text(self, text: str, after_special: bool) -> list[int]:
        if self.vocabulary.add_space_prefix and after_special:
            text = " " + text
        return self._encode_each(cut_apart(text.replace(" ", SPACE), self._joined), self._encode_part)

    def _apart(self, text: str, at: int) -> bool:
        return text[at - 1 : at + 1].replace(" ", SPACE) not in self._joined

    def _encode_part(self, part: str) -> list[int]:
        ids: list[int] = []
        for symbol in merge(list(part), self._rank_of):
            id = self.vocabulary.ids.get(symbol)
            if id is not None:
                ids.append(id)
            else:
                ids += (self._byte_or_unknown(byte) for byte in symbol.encode())
        return ids

    def _byte_or_unknown(self, byte: int) -> int:
        id = self._byte_ids[byte]
        if id is None:
            id = self.unk_id
        if id is None:
            raise UnsupportedError(f"the vocabulary has no token for the byte 0x{byte:02x}, and no unknown token")
        return id

    def _text_of(self, text: str) -> bytes:
        return text.replace(SPACE, " ").encode("utf-8", "surrogateescape")


def _byte_id(ids: dict[str, int], byte: int) -> int | None:
    """The token <0xNN> or, failing that, the one that is this byte alone."""
    id = ids.get(f"<0x{byte:02X}>")
    return ids.get(bytes([byte]).decode("utf-8", "surrogateescape")) if id is None else id
