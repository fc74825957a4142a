"""What a person can tell the chat instead of the model: lines that begin with a slash."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamakit.cli import render
from llamakit.cli.sources import local
from llamakit.errors import UsageError
from llamakit.files import escape_control, is_same_file

if TYPE_CHECKING:
    from llamakit.cli.loading import Loaded
    from llamakit.inference.conversation import Conversation, Report

_COMMAND = re.compile(r"/[a-z]+(\s.*)?", re.DOTALL)
_LARGEST_FLOAT32 = 3.4e38
_HELP = (
    ("/help", "this list"),
    ("/system TEXT", 'change the system message; alone: show it, with "": take it away'),
    ("/lora FILE", "put an adapter on instead of those before; alone: show them, with off: take them away"),
    ("/scale S", "how much the adapters count, 0 to 1 or any other number"),
    ("/save FILE", "write the conversation as JSON, a list of messages"),
    ("/load FILE", "go on with such a conversation instead of this one"),
    ("/regen", "draw another answer to the last message"),
    ("/undo", "take back the last message and its answer"),
    ("/clear", "forget everything but the system message"),
    ("/quit", "end; so do /bye, /exit and Ctrl-D"),
    ("", ""),
    ("line\\", "a backslash at its end: the message goes on in the next line"),
    ('"""', "begins and ends a message of several lines"),
    ("//text", "a message that begins with a slash"),
    ("Ctrl-C", "stops an answer, which stays as far as it came; twice at the prompt: end"),
)


class Quit(Exception):
    """The chat is over."""


@dataclass
class Commands:
    """The commands on one conversation. force, offline: as on the command line, for adapters to come."""

    conversation: Conversation
    loaded: Loaded
    force: bool
    offline: bool

    def run(self, line: str) -> Generator[Report, None, None] | None:
        """Do what a line asks for, and give the answer that has to be shown, if any.

        Raises Quit, and LlamakitError for what cannot be done: then nothing has changed.
        """
        name, *argument = line.split(maxsplit=1)
        command = self._table().get(name)
        if command is None:
            raise UsageError(f"unknown command {name}", hint="/help lists them; // begins a message with a slash")
        return command("".join(argument).strip())

    def _table(self) -> dict[str, Callable[[str], Generator[Report, None, None] | None]]:
        return {
            "/help": self._help, "/system": self._system, "/lora": self._lora, "/scale": self._scale,
            "/save": self._save, "/load": self._load, "/regen": self._regen, "/undo": self._undo,
            "/clear": self._clear, "/quit": self._quit, "/bye": self._quit, "/exit": self._quit,
        }  # fmt: skip

    def _help(self, _: str) -> None:
        for name, what in _HELP:
            render.log(f"  {name:<14}{what}".rstrip())

    def _system(self, text: str) -> None:
        if text:
            self.conversation.set_system("" if text in ('""', "''") else text)
        shown = self.conversation.system
        render.log(f"system message: {shown}" if shown else "no system message")

    def _lora(self, source: str) -> None:
        from llamakit.formats.adapter import check_adapter, read_adapter

        if source == "off":
            self.conversation.set_adapters([])
        elif source:
            adapter = read_adapter(local(os.path.expanduser(source), offline=self.offline), self.loaded.file)
            for text in check_adapter(adapter, self.loaded.file, force=self.force):
                render.note(f"{adapter.path}: {text}")
            self.conversation.set_adapters([(adapter, 1.0)])
        self._show_adapters()

    def _scale(self, text: str) -> None:
        try:
            scale = float(text)
        except ValueError:
            scale = float("nan")
        if not abs(scale) <= _LARGEST_FLOAT32:
            raise UsageError(f"/scale is '{text}' (expected a number, such as 0.5)")
        if not self.conversation.adapters:
            raise UsageError("no adapter is on", hint="/lora FILE puts one on")
        self.conversation.set_adapters([(adapter, scale) for adapter, _ in self.conversation.adapters])
        self._show_adapters()

    def _show_adapters(self) -> None:
        for adapter, scale in self.conversation.adapters:
            render.log(f"adapter: {adapter.path}, times {scale:g}")
        if not self.conversation.adapters:
            render.log("no adapter is on")

    def _save(self, name: str) -> None:
        from llamakit.formats.conversation import write_messages

        path = _path(name, "/save")
        if os.path.exists(path) and is_same_file(path, self.loaded.file.path):
            raise UsageError("is the model: a conversation cannot be saved there", path=path)
        write_messages(path, self.conversation.messages)
        render.log(f"saved {len(self.conversation.messages)} messages: {path}")

    def _load(self, name: str) -> None:
        from llamakit.formats.conversation import read_messages

        self.conversation.messages = read_messages(_path(name, "/load"))
        render.log(f"loaded {len(self.conversation.messages)} messages")
        if self.conversation.messages and self.conversation.messages[-1]["role"] == "user":
            render.hint("the last message has no answer: /regen gives one")

    def _regen(self, _: str) -> Generator[Report, None, None]:
        reports = self.conversation.say_again()
        if self.conversation.config.temperature <= 0:
            render.hint("at temperature 0 every answer is the same: -t 0.8 draws another")
        return reports

    def _undo(self, _: str) -> None:
        render.log(f"took back: {self.conversation.undo()}")

    def _clear(self, _: str) -> None:
        self.conversation.clear()
        render.log("forgot the conversation")

    def _quit(self, _: str) -> None:
        raise Quit


def is_command(text: str) -> bool:
    """Whether a line is for the chat: /word, alone or before a space; a path such as /usr/bin is a message."""
    return _COMMAND.fullmatch(text.strip()) is not None


def _path(name: str, command: str) -> str:
    if not name:
        raise UsageError(f"{command} needs the name of a file")
    if "\0" in name or os.path.isdir(os.path.expanduser(name)):
        raise UsageError("is no name of a file", path=escape_control(name))
    return os.path.expanduser(name)  # unlike Path's, it leaves a user that is not known as it is
