"""Small runs of `train` for the tests of this room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llamakit.dataset.prepare import Report as PrepareReport
from llamakit.training.loop import Control
from llamakit.training.report import Report
from llamakit.training.train import train
from llamakit.training.train_config import TrainConfig
from tests.tiny import cached_tiny_gguf, tiny_text

#: a run's last state holds what came of it in every byte, were it not for the clock
EXACT: dict[str, Any] = {"val_split": 0.0, "sample_tokens": 0, "eval_iters": 1}


def write_text(directory: Path) -> Path:
    """A text of some documents in the run's folder, unless there is one."""
    text = directory / "text.txt"
    if not text.exists():
        directory.mkdir(parents=True, exist_ok=True)
        text.write_text(tiny_text(4000, 5))
    return text


def train_config(directory: Path, **options: Any) -> TrainConfig:
    """A run of a few tiny steps in a directory, in float32 unless asked otherwise."""
    defaults: dict[str, Any] = {
        "train_data": str(write_text(directory)),
        "vocab_model": str(cached_tiny_gguf()),
        "out_dir": str(directory / "out"),
        "embd": 16,
        "layer": 2,
        "head": 4,
        "head_kv": 2,
        "ff": 24,
        "ctx": 16,
        "batch": 2,
        "adam_iter": 4,
        "save_every": 2,
        "eval_every": 2,
        "eval_iters": 2,
        "warmup": 2,
        "adam_alpha": 1e-2,
        "sample_tokens": 4,
        "seed": 7,
        "dtype": "f32",
    }
    return TrainConfig(**(defaults | options))


def run_train(directory: Path, control: Control | None = None, **options: Any) -> list[Report | PrepareReport]:
    """All reports of a run."""
    return list(train(train_config(directory, **options), control))
