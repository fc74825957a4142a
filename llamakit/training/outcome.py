"""What a run took, against what was predicted."""

from __future__ import annotations

import resource
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from llamakit.training.report import Outcome, Plan, StepReport

_Told = TypeVar("_Told")


def _status(field: str) -> int | None:
    """Bytes of a field of this process in Linux' /proc; None elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
    except (OSError, ValueError, StopIteration):
        return None


def resident_bytes() -> int:
    """Memory that this process holds now; where the system does not tell, the most that it has held."""
    found = _status("VmRSS")
    return peak_bytes() if found is None else found


def peak_bytes(device: str = "cpu") -> int:
    """The most memory that this process has held, or has taken on a GPU.

    VmHWM and not getrusage's figure, which a process inherits from the one that started it.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    found = _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if found is None else found


def with_outcome(reports: Iterable[_Told]) -> Iterator[_Told | Outcome]:
    """Pass reports on; behind them what was predicted and what it was, for a run that was planned and took a step."""
    plan: Plan | None = None
    seconds: list[float] = []
    for report in reports:
        if isinstance(report, Plan):
            plan = report
        if isinstance(report, StepReport):
            seconds.append(report.step_s)
        yield report
    if plan is not None and seconds:
        yield Outcome(plan.memory_bytes, peak_bytes(plan.device), plan.step_s, statistics.median(seconds))
