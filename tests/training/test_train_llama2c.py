"""Going on with a ckpt.pt of llama2.c as its own train.py would: weights, iteration, and the state of AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llamakit.formats.llama2c_checkpoint import Llama2cCheckpoint
from llamakit.formats.names import name_of_meta
from llamakit.training.checkpoint import read_checkpoint
from llamakit.training.optim import AdamW
from llamakit.training.report import Remark, StepReport
from tests.formats.torch_models import llama2c_checkpoint, meta_weights
from tests.training.test_train import of, token_list
from tests.training.train_runs import run_train

BETAS, DECAY = (0.9, 0.95), 0.1


def parameters() -> dict[str, torch.nn.Parameter]:
    """Meta's name -> parameter, in the order of model.py; the output is the embedding."""
    weights = meta_weights(dtype=torch.float32, n_kv=4)
    del weights["output.weight"]
    # model.py makes the layers before the last norm: named_parameters() has it behind them.
    weights["norm.weight"] = weights.pop("norm.weight")
    return {name: torch.nn.Parameter(weight) for name, weight in weights.items()}


def optimizer(named: dict[str, torch.nn.Parameter]) -> torch.optim.AdamW:
    """As train.py's configure_optimizers makes it: matrices with weight decay, then vectors without."""
    groups = [
        {"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": DECAY},
        {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=BETAS, fused=True)


def written(path: Path, **changes: Any) -> tuple[dict[str, torch.nn.Parameter], torch.optim.AdamW]:
    """A ckpt.pt after five steps of train.py, and what goes on there."""
    named = parameters()
    adam, random = optimizer(named), torch.Generator().manual_seed(1)
    for _ in range(5):
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=random)
        adam.step()
    weights = {name: parameter.detach() for name, parameter in named.items()}
    weights["output.weight"] = weights["tok_embeddings.weight"]
    llama2c_checkpoint(path, **({"model": weights, "optimizer": adam.state_dict()} | changes))
    return named, adam


def resumed(directory: Path, steps: int = 3, **options: Any) -> list[Any]:
    bare = directory / "bare"
    bare.mkdir(exist_ok=True)
    for name in ("a.bin", "b.bin"):
        (np.arange(500, dtype=np.uint16) % 37 + 3).tofile(bare / name)
    vocabulary = str(token_list(directory / "v.gguf", 40))
    defaults: dict[str, Any] = {"train_data": str(bare), "vocab_model": vocabulary, "sample_tokens": 0}
    return run_train(directory, **(defaults | {"adam_iter": 5 + steps, "init_from": "resume"} | options))


def test_three_more_steps_are_torch_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of the resumed run, given to torch's AdamW that goes on from the same file: the same weights."""
    (tmp_path / "out").mkdir()
    named, adam = written(tmp_path / "out/ckpt.pt")
    taken: list[tuple[float, list[torch.Tensor]]] = []
    step = AdamW.step

    def recorded(self: AdamW, lr: float) -> None:
        taken.append((lr, [gradient.clone() for _, gradient, _, _ in self._states]))
        step(self, lr)

    monkeypatch.setattr(AdamW, "step", recorded)
    reports = resumed(tmp_path)
    assert [report.step for report in of(StepReport, reports)] == [6, 7, 8]
    assert any("its iteration 5 and its optimizer moments are taken" in r.text for r in of(Remark, reports))
    state = read_checkpoint(tmp_path / "out/checkpoint-8.gguf", "train_model")
    assert state.progress.updates == 8
    names = [name for name in state.arrays if not name.endswith((".m", ".v"))]
    ours = {name_of_meta(theirs): parameter for theirs, parameter in named.items()}
    for lr, gradients in taken:
        for name, gradient in zip(names, gradients, strict=True):
            ours[name].grad = gradient
        for group in adam.param_groups:
            group["lr"] = lr
        adam.step()
    for name in names:
        expected = adam.state[ours[name]]
        assert np.array_equal(state.arrays[name], ours[name].detach().numpy()), name
        assert np.array_equal(state.arrays[f"{name}.m"], expected["exp_avg"].numpy()), name
        assert np.array_equal(state.arrays[f"{name}.v"], expected["exp_avg_sq"].numpy()), name


def test_the_run_goes_on_from_its_own_checkpoint_afterwards(tmp_path: Path) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name / "out").mkdir(parents=True)
        written(tmp_path / name / "out/ckpt.pt")
    options = {"lr_schedule": "constant", "eval_every": 0, "val_split": 0.0}
    resumed(tmp_path / "whole", 4, **options)
    resumed(tmp_path / "parts", 1, **options)
    resumed(tmp_path / "parts", 4, **options)
    models = [(tmp_path / name / "out/model-9.gguf").read_bytes() for name in ("whole", "parts")]
    assert models[0] == models[1]


def test_a_fresh_start_from_its_weights_has_a_fresh_optimizer(tmp_path: Path) -> None:
    written(tmp_path / "ckpt.pt")
    reports = resumed(tmp_path, -3, init_from=str(tmp_path / "ckpt.pt"))
    assert [report.step for report in of(StepReport, reports)] == [1, 2]
    assert read_checkpoint(tmp_path / "out/checkpoint-2.gguf", "train_model").progress.updates == 2


def _changed(state: dict[str, Any], number: int, **values: Any) -> dict[str, Any]:
    return {**state, "state": {**state["state"], number: {**state["state"][number], **values}}}


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {},
        lambda s: {**s, "state": {}},
        lambda s: {**s, "param_groups": s["param_groups"][:1]},
        lambda s: {**s, "param_groups": s["param_groups"][::-1]},
        lambda s: _changed(s, 0, step=torch.tensor(4.0)),
        lambda s: {**s, "state": {i: {**entry, "step": torch.tensor(0.5)} for i, entry in s["state"].items()}},
        lambda s: _changed(s, 1, exp_avg=torch.zeros(3, 2)),
        lambda s: _changed(s, 1, exp_avg_sq=s["state"][1]["exp_avg_sq"].half()),
        lambda s: {**s, "state": {i: {"step": entry["step"]} for i, entry in s["state"].items()}},
    ],
)
def test_a_state_that_is_not_certainly_theirs_is_not_taken(tmp_path: Path, change: Any) -> None:
    _, adam = written(tmp_path / "whole.pt")
    written(tmp_path / "ckpt.pt", optimizer=change(adam.state_dict()))
    with Llama2cCheckpoint(tmp_path / "ckpt.pt") as file:
        assert file.adam_state() is None
    with Llama2cCheckpoint(tmp_path / "whole.pt") as file:
        state = file.adam_state()
    assert state is not None and state.updates == 5 and len(state.moments) == len(parameters())
