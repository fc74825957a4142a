"""Where a prompt comes from: the command line, a file, or standard input when something was piped in; and what stands
around it."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llamakit.errors import UsageError
from llamakit.files import process_escapes, read_text

if TYPE_CHECKING:
    from llamakit.tokenizer import Tokenizer


def read_prompt(
    positional: str | None, option: str | None, file: Path | None, *, escape: bool, use_stdin: bool
) -> str | None:
    """The prompt, None where there is none.

    A prompt on the command line has its escapes processed unless `escape` is False; a file's or standard input's is
    verbatim, without one trailing newline. Standard input is read when there is nothing else and it is a regular
    file or a pipe; an empty one counts as none. Raises UsageError for more than one prompt, for unreadable files
    and for what is not UTF-8.
    """
    given = [name for name, value in (("PROMPT", positional), ("-p", option), ("-f", file)) if value is not None]
    if len(given) > 1:
        raise UsageError(f"the prompt is given more than once ({' and '.join(given)})", hint="give only one of them")
    text = positional if option is None else option
    if text is not None:
        return process_escapes(text) if escape else text
    if file is not None:
        return read_text(file).removesuffix("\n")
    return (read_stdin() or None) if use_stdin else None


def read_stdin() -> str:
    """What was redirected or piped in; nothing from a terminal, a device or a closed stream."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return ""
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)) or sys.stdin is None:
        return ""
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"is not UTF-8 text (at byte {error.start})", path="<stdin>") from error


def framed_ids(tokenizer: Tokenizer, prefix: str, text: str, suffix: str) -> list[int]:
    """Ids of a prompt between --in-prefix and --in-suffix: BOS where the vocabulary wants it, then each of the three by
    itself, as llama.cpp encodes what a user types. Control tokens written out count in the prefix and the suffix alone.
    """
    ids = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    ids += tokenizer.encode(prefix, add_special=False)
    ids += tokenizer.encode(text, add_special=False, parse_special=False)
    return ids + tokenizer.encode(suffix, add_special=False)
