"""BPE, `tokenizer.ggml.model = gpt2`: words cut out by regular expressions, their bytes merged by rank.

llama.cpp's variant (llm_tokenizer_bpe_session): a merge needs no token of its own to go on; a symbol that is no token
in the end gives the tokens of its bytes, if any. The `tokenizers` package refuses such vocabularies, and its
classes of characters are of another Unicode version, so the merging and the cutting are our own.
"""

from __future__ import annotations

from llamakit.formats.byte_letters import LETTERS, TO_BYTES
from llamakit.tokenizer.base import Tokenizer
from llamakit.tokenizer.merge import NO_MERGE, cut_apart, merge
from llamakit.tokenizer.pre import PreTokenizer
from llamakit.tokenizer.vocabulary import Vocabulary

#: bytes that ordinary text has; vocabularies that were trained without control characters and rare planes are sound
_TEXT_BYTES = frozenset((0x09, 0x0A, 0x0D, *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1)))

# Words of this length are cut where no merge can reach across before they are merged.
_LONG_WORD = 512


_TO_LETTERS = dict(enumerate(LETTERS))
_IS_LETTER = frozenset(LETTERS)


def merge_ranks(merges: list[str]) -> dict[str, int]:
    """Merge, as the file spells it ("left right"), -> rank; the first of equal merges counts.

    A file's merge is cut at its first space, which may not be its first character. Symbols hold no space, so two of
    them with a space in between are found here exactly when they are that merge.
    """
    return dict(zip(reversed(merges), range(len(merges) - 1, -1, -1), strict=True))


class BpeTokenizer(Tokenizer):
    """Byte-level BPE as llama.cpp does it."""

    model = "gpt2"

    def __init__(self, vocabulary: Vocabulary, merges: list[str], pre: PreTokenizer) -> None:
        super().__init__(vocabulary)
        self.pre = pre.name
        self._pre = pre
        ranks = self._ranks = merge_ranks(merges)
        self._rank_of = lambda a, b: ranks.get(f"{a} {b}", NO_MERGE)
        self._joined: set[str] | None = None
        # GPT-2's expression leaves the last of several spaces to what follows; others take line breaks together.
        self._lone_break = pre.split("a\n\na") == ["a", "\n", "\n", "a"]
        missing = [b for b, letter in enumerate(LETTERS) if b in _TEXT_BYTES and letter not in vocabulary.ids]
        if missing:
            self.warnings.append(f"the vocabulary has no token for {len(missing)} bytes of text: they are dropped")

    def _encode_text(self, text: str, after_special: bool) -> list[int]:
        return self._encode_each(self._pre.split(text), self._encode_word)

    def _apart(self, text: str, at: int) -> bool:
        """True where every expression of the table cuts: between letters and line breaks, on one side or the other."""
        if self.pre == "superbpe":  # its words reach over whole lines
            return False
        if text[at] == "\n":
            return text[at - 1].isalpha() or (self._lone_break and not text[at - 1].isspace())
        return text[at].isalpha() and not (self._lone_break and text[at - 2 : at - 1].isspace())

    def _encode_word(self, word: str) -> list[int]:
        letters = word.encode().decode("latin-1").translate(_TO_LETTERS)
        if self._pre.ignore_merges:
            id = self.vocabulary.ids.get(letters)
            if id is not None:
                return [id]
        ids: list[int] = []
        for part in cut_apart(letters, self._bridged()) if len(letters) >= _LONG_WORD else (letters,):
            for symbol in merge(list(part), self._rank_of):
                id = self.vocabulary.ids.get(symbol)
                ids += self._bytes_of(symbol) if id is None else (id,)
        return ids

    def _bridged(self) -> set[str]:
        """Pairs of letters that some merge puts side by side."""
        if self._joined is None:
            spaces = ((merge, merge.find(" ", 1)) for merge in self._ranks)
            self._joined = {merge[at - 1] + merge[at + 1 : at + 2] for merge, at in spaces if at > 0}
        return self._joined

    def _bytes_of(self, symbol: str) -> list[int]:
        """Tokens that are one byte of this spelling each; the bytes without one are dropped."""
        found = (bytes([b]).decode("utf-8", "surrogateescape") for b in symbol.encode("utf-8", "surrogateescape"))
        return [self.vocabulary.ids[b] for b in found if b in self.vocabulary.ids]

    def _text_of(self, text: str) -> bytes:
        if _IS_LETTER.issuperset(text):
            return text.translate(TO_BYTES).encode("latin-1")
        spelled = text.encode("utf-8", "surrogateescape")
        return b"".join(_byte_of(letter, spelled) for letter in text)


def _byte_of(letter: str, spelled: bytes) -> bytes:
    """A letter's byte; what is no byte's letter is spelled out as llama.cpp does, the whole token after it."""
    byte = TO_BYTES.get(ord(letter))
    if byte is not None:
        return bytes([byte])
    return b"[UNK_BYTE_0x" + letter.encode("utf-8", "surrogateescape").hex().encode() + spelled + b"]"
