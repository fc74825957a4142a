"""Fine-tuning on questions and answers: what is trained on, what is said of it, and that a resume is exact."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from llamakit.errors import DataError, LlamakitError, MismatchError, UsageError
from llamakit.formats.adapter import Adapter, read_adapter
from llamakit.formats.base import ModelFile
from llamakit.training import proof
from llamakit.training.checkpoint import read_checkpoint
from llamakit.training.finetune import finetune
from llamakit.training.report import (
    ChatFacts,
    Evaluation,
    Finished,
    Remark,
    Report,
    Sample,
    Saving,
    StepReport,
    Verified,
)
from llamakit.training.run_folder import keep_report
from tests.helpers import render_in_this_process
from tests.tiny import cached_tiny_gguf, tiny_text
from tests.training.runs import losses, run, run_config


@pytest.fixture(autouse=True)
def _no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    render_in_this_process(monkeypatch)


def chat_file(directory: Path, n: int = 12, name: str = "chat.jsonl", *extra: str) -> Path:
    path = directory / name
    words = tiny_text(4000, 3).split(". ")
    lines = [json.dumps({"prompt": words[2 * i][:16], "completion": words[2 * i + 1][: 8 + i]}) for i in range(n)]
    path.write_text("\n".join([*lines, *extra]) + "\n")
    return path


def chat(directory: Path, **options: Any) -> list[Report]:
    path = directory / "chat.jsonl"
    data = options.pop("train_data", None) or str(path if path.exists() else chat_file(directory))
    return run(directory, **({"train_data": data, "chat_template": "llama2", "ctx": 128} | options))


def of(kind: type, reports: list[Report]) -> list[Any]:
    return [r for r in reports if isinstance(r, kind)]


def test_questions_and_answers_train(tmp_path: Path) -> None:
    reports = chat(tmp_path, adam_iter=6, adam_alpha=0.02, warmup=1, val_split=0.2)
    (facts,) = of(ChatFacts, reports)
    assert facts.n_records == 12 and facts.schemas == {"prompt/completion": 12}
    assert facts.n_samples == 10 and facts.n_held_out == 2 and facts.n_skipped == facts.n_cut == 0
    assert 0 < facts.n_trained < facts.n_tokens
    found = losses(reports)
    assert len(found) == 6 and found[-1] < found[0]
    evaluations = of(Evaluation, reports)
    assert evaluations[0].when == "start" and evaluations[-1].loss < evaluations[0].loss
    assert evaluations[-1].n_tokens == facts.n_held_out_trained
    assert len(read_adapter(tmp_path / "lora-6.bin").tensors) > 0


def test_packing_changes_the_rows_and_not_the_loss(tmp_path: Path) -> None:
    """A whole epoch in one step: the mean is over the same tokens, however they lie."""
    packed = chat(tmp_path, adam_iter=1, batch=64, val_split=0.0, checkpoint_out="")
    alone = chat(tmp_path, adam_iter=1, batch=64, val_split=0.0, checkpoint_out="", pack=False)
    assert losses(packed) == pytest.approx(losses(alone), rel=1e-5)
    assert of(ChatFacts, packed)[0].n_rows < of(ChatFacts, alone)[0].n_rows == 12
    norms = [of(StepReport, reports)[0].grad_norm for reports in (packed, alone)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_what_is_trained_on_changes_the_loss(tmp_path: Path) -> None:
    once = {"adam_iter": 1, "batch": 64, "val_split": 0.0, "checkpoint_out": ""}
    answers, everything = (losses(chat(tmp_path, train_on=part, **once)) for part in ("assistant", "all"))
    assert answers != pytest.approx(everything, rel=1e-3)


@pytest.mark.parametrize("pack", [True, False])
def test_a_resume_is_exact(tmp_path: Path, pack: bool) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for directory in (whole, parts):
        directory.mkdir()
        chat_file(directory)
    options: dict[str, Any] = {"pack": pack, "lora_dropout": 0.1, "batch": 2, "grad_acc": 2}
    straight = chat(whole, adam_iter=7, **options)
    first = chat(parts, adam_iter=3, **options)
    second = chat(parts, adam_iter=4, **options)
    assert losses(straight) == losses(first) + losses(second)
    assert (whole / "lora-7.bin").read_bytes() == (parts / "lora-7.bin").read_bytes()
    states = [read_checkpoint(directory / "chk-7.gguf") for directory in (whole, parts)]
    assert states[0].arrays.keys() == states[1].arrays.keys()
    assert all((states[0].arrays[name] == states[1].arrays[name]).all() for name in states[0].arrays)
    assert states[0].progress.next_sample == states[1].progress.next_sample


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"train_on": "all"}, "--train-on"),
        ({"long_samples": "window"}, "--long-samples"),
        ({"pack": False}, "--pack"),
        ({"chat_template": "zephyr"}, "chat template"),
    ],
    ids=str,
)
def test_another_run_s_checkpoint_is_refused(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    chat(tmp_path, adam_iter=1)
    with pytest.raises(MismatchError, match=named):
        chat(tmp_path, adam_iter=1, **options)


def test_other_data_is_refused_until_it_is_asked_for(tmp_path: Path) -> None:
    chat(tmp_path, adam_iter=1)
    chat_file(tmp_path, 13)
    with pytest.raises(MismatchError, match="training text"):
        chat(tmp_path, adam_iter=1)
    assert of(Finished, chat(tmp_path, adam_iter=1, restart_data=True))[0].iterations == 2


def test_a_sample_that_cannot_be_used_stops_the_run_or_is_told(tmp_path: Path) -> None:
    path = chat_file(tmp_path, 3, "bad.jsonl", '{"prompt": "x", "completion": ""}', '{"prompt": ')
    with pytest.raises(DataError) as error:
        chat(tmp_path, train_data=str(path))
    assert error.value.line == 4 and error.value.path == str(path)
    reports = chat(tmp_path, train_data=str(path), on_error="skip", adam_iter=1)
    skipped = [r.text for r in of(Remark, reports) if r.text.startswith("skipped")]
    assert len(skipped) == 2 and f"{path}:4" in skipped[0] and f"{path}:5" in skipped[1]
    assert of(ChatFacts, reports)[0].n_skipped == 2


def test_what_is_too_long_is_told(tmp_path: Path) -> None:
    reports = chat(tmp_path, ctx=24, adam_iter=1, train_on="all")
    (facts,) = of(ChatFacts, reports)
    warned = [r.text for r in of(Remark, reports) if "cut" in r.text]
    assert facts.n_cut and f"{facts.n_cut} samples were longer than --ctx" in warned[0]


@pytest.mark.parametrize(
    ("options", "named"),
    [({"train_on": "all"}, "--train-on"), ({"pack": False}, "--pack"), ({"on_error": "skip"}, "--on-error")],
    ids=str,
)
def test_a_text_has_no_options_of_a_chat(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        run(tmp_path, **options)
    with pytest.raises(UsageError, match="--sample-start"):
        chat(tmp_path, sample_start="<s>")


def test_answers_come_before_at_saves_and_at_the_end(tmp_path: Path) -> None:
    reports = chat(tmp_path, sample_prompt=("Who?", "Why?"), sample_tokens=4, adam_iter=4, save_every=2)
    said = of(Sample, reports)
    assert [(s.step, s.prompt) for s in said] == [(n, p) for n in (0, 2, 4) for p in ("Who?", "Why?")]
    first_step = next(i for i, r in enumerate(reports) if isinstance(r, StepReport))
    assert reports.index(said[1]) < first_step
    assert losses(reports) == losses(chat(tmp_path, adam_iter=4, save_every=2, checkpoint_in="", lora_out=""))[:4]


def test_a_text_s_prompts_are_its_beginnings(tmp_path: Path) -> None:
    said = of(Sample, run(tmp_path, sample_prompt=("The king",), sample_tokens=3, adam_iter=1))
    assert [s.step for s in said] == [0, 1]


def test_the_best_adapter_is_kept_and_patience_ends(tmp_path: Path) -> None:
    """A run that gets no better, its steps being too small to count: the first evaluation is the best one."""
    options = {"adam_alpha": 1e-12, "warmup": 0, "adam_iter": 12, "save_every": 1, "val_split": 0.2}
    reports = chat(tmp_path, save_best=True, patience=2, **options)
    evaluations = [e for e in of(Evaluation, reports) if e.when != "start"]
    assert of(Finished, reports)[0].reason.startswith("--patience 2")
    best = max(i for i, e in enumerate(evaluations) if e.is_best)
    assert best == len(evaluations) - 3
    assert min(e.loss for e in evaluations) == evaluations[best].loss
    assert len({e.n_tokens for e in evaluations}) == 1
    assert (tmp_path / "lora-BEST.bin").read_bytes() == (tmp_path / f"lora-{best + 1}.bin").read_bytes()
    assert any(s.path.endswith("lora-BEST.bin") for s in of(Saving, reports))


def test_the_best_needs_something_to_be_the_best_of(tmp_path: Path) -> None:
    for options, named in (
        ({"save_best": True, "val_split": 0.0}, "--save-best needs held-out data"),
        ({"patience": 1, "val_split": 0.0}, "--patience needs held-out data"),
        ({"save_best": True, "lora_out": str(tmp_path / "a.gguf")}, "--save-best needs ITERATION"),
    ):
        with pytest.raises(LlamakitError, match=named):
            chat(tmp_path, **options)


def test_held_out_data_of_its_own(tmp_path: Path) -> None:
    held_out = chat_file(tmp_path, 4, "held.jsonl")
    (facts,) = of(ChatFacts, chat(tmp_path, val_data=str(held_out), adam_iter=1))
    assert facts.n_samples == 12 and facts.n_held_out == 4
    text = tmp_path / "text.txt"
    text.write_text(tiny_text(3000, 5))
    with pytest.raises(UsageError, match="--val-data is a plain text"):
        chat(tmp_path, val_data=str(text))
    other = tmp_path / "other.txt"
    other.write_text(tiny_text(500, 6))
    (evaluation,) = of(Evaluation, run(tmp_path, val_data=str(other), adam_iter=1, checkpoint_in=""))[-1:]
    assert evaluation.n_held_out > 100


def test_a_base_without_a_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LlamakitError, match="template"):
        chat(tmp_path, chat_template=None, model_base=str(cached_tiny_gguf(type="Q8_0")))


def test_the_adapter_is_proven_at_the_end(tmp_path: Path) -> None:
    for dtype in ("f32", "bf16"):
        where = tmp_path / dtype
        where.mkdir()
        (found,) = of(Verified, chat(where, dtype=dtype, adam_iter=3, adam_alpha=0.02, lora_dropout=0.2))
        assert found.path.endswith("lora-3.bin") and found.n_tokens > 10
        assert found.difference <= 1e-4 and found.change > 0.01


def test_an_adapter_that_changes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LlamakitError, match="the adapter changes nothing") as error:
        chat(tmp_path, adam_iter=2, adam_alpha=0.0)
    assert error.value.exit_code == 1


def test_an_adapter_that_is_not_what_was_trained_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path, base: ModelFile) -> Adapter:
        adapter = read_adapter(path, base)
        return dataclasses.replace(adapter, alpha=3 * adapter.alpha)

    monkeypatch.setattr(proof, "read_adapter", read)
    with pytest.raises(LlamakitError, match="what was written is not what was trained"):
        chat(tmp_path, adam_iter=3, adam_alpha=0.1, warmup=0)


@pytest.mark.slow
def test_the_report_of_a_run(tmp_path: Path) -> None:
    config = run_config(tmp_path, train_data=str(chat_file(tmp_path)), chat_template="llama2", ctx=128,
                        sample_prompt=("Who?",), sample_tokens=3, save_best=True,
                        merge_out=str(tmp_path / "merged.gguf"))  # fmt: skip
    list(keep_report(finetune(config), config, "llamakit finetune ...", tmp_path / "report"))
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert found["data"]["samples"] == 11 and found["data"]["records: prompt/completion"] == 12
    assert [s["step"] for s in found["samples"]] == [0, 2, 4]
    assert found["perplexity"]["before"] and found["perplexity"]["after"]
    assert found["results"]["max |dlogit| of the adapter read back"] <= 1e-4
    assert len(found["curves"]["steps"]["loss"]) == 4
    outside = {"../lora-LATEST.bin", "../chk-LATEST.gguf", "../lora-BEST.bin", "../merged.gguf"}
    assert outside | {"metrics.jsonl"} <= {f["name"] for f in found["files"]}
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Who?" in page and "tokens with a loss" in page
    list(keep_report(finetune(config), config, "llamakit finetune ...", tmp_path / "report"))
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert len(found["curves"]["steps"]["loss"]) == 8 and found["curves"]["n_resumed"] == 1
