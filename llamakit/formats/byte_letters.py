"""GPT-2's spelling of bytes: a printable letter for each, in which byte-level BPE vocabularies are written."""

from __future__ import annotations


def _byte_letters() -> list[str]:
    """A byte's stand-in: itself where it is printable, else the next letter from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b if b in printable else next(others)) for b in range(256)]


LETTERS: list[str] = _byte_letters()
TO_BYTES: dict[int, int] = {ord(letter): b for b, letter in enumerate(LETTERS)}
_IS_LETTER = frozenset(LETTERS)


def spelled_text(token: str) -> str:
    """The text that a token spells, itself where it holds what is no byte's letter; broken UTF-8 becomes U+FFFD."""
    if not _IS_LETTER.issuperset(token):
        return token
    return token.translate(TO_BYTES).encode("latin-1").decode("utf-8", "replace")
