"""loss.png: the curves of one run, or of several side by side, drawn by matplotlib without a window."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamakit.errors import UnsupportedError, UsageError
from llamakit.files import atomic_path
from llamakit.training.axes import LABELS, number, smooth, thin
from llamakit.training.curves import Curves, Quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#65a30d", "#475569", "#92400e")
_VALIDATION = "#d97706"
_DPI = 120
_MAX_POINTS = 3000
_MAX_PIXELS = 20_000
_STYLE: dict[Any, object] = {  # Any: the names of settings are a type of their own in its stubs
    "axes.edgecolor": "#94a3b8",
    "axes.grid": True,
    "axes.labelcolor": "#334155",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": "#e2e8f0",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar sign in a folder's name is a dollar sign
    "xtick.color": "#64748b",
    "ytick.color": "#64748b",
}


def write_figure(
    runs: Sequence[Curves],
    path: str | os.PathLike[str],
    *,
    quantity: Quantity | None = None,
    width: int = 1200,
    height: int | None = None,
) -> None:
    """Draw the curves of one or more runs into a PNG of `width` x `height` pixels, written atomically.

    quantity: draw this alone (height 600 by default); None: losses above, learning rate and tokens per second below
    (height 800). The same runs give the same bytes with the same matplotlib. Raises UsageError for a size that cannot
    be, UnsupportedError where matplotlib is missing or broken, SaveError for what the disk refuses.
    """
    height = height or (800 if quantity is None else 600)
    if not (200 <= width <= _MAX_PIXELS and 200 <= height <= _MAX_PIXELS):
        raise UsageError(f"a picture of {width} x {height} pixels (expected 200 to {_MAX_PIXELS} each way)")
    with _matplotlib(), atomic_path(path) as temporary:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, layout="constrained")
        if quantity is None:
            _overview(figure, runs)
        else:
            axes = figure.add_subplot()
            _panel(axes, runs, quantity)
            _legend(axes)
        # Without the name of its maker: another version of it then changes what is drawn, or nothing.
        figure.savefig(temporary, format="png", metadata={"Software": None})


@contextmanager
def _matplotlib() -> Iterator[None]:
    """matplotlib with our style for a while: no window, nobody's matplotlibrc, its global settings as before."""
    hint = "pip install matplotlib"
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise UnsupportedError("pictures of curves need the package matplotlib", hint=hint) from error
    except OSError as error:  # not even a temporary folder for its cache can be written
        raise UnsupportedError(f"matplotlib cannot start: {error.strerror or error}", hint=hint) from error
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name in a script that its font has not
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def _overview(figure: Figure, runs: Sequence[Curves]) -> None:
    grid = figure.add_gridspec(2, 2, height_ratios=(2.2, 1))
    losses = figure.add_subplot(grid[0, :])
    _panel(losses, runs, "loss")
    _legend(losses)
    for column, quantity in enumerate(("lr", "tok_per_s")):
        _panel(figure.add_subplot(grid[1, column]), runs, quantity)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color="#0f172a")


def _panel(axes: Axes, runs: Sequence[Curves], quantity: Quantity) -> None:
    """One quantity of all runs; the loss with what the validation measured."""
    alone = len(runs) == 1
    for i, run in enumerate(runs):
        color = _COLORS[i % len(_COLORS)]
        if quantity != "val_loss":
            _line(axes, run, quantity, color, "training" if alone and quantity == "loss" else run.name)
        if quantity in ("loss", "val_loss"):
            label = "validation" if alone else f"{run.name}, validation"
            _validation(axes, run, _VALIDATION if alone else color, label, quantity)
    axes.set_xlabel("step")
    axes.set_ylabel(LABELS[quantity])
    if quantity == "tok_per_s":
        axes.set_ylim(bottom=0)
        axes.margins(y=0.08)
    if quantity == "lr":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
    if not axes.lines:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", color="#94a3b8", transform=axes.transAxes)


def _line(axes: Axes, run: Curves, quantity: Quantity, color: str, label: str) -> None:
    steps, values = run.series(quantity)
    if not values:
        return
    if quantity == "lr" or len(values) < 30:
        axes.plot(*thin(steps, values, _MAX_POINTS), color=color, linewidth=1.5, label=label, **_marker(len(values)))
        return
    axes.plot(*thin(steps, values, _MAX_POINTS), color=color, linewidth=0.6, alpha=0.3)
    axes.plot(*thin(steps, smooth(values), _MAX_POINTS), color=color, linewidth=1.6, label=label)


def _validation(axes: Axes, run: Curves, color: str, label: str, quantity: Quantity) -> None:
    steps, values = run.series("val_loss")
    best = run.best
    if best is None or best.val_loss is None:
        return
    label = f"{label}: best {number(best.val_loss)} at step {best.step}"
    style = "--" if quantity == "loss" else "-"
    axes.plot(steps, values, style, color=color, linewidth=1.4, marker="o", markersize=3, label=label)
    axes.plot([best.step], [best.val_loss], "o", color=color, markersize=8, markerfacecolor="none")


def _marker(n_points: int) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3.5} if n_points == 1 else {}


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right", fontsize=8)


def save_figure(run: Curves, folder: str | os.PathLike[str]) -> Path:
    """Write loss.png of one run into its folder and return its path. Raises as `write_figure`."""
    path = Path(folder) / "loss.png"
    write_figure([run], path)
    return path
