"""--log-file: one JSON object per step; in the run folder of train also per start and evaluation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from llamakit.errors import SaveError
from llamakit.training.report import Begin, Evaluation, NewModel, StepReport

_Told = TypeVar("_Told")


class StepLog:
    """Writes StepReports as JSON lines; empty path: nothing. A fresh run truncates the file, a resume appends.

    events: write the metrics.jsonl of a run folder: a line where each go of a run starts and one for each evaluation,
    and more of a step (grad_norm, step_s, tokens: of all steps so far).
    """

    def __init__(self, path: str, *, append: bool, events: bool = False) -> None:
        self._path, self._append, self._events = path, append, events
        self._tokens, self._elapsed_s = 0, 0.0

    def follow(self, reports: Iterable[_Told]) -> Iterator[_Told]:
        """Pass reports on, writing each one's line before it. Raises SaveError."""
        for report in reports:
            if self._path:
                self._take(report)
            yield report

    def _take(self, report: object) -> None:
        match report:
            case NewModel():
                self._tokens = report.tokens
            case Begin():
                mended = end_of_cut_line(self._path) if self._append else ""
                start = {"event": "start", "step": report.first_iteration, "tokens": self._tokens}
                self._write("a" if self._append else "w", mended + (_line(start) if self._events else ""))
            case StepReport():
                self._tokens, self._elapsed_s = report.n_tokens, report.elapsed_s
                more = {"grad_norm": _number(report.grad_norm), "step_s": report.step_s, "tokens": self._tokens}
                self._write("a", _line(step_record(report) | (more if self._events else {})))
            case Evaluation() if self._events:
                self._write("a", _line(evaluation_record(report) | {"elapsed_s": self._elapsed_s}))

    def _write(self, mode: str, text: str) -> None:
        try:
            with Path(self._path).open(mode, encoding="ascii") as file:
                file.write(text)
        except OSError as error:
            raise SaveError(f"cannot write the log: {error.strerror or error}", path=self._path) from error


def evaluation_record(report: Evaluation) -> dict[str, str | float | int | None]:
    """The fields of an evaluation's line: event step train_loss val_loss val_ppl val_bpb; null for what is no number,
    and for what was not measured."""
    values = {"train_loss": report.train_loss, "val_loss": report.loss, "val_ppl": report.ppl}
    values["val_bpb"] = report.bits_per_byte
    numbers = {name: None if value is None else _number(value) for name, value in values.items()}
    return {"event": "eval", "step": report.step} | numbers


def _line(record: Mapping[str, object]) -> str:
    return json.dumps(record) + "\n"


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
    """The fields of a line: step loss lr tok_per_s elapsed_s, divergence with an anchor, val_loss val_ppl where
    evaluated.

    A loss that is no number is null: JSON has no word for it.
    """
    record: dict[str, float | int | None] = {
        "step": report.step,
        "loss": _number(report.loss),
        "lr": report.lr,
        "tok_per_s": report.tok_per_s,
        "elapsed_s": report.elapsed_s,
    }
    if report.divergence is not None:
        record["divergence"] = _number(report.divergence)
    if report.val_loss is not None and report.val_ppl is not None:
        record |= {"val_loss": _number(report.val_loss), "val_ppl": _number(report.val_ppl)}
    return record


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
