"""A run's reports become its summary: what train and finetune tell on the way is what their report.html shows."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from llamakit.errors import LlamakitError
from llamakit.training.curves import Curves, metrics_file, read_curves
from llamakit.training.figure import save_figure
from llamakit.training.page import write_report
from llamakit.training.report import (
    ChatFacts,
    Counters,
    DataFacts,
    Evaluation,
    Finished,
    ModelFacts,
    NewModel,
    Outcome,
    Plan,
    Remark,
    Sample,
    StepReport,
    Verified,
)
from llamakit.training.summary import RunFile, RunSummary, run_files

_Told = TypeVar("_Told")


class Recorder:
    """Listens to the reports of one run and knows its summary at the end.

    recorder = Recorder("llamakit finetune", shlex.join(argv), config)
    for report in recorder.follow(finetune(config)):
        ...
    """

    def __init__(self, title: str, command: str, config: Any, *, machine: Mapping[str, object] | None = None) -> None:
        """command: the shell's line that does the same again; config: the run's dataclass, whose defaults are known;
        machine: facts under the names to be shown."""
        self._title, self._command, self._machine = title, command, machine or {}
        self._settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        self._changed = frozenset(
            field.name for field in dataclasses.fields(config) if getattr(config, field.name) != _default(field)
        )
        self._started = time.strftime("%Y-%m-%d %H:%M %Z")
        self._model: dict[str, object] = {}
        self._data: dict[str, object] = {}
        self._results: dict[str, object] = {}
        self._samples: list[Sample] = []
        self._remarks: list[str] = []
        self._before: float | None = None
        self._after: float | None = None
        self._finished: Finished | None = None

    def follow(self, reports: Iterable[_Told]) -> Iterator[_Told]:
        """Pass reports on, remembering what a summary needs."""
        for report in reports:
            self._take(report)
            yield report

    def _take(self, report: object) -> None:
        match report:
            case ModelFacts() | NewModel() | Counters():
                self._model |= _model_facts(report)
                if isinstance(report, NewModel):
                    self._data["training tokens"] = report.n_train_tokens
                    self._data["validation tokens"] = report.n_validation_tokens
            case DataFacts():
                self._data |= _data_facts(report)
            case ChatFacts():
                self._data |= _chat_facts(report)
            case Verified():
                what = "adapter" if report.weights is None else "model"
                self._results[f"max |dlogit| of the {what} read back"] = report.difference
                self._results["max |dlogit| against the base"] = report.change
                if report.weights is not None:
                    self._results["relative change of the weights"] = report.weights
            case Plan():
                self._results["predicted peak memory, bytes"] = report.memory_bytes
                self._results["predicted seconds"] = round(report.total_s, 1)
                self._results |= {f"predicted memory, {name}, bytes": n for name, n in report.memory.items()}
            case Outcome():
                self._results["peak memory, bytes"] = report.peak_bytes
                self._results["seconds of an iteration"] = round(report.step_s, 4)
                self._results["predicted seconds of an iteration"] = round(report.predicted_step_s, 4)
            case Evaluation() if report.n_tokens:
                if report.when == "start":
                    self._before = report.ppl
                self._after = report.ppl
            case StepReport():
                self._results["loss of the last step"] = report.loss
            case Sample():
                self._samples.append(report)
            case Remark(level="warning"):
                self._remarks.append(report.text)
            case Finished():
                self._finished = report

    def summary(self, curves: Curves | None = None, files: Iterable[RunFile] = ()) -> RunSummary:
        """What is known now. curves: of its metrics; files: of its folder."""
        finished = self._finished
        return RunSummary(
            title=self._title,
            command=self._command,
            outcome=finished.reason if finished is not None else "not finished",
            started=self._started,
            duration_s=finished.total_s if finished is not None else None,
            model=self._model,
            data=self._data,
            results=self._results,
            settings=self._settings,
            changed=self._changed,
            curves=curves,
            samples=tuple(self._samples),
            perplexity_before=self._before,
            perplexity_after=self._after,
            files=tuple(files),
            machine=self._machine,
            remarks=tuple(self._remarks),
        )


def write_run_reports(
    recorder: Recorder,
    folder: str | os.PathLike[str],
    metrics: str | os.PathLike[str] | None = None,
    files: Iterable[RunFile] | None = None,
) -> Iterator[Remark]:
    """Write loss.png, report.html and report.json of a run into a folder that exists; yields what there is to say.

    metrics: the file with its numbers, the folder's metrics.jsonl by default; files: to be listed, by default those of
    the folder. Numbers that cannot be read and a matplotlib that is missing become warnings: the model is trained, and
    its report should not fail for that. Raises UsageError where there is no
    such folder, SaveError for what the disk refuses.
    """
    folder = Path(folder)
    curves: Curves | None = None
    try:
        curves = read_curves(metrics or metrics_file(folder))
    except LlamakitError as error:
        yield Remark("warning", f"the report has no curves: {error}")
    if curves is not None:
        try:
            save_figure(curves, folder)
        except LlamakitError as error:
            hint = f" ({error.hint})" if error.hint else ""
            yield Remark("warning", f"there is no loss.png: {error}{hint}")
    listed = tuple(files) if files is not None else run_files(folder)
    page, _ = write_report(recorder.summary(curves, listed), folder)
    yield Remark("note", f"the report of this run: {page}")


def _default(field: dataclasses.Field[Any]) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _model_facts(report: ModelFacts | NewModel | Counters) -> dict[str, object]:
    if isinstance(report, Counters):
        return {"trained parameters": report.trained_parameters}
    shape = report.config
    facts: dict[str, object] = {
        "layers": shape.n_layer,
        "width": shape.n_embd,
        "heads": shape.n_head,
        "heads of keys and values": shape.n_head_kv,
        "feed-forward width": shape.n_ff,
        "vocabulary": shape.n_vocab,
        "context": report.ctx,
        "seed": report.seed,
    }
    if isinstance(report, NewModel):
        return facts | {
            "parameters": report.n_parameters,
            "tokens per iteration": report.tokens_per_iteration,
            "computed on": f"{report.device} in {report.dtype}, threads: {report.threads}",
        }
    if not report.ranks:
        return {"base": report.path} | facts | {"trained": "all weights"}
    ranks = ", ".join(f"{kind} {rank}" for kind, rank in report.ranks.items() if rank)
    return {"base": report.path} | facts | {"ranks": ranks, "alpha": report.alpha}


def _data_facts(report: DataFacts) -> dict[str, object]:
    return {
        "text": report.path,
        "samples": report.n_samples,
        "training tokens": report.n_tokens,
        "different tokens": report.n_unique_tokens,
        "validation tokens": report.n_validation_tokens,
    }


def _chat_facts(report: ChatFacts) -> dict[str, object]:
    facts: dict[str, object] = {
        "questions and answers": report.path,
        "records": report.n_records,
        "records left out": report.n_skipped,
        "samples": report.n_samples,
        "training tokens": report.n_tokens,
        "tokens with a loss": report.n_trained,
        "rows of an epoch": report.n_rows,
        "held-out samples": report.n_held_out,
        "samples cut": report.n_cut,
        "tokens cut": report.n_cut_tokens,
        "samples in windows": report.n_windowed,
    }
    return facts | {f"records: {schema}": n for schema, n in report.schemas.items()}
