"""How a fine-tuning run looks: the old tool's lines on stdout, a progress bar on a terminal, one JSON at the end."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from types import TracebackType

from llamakit.cli import render
from llamakit.cli.plan_view import outcome_lines
from llamakit.training.config import FinetuneConfig
from llamakit.training.report import (
    Begin,
    ChatFacts,
    Counters,
    DataFacts,
    Evaluation,
    Finished,
    Loading,
    ModelFacts,
    Outcome,
    Plan,
    Remark,
    Report,
    Sample,
    Saving,
    StepReport,
    Verified,
)

_RANK_NAMES = (
    ("attention_norm", "attn_norm"),
    ("wq", "attn_q"),
    ("wk", "attn_k"),
    ("wv", "attn_v"),
    ("wo", "attn_output"),
    ("ffn_norm", "ffn_norm"),
    ("ffn_gate", "ffn_gate"),
    ("ffn_down", "ffn_down"),
    ("ffn_up", "ffn_up"),
    ("tok_embeddings", "token_embd"),
    ("norm", "output_norm"),
    ("output", "output"),
)

#: kind of a file -> what of the old tools wrote it
_FUNCTIONS = {
    "checkpoint": "save_checkpoint_lora_file",
    "adapter": "save_as_llama_lora",
    "model": "save_llama_model_file",
}


def step_line(step: StepReport, dt_s: float, first_loss: float) -> str:
    """One line as the old tool's train_opt_callback: its fields, its order, its bar."""
    dashes = max(0, int(1 + (first_loss - step.loss) * 10 + 0.5)) if step.loss == step.loss else 0
    eta = render.clock(dt_s * step.steps_left)
    return (
        f"train_opt_callback: iter={step.step:6d} sample={step.sample}/{step.n_samples} sched={step.sched:f}"
        f" loss={step.loss:f} dt={render.clock(dt_s)} eta={eta} |{'-' * dashes}>"
    )


class View:
    """Renders the reports of one run."""

    def __init__(self, config: FinetuneConfig, *, json: bool) -> None:
        self._json, self._config = json, config
        self._bar = render.Progress("training", total=config.adam_iter, fields=("loss", "lr", "tok/s"))
        self._first_loss: float | None = None
        self._dt_s: float | None = None
        self._last: dict[str, object] = {}
        self._said: dict[str, list[Sample]] = {}
        self._verified: dict[str, float] | None = None
        self._outcome: dict[str, float] | None = None
        self.training, self.speaks = False, True

    def __enter__(self) -> View:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.training:
            self._bar.__exit__(kind, error, trace)

    def show(self, report: Report) -> None:
        """Render one report."""
        match report:
            case Loading():
                if report.what != "model":  # the model was announced before torch was imported
                    render.loading(report.path)
            case Remark():
                (render.note if report.level == "note" else render.warn)(report.text)
            case StepReport():
                self._step(report)
            case Begin():
                self._say("main: begin training")
                self.training = True
                self._bar.__enter__()
                self._steps_before = report.first_iteration
            case Sample():
                self._sample(report)
            case Verified():
                self._verified = {"max_dlogit": report.difference, "change": report.change}
                self._verified |= {} if report.weights is None else {"weights": report.weights}
                for line in _lines(report):
                    self._say(line)
            case Outcome():
                self._outcome = {**vars(report)}
                for line in outcome_lines(report):
                    self._say(line)
            case Finished():
                self._finish(report)
            case _:
                for line in _lines(report):
                    self._say(line)

    def _say(self, line: str) -> None:
        if self._json or (self.training and self._bar.visible):
            self._bar.log(line)
        else:
            render.say(line)

    def _step(self, step: StepReport) -> None:
        if self._first_loss is None:
            self._first_loss = step.loss
        self._dt_s = step.step_s if self._dt_s is None else 0.3 * self._dt_s + 0.7 * step.step_s
        self._last = dataclasses.asdict(step)
        done = step.step - self._steps_before
        self._bar.update(done, loss=f"{step.loss:.4f}", lr=f"{step.lr:.2e}", **{"tok/s": f"{step.tok_per_s:.0f}"})
        if not self._bar.visible or not render.is_terminal(sys.stdout):
            line = step_line(step, self._dt_s, self._first_loss)
            (render.log if self._json else render.say)(line)
            if not self._json:
                sys.stdout.flush()
        if step.skipped:
            render.warn(f"iteration {step.step}: the loss or its gradient is not finite; the step was skipped")

    def _asked(self) -> list[dict[str, str]]:
        return [{"prompt": p, "before": s[0].text, "after": s[-1].text} for p, s in self._said.items()]

    def _sample(self, sample: Sample) -> None:
        self._said.setdefault(sample.prompt, []).append(sample)
        self._say(f"main: after {sample.step} iterations, to {_quoted(sample.prompt)}: {_quoted(sample.text)}")

    def _finish(self, finished: Finished) -> None:
        self._bar.__exit__(None, None, None)
        self.training = False
        for prompt, samples in self._said.items():
            self._say(f"main: asked {_quoted(prompt)}")
            self._say(f"main:   before: {_quoted(samples[0].text)}")
            self._say(f"main:   after:  {_quoted(samples[-1].text)}")
        if finished.reason and finished.reason != "all iterations are done":
            self._say(f"main: ended: {finished.reason}")
        self._say(f"main: total training time: {render.clock(finished.total_s)}")
        if self._json:
            summary = {
                "reason": finished.reason,
                "total_s": finished.total_s,
                "iterations": finished.iterations,
                "files": finished.files,
                "last_step": self._last,
                "samples": self._asked(),
                "verified": self._verified,
                "plan": self._outcome,
            }
            render.print_json(summary)


def _quoted(text: str) -> str:
    return json.dumps(text.strip(), ensure_ascii=False)


def _lines(report: Report) -> Iterator[str]:
    match report:
        case ModelFacts():
            yield from _model_lines(report)
        case Counters():
            yield f"main: total train_iterations {report.iterations}"
            yield f"main: seen train_samples     {report.samples}"
            yield f"main: seen train_tokens      {report.tokens}"
            yield f"main: completed train_epochs {report.epochs}"
            trained = f"{_size(report.trained_bytes)}, {report.trained_parameters} parameters"
            yield f"main: {report.what}_size = {trained}"
            yield f"main: opt_size  = {_size(report.optimizer_bytes)}"
            yield f"main: opt iter {report.updates}"
        case DataFacts():
            yield f"main: tokenize training data from {report.path}"
            yield f"main: sample-start: {report.sample_start}"
            yield f"main: include-sample-start: {str(report.include_sample_start).lower()}"
            yield f"tokenize_file: total number of samples: {report.n_samples}"
            yield f"main: number of training tokens: {report.n_tokens}"
            yield f"main: number of unique tokens: {report.n_unique_tokens}"
            if report.n_validation_tokens:
                yield f"main: number of held-out tokens: {report.n_validation_tokens}"
        case ChatFacts():
            yield from _chat_lines(report)
        case Plan():
            kept = "decoded once" if report.weights_kept_dense else "decoded for each use"
            yield f"main: computing on {report.device} in {report.dtype}, {report.threads} threads, weights {kept}"
            if report.chosen:
                yield f"main: {report.chosen}"
            yield f"main: predicted peak memory = {_size(report.memory_bytes)}"
            yield (
                f"main: predicted time = {render.human_duration(report.total_s)}"
                f" ({report.n_steps} iterations of {render.human_duration(report.step_s)})"
            )
        case Evaluation():
            yield (
                f"main: held-out loss = {report.loss:.4f}, perplexity = {report.ppl:.3f}"
                f" ({report.n_tokens} of {report.n_held_out} tokens)"
            )
        case Verified():
            on_the_base = " on the base" if report.weights is None else ""
            yield (
                f"main: verified: max |dlogit| = {report.difference:.3g} between {report.path}{on_the_base} and the"
                f" trained model ({report.n_tokens} tokens)"
            )
            if report.weights is None:
                yield f"main: the adapter changes the base: max |dlogit| = {report.change:.3g}"
            else:
                yield (
                    f"main: the model differs from the base: weights by {100 * report.weights:.3g} %,"
                    f" max |dlogit| = {report.change:.3g}"
                )
        case Saving():
            yield f"{_FUNCTIONS[report.kind]}: saving to {report.path}"


def _chat_lines(facts: ChatFacts) -> Iterator[str]:
    schemas = ", ".join(f"{n} {schema}" for schema, n in facts.schemas.items())
    share = 100 * facts.n_trained / facts.n_tokens
    yield f"main: questions and answers from {facts.path}"
    yield f"main: number of records: {facts.n_records} ({schemas}), {facts.n_skipped} skipped"
    yield f"main: number of samples: {facts.n_samples}"
    yield (
        f"main: number of training tokens: {facts.n_tokens}, {facts.n_trained} of them with a loss ({share:.1f} %,"
        f" --train-on {facts.train_on})"
    )
    yield f"main: samples cut at --ctx: {facts.n_cut} ({facts.n_cut_tokens} tokens), in windows: {facts.n_windowed}"
    yield f"main: rows of an epoch: {facts.n_rows}, {'packed' if facts.packed else 'a sample each'}"
    if facts.n_held_out:
        yield f"main: held-out samples: {facts.n_held_out}, {facts.n_held_out_trained} tokens with a loss"


def _model_lines(facts: ModelFacts) -> Iterator[str]:
    shape = facts.config
    yield f"main: seed: {facts.seed}"
    yield f"main: model base = '{facts.path}'"
    yield "main: init model"
    values = {
        "n_vocab": shape.n_vocab,
        "n_ctx": facts.ctx,
        "n_embd": shape.n_embd,
        "n_ff": shape.n_ff,
        "n_head": shape.n_head,
        "n_head_kv": shape.n_head_kv,
        "n_layer": shape.n_layer,
        "norm_rms_eps": f"{shape.rms_eps:f}",
        "rope_freq_base": f"{shape.rope_base:f}",
        "rope_freq_scale": f"{1 / shape.rope_scaling.factor:f}",
    }
    for name, value in values.items():
        yield f"print_params: {name:<22}: {value}"
    if not facts.ranks:
        yield "main: all weights are trained"
        return
    for name, kind in _RANK_NAMES:
        yield f"print_lora_params: {'n_rank_' + name:<22}: {facts.ranks[kind]}"
    yield f"print_lora_params: {'lora_alpha':<22}: {facts.alpha:g}"


def _size(count: int) -> str:
    return f"{count} bytes ({count / 2**20:.1f} MB)"
