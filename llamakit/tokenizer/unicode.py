"""Classes of characters, as llama.cpp knows them: Unicode 15.1, whatever the Unicode version of this Python.

One wrong class is one wrong id, so nothing is asked of `unicodedata` or of a regular expression's own classes.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cache
from pathlib import Path

#: what stands for a character from U+0080 on in a collapsed text: its class (llama.cpp's numbers, src/unicode.cpp)
OTHER, NUMBER, LETTER, PUNCTUATION, MARK, SYMBOL = "\xd0", "\xd1", "\xd2", "\xd3", "\xd4", "\xd5"
#: what stands for white space from U+0080 on, the same in every text that an expression sees
_SPACE = "\v"
_SPACES = (0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)

_CLASS_OF = {"L": LETTER, "N": NUMBER, "P": PUNCTUATION, "M": MARK, "S": SYMBOL}

#: for str.translate: only white space is replaced
PLAIN_SPACES: dict[int, str] = dict.fromkeys(_SPACES, _SPACE)


@cache
def _ranges() -> tuple[list[int], list[int], list[str]]:
    """First code points in order, last ones, classes."""
    found: list[tuple[int, int, str]] = []
    name = ""
    table = Path(__file__).with_name("unicode_classes.txt").read_text(encoding="ascii")
    for line in table.splitlines():
        if line.startswith("["):
            name = _CLASS_OF[line[1]]
        elif not line.startswith("#"):
            for item in line.split():
                first, _, last = item.partition("-")
                found.append((int(first, 16), int(last or first, 16), name))
    firsts, lasts, classes = zip(*sorted(found), strict=True)
    return list(firsts), list(lasts), list(classes)


def class_of(codepoint: int) -> str:
    """The stand-in of a character from U+0080 on."""
    if codepoint in PLAIN_SPACES:
        return _SPACE
    firsts, lasts, classes = _ranges()
    i = bisect_right(firsts, codepoint) - 1
    return classes[i] if i >= 0 and codepoint <= lasts[i] else OTHER


class _Collapsed(dict[int, str]):
    """For str.translate: ASCII as it is, everything else by its class, looked up once."""

    def __missing__(self, codepoint: int) -> str:
        stand_in = self[codepoint] = chr(codepoint) if codepoint < 0x80 else class_of(codepoint)
        return stand_in


COLLAPSED = _Collapsed()
