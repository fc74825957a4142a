"""Where the messages of a chat come from: a person at a terminal, or lines of a pipe or a file."""

from __future__ import annotations

import os
import sys
from typing import Protocol

from llamakit.cli import render
from llamakit.errors import UsageError

_LONGEST_LINE_BYTES = 16 << 20
_PROMPT, _MORE, _FENCE = "> ", ". ", '"""'


class Lines(Protocol):
    """A source of lines. is_terminal: whether a person types them."""

    is_terminal: bool

    def read(self, prompt: str) -> str | None:
        """The next line without its end, None after the last one; a person is asked with the prompt."""
        ...


def standard_input() -> Lines:
    """The lines of standard input. Read by its number: what sys.stdin may have read ahead is none of ours."""
    return Typed() if os.isatty(0) and sys.stdin is not None else Piped()


class Typed:
    """Lines that a person types, with the keys of readline where there is one."""

    is_terminal = True

    def __init__(self) -> None:
        try:
            import readline
        except ImportError:
            self._has_readline = False
        else:
            self._has_readline = bool(readline)

    def read(self, prompt: str) -> str | None:
        """The next line. Raises KeyboardInterrupt for Ctrl-C, and asks again for a line that is no text."""
        while True:
            try:
                line = self._ask(prompt)
                if line is not None:
                    line.encode("utf-8")  # a terminal's bytes may come as halves of surrogate pairs
                return line
            except UnicodeError:
                render.error("this line is not UTF-8 text")

    def _ask(self, prompt: str) -> str | None:
        if sys.stdout.isatty():
            try:
                return input(render.prompt(prompt, for_readline=self._has_readline))
            except EOFError:
                return None
        print(prompt, end="", file=sys.stderr, flush=True)  # stdout has the answers alone
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None


class Piped:
    """Lines of what was redirected or piped in."""

    is_terminal = False

    def __init__(self) -> None:
        """Raises UsageError where nothing can be read."""
        self._n_lines = 0
        try:
            self._file = open(0, "rb", closefd=False)  # noqa: SIM115  (as long as the chat)
        except OSError as error:
            raise UsageError(f"cannot be read: {error.strerror}", path="<stdin>") from error

    def read(self, prompt: str) -> str | None:
        """The next line. Raises UsageError for one that is no UTF-8 or has no end."""
        try:
            line = self._file.readline(_LONGEST_LINE_BYTES + 1)
        except OSError as error:
            raise UsageError(f"cannot be read: {error.strerror}", path="<stdin>") from error
        self._n_lines += 1
        if not line:
            return None
        if len(line) > _LONGEST_LINE_BYTES:
            reason = f"is too long (expected at most {_LONGEST_LINE_BYTES} bytes)"
            raise UsageError(reason, path="<stdin>", line=self._n_lines)
        try:
            return line.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise UsageError("is not UTF-8 text", path="<stdin>", line=self._n_lines) from error


def read_message(lines: Lines) -> tuple[str, bool] | None:
    """The next message, and whether it stood in quotes, which makes it no command; None at the end.

    A line is a message. One that ends with a backslash goes on with the next line, and what stands between two
    `\"\"\"` is one message, whatever it holds.
    """
    line = lines.read(_PROMPT)
    if line is None:
        return None
    if line.lstrip().startswith(_FENCE):
        return _fenced(line.lstrip().removeprefix(_FENCE), lines), True
    parts = []
    while line is not None and line.endswith("\\"):
        parts.append(line[:-1])
        line = lines.read(_MORE)
    return "\n".join([*parts, line] if line is not None else parts), False


def _fenced(line: str | None, lines: Lines) -> str:
    """Everything up to the closing quotes, or the end; the quotes may have lines of their own."""
    parts = []
    while line is not None and not line.rstrip().endswith(_FENCE):
        parts.append(line)
        line = lines.read(_MORE)
    if line is not None:
        parts.append(line.rstrip().removesuffix(_FENCE))
    if parts and not parts[0]:
        parts = parts[1:]
    return "\n".join(parts).removesuffix("\n")
