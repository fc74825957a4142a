"""loss.png is a PNG of the asked size that shows what it should, and drawing it leaves no trace."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from llamakit.errors import SaveError, UnsupportedError, UsageError
from llamakit.training import figure
from llamakit.training.curves import Curves, read_runs
from llamakit.training.figure import save_figure, write_figure
from tests.helpers import ROOT
from tests.training.curve_files import step_line, write_lines, write_run


def size_of(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


@pytest.fixture
def runs(tmp_path: Path) -> list[Curves]:
    return read_runs(
        [write_run(tmp_path / "a$b_c"), write_run(tmp_path / "second", 60), write_run(tmp_path / "ไทย", 60)]
    )


def test_a_run_gets_its_picture(tmp_path: Path, runs: list[Curves]) -> None:
    path = save_figure(runs[0], tmp_path)
    assert path == tmp_path / "loss.png" and size_of(path) == (1200, 800)
    before = path.read_bytes()
    save_figure(runs[0], tmp_path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a$b_c", "loss.png", "second", "ไทย"]


def test_what_is_drawn(runs: list[Curves]) -> None:
    """Three panels; of one run training and validation, of several their names; the best is told."""
    from matplotlib.figure import Figure

    with figure._matplotlib():
        one, several = Figure(), Figure()
        figure._overview(one, runs[:1])
        figure._overview(several, runs)
    labels = [[text.get_text() for text in f.axes[0].get_legend().get_texts()] for f in (one, several)]
    assert labels[0] == ["training", "validation: best 2.0000 at step 60"]
    assert labels[1][:2] == ["a$b_c", "a$b_c, validation: best 2.0000 at step 60"] and len(labels[1]) == 6
    assert [axes.get_ylabel() for axes in one.axes] == ["loss", "learning rate", "tokens per second"]
    assert list(one.axes[1].lines[0].get_ydata()) == [5e-4] * 100
    assert one.axes[2].get_ylim()[0] == 0
    assert one.axes[0].lines[0].get_xdata()[-1] == 100


def test_sizes_and_quantities(tmp_path: Path, runs: list[Curves]) -> None:
    write_figure(runs, tmp_path / "x.png", quantity="val_loss", width=640, height=480)
    assert size_of(tmp_path / "x.png") == (640, 480)
    with pytest.raises(UsageError, match="a picture of 10 x 800 pixels"):
        write_figure(runs, tmp_path / "x.png", width=10)


def test_a_run_of_one_step_and_of_losses_that_are_none(tmp_path: Path) -> None:
    lines = [[step_line(1)], [step_line(n, loss=None, tok_per_s=None) for n in range(1, 50)]]
    runs = read_runs([write_lines(tmp_path / str(i), those) for i, those in enumerate(lines)])
    for run in runs:
        write_figure([run], tmp_path / "x.png", width=400, height=300)
        assert size_of(tmp_path / "x.png") == (400, 300)


def test_nothing_stays_changed(tmp_path: Path, runs: list[Curves]) -> None:
    import matplotlib as mpl

    mpl.rcParams["font.size"] = 23
    filters = list(warnings.filters)
    try:
        save_figure(runs[0], tmp_path)
        assert mpl.rcParams["font.size"] == 23 and warnings.filters == filters
    finally:
        mpl.rcdefaults()


@pytest.mark.slow
def test_no_window_and_no_pyplot_whatever_the_surroundings_say(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 10)
    program = (
        "from llamakit.training.curves import read_curves; from llamakit.training.figure import save_figure;"
        f"save_figure(read_curves({str(tmp_path / 'run')!r}), {str(tmp_path)!r});"
        "import sys; print({'matplotlib.pyplot', 'tkinter'} & set(sys.modules))"
    )
    environment = {"PATH": "/usr/bin", "HOME": str(tmp_path), "MPLBACKEND": "tkagg",
                   "PYTHONPATH": ":".join([str(ROOT), *sys.path])}  # fmt: skip
    (tmp_path / ".config" / "matplotlib").mkdir(parents=True)
    (tmp_path / ".config" / "matplotlib" / "matplotlibrc").write_text("text.usetex: True\nfigure.dpi: 7\n")
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stdout) == (0, "set()\n"), result.stderr
    assert size_of(tmp_path / "loss.png") == (1200, 800)


def test_without_matplotlib_it_says_so(tmp_path: Path, runs: list[Curves], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match="need the package matplotlib") as caught:
        save_figure(runs[0], tmp_path)
    assert caught.value.hint == "pip install matplotlib" and not (tmp_path / "loss.png").exists()


def test_a_folder_that_is_none(tmp_path: Path, runs: list[Curves]) -> None:
    with pytest.raises(SaveError):
        save_figure(runs[0], tmp_path / "none")
