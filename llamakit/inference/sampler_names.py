"""The names of the samplers: llama.cpp's own, its other spellings, and its letters. Free of numpy."""

from __future__ import annotations

from llamakit.errors import UsageError

#: name -> letter of --sampling-seq, in the default order.
SAMPLERS = {
    "penalties": "e",
    "dry": "d",
    "top_n_sigma": "s",
    "top_k": "k",
    "typ_p": "y",
    "top_p": "p",
    "min_p": "m",
    "xtc": "x",
    "temperature": "t",
    "adaptive_p": "a",
}
DEFAULT = ";".join(name for name in SAMPLERS if name != "adaptive_p")
_ALIASES = {"nucleus": "top_p", "temp": "temperature", "typ": "typ_p"}
_SPELLINGS = {name.replace("_", sign): name for name in SAMPLERS for sign in ("_", "-", "")} | _ALIASES
_LETTERS = {letter: name for name, letter in SAMPLERS.items()}


def parse_names(text: str) -> tuple[str, ...]:
    """`penalties;top-k;temp` -> their names; none for an empty text. Raises UsageError for an unknown one."""
    names = text.split(";") if text else []
    return tuple(_known(_SPELLINGS, name.lower(), name, "--samplers", SAMPLERS) for name in names)


def parse_letters(text: str) -> tuple[str, ...]:
    """`edskypmxt` -> the names of the letters. Raises UsageError for an unknown one."""
    return tuple(_known(_LETTERS, letter, letter, "--sampling-seq", _LETTERS) for letter in text)


def _known(table: dict[str, str], key: str, shown: str, flag: str, expected: dict[str, str]) -> str:
    if key in table:
        return table[key]
    if key in ("infill", "i"):
        raise UsageError(f"{flag} has the sampler 'infill', which llamakit does not have")
    raise UsageError(f"{flag} has the unknown sampler {shown!r} (expected some of {', '.join(expected)})")
