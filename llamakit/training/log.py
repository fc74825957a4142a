"""--log-file: one JSON object per step, and per evaluation of `train`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from llamakit.errors import SaveError
from llamakit.training.report import Begin, Evaluation, StepReport

T = TypeVar("T")


class StepLog:
    """Writes reports as JSON lines; empty path: nothing. A fresh run truncates the file, a resume appends."""

    def __init__(self, path: str, *, append: bool) -> None:
        self._path, self._append = path, append

    def follow(self, reports: Iterable[T]) -> Iterator[T]:
        """Pass reports on, writing the line of each before it. Raises SaveError."""
        elapsed_s = 0.0
        for report in reports:
            if self._path and isinstance(report, Begin) and not self._append:
                self._write("w", "")
            if self._path and isinstance(report, StepReport):
                elapsed_s = report.elapsed_s
                self._write("a", json.dumps(step_record(report)) + "\n")
            if self._path and isinstance(report, Evaluation) and report.train_loss is not None:
                self._write("a", json.dumps(evaluation_record(report, elapsed_s)) + "\n")
            yield report

    def _write(self, mode: str, text: str) -> None:
        try:
            with Path(self._path).open(mode, encoding="ascii") as file:
                file.write(text)
        except OSError as error:
            raise SaveError(f"cannot write the log: {error.strerror or error}", path=self._path) from error


def step_record(report: StepReport) -> dict[str, float | int | None]:
    """The fields of a line: step loss lr grad_norm step_s tok_per_s elapsed_s tokens, and val_loss val_ppl where
    evaluated.

    A loss that is no number is null: JSON has no word for it.
    """
    record: dict[str, float | int | None] = {
        "step": report.step,
        "loss": _number(report.loss),
        "lr": report.lr,
        "grad_norm": _number(report.grad_norm),
        "step_s": report.step_s,
        "tok_per_s": report.tok_per_s,
        "elapsed_s": report.elapsed_s,
        "tokens": report.n_tokens,
    }
    if report.val_loss is not None and report.val_ppl is not None:
        record |= {"val_loss": _number(report.val_loss), "val_ppl": _number(report.val_ppl)}
    return record


def evaluation_record(report: Evaluation, elapsed_s: float) -> dict[str, float | int | str | None]:
    """The fields of an evaluation's line; what was not measured is null."""
    bits = report.bits_per_byte
    return {
        "step": report.step,
        "event": "eval",
        "train_loss": None if report.train_loss is None else _number(report.train_loss),
        "val_loss": _number(report.loss) if report.n_tokens else None,
        "val_bpb": None if bits is None else _number(bits),
        "elapsed_s": elapsed_s,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
