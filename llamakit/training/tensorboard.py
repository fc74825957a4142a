"""--report-to tensorboard: the numbers of a run as events in a folder that TensorBoard watches."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from llamakit.errors import SaveError, UsageError
from llamakit.training.report import Begin, Evaluation, StepReport

_Told = TypeVar("_Told")


def check_tensorboard(folder: str | os.PathLike[str]) -> None:
    """Raise UsageError where the package tensorboard is missing, or where `folder` is a file: before anything is read,
    and without the seconds that importing it takes."""
    if importlib.util.find_spec("tensorboard") is None:
        hint = "pip install '.[tensorboard]' in llamakit's folder, or pip install tensorboard"
        raise UsageError("--report-to tensorboard needs the package tensorboard", hint=hint)
    if Path(folder).exists() and not Path(folder).is_dir():
        raise UsageError("is a file, the folder of the events is needed", path=folder)


class TensorboardLog:
    """Writes scalars into a folder, one for each run; TensorBoard shows them while the run goes on.

    with TensorboardLog("out/tensorboard", first_step=1) as log:
        log.add(1, {"loss": 10.2, "lr": 1e-4})
    """

    def __init__(self, folder: str | os.PathLike[str], *, first_step: int = 0) -> None:
        """first_step: of this go; what an earlier one has from there on is shown no more. Raises UsageError where the
        package is missing, SaveError for what the disk refuses."""
        check_tensorboard(folder)
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        try:
            self._writer = SummaryWriter(os.fspath(folder), purge_step=first_step, flush_secs=10)
        except OSError as error:
            raise self._refused(error) from error

    def add(self, step: int, scalars: Mapping[str, float | None]) -> None:
        """Write values of a step under their names; None and what is not finite is left out. Raises SaveError."""
        try:
            for name, value in scalars.items():
                if value is not None and math.isfinite(value):
                    self._writer.add_scalar(name, value, step)
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        """Write what is left. Raises SaveError."""
        try:
            self._writer.close()
        except OSError as error:
            raise self._refused(error) from error

    def __enter__(self) -> TensorboardLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _refused(self, error: OSError) -> SaveError:
        return SaveError(f"cannot write the events: {error.strerror or error}", path=self._folder)


def follow(reports: Iterable[_Told], folder: str | os.PathLike[str]) -> Iterator[_Told]:
    """Pass the reports of finetune or train on, writing each step's and evaluation's numbers before it.

    The folder is made when training begins. Raises UsageError where the package is missing, SaveError.
    """
    check_tensorboard(folder)
    log: TensorboardLog | None = None
    step = 0
    try:
        for report in reports:
            if isinstance(report, Begin):
                step = report.first_iteration
                log = TensorboardLog(folder, first_step=step + 1 if step else 0)
            elif isinstance(report, StepReport):
                step = report.step
            if log is not None and (scalars := scalars_of(report)):
                log.add(step, scalars)
            yield report
    finally:
        if log is not None:
            log.close()


def scalars_of(report: object) -> dict[str, float | None]:
    """The numbers of a step or an evaluation under the names that TensorBoard groups, such as train/loss; else none."""
    if isinstance(report, StepReport):
        return {
            "train/loss": report.loss,
            "train/lr": report.lr,
            "train/grad_norm": report.grad_norm,
            "speed/tok_per_s": report.tok_per_s,
        }
    if isinstance(report, Evaluation):
        return {
            "validation/loss": report.loss,
            "validation/ppl": report.ppl,
            "validation/bits_per_byte": report.bits_per_byte,
            "validation/train_loss": report.train_loss,
        }
    return {}
