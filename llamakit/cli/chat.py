"""`llamakit chat`: talk with a model. It is `generate -cnv` with the options that a chat has a use for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from llamakit.cli.generate import generate
from llamakit.cli.options import CHAT, OUTPUT

#: options of a completion alone
_NOT_IN_CHAT = {
    "prompt", "conversation", "no_display_prompt", "keep", "context_shift", "in_prefix", "in_suffix", "prompts",
    "parallel",
}  # fmt: skip
#: what these mean in a chat
_MEANING = {
    "prompt_option": Annotated[
        str | None, typer.Option("-p", metavar="TEXT", help="The first message.", rich_help_panel=CHAT)
    ],
    "prompt_file": Annotated[
        Path | None, typer.Option("-f", metavar="FILE", help="File with the first message.", rich_help_panel=CHAT)
    ],
    "no_escape": Annotated[
        bool, typer.Option("--no-escape", help=r"Leave \n ... in -p and --system as they are.", rich_help_panel=CHAT)
    ],
    "json": Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each answer.", rich_help_panel=OUTPUT)
    ],
}


def _with_options_of(command: Callable[..., Any]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a function the signature of `generate`, less what is no option of a chat."""

    def decorate(function: Callable[..., int]) -> Callable[..., int]:
        signature = inspect.signature(command, eval_str=True)
        options = [
            option.replace(annotation=_MEANING.get(name, option.annotation))
            for name, option in signature.parameters.items()
            if name not in _NOT_IN_CHAT
        ]
        function.__annotations__ = {option.name: option.annotation for option in options} | {"return": int}
        vars(function)["__signature__"] = signature.replace(parameters=options)
        return function

    return decorate


@_with_options_of(generate)
def chat(**options: Any) -> int:
    """Talk with a model, in its own chat template; lines of standard input are messages, /help lists what else."""
    return generate(conversation=True, **options)
