"""The options of `generate` for where a text ends, what stands around a prompt, and several prompts at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llamakit.cli.options import COMPUTE, OUTPUT, SAMPLING
from llamakit.files import process_escapes

PROMPT = "Prompt"

ReversePromptOption = Annotated[
    list[str] | None,
    typer.Option(
        "-r",
        "--reverse-prompt",
        metavar="TEXT",
        help="End after this text, and show it; repeatable.",
        rich_help_panel=SAMPLING,
        show_default=False,
    ),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        metavar="TEXT",
        help="End before this text, and do not show it; repeatable.",
        rich_help_panel=SAMPLING,
        show_default=False,
    ),
]
KeepOption = Annotated[
    int,
    typer.Option(
        "--keep", help="With --context-shift: prompt tokens that stay; -1: all of them.", rich_help_panel=SAMPLING
    ),
]
ContextShiftOption = Annotated[
    bool,
    typer.Option(
        "--context-shift/--no-context-shift",
        help="When the context is full, forget half of it and go on.",
        rich_help_panel=SAMPLING,
    ),
]
InPrefixOption = Annotated[
    str,
    typer.Option(
        "--in-prefix",
        metavar="TEXT",
        help="Put before the prompt; control tokens count in it, and no longer in the prompt.",
        rich_help_panel=PROMPT,
        show_default=False,
    ),
]
InSuffixOption = Annotated[
    str,
    typer.Option(
        "--in-suffix",
        metavar="TEXT",
        help="Put after the prompt; likewise.",
        rich_help_panel=PROMPT,
        show_default=False,
    ),
]
PromptsOption = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help='Many prompts, one a line or JSON lines with "prompt"; -: standard input. Prints JSON lines.',
        rich_help_panel=PROMPT,
        show_default=False,
    ),
]
ParallelOption = Annotated[
    int, typer.Option("-np", "--parallel", help="How many of --prompts run at once.", rich_help_panel=COMPUTE)
]
LogprobsOption = Annotated[
    int | None,
    typer.Option(
        "--logprobs",
        metavar="N",
        help="Show each token's log-probability, and the N likeliest: on stderr, or in --json.",
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]
VerboseOption = Annotated[
    bool, typer.Option("-v", "--verbose", help="Show the chain of samplers on stderr.", rich_help_panel=OUTPUT)
]


def texts(given: list[str] | None, *, escape: bool) -> tuple[str, ...]:
    """The texts of an option that may be repeated, escapes in them processed if `escape`."""
    return tuple(process_escapes(text) if escape else text for text in given or ())
