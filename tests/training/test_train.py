"""The verb `train`: exact resumes, the files of a run, how it ends, where it begins, what it refuses."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llamakit.errors import FormatError, LlamakitError, MismatchError, UsageError
from llamakit.files import RunLock
from llamakit.formats.gguf import write_gguf
from llamakit.formats.open import open_model
from llamakit.model.config import ModelConfig
from llamakit.native import library, using
from llamakit.training.blueprint import build, from_scratch
from llamakit.training.checkpoint import read_checkpoint
from llamakit.training.evaluation import Evaluator
from llamakit.training.loop import Control, Parameters
from llamakit.training.optim import AdamW
from llamakit.training.report import Evaluation, Finished, NewModel, Remark, Sample, Saving, StepReport
from llamakit.training.state import TrainState
from llamakit.training.train import train
from llamakit.training.train_config import TrainConfig
from tests.dataset.token_folders import documents, tiny_vocabulary, write_folder
from tests.formats.torch_models import llama2c_checkpoint
from tests.tiny import cached_tiny_gguf, tiny_text
from tests.training.runs import run as run_finetune
from tests.training.train_runs import EXACT, run_train, train_config


def of(kind: Any, reports: list[Any]) -> list[Any]:
    return [report for report in reports if isinstance(report, kind)]


def losses(reports: list[Any]) -> list[float]:
    return [report.loss for report in of(StepReport, reports)]


def state(directory: Path, name: str = "checkpoint-LATEST.gguf") -> TrainState:
    found = read_checkpoint(directory / "out" / name, "train_model")
    assert isinstance(found, TrainState)
    return found


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "out").iterdir() if path.is_file())


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# ---- exact resumes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"lr_schedule": "constant"},
        {"lr_schedule": "constant", "dropout": 0.2, "grad_acc": 2, "tie": False},
        {"cos_decay_steps": 9, "dropout": 0.1, "use_checkpointing": True},
        {"lr_schedule": "linear", "cos_decay_steps": 5, "dtype": "bf16"},
    ],
    ids=str,
)
def test_a_resume_is_exact_to_the_last_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    options = {**EXACT, "save_every": 4, "eval_every": 4, **options}
    whole = run_train(tmp_path / "whole", adam_iter=8, **options)
    parts = run_train(tmp_path / "parts", adam_iter=4, **options)
    parts += run_train(tmp_path / "parts", adam_iter=8, **options)
    assert losses(whole) == losses(parts) and len(losses(whole)) == 8
    for name in ("checkpoint-8.gguf", "model-8.gguf"):
        assert (tmp_path / "whole/out" / name).read_bytes() == (tmp_path / "parts/out" / name).read_bytes()


def test_a_resume_is_exact_over_the_end_of_an_epoch(tmp_path: Path) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(tiny_text(300, 1))
    options = {**EXACT, "lr_schedule": "constant", "batch": 3, "save_every": 0, "eval_every": 0}
    whole = run_train(tmp_path / "whole", adam_iter=12, **options)
    parts = [report for n in (3, 5, 12) for report in run_train(tmp_path / "parts", adam_iter=n, **options)]
    assert losses(whole) == losses(parts)
    assert state(tmp_path / "parts").progress.epochs >= 1
    assert (tmp_path / "whole/out/model-12.gguf").read_bytes() == (tmp_path / "parts/out/model-12.gguf").read_bytes()


def test_running_again_with_nothing_left_to_do_changes_nothing(tmp_path: Path) -> None:
    run_train(tmp_path)
    before = content(tmp_path)
    reports = run_train(tmp_path)
    assert not of(StepReport, reports) and not of(Saving, reports)
    after = content(tmp_path)
    assert {n for n in after if after[n] != before.get(n)} <= {"out/metrics.jsonl"} and before.keys() == after.keys()


def test_settings_come_from_the_command_line_with_one_warning_naming_both(tmp_path: Path) -> None:
    run_train(tmp_path)
    reports = run_train(tmp_path, adam_iter=5, adam_alpha=5e-4)
    (warning,) = [r.text for r in of(Remark, reports) if r.level == "warning"]
    assert "--adam-alpha 0.0005 (was 0.01)" in warning and "--adam-iter 5 (was 4)" in warning


def test_a_warmup_longer_than_the_run_is_warned_of_with_the_rate_that_it_will_reach(tmp_path: Path) -> None:
    (warning,) = [r.text for r in of(Remark, run_train(tmp_path, adam_iter=2, warmup=100)) if r.level == "warning"]
    assert "--warmup 100 is longer than the run, which ends at iteration 2" in warning and "reach 0.0002" in warning
    assert not [r for r in of(Remark, run_train(tmp_path, adam_iter=2, warmup=2)) if "is longer than" in r.text]


# ---- files -----------------------------------------------------------------------------------------------------------


def test_the_files_of_a_run(tmp_path: Path) -> None:
    reports = run_train(tmp_path, adam_iter=5, **EXACT)
    numbered = [f"{kind}-{n}.gguf" for kind in ("checkpoint", "model") for n in (4, 5, "LATEST")]
    assert names(tmp_path) == sorted([*numbered, "metrics.jsonl", "data.json", "vocab.gguf"])
    assert of(Finished, reports)[0].files == tuple(
        str(tmp_path / "out" / f"{kind}-LATEST.gguf") for kind in ("checkpoint", "model")
    )
    assert (tmp_path / "out/model-LATEST.gguf").read_bytes() == (tmp_path / "out/model-5.gguf").read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "event" not in line] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if line.get("event") == "eval"] == [2, 4, 5]


@pytest.mark.slow
def test_the_best_model_is_the_one_that_was_evaluated_and_is_kept(tmp_path: Path) -> None:
    """Where an evaluation is the best so far the model is saved, whatever --save-every says, and outlives --keep-last."""
    options = {"adam_alpha": 1.0, "lr_schedule": "constant", "val_split": 0.3}  # far too much: it gets worse
    reports = run_train(tmp_path, adam_iter=40, save_every=7, keep_last=1, **options)
    evaluations = of(Evaluation, reports)
    best = [e.step for e in evaluations if e.is_best][-1]
    assert best < 40
    assert f"model-{best}.gguf" not in names(tmp_path) and "model-40.gguf" in names(tmp_path)
    other = tmp_path / "other"
    run_train(other, adam_iter=40, save_every=2, keep_last=0, **options)
    assert (tmp_path / "out/model-BEST.gguf").read_bytes() == (other / f"out/model-{best}.gguf").read_bytes()


def test_only_the_newest_files_are_kept(tmp_path: Path) -> None:
    run_train(tmp_path, adam_iter=6, save_every=1, keep_last=2, **EXACT)
    assert [n for n in names(tmp_path) if n.startswith("check")] == [f"checkpoint-{n}.gguf" for n in (5, 6, "LATEST")]


def test_only_the_model_is_written(tmp_path: Path) -> None:
    """From the checkpoint alone: the text need not be there any more."""
    run_train(tmp_path)
    expected = (tmp_path / "out/model-4.gguf").read_bytes()
    for path in (tmp_path / "out").glob("model-*"):
        path.unlink()
    (tmp_path / "text.txt").write_text("another text")
    run_train(tmp_path, only_write_model=True, train_data="", vocab_model="")
    assert (tmp_path / "out/model-4.gguf").read_bytes() == (tmp_path / "out/model-LATEST.gguf").read_bytes() == expected
    with pytest.raises(MismatchError, match="--embd is 16 in the checkpoint, and 32 in this run"):
        run_train(tmp_path, only_write_model=True, embd=32)
    with pytest.raises(UsageError, match="needs a checkpoint"):
        run_train(tmp_path / "new", only_write_model=True)


# ---- how a run ends --------------------------------------------------------------------------------------------------


def test_a_signal_ends_the_run_after_its_step_saved(tmp_path: Path) -> None:
    control, seen = Control(), []
    for report in train(train_config(tmp_path, adam_iter=50, save_every=0, eval_every=0), control):
        seen.append(report)
        if isinstance(report, StepReport) and report.step == 3:
            control.signal = 15
    (finished,) = of(Finished, seen)
    assert finished.signal == 15 and finished.iterations == 3 and not of(Evaluation, seen)
    assert state(tmp_path).progress.iterations == 3


def test_a_request_to_save_saves_and_goes_on(tmp_path: Path) -> None:
    control = Control()
    for report in train(train_config(tmp_path, adam_iter=4, save_every=0, **EXACT), control):
        if isinstance(report, StepReport) and report.step == 1:
            control.save = True
    assert {"checkpoint-1.gguf", "checkpoint-4.gguf"} <= set(names(tmp_path)) and not control.save


def test_a_time_limit_ends_in_time_with_the_rate_decayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()  # a clock that goes on by 20 ms whenever somebody looks
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) / 50)
    monkeypatch.setattr(Evaluator, "seconds_at_the_end", lambda _: 0.5)
    reports = run_train(tmp_path, adam_iter=10**6, save_every=0, eval_every=0, max_minutes=5 / 60)
    assert next(ticks) / 50 < 5.5
    (finished,) = of(Finished, reports)
    assert "--max-minutes" in finished.reason
    steps = of(StepReport, reports)
    assert 3 < len(steps) == state(tmp_path).progress.iterations
    assert steps[-1].lr < 0.2 * max(step.lr for step in steps)
    assert of(Evaluation, reports)[-1].when == "end"


@pytest.mark.prove
def test_a_time_limit_is_kept_by_a_true_clock(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    began = time.monotonic()
    reports = run_train(tmp_path, adam_iter=10**6, save_every=0, eval_every=0, max_minutes=2 / 60)
    seconds = time.monotonic() - began
    record_property("seconds of a run with --max-minutes of 2 seconds", round(seconds, 2))
    assert seconds < 3.5 and "--max-minutes" in of(Finished, reports)[0].reason


def test_patience_ends_a_run_that_no_longer_gets_better(tmp_path: Path) -> None:
    reports = run_train(tmp_path, adam_iter=400, eval_every=2, adam_alpha=3.0, patience=3, save_every=0)
    (finished,) = of(Finished, reports)
    assert "--patience 3" in finished.reason and finished.iterations < 400
    assert [e.is_best for e in of(Evaluation, reports)][-3:] == [False] * 3
    with pytest.raises(UsageError, match="--patience needs held-out text"):
        run_train(tmp_path / "b", patience=1, val_split=0.0)


def test_the_last_evaluation_takes_everything_however_a_run_ends(tmp_path: Path) -> None:
    reports = run_train(tmp_path, adam_iter=400, eval_every=2, adam_alpha=3.0, patience=1, save_every=0, eval_iters=1)
    last = of(Evaluation, reports)[-1]
    assert last.when == "end" and last.n_tokens > of(Evaluation, reports)[0].n_tokens


def test_no_iterations_give_the_start(tmp_path: Path) -> None:
    run_train(tmp_path, adam_iter=0)
    assert "model-0.gguf" in names(tmp_path) and "model-LATEST.gguf" in names(tmp_path)


def test_compiling_is_for_devices_without_native_code(tmp_path: Path) -> None:
    if library() is None:
        pytest.skip("there is no native code here")
    assert any("--compile has no effect" in r.text for r in of(Remark, run_train(tmp_path, compile=True)))


@pytest.mark.prove
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_compiled_blocks_take_the_same_steps(tmp_path: Path) -> None:
    with using(None):
        expected = [r.loss for r in of(StepReport, run_train(tmp_path / "a"))]
        found = [r.loss for r in of(StepReport, run_train(tmp_path / "b", compile=True))]
    assert found == pytest.approx(expected, rel=1e-5)


def test_evaluating_only(tmp_path: Path) -> None:
    run_train(tmp_path, val_split=0.2)
    before = content(tmp_path)
    reports = run_train(tmp_path, val_split=0.2, eval_only=True, adam_iter=99)
    (evaluation,) = of(Evaluation, reports)
    assert evaluation.when == "end" and evaluation.step == 4 and not of(StepReport, reports)
    assert 0 < evaluation.n_tokens <= evaluation.n_held_out and math.isfinite(evaluation.loss)
    after = content(tmp_path)
    assert [name for name in before if before[name] != after[name]] in ([], ["out/metrics.jsonl"])


def test_samples_are_the_same_for_the_same_weights(tmp_path: Path) -> None:
    prompts = ("The", "")
    first = of(Sample, run_train(tmp_path / "a", sample_prompt=prompts))
    again = of(Sample, run_train(tmp_path / "b", sample_prompt=prompts))
    assert first == again and [s.prompt for s in first[:2]] == list(prompts)


def test_a_prompt_longer_than_the_context_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--sample-prompt"):
        run_train(tmp_path, sample_prompt=(tiny_text(400),))
    assert "checkpoint-LATEST.gguf" not in names(tmp_path)


# ---- where a run begins ----------------------------------------------------------------------------------------------


def test_the_start_is_llama2cs(tmp_path: Path) -> None:
    """Norms 1, matrices N(0, 0.02), wo and w3 narrower by sqrt(2 layers); weight decay on matrices alone."""
    config = train_config(tmp_path, embd=64, head=4, layer=3, ff=160, adam_decay=0.1)
    blueprint = from_scratch(config, {}, 300, 1)
    for name in blueprint.names:
        tensor = blueprint.first(name)
        if tensor.dim() == 1:
            assert bool((tensor == 1).all())
            continue
        narrow = name.endswith(("attn_output.weight", "ffn_up.weight"))
        assert float(tensor.std()) == pytest.approx(0.02 / math.sqrt(6) if narrow else 0.02, rel=0.05), name
        assert torch.equal(tensor, blueprint.first(name))
    assert not torch.equal(blueprint.first("blk.0.attn_q.weight"), blueprint.first("blk.1.attn_q.weight"))
    _, named = build(blueprint, torch.device("cpu"), torch.float32)
    before = {name: tensor.detach().clone() for name, tensor in named.items()}
    AdamW(list(named.values()), config).step(0.1)  # no gradient: only the decay is left
    for name, tensor in named.items():
        factor = 0.99 if tensor.dim() >= 2 else 1.0
        torch.testing.assert_close(tensor.detach(), factor * before[name])


@pytest.mark.parametrize(
    ("shape", "n_vocab", "count"),
    [
        ({"embd": 64, "layer": 5, "head": 8, "head_kv": 4, "multiple_of": 4}, 512, 260_032),
        ({"embd": 288, "layer": 6, "head": 6}, 32000, 15_191_712),
    ],
)
def test_the_number_of_parameters_is_llama2cs(tmp_path: Path, shape: dict[str, int], n_vocab: int, count: int) -> None:
    """stories260K and stories15M, counted by their own rule."""
    config = TrainConfig(**shape)
    blueprint = from_scratch(config, {}, n_vocab, 1)
    n, c, kv = config.layer, config.embd, config.embd // config.head * config.n_head_kv
    by_rule = n_vocab * c + n * (2 * c * c + 2 * kv * c + 3 * c * config.n_ff + 2 * c) + c
    assert sum(math.prod(s) for s in blueprint.names.values()) == by_rule == count


def test_an_untied_model_has_an_output_of_its_own(tmp_path: Path) -> None:
    (tied,), (untied,) = (of(NewModel, run_train(tmp_path / str(t), tie=t, adam_iter=1)) for t in (True, False))
    n_vocab = tied.config.n_vocab
    assert untied.n_parameters - tied.n_parameters == 16 * n_vocab
    with open_model(tmp_path / "False/out/model-1.gguf") as file:
        assert file.tensors["output.weight"].shape == (n_vocab, 16)


@pytest.mark.parametrize("kind", ["Q8_0", "F32"])
def test_a_model_is_trained_on_and_keeps_its_shape_and_vocabulary(tmp_path: Path, kind: str) -> None:
    base = cached_tiny_gguf(type=kind, tied=True, biases=True)
    options = {"init_from": str(base), "vocab_model": "", "adam_alpha": 1e-4}
    reports = run_train(tmp_path, **options)
    assert any("--embd, --layer" in remark.text for remark in of(Remark, reports))
    with open_model(base) as before, open_model(tmp_path / "out/model-LATEST.gguf") as after:
        assert after.tensors.keys() == before.tensors.keys()
        config = ModelConfig.from_metadata(after.metadata, after.tensors)
        assert config == ModelConfig.from_metadata(before.metadata, before.tensors)
        assert list(after.metadata["tokenizer.ggml.tokens"]) == list(before.metadata["tokenizer.ggml.tokens"])
        if kind == "F32":
            for name in before.tensors:
                moved = after.read(name).view(np.float32) - before.read(name).view(np.float32)
                assert 0 < np.abs(moved).max() < 1e-2, name
    more = run_train(tmp_path, **options, adam_iter=6)
    assert [step.step for step in of(StepReport, more)] == [5, 6]
    with pytest.raises(UsageError, match="--ctx 300 is more than the model's context of 256"):
        run_train(tmp_path / "b", **(options | {"ctx": 300}))


def test_tokens_are_trained_on_where_they_lie(tmp_path: Path) -> None:
    write_folder(tmp_path / "tokens", documents(80))
    reports = run_train(tmp_path, train_data=str(tmp_path / "tokens"), vocab_model="")
    (facts,) = of(NewModel, reports)
    assert facts.config.n_vocab == len(tiny_vocabulary()["tokenizer.ggml.tokens"])
    assert not (tmp_path / "out/data").exists()


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, error: type[LlamakitError] = LlamakitError, **options: Any) -> str:
    """The line of a run that is refused with exit code 2, and changes no file but its folder's vocabulary."""
    before = content(tmp_path)
    with pytest.raises(error) as caught:
        run_train(tmp_path, **options)
    assert caught.value.exit_code == 2
    after = content(tmp_path)
    assert {name: after.get(name) for name in before} == before
    return f"{caught.value} | {caught.value.hint}"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"embd": 32}, "--embd is 16 in the checkpoint, and 32 in this run"),
        ({"layer": 1}, "--layer is 2 in the checkpoint, and 1 in this run"),
        ({"head_kv": 4}, "--head-kv is 2 in the checkpoint, and 4 in this run"),
        ({"tie": False}, "--tie is True in the checkpoint, and False in this run"),
        ({"ctx": 8}, "--ctx is 16 in the checkpoint, and 8 in this run"),
        ({"seed": 8}, "--seed is 8, these tokens were made with 7"),
        ({"val_split": 0.5}, "--val-split is 0.5, these tokens were made with 0.1"),
        ({"vocab_model": "", "vocab_size": 300}, "--vocab-size is 300, these tokens were made with 0"),
        ({"vocab_model": {"n_merges": 50}}, "the vocabulary is not the one"),
    ],
    ids=str,
)
def test_a_resume_that_is_not_of_the_run_names_what_differs(
    tmp_path: Path, options: dict[str, Any], expected: str
) -> None:
    run_train(tmp_path)
    options = {k: str(cached_tiny_gguf(**v)) if isinstance(v, dict) else v for k, v in options.items()}
    assert expected in refused(tmp_path, MismatchError, **options)
    assert [step.step for step in of(StepReport, run_train(tmp_path, adam_iter=5))] == [5]


def test_changed_text_is_refused_at_a_resume_and_the_tokens_stay(tmp_path: Path) -> None:
    run_train(tmp_path)
    text = (tmp_path / "text.txt").read_text()
    (tmp_path / "text.txt").write_text(text + "more")
    said = refused(tmp_path, MismatchError)
    assert "text.txt is not what it was" in said and "--init-from scratch" in said
    (tmp_path / "text.txt").write_text(text)
    assert len(of(StepReport, run_train(tmp_path, adam_iter=5))) == 1
    (tmp_path / "text.txt").write_text(text + "more")
    assert len(of(StepReport, run_train(tmp_path, init_from="scratch"))) == 4


def test_changed_tokens_are_refused_at_a_resume(tmp_path: Path) -> None:
    write_folder(tmp_path / "tokens", documents(80))
    options = {"train_data": str(tmp_path / "tokens"), "vocab_model": ""}
    run_train(tmp_path, **options)
    write_folder(tmp_path / "tokens2", documents(80, seed=1))
    said = refused(tmp_path, MismatchError, **options | {"train_data": str(tmp_path / "tokens2")})
    assert "the training text (sha256)" in said and "--init-from scratch" in said and "--restart-data" not in said


def test_a_folder_named_data_that_is_not_a_runs_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out/data").mkdir(parents=True)
    (tmp_path / "out/data/mine.txt").write_text("years of work")
    assert "holds 'mine.txt', which is not of a run" in refused(tmp_path, UsageError)
    (tmp_path / "out/data/mine.txt").rename(tmp_path / "out/data/mine.bin")
    assert "holds 'mine.bin'" in refused(tmp_path, UsageError)


def test_a_run_that_was_cut_off_while_its_text_was_prepared_begins_again(tmp_path: Path) -> None:
    run_train(tmp_path, adam_iter=1)
    for path in (*(tmp_path / "out").glob("*.gguf"), tmp_path / "out/data.json"):
        path.unlink()
    assert len(of(StepReport, run_train(tmp_path, adam_iter=1))) == 1


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    run_train(tmp_path)
    path = tmp_path / "out/checkpoint-LATEST.gguf"
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], data[:-40] + b"\x07" * 40, b""):
        path.write_bytes(broken)
        refused(tmp_path, adam_iter=6)
        assert path.read_bytes() == broken


def test_checkpoints_of_other_trainings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    run_finetune(tmp_path / "lora", adam_iter=1)
    said = refused(tmp_path, FormatError, checkpoint_in=str(tmp_path / "lora/chk-LATEST.gguf"))
    assert "expected training.type 'train_model', got 'finetune_lora'" in said
    refused(tmp_path, FormatError, checkpoint_in=str(cached_tiny_gguf()))
    run_train(tmp_path)
    with pytest.raises(FormatError, match="got 'train_model'"):
        run_finetune(tmp_path / "lora", checkpoint_in=str(tmp_path / "out/checkpoint-4.gguf"))


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with RunLock([tmp_path / "out/run"]):
        assert "another run" in refused(tmp_path)
    run_train(tmp_path, adam_iter=1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"train_data": ""}, "--train-data is missing"),
        ({"train_data": "/nowhere/text.txt"}, "No such file"),
        ({"vocab_model": ""}, "no vocabulary is given"),
        ({"vocab_size": 300}, "both --vocab-model and --vocab-size are given"),
        ({"vocab_model": "", "vocab_size": 20}, "20"),
        ({"vocab_model": "", "vocab_size": 1000000}, "1000000"),
        ({"vocab_model": "/nowhere/vocab.gguf"}, "No such file"),
        ({"ctx": 100000}, "--ctx"),
        ({"batch": 100000}, "expected at least --batch 100000"),
        ({"init_from": "resume"}, "no such checkpoint"),
        ({"init_from": "/nowhere/model.gguf"}, "No such file"),
        ({"checkpoint_out": "", "model_out": ""}, "nothing would be written"),
        ({"model_out": "OUT_DIR/checkpoint-ITERATION.gguf"}, "one would replace the other"),
        ({"log_file": "OUT_DIR/model-LATEST.gguf"}, "one would replace the other"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(tmp_path: Path, options: dict[str, Any], expected: str) -> None:
    assert expected in refused(tmp_path, **options)
    assert not list((tmp_path).rglob("checkpoint-*"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "text.txt: there is no text in it"),
        (b" \n \n", "text.txt: there is no text in it"),
        (b"fine\nalso fine\nbad \xff\xfe here\n" * 3, "text.txt:3: is not UTF-8"),
        (b"short", "--ctx"),
    ],
)  # fmt: skip
def test_text_that_cannot_be_learnt_from(tmp_path: Path, text: bytes, expected: str) -> None:
    (tmp_path / "text.txt").write_bytes(text)
    assert expected in refused(tmp_path)


def test_tokens_that_do_not_fit_the_vocabulary(tmp_path: Path) -> None:
    write_folder(tmp_path / "tokens", documents(80))
    other = str(cached_tiny_gguf(n_merges=50))
    said = refused(tmp_path, MismatchError, train_data=str(tmp_path / "tokens"), vocab_model=other)
    assert "was written with another tokenizer" in said and other in said
    bare = tmp_path / "bare"
    bare.mkdir()
    ids = np.arange(3000, dtype=np.uint16) % 300
    ids[2000] = 60000
    for name in ("a.bin", "b.bin"):
        ids.tofile(bare / name)
    assert "has tokens, and no vocabulary" in refused(tmp_path, train_data=str(bare), vocab_model="")
    said = refused(tmp_path, MismatchError, train_data=str(bare))
    assert "token 2000 is 60000" in said and ".bin" in said


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    assert "the run's folder cannot be made: File exists" in refused(tmp_path, UsageError)
    assert "cannot be made: Not a directory" in refused(tmp_path, UsageError, out_dir=str(tmp_path / "out/deeper"))


@pytest.mark.parametrize(
    "options",
    [{"ctx": 0}, {"embd": 1}, {"layer": 0}, {"head": 0}, {"head": 3}, {"head_kv": 3}, {"vocab_size": -1},
     {"val_split": 1.0}, {"dropout": -0.1}, {"dropout": 1.0}, {"norm_rms_eps": 0.0}, {"rope_freq_base": -1.0},
     {"max_minutes": float("nan")}, {"patience": -1}, {"eval_iters": 0}, {"export": ("onnx",)}],
    ids=str,
)  # fmt: skip
def test_an_option_that_cannot_be_is_named(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--" + next(iter(options)).replace("_", "-")):
        train_config(tmp_path, **options)


def test_parameters_restore_what_they_gave(tmp_path: Path) -> None:
    config = train_config(tmp_path)
    blueprint = from_scratch(config, {}, 300, 1)
    first, again = (Parameters(build(blueprint, torch.device("cpu"), torch.float32)[1], config) for _ in range(2))
    first.optimizer.gradient.normal_(generator=torch.Generator().manual_seed(0))
    first.optimizer.step(0.1)
    again.restore(first.snapshot(), 1)
    assert again.optimizer.updates == 1
    for name, array in first.snapshot().items():
        assert np.array_equal(array, again.snapshot()[name]), name


def test_a_new_vocabulary_is_made_of_the_text_and_kept(tmp_path: Path) -> None:
    options = {"vocab_model": "", "vocab_size": 300}
    (facts,) = of(NewModel, run_train(tmp_path, **options))
    assert facts.config.n_vocab == 300
    index = (tmp_path / "out/data/index.json").stat()
    run_train(tmp_path, **options, adam_iter=5)
    assert (tmp_path / "out/data/index.json").stat().st_mtime_ns == index.st_mtime_ns
    said = refused(tmp_path, MismatchError, vocab_model="", vocab_size=320)
    assert "--vocab-size is 320, these tokens were made with 300" in said
    (facts,) = of(NewModel, run_train(tmp_path, init_from="scratch", vocab_model="", vocab_size=320))
    assert facts.config.n_vocab == 320


def test_bytes_that_are_no_text_can_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(tiny_text(2000).encode() + b"\xff\xfe" + tiny_text(2000, 1).encode())
    assert "--errors replace" in refused(tmp_path)
    assert len(of(StepReport, run_train(tmp_path, errors="replace"))) == 4


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("init_from", ["resume", "FILE"])
def test_a_checkpoint_of_llama2c_is_gone_on_with(tmp_path: Path, prefix: str, init_from: str) -> None:
    (tmp_path / "out").mkdir()
    path = llama2c_checkpoint(tmp_path / "out/ckpt.pt", prefix=prefix)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("a.bin", "b.bin"):
        (np.arange(500, dtype=np.uint16) % 37 + 3).tofile(bare / name)
    vocabulary = token_list(tmp_path / "v.gguf", 40)
    first = 5 if init_from == "resume" else 0
    options = {"train_data": str(bare), "vocab_model": str(vocabulary), "sample_tokens": 0, "adam_iter": first + 2}
    reports = run_train(tmp_path, **options, init_from=str(path) if init_from == "FILE" else init_from)
    assert [step.step for step in of(StepReport, reports)] == [first + 1, first + 2]
    if init_from == "resume":
        assert any("its optimizer moments are not" in remark.text for remark in of(Remark, reports))


def token_list(path: Path, n_vocab: int) -> Path:
    """A vocabulary of so many tokens: the first of a tiny model's."""
    keys = {key: value[:n_vocab] if isinstance(value, list) else value for key, value in tiny_vocabulary().items()}
    write_gguf(path, metadata={"general.architecture": "llama", "general.type": "model", **keys}, tensors=())
    return path
