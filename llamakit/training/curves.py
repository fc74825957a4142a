"""What a run wrote about itself, read again: metrics.jsonl of a run folder, or the file of finetune's --log-file.

A run that was resumed has written one file in several goes. They are joined into one curve: where a step stands there
twice, the later line counts, and what a broken attempt had done beyond it is left out.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from llamakit.errors import DataError, FormatError, LlamakitError, UsageError
from llamakit.files import escape_control
from llamakit.formats.strict_json import parse_object

METRICS = "metrics.jsonl"
Quantity = Literal["loss", "val_loss", "lr", "tok_per_s"]
_MAX_LINE_BYTES = 1 << 20
_MAX_STEP = 1 << 53


@dataclass(frozen=True)
class StepPoint:
    """One update. loss: mean of its batch; lr: its learning rate; elapsed_s: of all goes together; None: not told."""

    step: int
    loss: float | None = None
    lr: float | None = None
    tok_per_s: float | None = None
    grad_norm: float | None = None
    elapsed_s: float | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class EvalPoint:
    """One evaluation after `step` updates: losses in nats a token, val_bpb in bits a byte; None: not told."""

    step: int
    train_loss: float | None = None
    val_loss: float | None = None
    val_bpb: float | None = None


@dataclass(frozen=True)
class Curves:
    """One run. steps, evaluations: in order, each step once; n_resumed: how often it went on after an end; n_redone:
    steps that were done again, or given up, by that; remarks: what the reader left out, a line each."""

    name: str
    path: Path
    steps: tuple[StepPoint, ...] = ()
    evaluations: tuple[EvalPoint, ...] = ()
    n_resumed: int = 0
    n_redone: int = 0
    remarks: tuple[str, ...] = ()

    def series(self, quantity: Quantity) -> tuple[list[int], list[float]]:
        """Steps and values of a quantity, gaps left out; val_loss is what the evaluations have, the rest the steps."""
        points: Sequence[Any] = self.evaluations if quantity == "val_loss" else self.steps
        found = [(point.step, getattr(point, quantity)) for point in points]
        found = [(step, value) for step, value in found if value is not None]
        return [step for step, _ in found], [value for _, value in found]

    @property
    def best(self) -> EvalPoint | None:
        """The evaluation with the least validation loss, the first of equals; None where there is none."""
        measured = [(point.val_loss, point) for point in self.evaluations if point.val_loss is not None]
        return min(measured, key=lambda pair: pair[0])[1] if measured else None

    @property
    def n_steps(self) -> int:
        """The last step's number, 0 before the first."""
        return self.steps[-1].step if self.steps else 0

    @property
    def total_s(self) -> float | None:
        """Seconds of training, of all goes together; None where no line told."""
        return next((point.elapsed_s for point in reversed(self.steps) if point.elapsed_s is not None), None)

    @property
    def tok_per_s(self) -> float | None:
        """The median of the steps' tokens per second; None where no line told."""
        values = self.series("tok_per_s")[1]
        return statistics.median(values) if values else None


def metrics_file(path: str | os.PathLike[str]) -> Path:
    """The file with a run's numbers: of a run folder its metrics.jsonl, of anything else itself.

    Raises UsageError where it is missing.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise UsageError("does not exist", path=path, hint="name a run folder, or the file of --log-file")
    file = path / METRICS if path.is_dir() else path
    if not file.exists():
        raise UsageError(f"has no {METRICS}", path=path, hint="name the folder of a run, or the file with its numbers")
    return file


def read_curves(path: str | os.PathLike[str]) -> Curves:
    """The curves of a run folder or of a file of JSON lines, goes of a resumed run joined.

    A line that a crash cut short is left out, with a remark. Raises UsageError where there is no such file or it
    cannot be read, FormatError naming the line that is none of ours, DataError where no step and no evaluation is
    in it.
    """
    file = metrics_file(path)
    joined = _Joined()
    for number, raw, is_last in _lines(file):
        record = _record(raw, file, number, is_last=is_last)
        if record is None:
            joined.cut.append(number)
            continue
        try:
            joined.add(record)
        except ValueError as error:
            raise FormatError(str(error), path=file, line=number) from error
    if not joined.steps and not joined.evaluations:
        raise DataError("has no step and no evaluation yet", path=file)
    return Curves(
        name=_name(Path(path), file),
        path=file,
        steps=tuple(joined.steps),
        evaluations=tuple(joined.evaluations[step] for step in sorted(joined.evaluations)),
        n_resumed=joined.n_resumed,
        n_redone=joined.n_redone,
        remarks=_cut_remark(file, joined.cut),
    )


def read_runs(paths: Sequence[str | os.PathLike[str]]) -> list[Curves]:
    """The curves of several runs under names that differ: two of one name get their paths. Raises as `read_curves`."""
    runs = [read_curves(path) for path in paths]
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else replace(run, name=escape_control(os.fspath(path)))
        for run, path in zip(runs, paths, strict=True)
    ]


def _name(path: Path, file: Path) -> str:
    folder = path if path.is_dir() else path.parent
    return escape_control(folder.resolve().name if file.name == METRICS else file.stem) or "run"


def _cut_remark(file: Path, cut: Sequence[int]) -> tuple[str, ...]:
    if not cut:
        return ()
    which = f"line {cut[0]} was" if len(cut) == 1 else f"{len(cut)} lines (the first is {cut[0]}) were"
    return (f"{file}: {which} cut short when a run was ended, and left out",)


def _lines(file: Path) -> Iterator[tuple[int, bytes, bool]]:
    """(number from 1, line, whether the file ends in it without a newline). Raises UsageError, FormatError."""
    try:
        with file.open("rb") as lines:
            number = 0
            while raw := lines.readline(_MAX_LINE_BYTES + 1):
                number += 1
                if len(raw) > _MAX_LINE_BYTES:
                    reason = f"is too long for a line of a run (expected at most {_MAX_LINE_BYTES} bytes)"
                    raise FormatError(reason, path=file, line=number)
                yield number, raw.strip(b"\r\n\t \0"), not raw.endswith(b"\n")  # a crash may leave zeros at the end
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror or error}", path=file) from error


def _record(raw: bytes, file: Path, number: int, *, is_last: bool) -> dict[str, Any] | None:
    """The object of a line, {} for an empty one, None for one that was cut short."""
    if not raw:
        return {}
    try:
        return parse_object(raw, file, "the line")
    except LlamakitError as error:
        if raw.startswith(b"{") and (is_last or not raw.endswith(b"}")):
            return None
        raise FormatError(error.reason, path=file, line=number) from error


@dataclass
class _Joined:
    """The goes of one run on their way to being one."""

    steps: list[StepPoint] = field(default_factory=list)
    evaluations: dict[int, EvalPoint] = field(default_factory=dict)
    cut: list[int] = field(default_factory=list)
    n_resumed: int = 0
    n_redone: int = 0
    _begun: bool = False
    _before_s: float = 0.0
    _last_s: float = 0.0

    def add(self, record: dict[str, Any]) -> None:
        """Take one line's object. Raises ValueError saying which value cannot be."""
        event = record.get("event", "step" if "step" in record else None)
        if event == "start":
            self._begin()
        elif event == "eval":
            self._add_evaluation(record)
        elif event == "step":
            self._add_step(record)

    def _begin(self) -> None:
        if self._begun:
            self.n_resumed += 1
            self._before_s = self._elapsed()
            self._last_s = 0.0
        self._begun = True

    def _elapsed(self) -> float:
        """Seconds of the goes so far."""
        return next((point.elapsed_s for point in reversed(self.steps) if point.elapsed_s is not None), 0.0)

    def _add_step(self, record: dict[str, Any]) -> None:
        step, elapsed_s = _step(record), _number(record, "elapsed_s")
        # finetune's log says by going back, in steps or in time, what a `start` says elsewhere.
        goes_back = bool(self.steps) and step <= self.steps[-1].step
        if self._last_s and (goes_back or (elapsed_s is not None and elapsed_s < self._last_s)):
            self._begin()
        if goes_back:
            n_kept = next(i for i, point in enumerate(self.steps) if point.step >= step)
            self.n_redone += len(self.steps) - n_kept
            del self.steps[n_kept:]
            self.evaluations = {at: point for at, point in self.evaluations.items() if at < step}
        self._begun = True
        if elapsed_s is not None:
            self._last_s = elapsed_s
            elapsed_s += self._before_s
        self.steps.append(
            StepPoint(
                step,
                _number(record, "loss"),
                _number(record, "lr"),
                _number(record, "tok_per_s"),
                _number(record, "grad_norm"),
                elapsed_s,
                _count(record, "tokens"),
            )
        )
        if record.get("val_loss") is not None:
            self._add_evaluation(record)

    def _add_evaluation(self, record: dict[str, Any]) -> None:
        self._begun = True
        step = _step(record)
        values = {name: _number(record, name) for name in ("train_loss", "val_loss", "val_bpb")}
        known = self.evaluations.get(step, EvalPoint(step))
        self.evaluations[step] = replace(known, **{name: v for name, v in values.items() if v is not None})


def _step(record: dict[str, Any]) -> int:
    step = _count(record, "step")
    if step is None:
        raise ValueError("has no 'step' (expected a whole number)")
    return step


def _count(record: dict[str, Any], key: str) -> int | None:
    value = record.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MAX_STEP:
        raise ValueError(f"{key!r} is {_shown(value)} (expected a whole number from 0)")
    return value


def _number(record: dict[str, Any], key: str) -> float | None:
    value = record.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key!r} is {_shown(value)} (expected a number or null)")
    return float(value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"
