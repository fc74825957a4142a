"""What the commands print: product on stdout, everything else on stderr, nothing unescaped from a file.

rich is imported only for a progress bar on a terminal. Colours obey NO_COLOR, TERM=dumb and redirection.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from llamakit.errors import LlamakitError
from llamakit.files import escape_control

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_RED, _YELLOW, _GREEN, _CYAN, _DIM, _BOLD = "31;1", "33;1", "32;1", "36", "2", "1"
_CURVES = ("36;1", "33;1", "35;1", "32;1", "31;1", "34;1")
# Text that a model wrote may hold newlines and tabs, and nothing else that moves a terminal's cursor.
_NOT_ON_TERMINAL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class _Voice:
    """Whether this process says anything but errors."""

    silent = False


def be_silent() -> None:
    """From here on stdout goes nowhere, and stderr has errors alone: another process speaks for this one."""
    _Voice.silent = True
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def is_terminal(stream: IO[str] | None) -> bool:
    """Whether a person reads this stream as it is written."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def has_color(stream: IO[str] | None) -> bool:
    """Whether colours may be written to this stream (a terminal, and NO_COLOR is not set)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def _paint(text: str, code: str, stream: IO[str]) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if has_color(stream) else text


def bold(text: str) -> str:
    """Text for a heading on stdout."""
    return _paint(text, _BOLD, sys.stdout)


def good(text: str) -> str:
    """Text that is green on stdout where that has colours."""
    return _paint(text, _GREEN, sys.stdout)


def curve(text: str, index: int) -> str:
    """A piece of the drawing of curve `index`, from 0, on stdout: neighbours differ in colour."""
    return _paint(text, _CURVES[index % len(_CURVES)], sys.stdout)


def prompt(text: str, *, for_readline: bool) -> str:
    """What asks a person for a line on stdout; readline is told that colours take no place."""
    if not has_color(sys.stdout):
        return text
    start, end = ("\x01", "\x02") if for_readline else ("", "")
    return f"{start}\x1b[{_GREEN}m{end}{text}{start}\x1b[0m{end}"


def _line(label: str, code: str, text: str) -> None:
    sys.stdout.flush()
    print(_paint(label, code, sys.stderr) + escape_control(text), file=sys.stderr, flush=True)


def quiet_matplotlib() -> None:
    """Have matplotlib say errors alone: that it looks for fonts, or has no home to keep them in, helps nobody here.
    Before it is imported, since it speaks then already."""
    import logging

    logging.getLogger("matplotlib").setLevel(logging.ERROR)


def error(text: str) -> None:
    """`error: TEXT` on stderr, one line whatever the text holds."""
    _line("error: ", _RED, text)


def warn(text: str) -> None:
    """`warning: TEXT` on stderr."""
    if not _Voice.silent:
        _line("warning: ", _YELLOW, text)


def note(text: str) -> None:
    """`note: TEXT` on stderr."""
    if not _Voice.silent:
        _line("note: ", _CYAN, text)


def hint(text: str) -> None:
    """`hint: TEXT` on stderr: what to do next."""
    _line("hint: ", _CYAN, text)


def log(text: str) -> None:
    """One line on stderr without a label: what a run says about itself."""
    if not _Voice.silent:
        _line("", _DIM, text)


def loading(path: str | os.PathLike[str]) -> None:
    """`loading PATH (98 MB)` on stderr, said before the work so that nobody waits in silence."""
    from llamakit.formats.open import size_on_disk

    try:
        size = f" ({human_bytes(size_on_disk(path))})"
    except (OSError, LlamakitError):
        size = ""
    log(f"loading {os.fspath(path)}{size}")


def say(text: str = "") -> None:
    """One line of the product on stdout, control characters escaped."""
    print(escape_control(text))


def heading(text: str) -> None:
    """One line on stdout that stands out, control characters escaped."""
    print(bold(escape_control(text)), flush=True)


def stream(text: str) -> None:
    """A piece of generated text on stdout at once: raw into a file or pipe, made harmless on a terminal."""
    if is_terminal(sys.stdout):
        text = _NOT_ON_TERMINAL.sub(lambda m: f"\\x{ord(m[0]):02x}", text)
    sys.stdout.write(text)
    sys.stdout.flush()


def print_json(value: Any, *, flush: bool = False) -> None:
    """One JSON value on one line of stdout; numbers that JSON has no word for become null. flush: at once."""
    # ASCII: no character of a file's metadata can then move a terminal's cursor or break a pipe's encoding.
    print(json.dumps(_plain(value), ensure_ascii=True, allow_nan=False), flush=flush)


def _plain(value: Any) -> Any:
    """The value in JSON's types: mappings, sequences, numpy arrays and numbers, paths."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # numpy, which this module does not import
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()) -> None:
    """An aligned table on stdout; `right` names the columns that line up on the right (numbers)."""
    cells = [[escape_control(str(cell)) for cell in row] for row in rows]
    widths = [max(len(header), *(len(row[i]) for row in cells), 0) for i, header in enumerate(headers)]

    def join(row: Sequence[str]) -> str:
        padded = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(padded).rstrip()

    print(bold(join(headers)))
    for row in cells:
        print(join(row))


def human_bytes(count: float) -> str:
    """98 MB, 3.8 GB: decimal units, two or three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 9.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_count(count: float) -> str:
    """292.80 K, 134.52 M, 1.10 B: as llama.cpp prints parameters."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{count / limit:.2f} {unit}"
    return str(int(count))


def human_duration(seconds: float) -> str:
    """850 ms, 12.3 s, 4 min 05 s, 2 h 10 min."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def clock(seconds: float) -> str:
    """A duration as the old finetune prints it: 123.4ms below a second, then [Nd ]HH:MM:SS."""
    if seconds < 1:
        return f"{seconds * 1000:.1f}ms"
    whole = int(seconds)
    days, rest = divmod(whole, 86400)
    return (f"{days}d " if days else "") + f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"


class Progress:
    """A progress bar on stderr where that is a terminal, nothing anywhere else.

    with render.Progress("training", total=30, fields=("loss", "lr", "tok/s")) as bar:
        bar.update(1, loss="2.31", lr="1.0e-03")
    """

    def __init__(
        self, description: str, total: float | None, *, fields: Sequence[str] = (), beside_output: bool = False
    ) -> None:
        """beside_output: lines grow on stdout meanwhile; a bar on the same terminal would write over them."""
        self._hidden = beside_output and is_terminal(sys.stdout)
        self._description, self._total = escape_control(description), total
        self._fields = dict.fromkeys(fields, "")
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    @property
    def visible(self) -> bool:
        """Whether a bar is drawn; a caller prints plain lines where not."""
        return is_terminal(sys.stderr) and not self._hidden

    def __enter__(self) -> Progress:
        if self.visible:
            self._bar = _rich_bar()
            self._bar.start()
            self._task = self._bar.add_task(self._description, total=self._total, fields="")
        return self

    def update(self, completed: float, **fields: object) -> None:
        """Set how much is done and the named fields shown behind the bar."""
        self._fields |= {name: str(value) for name, value in fields.items()}
        if self._bar is not None and self._task is not None:
            shown = "  ".join(f"{name} {value}" for name, value in self._fields.items() if value)
            self._bar.update(self._task, completed=completed, fields=escape_control(shown))

    def set_total(self, total: float) -> None:
        """How much there is to do, where that became known later."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total)

    def log(self, text: str) -> None:
        """A line above the bar, or a plain line on stderr."""
        if self._bar is None:
            log(text)
        else:
            self._bar.console.print(escape_control(text), markup=False, highlight=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _rich_bar() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    # markup=False: square brackets in a file name are a file name, not a style.
    text = TextColumn("{task.description}", markup=False)
    fields = TextColumn("{task.fields[fields]}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), fields, TimeElapsedColumn(), TextColumn("eta"), Remaining())
    return Progress(*columns, console=Console(stderr=True, no_color=not has_color(sys.stderr)))
