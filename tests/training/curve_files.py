"""Files such as a run writes about itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def step_line(step: int, *, elapsed_s: float | None = None, **values: Any) -> dict[str, Any]:
    """The object of one step, its loss a number that tells the step."""
    line = {"step": step, "loss": round(2 + 8 * math.exp(-step / 30), 6), "lr": 5e-4, "grad_norm": 0.8, "step_s": 0.5}
    seconds = 0.5 * step if elapsed_s is None else elapsed_s
    return {**line, "tok_per_s": 4000.0 + step, "elapsed_s": seconds, "tokens": 2048 * step, **values}


def eval_line(step: int, val_loss: float, **values: Any) -> dict[str, Any]:
    return {"step": step, "event": "eval", "train_loss": val_loss - 0.1, "val_loss": val_loss, "val_bpb": val_loss / 2,
            "elapsed_s": 0.5 * step, **values}  # fmt: skip


def write_lines(path: Path, lines: list[Any], *, end: str = "") -> Path:
    """A file of JSON lines, and `end` after them; a folder gets its metrics.jsonl."""
    file = path if path.suffix == ".jsonl" else path / "metrics.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + end, encoding="utf-8")
    return path


def write_run(path: Path, n_steps: int = 100, *, every: int = 20) -> Path:
    """A run that trained in one go, evaluated now and then, best before the end."""
    lines: list[Any] = [{"event": "start", "n_layer": 6}]
    for step in range(1, n_steps + 1):
        lines.append(step_line(step))
        if step % every == 0:
            lines.append(eval_line(step, 2.0 + abs(step - 3 * n_steps // 5) / n_steps))
    return write_lines(path, lines)
