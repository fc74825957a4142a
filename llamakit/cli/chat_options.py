"""The options of a chat, which `chat` and `generate -cnv` share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from llamakit.cli.options import CHAT
from llamakit.errors import UsageError
from llamakit.files import process_escapes, read_text

SystemOption = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="System message.", rich_help_panel=CHAT)
]
SystemFileOption = Annotated[
    Path | None, typer.Option("--system-file", metavar="FILE", help="File with it.", rich_help_panel=CHAT)
]
ChatTemplateOption = Annotated[
    str | None,
    typer.Option(
        "--chat-template",
        metavar="NAME|FILE",
        help="Template instead of the model's own: one of llama.cpp's names, or a Jinja file.",
        rich_help_panel=CHAT,
    ),
]
SingleTurnOption = Annotated[
    bool, typer.Option("--single-turn", help="Answer one message, and end.", rich_help_panel=CHAT)
]


@dataclass(frozen=True)
class ChatSetup:
    """What a chat starts with. message: the user's first one, empty where it is still to be read."""

    message: str
    system: str
    single_turn: bool
    json: bool
    force: bool
    offline: bool


def system_text(text: str | None, file: Path | None, *, escape: bool) -> str:
    """The system message; of a file as it is, without one trailing newline. Raises UsageError for two of them."""
    if text is not None and file is not None:
        raise UsageError("the system message is given more than once", hint="give --system or --system-file")
    if file is not None:
        return read_text(file).removesuffix("\n")
    return process_escapes(text) if text and escape else text or ""


def refuse_without_chat(**options: object) -> None:
    """Raises UsageError for the first option, by its name here, that is set although nobody wants to chat."""
    for name, value in options.items():
        if value:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} is of a chat", hint="add -cnv, or use: llamakit chat")
