"""A model that is held to its base on a text: what is added to the loss, and what it is good for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llamakit.errors import DataError, MismatchError, UsageError
from llamakit.formats.adapter import Adapter, read_adapter
from llamakit.formats.open import open_model
from llamakit.model import Llama, attach, load_model
from llamakit.model.lora import without_adapters
from llamakit.tokenizer import load_tokenizer
from llamakit.training.anchor import Anchor
from llamakit.training.finetune_data import read_anchor
from llamakit.training.loss import Rows, backpropagate_divergence
from llamakit.training.report import StepReport
from tests.helpers import render_in_this_process
from tests.tiny import cached_tiny_gguf, tiny_text
from tests.training.runs import run, run_config

Options = dict[str, Any]


def anchored(directory: Path, **options: Any) -> Options:
    (directory / "other.txt").write_text(tiny_text(600, 11))
    return {"anchor_data": str(directory / "other.txt"), **options}


def tuned(scale: float = 1.0) -> tuple[Llama, dict[str, torch.nn.Parameter]]:
    """A tiny model with an adapter of random numbers on some matrices, the output among them."""
    base = cached_tiny_gguf()
    with open_model(base) as file:
        model = load_model(file)
        generator = torch.Generator().manual_seed(3)
        names = ["blk.0.attn_q.weight", "blk.1.ffn_down.weight", "output.weight"]
        pairs = {}
        for name in names:
            info = file.tensors[name]
            a, b = (
                torch.randn(2, info.shape[1], generator=generator),
                torch.randn(info.shape[0], 2, generator=generator),
            )
            pairs[name] = (a.numpy(), scale * b.numpy())
    attach(model, Adapter(alpha=0.1, tensors=pairs))
    trained = {name: p for name, p in model.named_parameters() if "lora_" in name}
    for parameter in trained.values():
        parameter.requires_grad_()
    return model.train(), trained


@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_is_that_of_the_divergence(masked: bool) -> None:
    model, trained = tuned()
    tokens = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(2)) < 0.6 if masked else None
    found = backpropagate_divergence(model, Rows(tokens, tokens, mask), 0.25)
    ours = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    model.zero_grad()
    with torch.no_grad(), without_adapters(model):
        base = model.output(model(tokens)).double().log_softmax(-1)
    log_probs = model.output(model(tokens)).double().log_softmax(-1)
    each = (base.exp() * (base - log_probs)).sum(-1)
    total = (each if mask is None else each[mask]).sum()
    (0.25 * total).backward()
    assert found == pytest.approx(float(total.detach()), rel=1e-5) and found > 1e-3
    assert ours.keys() == trained.keys()
    for name, parameter in trained.items():
        assert parameter.grad is not None
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_an_adapter_that_changes_nothing_is_at_its_base() -> None:
    model, trained = tuned(scale=0.0)
    tokens = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(1))
    assert backpropagate_divergence(model, Rows(tokens, tokens), 1.0) == pytest.approx(0, abs=1e-5)
    assert all(float(p.grad.abs().max()) < 1e-5 for p in trained.values() if p.grad is not None)


def test_without_adapters_is_the_bare_model_for_a_while() -> None:
    model, _ = tuned()
    with open_model(cached_tiny_gguf()) as file:
        bare = load_model(file)
    tokens = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, expected = model(tokens), bare(tokens)
        with without_adapters(model):
            assert torch.equal(model(tokens), expected)
        assert torch.equal(model(tokens), before) and not torch.equal(before, expected)


def test_every_row_is_used_before_one_is_used_again() -> None:
    rows = [Rows(torch.full((1, 4), i), torch.full((1, 4), i)) for i in range(7)]
    anchor = Anchor(rows, 1.0, 3, 5, "")
    seen = [int(row.tokens[0, 0]) for iteration in range(1, 15) for row in anchor.chosen(iteration)]
    passes = [seen[at : at + 7] for at in range(0, 42, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes) and len({tuple(one) for one in passes}) > 3
    assert [int(row.tokens[0, 0]) for row in anchor.chosen(9)] == seen[24:27]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("other.txt", tiny_text(600, 11)),
        ("other.jsonl", '{"text": "the king has a crown"}\n{"prompt": "who?", "completion": "the king"}\n'),
    ],
)
def test_texts_and_records_are_read_whole(
    name: str, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    render_in_this_process(monkeypatch)
    (tmp_path / name).write_text(content)
    config = run_config(tmp_path, anchor_data=str(tmp_path / name), chat_template="llama2", ctx=32)
    with open_model(config.model_base) as file:
        tokenizer = load_tokenizer(file)
    anchor = read_anchor(config, tokenizer, n_vocab=1000, seed=1)
    assert anchor is not None and all(len(row.tokens) == 1 for row in anchor.rows)
    n_tokens = sum(row.n_trained for row in anchor.rows)
    if name.endswith(".txt"):
        assert n_tokens == len(tokenizer.encode(content, add_special=False, parse_special=False))
    else:
        assert n_tokens > len(tokenizer.encode("the king has a crown who? the king", add_special=False))


def test_it_keeps_the_model_at_its_base(tmp_path: Path) -> None:
    more = {"adam_alpha": 0.02, "warmup": 1, "adam_iter": 12, "checkpoint_out": "", "save_every": 0}
    found = {}
    for weight in (1e-9, 3.0):
        folder = tmp_path / str(weight)
        folder.mkdir()
        reports = run(folder, **anchored(folder, anchor_weight=weight, anchor_batch=2, **more))
        steps = [report for report in reports if isinstance(report, StepReport)]
        assert steps[0].divergence == pytest.approx(0, abs=1e-5)
        assert steps[-1].loss < steps[0].loss
        found[weight] = steps[-1].divergence
    assert found[3.0] < 0.5 * found[1e-9]


def test_without_one_nothing_is_said_of_it(tmp_path: Path) -> None:
    reports = run(tmp_path, adam_iter=1, checkpoint_out="")
    assert [report.divergence for report in reports if isinstance(report, StepReport)] == [None]


def test_a_resume_is_exact(tmp_path: Path) -> None:
    options = anchored(tmp_path, lora_dropout=0.2, grad_acc=2, anchor_batch=2, anchor_weight=0.5)
    for name, runs in (("whole", (6,)), ("parts", (2, 4))):
        folder = tmp_path / name
        folder.mkdir()
        for adam_iter in runs:
            run(folder, **options, adam_iter=adam_iter)
    assert (tmp_path / "whole/lora-6.bin").read_bytes() == (tmp_path / "parts/lora-6.bin").read_bytes()
    with open_model(run_config(tmp_path).model_base) as base:
        assert read_adapter(tmp_path / "whole/lora-6.bin", base).tensors


def test_another_anchor_is_another_run(tmp_path: Path) -> None:
    run(tmp_path, **anchored(tmp_path, adam_iter=2))
    (tmp_path / "third.txt").write_text(tiny_text(600, 12))
    with pytest.raises(MismatchError, match="the anchor"):
        run(tmp_path, anchor_data=str(tmp_path / "third.txt"), adam_iter=2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"anchor_weight": 0.0}, "--anchor-weight is 0.0"),
        ({"anchor_batch": 0}, "--anchor-batch is 0"),
        (
            {"full": True, "anchor_data": "x", "lora_out": "ggml-lora-ITERATION-f32.gguf"},
            "--anchor-data is for an adap",
        ),
    ],
)
def test_what_cannot_be(options: Options, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=expected):
        run_config(tmp_path, **options)


def test_an_anchor_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.txt"):
        run(tmp_path, anchor_data=str(tmp_path / "nowhere.txt"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"empty\.txt"):
        run(tmp_path, anchor_data=str(tmp_path / "empty.txt"))
