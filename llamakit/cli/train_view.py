"""How training from scratch looks: llama2.c's lines on stdout, a progress bar on a terminal, one JSON at the end."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from types import TracebackType

from llamakit.cli import render
from llamakit.dataset.prepare import Encoding, Prepared, Reading, TrainingVocabulary, VocabularyReady
from llamakit.dataset.prepare import Report as PrepareReport
from llamakit.files import as_argument
from llamakit.training.report import (
    Begin,
    Evaluation,
    Finished,
    Loading,
    NewModel,
    Remark,
    Report,
    Sample,
    Saving,
    StepReport,
)
from llamakit.training.train_config import TrainConfig


class TrainView:
    """Renders the reports of one run."""

    def __init__(self, config: TrainConfig, *, json: bool) -> None:
        self._config, self._json = config, json
        # A clock that ends the run is what is left to see of it, not the iterations that it never comes to.
        self._limit_s = 60 * config.max_minutes
        what, total = ("training (s)", round(self._limit_s)) if self._limit_s else ("training", config.adam_iter)
        self._bar = render.Progress(what, total=total, fields=("step", "loss", "lr", "tok/s"))
        self._reading: render.Progress | None = None
        self._last: dict[str, object] = {}
        self._evaluation: dict[str, object] = {}
        self._tok_per_s_at_peak = float("inf")
        self.training, self.speaks = False, True

    def __enter__(self) -> TrainView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._read()
        if self.training:
            self._bar.__exit__(kind, error, trace)

    def _read(self) -> None:
        """The bar of the text that is read is done."""
        if self._reading is not None:
            self._reading.__exit__(None, None, None)
            self._reading = None

    def show(self, report: Report | PrepareReport) -> None:
        """Render one report."""
        match report:
            case Loading():
                render.loading(report.path)
            case Remark():
                (render.note if report.level == "note" else render.warn)(report.text)
            case Begin():
                self.training = True
                self._bar.__enter__()
                if not self._limit_s:
                    self._bar.update(report.first_iteration)
            case Encoding():
                self._encoding(report)
            case StepReport():
                self._step(report)
            case Finished():
                self._finish(report)
            case _:
                if isinstance(report, Evaluation):
                    self._evaluation = dataclasses.asdict(report)
                if isinstance(report, Prepared):
                    self._read()
                if isinstance(report, NewModel):
                    self._tok_per_s_at_peak = report.peak_flop_per_s / report.flop_per_token
                for line in _lines(report):
                    self._say(line)
                for warning in _warnings(report):
                    render.warn(warning)

    def _say(self, line: str) -> None:
        if self._json or (self.training and self._bar.visible):
            self._bar.log(line)
        else:
            render.say(line)
            sys.stdout.flush()

    def _encoding(self, report: Encoding) -> None:
        """A bar for a text that takes a while, before training has its own."""
        if self._reading is None:
            fields = ("documents", "tokens")
            self._reading = render.Progress("tokenizing (kB)", total=report.n_bytes_total // 1000, fields=fields)
            self._reading.__enter__()
        tokens = render.human_count(report.n_tokens)
        self._reading.update(report.n_bytes // 1000, documents=report.n_documents, tokens=tokens)

    def _step(self, step: StepReport) -> None:
        self._last = dataclasses.asdict(step)
        done = min(step.elapsed_s, self._limit_s) if self._limit_s else step.step
        self._bar.update(
            done,
            step=step.step if self._limit_s else "",
            loss=f"{step.loss:.4f}",
            lr=f"{step.lr:.2e}",
            **{"tok/s": f"{step.tok_per_s:.0f}"},
        )
        if not self._bar.visible or not render.is_terminal(sys.stdout):
            line = (
                f"{step.step} | loss {step.loss:.4f} | lr {step.lr:e} | {1000 * step.step_s:.2f}ms"
                f" | mfu {100 * step.tok_per_s / self._tok_per_s_at_peak:.2f}% | {step.tok_per_s:.0f} tok/s"
            )
            (render.log if self._json else render.say)(line)
            if not self._json:
                sys.stdout.flush()
        if step.skipped:
            render.warn(f"iteration {step.step}: the loss or its gradient is not finite; the step was skipped")

    def _finish(self, finished: Finished) -> None:
        self._bar.__exit__(None, None, None)
        self.training = False
        if finished.reason and finished.reason != "all iterations are done":
            self._say(f"ended: {finished.reason}")
        self._say(f"{finished.iterations} iterations, {render.human_duration(finished.total_s)}")
        for file in finished.files:
            self._say(f"wrote {file}")
        model = next((file for file in finished.files if file == self._config.latest_model()), None)
        if model is not None and not finished.signal:
            render.hint(
                f"llamakit generate -m {as_argument(model)}; curves: llamakit plot {as_argument(self._config.out_dir)}"
            )
        if self._json:
            render.print_json(
                {
                    "reason": finished.reason,
                    "total_s": finished.total_s,
                    "iterations": finished.iterations,
                    "files": finished.files,
                    "last_step": self._last,
                    "evaluation": self._evaluation,
                }
            )


def _lines(report: Report | PrepareReport) -> Iterator[str]:
    match report:
        case Reading():
            files = f"{report.n_files} file{'s' if report.n_files != 1 else ''}"
            yield f"reading {files}, {render.human_bytes(report.n_bytes)}"
        case TrainingVocabulary():
            yield f"training a vocabulary of {report.n_vocab} tokens"
        case VocabularyReady():
            yield f"vocabulary: {report.n_vocab} tokens"
        case Prepared():
            yield (
                f"data: {report.n_documents} documents, {report.n_tokens} tokens,"
                f" {report.bytes_per_token:.2f} bytes per token, {report.n_validation_tokens} held out"
            )
            yield f"Saved {report.path}, average seqlen: {report.n_tokens / max(1, report.n_documents):.2f}"
        case NewModel():
            yield from _model_lines(report)
        case Evaluation():
            yield _evaluation_line(report)
        case Sample():
            yield f"sample {report.step}:"
            yield from (f"    {line}" for line in f"{report.prompt}{report.text}".split("\n"))
        case Saving():
            yield f"saving {report.kind} to {report.path}"


def _warnings(report: Report | PrepareReport) -> Iterator[str]:
    match report:
        case Reading():
            if report.n_left_out:
                yield f"{report.n_left_out} files of the folder are left out: their names do not say text"
        case VocabularyReady():
            yield from report.warnings
        case Prepared():
            if report.n_duplicates:
                yield f"{report.n_duplicates} documents were there before; they are kept"


def _model_lines(model: NewModel) -> Iterator[str]:
    shape = model.config
    yield f"tokens per iteration will be: {model.tokens_per_iteration:,}"
    yield (
        f"breaks down as: {model.grad_acc} grad accum steps * 1 processes * {model.batch} batch size"
        f" * {model.ctx} max seq len"
    )
    yield (
        f"model: {model.n_parameters:,} parameters: {shape.n_embd} wide, {shape.n_layer} blocks, {shape.n_head} heads"
        f" ({shape.n_head_kv} for keys and values), feed-forward {shape.n_ff}, vocabulary {shape.n_vocab}"
        f"{', tied' if shape.tied_output else ''}"
    )
    yield f"data: {model.n_train_tokens:,} tokens to train on, {model.n_validation_tokens:,} held out"
    yield f"computing on {model.device} in {model.dtype}, {model.threads} threads; seed {model.seed}"
    yield (
        f"mfu: {model.flop_per_token / 1e6:.1f} MFLOP per token (6 per weight of a product, 6 x ctx x width per block)"
        f" of {model.peak_flop_per_s / 1e9:.0f} GFLOP/s, this device's rate of a 2048 x 2048 product"
    )
    if model.iterations:
        yield f"going on from iteration {model.iterations}, {model.tokens:,} tokens"


def _evaluation_line(found: Evaluation) -> str:
    train = "" if found.train_loss is None else f"train loss {found.train_loss:.4f}, "
    if not found.n_tokens:
        return f"step {found.step}: {train}nothing is held out"
    bits = "" if found.bits_per_byte is None else f", {found.bits_per_byte:.4f} bits per byte"
    return f"step {found.step}: {train}val loss {found.loss:.4f}{bits}{' (best)' if found.is_best else ''}"
