"""`llamakit plot`: curves on a terminal, over a pipe, as PNG, as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llamakit.cli import render
from llamakit.cli.plot_canvas import Line, draw, legend
from tests.helpers import ROOT, assert_error, called, cli
from tests.training.curve_files import step_line, write_lines, write_run

BRAILLE = re.compile("[\u2801-\u28ff]")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with two runs."""
    write_run(tmp_path / "small")
    write_run(tmp_path / "large", 60)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def plotted(out: str) -> list[str]:
    """The rows of the drawing."""
    return [line for line in out.splitlines() if re.match(r" *[\d.,e-]*[│┤|+]", line)]


def test_one_run(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = called(capfd, "plot", "small", "--width", "60", "--height", "12")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "loss by step" and max(map(len, lines[:13])) <= 60
    rows = plotted(result.stdout)
    assert len(rows) == 10
    # It falls: dots begin in the left upper corner and end in the right lower one.
    left = [row for row, line in enumerate(rows) if BRAILLE.search(line[:8])]
    right = [row for row, line in enumerate(rows) if BRAILLE.search(line[-6:]) and len(line) > 52]
    assert left[0] == 0 and min(right) >= 7
    assert sum(row.count("o") for row in rows) == 5 and "o validation" in result.stdout
    assert re.search(r"^small +100 +2\.\d+ +2\.0000 +60 +4,050 +50\.0 s$", result.stdout, re.MULTILINE)


def test_several_runs_are_told_apart_without_colour(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = called(capfd, "plot", "small", "large/metrics.jsonl", "--y", "val_loss")
    assert result.returncode == 0 and "\x1b" not in result.stdout
    assert "* small   + large" in result.stdout and not BRAILLE.search(result.stdout)
    drawn = "".join(plotted(result.stdout))
    assert drawn.count("*") > 30 and drawn.count("+") > 20


@pytest.mark.parametrize("quantity", ["loss", "val_loss", "lr", "tok_per_s"])
def test_quantities(place: Path, capfd: pytest.CaptureFixture[str], quantity: str) -> None:
    result = called(capfd, "plot", "small", "--y", quantity)
    assert result.returncode == 0 and BRAILLE.search(result.stdout)
    assert bool(re.search("^ *0┤", result.stdout, re.MULTILINE)) == (quantity in ("lr", "tok_per_s"))


def test_a_terminal_gets_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "has_color", lambda _stream: True)
    lines = [Line("a", [1, 2, 3], [3.0, 2.0, 1.0], 0), Line("b", [1, 2, 3], [1.0, 2.0, 3.0], 1)]
    rows = draw(lines, 40, 10, unicode=True, color=True, from_zero=False)
    assert any("\x1b[36;1m" in row for row in rows) and any("\x1b[33;1m" in row for row in rows)
    plain = [re.sub(r"\x1b\[[\d;]*m", "", row) for row in rows]
    assert all(len(row) <= 40 for row in plain) and BRAILLE.search("".join(plain))
    assert "a" in legend(lines, unicode=True, color=True)


def test_ascii_where_the_output_takes_no_more(place: Path) -> None:
    result = cli("plot", "small", env={"PYTHONIOENCODING": "ascii", "COLUMNS": "70"})
    assert result.returncode == 0 and result.stdout.isascii() and "\\u" not in result.stdout
    assert result.stdout.count("*") > 40 and "+----" in result.stdout


def test_a_single_point_and_a_level_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for i, lines in enumerate(([step_line(5)], [step_line(n, loss=3.0) for n in range(1, 9)])):
        result = called(capfd, "plot", write_lines(tmp_path / str(i), lines), "--width", "30", "--height", "6")
        assert result.returncode == 0 and BRAILLE.search(result.stdout)


def test_a_png(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = called(capfd, "plot", "small", "large", "-o", "curves.png", "--width", "500", "--height", "400")
    assert result.returncode == 0 and re.fullmatch(r"wrote curves\.png \(\d+ kB\)\n", result.stdout)
    data = Path("curves.png").read_bytes()
    assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (500, 400)
    both = called(capfd, "plot", "small", "--y", "lr", "-o", "lr.png", "--json")
    assert json.loads(both.stdout)["file"] == "lr.png" and Path("lr.png").exists()


@pytest.mark.slow
def test_a_png_without_a_word_where_there_is_no_home(place: Path) -> None:
    """matplotlib would tell of the cache of fonts that it cannot keep."""
    environment = {"HOME": str(place / "small" / "metrics.jsonl"), "TMPDIR": str(place)}
    result = cli("plot", "small", "-o", "x.png", cwd=place, env=environment)
    assert (result.returncode, result.stderr) == (0, "") and (place / "x.png").exists()


def test_json(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    value = json.loads(called(capfd, "plot", "small", "large", "--json").stdout)
    small, large = value["runs"]
    assert (small["name"], small["n_steps"], small["best_val_loss"], small["best_step"]) == ("small", 100, 2.0, 60)
    assert small["steps"]["loss"][9] == step_line(10)["loss"] and len(large["steps"]["step"]) == 60
    assert small["evaluations"]["val_bpb"][2] == 1.0 and value["file"] is None


def test_what_a_resume_and_a_crash_left_is_told(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    goes = [{"event": "start"}, *map(step_line, range(1, 9)), {"event": "start"}, *map(step_line, range(6, 12))]
    write_lines(place / "out", goes, end='{"step": 12')
    result = called(capfd, "plot", "out")
    assert result.returncode == 0
    assert "warning: out/metrics.jsonl: line 17 was cut short when a run was ended, and left out" in result.stderr
    assert "note: out: resumed once, 3 steps were done again or given up" in result.stderr


def test_a_run_without_the_quantity_is_left_out(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_lines(place / "bare.jsonl", [step_line(1), step_line(2)])
    result = called(capfd, "plot", "small", "bare.jsonl", "--y", "val_loss")
    assert result.returncode == 0 and "warning: bare.jsonl: has no val_loss; left out" in result.stderr
    assert_error(called(capfd, "plot", "bare.jsonl", "--y", "val_loss"), 2, "bare.jsonl: has no val_loss", "hint: ")


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["none"], ("none: does not exist", "hint: name a run folder")),
        (["."], (".: has no metrics.jsonl",)),
        (["broken.jsonl"], ("broken.jsonl:2: the line is no sound JSON",)),
        (["small", "-o", "x.jpg"], ("x.jpg: is no name for a PNG",)),
        (["small", "-o", "none/x.png"], ("the output directory cannot be written",)),
        (["log.png", "-o", "log.png"], ("log.png: is an input",)),
        (["small", "-o", "x.png", "--width", "5"], ("5 x 800 pixels",)),
        (["small", "--width", "5"], ("--width is 5 (expected 30 to 1000",)),
        (["small", "--height", "5000"], ("--height is 5000",)),
        (["small", "--y", "speed"], ("--y", "'loss', 'val_loss', 'lr', 'tok_per_s'")),
        ([], ("missing argument",)),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_errors(place: Path, capfd: pytest.CaptureFixture[str], words: list[str], fragments: tuple[str, ...]) -> None:
    write_lines(place / "broken.jsonl", [step_line(1)], end="<html>\n")
    (place / "log.png").write_text(json.dumps(step_line(1)) + "\n")
    assert_error(called(capfd, "plot", *words), 2, *fragments)
    assert not (place / "x.png").exists() and (place / "log.png").read_text().startswith("{")


def test_plot_loads_neither_torch_nor_matplotlib(place: Path) -> None:
    program = (
        "import sys; from llamakit.cli import run; code = run(['plot', 'small']);"
        "print(sorted({'torch', 'matplotlib', 'rich'} & set(sys.modules)), code, file=sys.stderr)"
    )
    environment: dict[str, Any] = {"PATH": "/usr/bin", "PYTHONPATH": ":".join([str(ROOT), *sys.path])}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stderr == "[] 0\n"
