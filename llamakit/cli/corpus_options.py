"""Options of the commands that read a corpus."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from llamakit.cli import render
from llamakit.cli.options import DATA, FILES
from llamakit.cli.sources import local

VOCABULARY = "Vocabulary"

InputsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[INPUT]...",
        help="Files and folders: text, .jsonl, .json, .csv; - is standard input.",
        show_default=False,
    ),
]
InputOption = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="FILE", help="One more INPUT; repeatable.", rich_help_panel=FILES),
]
NameOption = Annotated[
    Literal["tinyshakespeare"] | None,
    typer.Option("--name", help="A corpus by its name, where no INPUT is given.", rich_help_panel=FILES),
]
FormatOption = Annotated[
    Literal["auto", "text", "jsonl", "json", "csv"],
    typer.Option("--format", help="What the inputs are; auto goes by their names.", rich_help_panel=DATA),
]
TextKeyOption = Annotated[
    str,
    typer.Option(
        "--text-key", metavar="KEY", help="Key or column with the text; for text also story.", rich_help_panel=DATA
    ),
]
SplitOnOption = Annotated[
    Literal["file", "paragraph", "line"],
    typer.Option("--split-on", help="What a document is in a text file.", rich_help_panel=DATA),
]
ErrorsOption = Annotated[
    Literal["strict", "replace"],
    typer.Option("--errors", help="What becomes of bytes that are no UTF-8.", rich_help_panel=DATA),
]
CoverageOption = Annotated[
    float,
    typer.Option(
        "--character-coverage",
        metavar="F",
        help="Share of the characters with a token of their own; the rest is bytes.",
        rich_help_panel=VOCABULARY,
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Draws what is held out.", rich_help_panel=DATA)]


def log_reading(n_files: int, n_bytes: int) -> None:
    """What is read, on stderr, before anybody waits for it."""
    render.log(f"reading {n_files} file{'s' if n_files != 1 else ''} ({render.human_bytes(n_bytes)})")


def corpus(inputs: list[str] | None, more: list[str] | None, *, offline: bool) -> tuple[str, ...]:
    """All inputs; what is on the Hub or at a URL is fetched."""
    given = [*(inputs or ()), *(more or ())]
    return tuple(name if name == "-" else str(local(name, offline=offline)) for name in given)
