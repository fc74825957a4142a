"""What is known about a run when it is over; report.html and report.json are made of nothing else."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamakit.errors import UsageError
from llamakit.training.curves import Curves

if TYPE_CHECKING:
    from llamakit.training.report import Sample


@dataclass(frozen=True)
class RunFile:
    """A file of the run, or a folder with all that is in it. name: as a user finds it from the run's folder."""

    name: str
    n_bytes: int


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One run of `train` or `finetune`, for its report. Mappings are shown as tables, in their order.

    title: the heading; command: the line of a shell that does the same again; outcome: why it ended; started: date and
    time; duration_s: seconds from start to end; model, data, results, machine: facts under the names to be shown;
    settings: every option with its value; changed: those of them that are not at their default; samples: in order of
    time; perplexity_before, perplexity_after: of the validation part; remarks: what the run warned of.
    """

    title: str
    command: str
    outcome: str = ""
    started: str = ""
    duration_s: float | None = None
    model: Mapping[str, object] = field(default_factory=dict)
    data: Mapping[str, object] = field(default_factory=dict)
    results: Mapping[str, object] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    changed: frozenset[str] = frozenset()
    curves: Curves | None = None
    samples: Sequence[Sample] = ()
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    files: Sequence[RunFile] = ()
    machine: Mapping[str, object] = field(default_factory=dict)
    remarks: Sequence[str] = ()


def run_files(folder: str | os.PathLike[str]) -> tuple[RunFile, ...]:
    """The files of a run folder by name; a folder in it counts as one, its name with a slash at the end. Names that
    begin with a dot, which are temporary files and locks, are left out. Raises UsageError where it cannot be read."""
    try:
        paths = sorted(path for path in Path(folder).iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror or error}", path=folder) from error
    found = []
    for path in paths:
        if path.is_dir():
            found.append(RunFile(f"{path.name}/", sum(_size(file) for file in path.rglob("*") if file.is_file())))
        elif path.is_file():
            found.append(RunFile(path.name, _size(path)))
    return tuple(found)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # another process removed it just now
        return 0


def curves_json(run: Curves) -> dict[str, Any]:
    """A run's numbers in JSON's types: what is known of it, and every step and evaluation by columns."""
    best = run.best
    return {
        "name": run.name,
        "path": os.fspath(run.path),
        "n_steps": run.n_steps,
        "n_resumed": run.n_resumed,
        "n_redone": run.n_redone,
        "total_s": run.total_s,
        "tok_per_s": run.tok_per_s,
        "best_val_loss": None if best is None else best.val_loss,
        "best_step": None if best is None else best.step,
        "steps": _columns(run.steps, ("step", "loss", "lr", "tok_per_s", "grad_norm", "elapsed_s", "tokens")),
        "evaluations": _columns(run.evaluations, ("step", "train_loss", "val_loss", "val_bpb")),
        "remarks": list(run.remarks),
    }


def _columns(points: Sequence[object], names: Sequence[str]) -> dict[str, list[Any]]:
    return {name: [getattr(point, name) for point in points] for name in names}


def summary_json(summary: RunSummary) -> dict[str, Any]:
    """A summary in JSON's types, numbers that JSON has no word for as null."""
    return {
        "title": summary.title,
        "command": summary.command,
        "outcome": summary.outcome,
        "started": summary.started,
        "duration_s": plain(summary.duration_s),
        "perplexity": {"before": plain(summary.perplexity_before), "after": plain(summary.perplexity_after)},
        "model": plain(summary.model),
        "data": plain(summary.data),
        "results": plain(summary.results),
        "settings": plain(summary.settings),
        "changed": sorted(summary.changed),
        "samples": [{"step": s.step, "prompt": s.prompt, "text": s.text} for s in summary.samples],
        "files": [{"name": file.name, "bytes": file.n_bytes} for file in summary.files],
        "machine": plain(summary.machine),
        "remarks": list(summary.remarks),
        "curves": None if summary.curves is None else curves_json(summary.curves),
    }


def plain(value: object) -> Any:
    """A value in JSON's types; what is no number of JSON is None, anything unknown its text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
