"""`llamakit plot RUN...`: the curves of runs, on the terminal or as a PNG."""

from __future__ import annotations

import codecs
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llamakit.cli import render
from llamakit.cli.options import OUTPUT, JsonOption
from llamakit.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llamakit.cli.plot_canvas import Line
    from llamakit.training.curves import Curves, Quantity

_MIN_WIDTH, _MIN_HEIGHT, _MAX_CHARACTERS = 30, 6, 1000


def plot(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or files of --log-file or metrics.jsonl.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FILE.png", help="Draw a PNG instead.", rich_help_panel=OUTPUT),
    ] = None,
    y: Annotated[
        Literal["loss", "val_loss", "lr", "tok_per_s"] | None,
        typer.Option(
            "--y", help="What to draw.", show_default="loss; with -o losses, lr and tok/s", rich_help_panel=OUTPUT
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            "--width",
            help="Characters a row, of a PNG pixels.",
            show_default="the terminal's, 1200 pixels",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(
            "--height",
            help="Rows, of a PNG pixels.",
            show_default="to fit the terminal, 800 pixels",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Draw the curves of one or more runs: losses, learning rate, tokens per second.

    Example: llamakit plot out another-run -o curves.png
    """
    from llamakit.training.curves import read_runs

    curves = read_runs(runs)
    for run in curves:
        for remark in run.remarks:
            render.warn(remark)
        if run.n_resumed:
            times = "once" if run.n_resumed == 1 else f"{run.n_resumed} times"
            redone = f", {run.n_redone} steps were done again or given up" if run.n_redone else ""
            render.note(f"{run.name}: resumed {times}{redone}")
    if y is not None:
        curves = _measured(curves, y)
    if out is not None:
        _write(curves, out, y, width, height)
    if json:
        render.print_json({"runs": [_as_json(run) for run in curves], "file": out})
    elif out is None:
        _print(_measured(curves, y or "loss"), y or "loss", width, height)
    else:
        render.say(f"wrote {out} ({render.human_bytes(out.stat().st_size)})")


def _measured(curves: list[Curves], quantity: Quantity) -> list[Curves]:
    """The runs that have a quantity; a warning for the others. Raises DataError where none has it."""
    found = [run for run in curves if run.series(quantity)[0]]
    if not found:
        hint = "llamakit plot RUN --y loss draws the training loss" if quantity == "val_loss" else None
        raise DataError(f"has no {quantity}", path=curves[0].path, hint=hint)
    for run in curves:
        if run not in found:
            render.warn(f"{run.path}: has no {quantity}; left out")
    return found


def _write(curves: Sequence[Curves], out: Path, y: Quantity | None, width: int | None, height: int | None) -> None:
    from llamakit.files import check_writable, is_same_file
    from llamakit.training.figure import write_figure

    if out.suffix.lower() != ".png":
        raise UsageError("is no name for a PNG (expected a name that ends in .png)", path=out)
    if any(is_same_file(out, run.path) for run in curves):
        raise UsageError("is an input: it would be overwritten", path=out)
    check_writable(out)
    render.quiet_matplotlib()
    write_figure(curves, out, quantity=y, width=width or 1200, height=height)


def _print(curves: Sequence[Curves], quantity: Quantity, width: int | None, height: int | None) -> None:
    from llamakit.cli.plot_canvas import draw, legend
    from llamakit.training.axes import LABELS

    columns, rows = shutil.get_terminal_size((80, 24))
    width = _within("--width", width, _MIN_WIDTH, max(_MIN_WIDTH, min(columns, 120)))
    height = _within("--height", height, _MIN_HEIGHT, max(10, min(24, rows - len(curves) - 6)))
    lines = _lines(curves, quantity)
    unicode, color = _takes_unicode(), render.has_color(sys.stdout)
    render.heading(f"{LABELS[quantity]} by step")
    from_zero = quantity in ("lr", "tok_per_s")
    for row in draw(lines, width, height, unicode=unicode, color=color, from_zero=from_zero):
        print(row)
    print(legend(lines, unicode=unicode, color=color))
    render.say()
    headers = ["run", "steps", "loss", "best validation", "at step", "tok/s", "time"]
    render.table(headers, [_cells(run) for run in curves], right=range(1, len(headers)))


def _within(option: str, value: int | None, least: int, default: int) -> int:
    if value is not None and not least <= value <= _MAX_CHARACTERS:
        raise UsageError(f"{option} is {value} (expected {least} to {_MAX_CHARACTERS} on a terminal)")
    return default if value is None else value


def _lines(curves: Sequence[Curves], quantity: Quantity) -> list[Line]:
    """What is drawn: a line for each run; of one run alone what the validation measured, too."""
    from llamakit.cli.plot_canvas import Line
    from llamakit.training.axes import smooth

    lines: list[Line] = []
    for i, run in enumerate(curves):
        steps, values = run.series(quantity)
        is_noisy = quantity in ("loss", "tok_per_s")
        name = "training" if len(curves) == 1 and quantity == "loss" else run.name
        lines.append(Line(name, steps, smooth(values) if is_noisy else values, i))
    if len(curves) == 1 and quantity == "loss":
        steps, values = curves[0].series("val_loss")
        if steps:
            lines.append(Line("validation", steps, values, 1, mark="o"))
    return lines


def _takes_unicode() -> bool:
    try:
        return codecs.lookup(sys.stdout.encoding or "ascii").name.startswith("utf")
    except LookupError:
        return False


def _cells(run: Curves) -> list[str]:
    from llamakit.training.axes import number

    losses, best = run.series("loss")[1], run.best
    return [
        run.name,
        f"{run.n_steps:,}",
        number(_last_mean(run)) if losses else "-",
        number(best.val_loss) if best is not None and best.val_loss is not None else "-",
        f"{best.step:,}" if best is not None else "-",
        f"{run.tok_per_s:,.0f}" if run.tok_per_s is not None else "-",
        render.human_duration(run.total_s) if run.total_s is not None else "-",
    ]


def _last_mean(run: Curves) -> float:
    """Mean loss of the last steps, a fortieth of all: one batch says little."""
    losses = run.series("loss")[1]
    last = losses[-max(1, len(losses) // 40) :]
    return sum(last) / len(last)


def _as_json(run: Curves) -> dict[str, Any]:
    from llamakit.training.summary import curves_json

    return curves_json(run)
