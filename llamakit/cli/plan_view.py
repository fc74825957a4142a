"""How a plan looks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llamakit.cli import render
from llamakit.training.config import FinetuneConfig
from llamakit.training.finetune import plan_finetune
from llamakit.training.report import ChatFacts, DataFacts, Outcome, Plan, Remark

_NAMES = {
    "interpreter": "Python, torch, data",
    "base": "base, packed",
    "cache": "decoded weights",
    "trained": "what is trained",
    "activations": "activations",
    "logits": "logits of a chunk",
}


def show_plan(config: FinetuneConfig, *, json: bool) -> None:
    """Print the plan of a run on stdout, its remarks on stderr."""
    for report in plan_finetune(config):
        match report:
            case Remark():
                (render.note if report.level == "note" else render.warn)(report.text)
            case DataFacts() | ChatFacts() if not json:
                render.say(f"{'data':<22} {report.path}: {report.n_samples} samples, {report.n_tokens} tokens")
            case Plan() if json:
                render.print_json(as_json(report))
            case Plan():
                for line in _lines(report):
                    render.say(line)


def as_json(plan: Plan) -> dict[str, Any]:
    """A plan in JSON's types."""
    return {**vars(plan), "total_s": plan.total_s, "time_source": "measured on this machine"}


def _lines(plan: Plan) -> Iterator[str]:
    yield f"{'trained':<22} {render.human_count(plan.trained_parameters)} parameters"
    options = " ".join(_flag(name, value) for name, value in plan.options.items())
    yield f"{'computed':<22} on {plan.device} in {plan.dtype}, {plan.threads} threads: {options}"
    if plan.chosen:
        yield f"{'chosen':<22} {plan.chosen}"
    yield f"{'peak memory':<22} {render.human_bytes(plan.memory_bytes)}"
    for name, size in plan.memory.items():
        yield f"  {_NAMES[name]:<20} {render.human_bytes(size)}"
    yield f"{'disk':<22} {render.human_bytes(sum(plan.disk.values()))}"
    for name, size in plan.disk.items():
        yield f"  {name:<20} {render.human_bytes(size)}"
    yield f"{'steps':<22} {plan.n_steps}"
    share = f"{100 * plan.trained_share:.1f} % of the data's tokens have a loss"
    yield f"{'tokens':<22} {plan.n_tokens} at most, {share}"
    each = f"{render.human_duration(plan.step_s)} a step, from a measurement of this machine"
    yield f"{'time':<22} {render.human_duration(plan.total_s)} ({each})"


def _flag(name: str, value: object) -> str:
    if isinstance(value, bool):
        return name if value else "--no-checkpointing"
    return f"{name} {value}"


def outcome_lines(outcome: Outcome) -> Iterator[str]:
    """What was predicted and what it was, as finetune says it at the end."""
    yield (
        f"main: peak memory = {_megabytes(outcome.peak_bytes)}, predicted {_megabytes(outcome.predicted_bytes)}"
        f" ({100 * (outcome.predicted_bytes / outcome.peak_bytes - 1):+.1f} %)"
    )
    yield (
        f"main: time of an iteration = {render.human_duration(outcome.step_s)}, predicted"
        f" {render.human_duration(outcome.predicted_step_s)}"
    )


def _megabytes(count: int) -> str:
    return f"{count / 2**20:.1f} MB"
