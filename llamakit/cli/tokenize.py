"""`llamakit tokenize`: which tokens a text becomes, printed as llama-tokenize does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llamakit.cli import render
from llamakit.cli.options import FILES, OUTPUT, OfflineOption
from llamakit.cli.sources import local
from llamakit.errors import UsageError
from llamakit.files import escape_control, process_escapes, read_whole

if TYPE_CHECKING:
    from llamakit.tokenizer import Tokenizer


def tokenize(
    model: Annotated[
        str, typer.Option("-m", metavar="FILE", help="GGUF file with a vocabulary.", rich_help_panel=FILES)
    ],
    prompt: Annotated[str | None, typer.Option("-p", metavar="TEXT", help="The text.", rich_help_panel=FILES)] = None,
    file: Annotated[
        Path | None, typer.Option("-f", metavar="FILE", help="Read the text from a file.", rich_help_panel=FILES)
    ] = None,
    stdin: Annotated[
        bool, typer.Option("--stdin", help="Read the text from standard input.", rich_help_panel=FILES)
    ] = False,
    ids: Annotated[
        bool, typer.Option("--ids", help="Print the ids alone, as [1, 2, 3].", rich_help_panel=OUTPUT)
    ] = False,
    show_count: Annotated[
        bool, typer.Option("--show-count", help="Print the number of tokens, too.", rich_help_panel=OUTPUT)
    ] = False,
    offline: OfflineOption = False,
    no_bos: Annotated[bool, typer.Option("--no-bos", help="Add no BOS token, even where the model wants one.")] = False,
    no_parse_special: Annotated[
        bool, typer.Option("--no-parse-special", help="Read special tokens written in the text as plain text.")
    ] = False,
    no_escape: Annotated[
        bool, typer.Option("--no-escape", help=r"Take \n, \t, \' \" \\ and \xNN in the text as they are.")
    ] = False,
) -> None:
    """Print the tokens of a text, one a line: id and piece."""
    from llamakit.formats.open import open_model
    from llamakit.tokenizer import load_tokenizer

    text = _read(prompt, file, stdin)
    if not no_escape:
        text = process_escapes(text)
    tokenizer = load_tokenizer(open_model(local(model, offline=offline), n_ctx=0))
    for warning in tokenizer.warnings:
        render.warn(warning)
    found = tokenizer.encode(text, add_special=tokenizer.add_bos and not no_bos, parse_special=not no_parse_special)
    if ids:
        render.say(f"[{', '.join(map(str, found))}]")
    else:
        _print_pieces(tokenizer, found)
    if show_count:
        render.say(f"Total number of tokens: {len(found)}")


def _read(prompt: str | None, file: Path | None, stdin: bool) -> str:
    """The text, verbatim. As in llama-tokenize, standard input goes before what else is given."""
    if stdin:
        if prompt is not None or file is not None:
            render.warn("--stdin is given: -p and -f are ignored")
        return _decode(sys.stdin.buffer.read(), "<stdin>")
    if prompt is not None and file is not None:
        raise UsageError("the text is given twice (-p and -f)", hint="give only one of them")
    if file is not None:
        return _decode(read_whole(file), file)
    if prompt is None:
        raise UsageError("there is no text to tokenize", hint="give one with -p TEXT, -f FILE or --stdin")
    return prompt


def _decode(data: bytes, path: str | Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"is not UTF-8 text (byte 0x{data[error.start]:02x})", path=path, line=line) from error


def _print_pieces(tokenizer: Tokenizer, ids: list[int]) -> None:
    """One line a token. A piece may be half a character: its bytes go out as they are, except to a terminal."""
    terminal = sys.stdout.isatty()
    lines = []
    for id in ids:
        piece = tokenizer.piece(id, special=True)
        if terminal:
            piece = escape_control(piece.decode("utf-8", "backslashreplace")).encode()
        lines.append(b"%6d -> '%s'\n" % (id, piece))
    sys.stdout.flush()
    sys.stdout.buffer.write(b"".join(lines))
    sys.stdout.buffer.flush()
