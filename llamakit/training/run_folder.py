"""What a run leaves in its folder besides checkpoints and models: its options, its samples, its report, its exports."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from llamakit.conversion.convert import convert
from llamakit.conversion.convert_config import ConvertConfig
from llamakit.conversion.modelfile import write_modelfile
from llamakit.errors import LlamakitError, SaveError
from llamakit.files import atomic_path
from llamakit.formats.base import ModelFile
from llamakit.formats.open import open_model
from llamakit.inference.verify import verify
from llamakit.training.config import FinetuneConfig
from llamakit.training.log import StepLog
from llamakit.training.recorder import Recorder, write_run_reports
from llamakit.training.report import Begin, Finished, Remark, Sample, Saving
from llamakit.training.summary import RunFile, run_files
from llamakit.training.train_config import EXPORTS, TrainConfig, as_toml

_Told = TypeVar("_Told")


def keep_records(
    reports: Iterable[_Told], config: TrainConfig, command: str, *, append: bool
) -> Iterator[_Told | Remark | Saving]:
    """Pass the reports of `train` on and write config.toml, samples.txt, the exports, and at the end the report.

    command: the shell's line that does the same again. append: samples.txt is gone on with. Raises SaveError.
    """
    folder = Path(config.out_dir)
    recorder = Recorder("llamakit train", command, config)
    for report in recorder.follow(reports):
        if isinstance(report, Begin):
            with atomic_path(folder / "config.toml") as temporary:
                temporary.write_text(as_toml(config) + "\n", encoding="utf-8")
            if not append:
                (folder / "samples.txt").unlink(missing_ok=True)
        if isinstance(report, Sample):
            _append(folder / "samples.txt", report)
        if isinstance(report, Finished):
            if not (report.signal or config.eval_only):
                yield from export(config)
            yield from write_run_reports(recorder, folder)
        yield report


def keep_report(
    reports: Iterable[_Told],
    config: FinetuneConfig,
    command: str,
    folder: str | os.PathLike[str],
    *,
    append: bool = False,
) -> Iterator[_Told | Remark]:
    """Pass the reports of `finetune` on, and write the report of the run into a folder, which is made, at the end; on
    the way metrics.jsonl in it, which a resumed run goes on with.

    command: the shell's line that does the same again. append: metrics.jsonl is gone on with, whatever else there is.
    Raises SaveError.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"cannot make the folder of the report: {error.strerror or error}", path=folder) from error
    goes_on = append or (bool(config.checkpoint_in) and os.path.lexists(config.checkpoint_in))
    recorder = Recorder("llamakit finetune", command, config)
    metrics = StepLog(str(folder / "metrics.jsonl"), append=goes_on, events=True)
    written: list[Path] = []
    for report in metrics.follow(recorder.follow(reports)):
        if isinstance(report, Saving) and (report.path == config.merge_out or "BEST" in Path(report.path).name):
            written.append(Path(report.path))
        if isinstance(report, Finished):
            outside = dict.fromkeys([*map(Path, report.files), *written])
            yield from write_run_reports(recorder, folder, files=_listed(folder, outside))
        yield report


def _listed(folder: Path, outside: Iterable[Path]) -> Iterator[RunFile]:
    """The files of the folder, when they are asked for, and others by their way from there."""
    yield from run_files(folder)
    for path in filter(Path.exists, outside):
        is_folder = path.is_dir()
        n_bytes = sum(file.stat().st_size for file in (path.iterdir() if is_folder else (path,)))
        yield RunFile(os.path.relpath(path, folder) + "/" * is_folder, n_bytes)


def _append(path: Path, sample: Sample) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"--- step {sample.step}: {json.dumps(sample.prompt, ensure_ascii=False)}\n")
            file.write(f"{sample.prompt}{sample.text}\n")
    except OSError as error:
        raise SaveError(f"cannot write the samples: {error.strerror or error}", path=path) from error


def export(config: TrainConfig) -> Iterator[Saving | Remark]:
    """Write the newest model in every --export format beside it; each is compared with it before it has its name.

    Raises UnsupportedError for a model that the format cannot hold, SaveError when the disk refuses.
    """
    folder, model = Path(config.out_dir), Path(config.latest_model())
    for form in config.export:
        target = folder / EXPORTS[form]
        yield Saving("model", str(target))
        if form == "modelfile":
            with open_model(model) as file:
                write_modelfile(target, file, model)
            continue
        written = convert(ConvertConfig(source=model, out=target, outtype="f32"), verify=_check)
        yield from (Remark("note", text) for text in written.notes)


def _check(expected: ModelFile, written: ModelFile) -> None:
    report = verify(expected, written)
    if not report.passed:
        raise LlamakitError(f"what was exported is not the model: {report.failures[0]}", path=expected.path)
