"""--log-file: one JSON object per step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from llamakit.errors import SaveError
from llamakit.training.report import Begin, Report, StepReport


class StepLog:
    """Writes StepReports as JSON lines; empty path: nothing. A fresh run truncates the file, a resume appends."""

    def __init__(self, path: str, *, append: bool) -> None:
        self._path, self._append = path, append

    def follow(self, reports: Iterable[Report]) -> Iterator[Report]:
        """Pass reports on, writing each step's line before it. Raises SaveError."""
        for report in reports:
            if self._path and isinstance(report, Begin):
                self._write("a" if self._append else "w", end_of_cut_line(self._path) if self._append else "")
            if self._path and isinstance(report, StepReport):
                self._write("a", json.dumps(step_record(report)) + "\n")
            yield report

    def _write(self, mode: str, text: str) -> None:
        try:
            with Path(self._path).open(mode, encoding="ascii") as file:
                file.write(text)
        except OSError as error:
            raise SaveError(f"cannot write the log: {error.strerror or error}", path=self._path) from error


def end_of_cut_line(path: str | os.PathLike[str]) -> str:
    """What to write first when a file of lines is gone on with: a newline where a crash cut its last line, else
    nothing. The next line would continue the broken one, and be lost with it. Raises SaveError."""
    try:
        with Path(path).open("rb") as file:
            if not file.seek(0, os.SEEK_END):
                return ""
            file.seek(-1, os.SEEK_END)
            return "" if file.read() == b"\n" else "\n"
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise SaveError(f"cannot go on with the log: {error.strerror or error}", path=path) from error


def step_record(report: StepReport) -> dict[str, float | int | None]:
    """The fields of a line: step loss lr tok_per_s elapsed_s, and val_loss val_ppl where evaluated.

    A loss that is no number is null: JSON has no word for it.
    """
    record: dict[str, float | int | None] = {
        "step": report.step,
        "loss": _number(report.loss),
        "lr": report.lr,
        "tok_per_s": report.tok_per_s,
        "elapsed_s": report.elapsed_s,
    }
    if report.val_loss is not None and report.val_ppl is not None:
        record |= {"val_loss": _number(report.val_loss), "val_ppl": _number(report.val_ppl)}
    return record


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
