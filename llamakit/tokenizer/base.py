"""What every tokenizer is: text to ids and back, special tokens inside the text, streaming that never halves a letter.

The behaviour is llama.cpp's (src/llama-vocab.cpp), id for id: `encode` is llama_tokenize, `piece` is
llama_token_to_piece, `decode` is llama_detokenize.
"""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from itertools import accumulate, chain

from llamakit.errors import UnsupportedError, UsageError
from llamakit.tokenizer.vocabulary import Attr, Vocabulary

_C_SPACES = " \t\n\v\f\r"  # isspace() of the C locale

#: a piece of the input: text still to be encoded, or the id of a special token found in it
Fragment = str | int
# Parts of a text whose ids are remembered, and how long they may be.
_CACHED_PARTS = 1 << 14
_CACHED_LENGTH = 64


class TokenStream:
    """Ids in, text out, one at a time: a character appears once its last byte has."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._previous: int | None = None

    def push(self, id: int) -> str:
        """What `id` adds to the text; empty while a character is incomplete. Bytes that are no UTF-8 become U+FFFD.

        Control and unknown tokens add nothing. Raises UsageError for an id outside the vocabulary.
        """
        piece = self._tokenizer.piece_after(self._previous, id)
        self._previous = id
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What is left of an incomplete character: U+FFFD, or nothing. The stream then starts anew."""
        rest = self._decoder.decode(b"", True)
        self._decoder.reset()
        self._previous = None
        return rest


class Tokenizer(ABC):
    """A vocabulary and its way of cutting text. Made by `load_tokenizer` or `load_llama2c_tokenizer`.

    n_vocab: number of tokens. bos_id, eos_id, unk_id: None where the vocabulary has none. add_bos, add_eos: what
    `encode(add_special=True)` puts around the ids. eog_ids: tokens that end a generation. chat_template: Jinja
    source, if any. model: "llama" (SPM) or "gpt2" (BPE); pre: how BPE cuts text into words. warnings: what was odd
    about the file, one line each.
    """

    model = ""
    pre: str | None = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        v = self.vocabulary = vocabulary
        self._cache: dict[str, list[int]] = {}
        self.n_vocab = len(v.tokens)
        self.bos_id, self.eos_id, self.unk_id = v.bos_id, v.eos_id, v.unk_id
        self.add_bos, self.add_eos = v.add_bos, v.add_eos
        self.eog_ids = v.eog_ids
        self.chat_template = v.chat_template
        self.warnings = v.warnings
        self._pieces: dict[int, bytes] = {}
        #: whether a special token may reach over a line break; None: nobody asked yet
        self._reach: bool | None = None

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True, continued: bool = False
    ) -> list[int]:
        """Ids of a text. add_special: BOS and EOS where the vocabulary wants them. parse_special: control tokens
        written out in the text become their ids (user-defined ones always do). continued: the text goes on after
        other text, so that no space is put before it.

        Lone surrogates, which are no Unicode text, are read as U+FFFD.
        """
        ids: list[int] = []
        if add_special and self.add_bos and self.bos_id is not None:
            ids.append(self.bos_id)
        after_special = not continued
        for fragment in self._fragments(_well_formed(text), parse_special):
            if isinstance(fragment, int):
                ids.append(fragment)
            else:
                ids += self._encode_text(fragment, after_special)
            after_special = isinstance(fragment, int)
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def encode_with_ends(self, text: str, *, add_special: bool = True) -> tuple[list[int], list[int]]:
        """What `encode` gives for a text, special tokens in it read as such, and where in the text's UTF-8 bytes each
        token ends.

        A token of `add_special` ends where the text begins, or at its end; a space that the vocabulary puts before a
        text has no place of its own. Raises UnsupportedError where a token cannot be traced to the bytes that it stands
        for: the vocabulary lacks some of them.
        """
        text = _well_formed(text)
        data, at, after_special = text.encode(), 0, True
        ids: list[int] = []
        ends: list[int] = []
        if add_special and self.add_bos and self.bos_id is not None:
            ids, ends = [self.bos_id], [0]
        for fragment in self._fragments(text, True):
            if isinstance(fragment, int):
                found, written = [fragment], self.vocabulary.tokens[fragment].encode("utf-8", "surrogateescape")
                places = [len(written)]
            else:
                found, written = self._encode_text(fragment, after_special), fragment.encode()
                places = _places([self.piece(id, special=True) for id in found], fragment)
            # A special token may take the spaces beside it away: nothing else can lie between two fragments.
            begin = data.index(written, at)
            at = begin + len(written)
            ids += found
            ends += [begin + place for place in places]
            after_special = isinstance(fragment, int)
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
            ends.append(len(data))
        return ids, ends

    def may_cut(self, text: str, at: int) -> bool:
        """Whether ids(text) = ids(text[:at]) + ids(text[at:], continued) is sure, for an `at` before or after a line
        break and inside of the text. False where it is not sure.
        """
        if self._reach is None:
            attrs, tokens = self.vocabulary.attrs, self.vocabulary.tokens
            special = [(attrs[id], tokens[id]) for id in self.vocabulary.special_ids]
            self._reach = any(attr & (Attr.LSTRIP | Attr.RSTRIP) or "\n" in token for attr, token in special)
        return not self._reach and "\n" in text[at - 1 : at + 1] and self._apart(text, at)

    def _apart(self, text: str, at: int) -> bool:
        """Whether surely no merge, and no word, reaches over a place before or after a line break."""
        return False

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of some ids; special: control and unknown tokens are written out, too.

        One leading space of the first token is dropped where encoding adds one; English punctuation is closed up
        where the vocabulary asks for it. Bytes that are no UTF-8 become U+FFFD. Raises UsageError for an id outside
        the vocabulary.
        """
        return self.decode_bytes(ids, special=special).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], *, special: bool = False) -> bytes:
        """What `decode` makes text of: the bytes of some ids, which may begin or end inside of a character."""
        pieces = [self.piece(i, special=special) for i in ids]
        if pieces and self.vocabulary.add_space_prefix:
            pieces[0] = pieces[0].removeprefix(b" ")
        data = b"".join(pieces)
        return clean_spaces(data) if self.vocabulary.clean_spaces else data

    def piece(self, id: int, *, special: bool = False) -> bytes:
        """Bytes that one token stands for, perhaps part of a character; empty for control and unknown tokens unless
        `special`. Raises UsageError for an id outside the vocabulary.
        """
        if not 0 <= id < self.n_vocab:
            raise UsageError(f"there is no token {id} (expected 0 to {self.n_vocab - 1})")
        if not special and self.vocabulary.attrs[id] & (Attr.CONTROL | Attr.UNKNOWN):
            return b""
        piece = self._pieces.get(id)
        if piece is None:
            piece = self._pieces[id] = self._piece(id)
        return piece

    def piece_after(self, previous: int | None, id: int) -> bytes:
        """Bytes that a token adds to a text that goes on after `previous` (None: it begins here)."""
        return self.piece(id)

    def stream(self) -> TokenStream:
        """A decoder for ids that arrive one by one."""
        return TokenStream(self)

    def _encode_each(self, parts: Iterable[str], encode: Callable[[str], list[int]]) -> list[int]:
        """Ids of parts of a text that do not depend on each other; a short part is encoded once."""
        ids: list[int] = []
        cache = self._cache
        for part in parts:
            known = cache.get(part)
            if known is None:
                known = encode(part)
                if len(part) <= _CACHED_LENGTH:
                    if len(cache) >= _CACHED_PARTS:
                        cache.clear()
                    cache[part] = known
            ids += known
        return ids

    @abstractmethod
    def _encode_text(self, text: str, after_special: bool) -> list[int]:
        """Ids of a text without special tokens; after_special: it begins the input or follows a special token."""

    @abstractmethod
    def _text_of(self, text: str) -> bytes:
        """Bytes of a normal token, from its spelling in the vocabulary."""

    def _piece(self, id: int) -> bytes:
        text, attr = self.vocabulary.tokens[id], self.vocabulary.attrs[id]
        if attr & (Attr.UNKNOWN | Attr.CONTROL | Attr.USER_DEFINED):
            return text.encode("utf-8", "surrogateescape")
        if attr & Attr.NORMAL:
            return self._text_of(text)
        return bytes([int(text[3:5], 16)]) if attr & Attr.BYTE else b""

    def _fragments(self, text: str, parse_special: bool) -> list[Fragment]:
        """The text with its special tokens taken out: each one everywhere before the next, the longest first."""
        fragments: list[Fragment] = [text] if text else []
        for id in self.vocabulary.special_ids:
            attr, token = self.vocabulary.attrs[id], self.vocabulary.tokens[id]
            if token not in text or (not parse_special and attr & (Attr.CONTROL | Attr.UNKNOWN)):
                continue
            parts = ([f] if isinstance(f, int) else _take_out(f, token, id, attr) for f in fragments)
            fragments = list(chain.from_iterable(parts))
        return fragments


def _places(pieces: list[bytes], text: str) -> list[int]:
    """Where each of the tokens of a text ends in its bytes; a space before the text counts as none of it."""
    joined, written = b"".join(pieces), text.encode()
    own: list[int] | None = None
    if joined not in (written, b" " + written):
        # A vocabulary that spells spaces U+2581 takes a U+2581 in the text for a space.
        written = text.replace("\u2581", " ").encode()
        if joined not in (written, b" " + written):
            raise UnsupportedError("the vocabulary has no tokens for some of the text: it cannot be traced")
        own = [0]
        for letter in text:
            size = len(letter.encode())
            own += [own[-1] + size] if letter == "\u2581" else [own[-1] + n for n in range(1, size + 1)]
    places = list(accumulate(map(len, pieces), initial=len(written) - len(joined)))[1:]
    if places and places[0] < 0:
        places[0] = 0
    return places if own is None else [own[place] for place in places]


def _well_formed(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _take_out(text: str, token: str, id: int, attr: int) -> list[Fragment]:
    """The text around each occurrence of a token, and its id in between; spaces beside it go where its attributes
    say so."""
    fragments: list[Fragment] = []
    begin, at = 0, text.find(token)
    while at >= 0:
        before = text[begin:at].rstrip(_C_SPACES) if attr & Attr.LSTRIP else text[begin:at]
        fragments += [before, id] if before else [id]
        begin = at + len(token)
        while attr & Attr.RSTRIP and text[begin : begin + 1] in _C_SPACES and begin < len(text):
            begin += 1
        at = text.find(token, begin)
    return [*fragments, text[begin:]] if begin < len(text) else fragments


_BEFORE_PUNCTUATION = re.compile(rb" (?=[?!.,])")
_APOSTROPHE_ALONE = re.compile(rb" ' ")
_BEFORE_ENDING = re.compile(rb" (?='(?:[sm]|re|ve))")


def clean_spaces(text: bytes) -> bytes:
    """Close up English punctuation, in llama.cpp's three passes: before ?!., then around a lone ', then before 's."""
    text = _APOSTROPHE_ALONE.sub(b"'", _BEFORE_PUNCTUATION.sub(b"", text))
    return _BEFORE_ENDING.sub(b"", text)
