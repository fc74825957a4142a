from __future__ import annotations

import io
import json

import numpy as np
import pytest

from llamakit.cli import render


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> tuple[Terminal, Terminal]:
    """Standard output and error as a terminal; no fixture, because pytest replaces both once more before the test."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out, err = Terminal(), Terminal()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    return out, err


def test_labelled_lines_go_to_stderr_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    render.error("a\x1b[2J\nb")
    render.warn("w")
    render.note("n")
    render.hint("h")
    render.log("l")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: a\\x1b[2J\\x0ab\nwarning: w\nnote: n\nhint: h\nl\n"


def test_colours_only_on_a_terminal_and_not_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    _, err = terminal(monkeypatch)
    render.warn("w")
    assert err.getvalue() == "\x1b[33;1mwarning: \x1b[0mw\n"
    monkeypatch.setenv("NO_COLOR", "1")
    render.warn("w")
    assert err.getvalue().endswith("\nwarning: w\n")
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not render.has_color(err)


def test_generated_text_is_raw_in_a_pipe_and_harmless_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    render.stream("a\tb\n\x1b[2J")
    assert capsys.readouterr().out == "a\tb\n\x1b[2J"
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    monkeypatch.setattr("sys.stdout", out)
    render.stream("a\tb\n\x1b[2J")
    assert out.getvalue() == "a\tb\n\\x1b[2J"


def test_json_is_one_ascii_line_of_plain_values(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_json({"a": np.float32(1.5), "b": np.arange(2), "c": float("nan"), "d": (1, "é\x9b\udc80")})
    line = capsys.readouterr().out
    assert line.isascii() and line.count("\n") == 1
    assert json.loads(line) == {"a": 1.5, "b": [0, 1], "c": None, "d": [1, "é\x9b\udc80"]}


def test_table_aligns_and_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    render.table(("name", "bytes"), [("a\x1b", 5), ("long name", 12345)], right=(1,))
    assert capsys.readouterr().out == "name       bytes\na\\x1b          5\nlong name  12345\n"
    render.table(("empty",), [])
    assert capsys.readouterr().out == "empty\n"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (97_999_999, "98 MB"),
        (3.8e9, "3.8 GB"),
        (999_600, "1.0 MB"),
        (2e12, "2.0 TB"),
    ],
)
def test_human_bytes(count: float, text: str) -> None:
    assert render.human_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12"), (292_800, "292.80 K"), (134_515_008, "134.52 M"), (1.1e9, "1.10 B")]
)
def test_human_count(count: float, text: str) -> None:
    assert render.human_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "human", "clock"),
    [(0.0123, "12 ms", "12.3ms"), (12.34, "12.3 s", "00:00:12"), (245, "4 min 05 s", "00:04:05"), (7800, "2 h 10 min", "02:10:00"), (90061, "25 h 01 min", "1d 01:01:01")],
)  # fmt: skip
def test_durations(seconds: float, human: str, clock: str) -> None:
    assert render.human_duration(seconds) == human
    assert render.clock(seconds) == clock


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with render.Progress("work", 3, fields=("loss",)) as bar:
        bar.update(1, loss=2.5)
        bar.log("said\x1b")
    assert capsys.readouterr().err == "said\\x1b\n"
    assert not bar.visible


def test_progress_draws_a_bar_with_its_fields_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    _, err = terminal(monkeypatch)
    with render.Progress("work [red]x", 3, fields=("loss",)) as bar:
        bar.update(3, loss="2.5 [bold]")
        bar.log("saving to [a].gguf")
    text = err.getvalue()
    assert "work [red]x" in text and "3/3" in text and "loss 2.5 [bold]" in text and "saving to [a].gguf" in text
