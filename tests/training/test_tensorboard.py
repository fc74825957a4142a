"""What is written for TensorBoard is what TensorBoard reads."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamakit.errors import SaveError, UsageError
from llamakit.training.report import Begin, Evaluation, Remark, Report, StepReport
from llamakit.training.tensorboard import TensorboardLog, check_tensorboard, follow

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None,
    reason="the package tensorboard is missing: pip install '.[interop]'",
)


def go(first: int, last: int, loss: float = 2.0) -> Iterator[Report]:
    """The reports of one go of finetune: steps `first` to `last`, evaluated at the end."""
    yield Remark("note", "a remark")
    yield Begin(first - 1, last - first + 1)
    if first == 1:
        yield Evaluation("start", 9.0, 90.0, 10, 10, bits_per_byte=4.5, train_loss=8.5)
    for step in range(first, last + 1):
        value = float("nan") if step == 2 else loss + step
        yield StepReport(step, value, 1e-3 * step, 1.0, step, 9, 0.5, 100.0 + step, 1.0, 0, step == 2, grad_norm=0.5)
    yield Evaluation("end", 1.5, 4.5, 10, 10)


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, round(event.value, 6)) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


@needs_tensorboard
def test_the_reports_of_a_run_are_read_back(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "events"
    assert list(map(repr, follow(go(1, 3), folder))) == list(map(repr, go(1, 3)))
    assert read(folder) == {
        "train/loss": [(1, 3.0), (3, 5.0)],
        "train/lr": [(1, 0.001), (2, 0.002), (3, 0.003)],
        "train/grad_norm": [(1, 0.5), (2, 0.5), (3, 0.5)],
        "validation/bits_per_byte": [(0, 4.5)],
        "validation/train_loss": [(0, 8.5)],
        "speed/tok_per_s": [(1, 101.0), (2, 102.0), (3, 103.0)],
        "validation/loss": [(0, 9.0), (3, 1.5)],
        "validation/ppl": [(0, 90.0), (3, 4.5)],
    }


@needs_tensorboard
def test_a_resume_takes_the_place_of_what_was_beyond_it(tmp_path: Path) -> None:
    list(follow(go(1, 5), tmp_path))
    list(follow(go(4, 6, loss=20.0), tmp_path))
    assert read(tmp_path)["train/loss"] == [(1, 3.0), (3, 5.0), (4, 24.0), (5, 25.0), (6, 26.0)]
    list(follow(go(1, 1), tmp_path))
    assert read(tmp_path)["train/loss"] == [(1, 3.0)]


@needs_tensorboard
def test_a_run_that_is_broken_off_is_written(tmp_path: Path) -> None:
    reports = follow(go(1, 5), tmp_path)
    for report in reports:
        if isinstance(report, StepReport) and report.step == 3:
            break
    reports.close()  # type: ignore[attr-defined]
    assert read(tmp_path)["train/lr"] == [(1, 0.001), (2, 0.002), (3, 0.003)]


@needs_tensorboard
def test_any_numbers_are_taken(tmp_path: Path) -> None:
    with TensorboardLog(tmp_path / "events") as log:
        log.add(7, {"mfu": 0.4, "val_bpb": None, "loss": float("inf")})
    assert read(tmp_path / "events") == {"mfu": [(7, 0.4)]}


@needs_tensorboard
def test_a_place_that_cannot_be(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UsageError, match="is a file"):
        check_tensorboard(file)
    with pytest.raises(SaveError, match="cannot write the events"):
        TensorboardLog(file / "below")


def test_without_the_package_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else found(name))
    with pytest.raises(UsageError, match="needs the package tensorboard") as caught:
        next(follow(go(1, 2), tmp_path / "events"))
    assert "pip install '.[tensorboard]'" in (caught.value.hint or "")
    assert not (tmp_path / "events").exists()
