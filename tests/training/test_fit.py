"""--max-memory: what fits, what is chosen, what is refused; and that the choice changes no loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llamakit.errors import UsageError
from llamakit.training.finetune import plan_finetune
from llamakit.training.report import Outcome, Plan, StepReport
from tests.helpers import render_in_this_process
from tests.training.runs import losses, run, run_config
from tests.training.test_finetune_chat import chat
from tests.training.test_finetune_full import full_options


def planned(directory: Path, **options: Any) -> Plan:
    return next(r for r in plan_finetune(run_config(directory, **options)) if isinstance(r, Plan))


def test_a_plan_writes_and_loads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(tmp_path)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("llamakit.training.finetune_lora.load_model", None)
    plan = next(r for r in plan_finetune(config) if isinstance(r, Plan))
    assert sorted(tmp_path.iterdir()) == before
    assert plan.memory_bytes == sum(plan.memory.values()) and plan.total_s > 0
    assert (plan.n_steps, plan.n_tokens, plan.trained_share) == (4, 4 * 2 * 16, 1.0)


def test_disk_is_what_the_run_leaves(tmp_path: Path) -> None:
    adapters = str(tmp_path / "lora-ITERATION.gguf")
    plan = planned(tmp_path, lora_out=adapters)
    reports = run(tmp_path, lora_out=adapters)
    files = {kind: sum(p.stat().st_size for p in tmp_path.glob(f"{kind}-[0-9]*")) for kind in ("chk", "lora")}
    told = [r for r in reports if isinstance(r, Plan)]
    assert len(told) == 1 and told[0].disk == plan.disk
    assert plan.disk["checkpoints"] == pytest.approx(files["chk"], rel=0.15)
    assert plan.disk["adapters"] == pytest.approx(files["lora"], rel=0.15)


def test_all_weights_are_fitted_too(tmp_path: Path) -> None:
    """They need no cache of decoded weights, and none is chosen for them."""
    whole = full_options(tmp_path, batch=4)
    asked, fitted = planned(tmp_path, **whole), planned(tmp_path, **whole, max_memory="20G")
    assert fitted.chosen and fitted.trained_parameters == asked.trained_parameters
    assert "--weight-cache" not in fitted.options and "--weight-cache" not in asked.options


def test_the_outcome_is_told_beside_the_plan(tmp_path: Path) -> None:
    reports = run(tmp_path)
    outcome = next(r for r in reports if isinstance(r, Outcome))
    plan = next(r for r in reports if isinstance(r, Plan))
    assert outcome.predicted_bytes == plan.memory_bytes and outcome.peak_bytes > 50 << 20
    steps = [r.step_s for r in reports if isinstance(r, StepReport)]
    assert min(steps) <= outcome.step_s <= max(steps)


def test_epochs_end_the_steps(tmp_path: Path) -> None:
    one = planned(tmp_path, adam_iter=10**6, epochs=1, sample_start="\n")
    two = planned(tmp_path, adam_iter=10**6, epochs=2, sample_start="\n")
    assert 0 < one.n_steps < two.n_steps <= 2 * one.n_steps


# ---- choosing ----------------------------------------------------------------------------------------------------


def test_less_memory_means_a_smaller_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamakit.training.plan.resident_bytes", lambda: 10_000_000)
    asked = {"ctx": 64, "batch": 32}
    most = planned(tmp_path, **asked, use_checkpointing=False)
    free = planned(tmp_path, **asked, max_memory="100G")
    assert (free.options["--micro-batch"], free.options["--use-checkpointing"]) == (32, False)
    # Half of what the batch takes beyond a process that has no rows to compute.
    parts = ("activations", "logits")
    room = most.memory_bytes - sum(most.memory[name] for name in parts) // 2
    less = planned(tmp_path, **asked, max_memory=f"{room / 1e6:.3f}M")
    assert less.memory_bytes <= room and less.chosen
    assert less.options["--micro-batch"] != 32 or less.options["--use-checkpointing"] is True
    assert (less.options["--batch"], less.options["--grad-acc"], less.n_tokens) == (32, 1, free.n_tokens)


def test_what_does_not_fit_is_refused_with_what_would(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"--max-memory 10M: nothing fits; the smallest takes [\d.]+[MG] \(--micro-batch 1, "
    ):
        planned(tmp_path, max_memory="10M")


@pytest.mark.parametrize("size", ["x", "3 potatoes", "-1G", "0", "1e3"])
def test_a_size_that_is_none(tmp_path: Path, size: str) -> None:
    with pytest.raises(UsageError, match="--max-memory"):
        run_config(tmp_path, max_memory=size)


def test_a_cache_that_was_asked_for_stays(tmp_path: Path) -> None:
    assert planned(tmp_path, weight_cache="none", max_memory="100G").options["--weight-cache"] == "none"


# ---- the losses stay ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_parts_of_a_micro_step_add_up_to_it(tmp_path: Path, micro: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = losses(run(tmp_path / "a", batch=4, grad_acc=2))
    parts = losses(run(tmp_path / "b", batch=4, grad_acc=2, micro_batch=micro))
    torch.testing.assert_close(torch.tensor(parts), torch.tensor(whole), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pack", [True, False])
def test_parts_of_chat_rows_add_up_too(tmp_path: Path, pack: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    render_in_this_process(monkeypatch)
    found = []
    for micro in (0, 1):
        folder = tmp_path / str(micro)
        folder.mkdir()
        found.append(losses(chat(folder, batch=3, pack=pack, micro_batch=micro, adam_iter=3)))
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), rtol=1e-5, atol=1e-6)


def test_parts_draw_masks_of_their_own_and_resume(tmp_path: Path) -> None:
    options = {"batch": 4, "micro_batch": 2, "lora_dropout": 0.3}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert losses(run(tmp_path / "a", **options)) == losses(run(tmp_path / "b", **options))
