"""Small fine-tuning runs for the tests of this room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llamakit.training.config import FinetuneConfig
from llamakit.training.finetune import finetune
from llamakit.training.loop import Control
from llamakit.training.report import Report, StepReport
from tests.tiny import cached_tiny_gguf, tiny_text


def run_config(directory: Path, **options: Any) -> FinetuneConfig:
    """A run of a few tiny steps in a directory, in float32 unless asked otherwise."""
    text = directory / "text.txt"
    if not text.exists():
        text.write_text(tiny_text(3000, 5))
    defaults: dict[str, Any] = {
        "model_base": str(cached_tiny_gguf(type="Q8_0")),
        "train_data": str(text),
        "checkpoint_in": str(directory / "chk-LATEST.gguf"),
        "checkpoint_out": str(directory / "chk-ITERATION.gguf"),
        "lora_out": str(directory / "lora-ITERATION.bin"),
        "save_every": 2,
        "adam_iter": 4,
        "batch": 2,
        "ctx": 16,
        "warmup": 2,
        "seed": 7,
        "dtype": "f32",
    }
    return FinetuneConfig(**(defaults | options))


def run(directory: Path, control: Control | None = None, **options: Any) -> list[Report]:
    """All reports of a run."""
    return list(finetune(run_config(directory, **options), control))


def losses(reports: list[Report]) -> list[float]:
    """The loss of every step."""
    return [r.loss for r in reports if isinstance(r, StepReport)]
