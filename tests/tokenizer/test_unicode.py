from __future__ import annotations

import unicodedata

from llamakit.tokenizer.unicode import (
    COLLAPSED,
    LETTER,
    MARK,
    NUMBER,
    OTHER,
    PLAIN_SPACES,
    PUNCTUATION,
    SYMBOL,
    class_of,
)

CLASSES = {"L": LETTER, "N": NUMBER, "P": PUNCTUATION, "M": MARK, "S": SYMBOL}


def test_classes_are_unicode_s() -> None:
    """Every character that this Python's Unicode has too; a category changes once in a decade."""
    different = []
    for codepoint in range(0x80, 0x110000):
        category = unicodedata.category(chr(codepoint))
        if category in ("Cn", "Cs") or codepoint in PLAIN_SPACES:
            continue
        if class_of(codepoint) != CLASSES.get(category[0], OTHER):
            different.append(codepoint)
    newer = unicodedata.unidata_version not in ("14.0.0", "15.0.0", "15.1.0")
    assert not different or (newer and len(different) < 12000)


def test_characters_of_unicode_15_1() -> None:
    assert [class_of(c) for c in (0x2EBF0, 0x31EF, 0x10EFD, 0x1D2C0, 0x11B00)] == [
        LETTER, SYMBOL, MARK, NUMBER, PUNCTUATION,
    ]  # fmt: skip
    assert class_of(0x10D40) == OTHER  # a digit since 16.0


def test_collapsing() -> None:
    assert "aß1²!¡\u0301€\xa0\ue000\n".translate(COLLAPSED) == (
        f"a{LETTER}1{NUMBER}!{PUNCTUATION}{MARK}{SYMBOL}\v{OTHER}\n"
    )
    assert "ß\xa0\u3000".translate(PLAIN_SPACES) == "ß\v\v"
