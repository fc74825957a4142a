"""What of a model is trained, with which scale, from which start, and what becomes of it at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamakit.conversion.merge import merge
from llamakit.conversion.merge_config import MergeConfig
from llamakit.errors import LlamakitError, MismatchError, UsageError
from llamakit.formats.adapter import read_adapter
from llamakit.training.finetune import finetune
from llamakit.training.report import Evaluation, ModelFacts, Report, Saving, Verified
from tests.tiny import cached_tiny_gguf
from tests.training.runs import losses, run, run_config

OUT: dict[str, Any] = {"adam_iter": 2, "adam_alpha": 0.02, "warmup": 0}


def ranks(directory: Path, name: str = "lora-2.bin") -> dict[str, int]:
    adapter = read_adapter(directory / name)
    return {tensor.removesuffix(".weight"): adapter.rank(tensor) for tensor in adapter.tensors}


def proof(reports: list[Report]) -> Verified:
    (found,) = [r for r in reports if isinstance(r, Verified)]
    return found


def test_targets_are_kinds_names_and_patterns(tmp_path: Path) -> None:
    reports = run(tmp_path, **OUT, lora_targets=("attn_q,attn_v=2", "blk.1.ffn_*=3", "output=1"))
    assert ranks(tmp_path) == {
        "blk.0.attn_q": 4, "blk.0.attn_v": 2, "blk.1.attn_q": 4, "blk.1.attn_v": 2,
        "blk.1.ffn_gate": 3, "blk.1.ffn_up": 3, "blk.1.ffn_down": 3, "output": 1,
    }  # fmt: skip
    assert proof(reports).difference <= 1e-4
    (facts,) = [r for r in reports if isinstance(r, ModelFacts)]
    assert facts.ranks["attn_q"] == 4 and facts.ranks["ffn_up"] == 3 and facts.ranks["attn_output"] == 0
    with pytest.raises(MismatchError):
        run(tmp_path, **OUT)


@pytest.mark.parametrize(
    ("target", "reason"), [("attn_x", "fits no tensor"), ("attn_q=", "expected a kind"), ("attn_q=0", "at least 1")]
)
def test_targets_that_cannot_be(tmp_path: Path, target: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        run(tmp_path, lora_targets=(target,))


def test_rslora_is_in_the_file_s_scale(tmp_path: Path) -> None:
    """Equal ranks: alpha sqrt(rank), over rank. Different ones: the proof holds them against the trained model."""
    same, different = tmp_path / "same", tmp_path / "different"
    same.mkdir()
    different.mkdir()
    assert proof(run(same, **OUT, lora_r=4, lora_alpha=6.0, rslora=True)).difference <= 1e-4
    adapter = read_adapter(same / "lora-2.bin")
    assert adapter.scale("blk.0.attn_q.weight") == pytest.approx(6 / np.sqrt(4))
    found = proof(run(different, **OUT, rslora=True, lora_targets=("attn_*=9", "ffn_*=2")))
    assert found.difference <= 1e-4 < found.change
    with pytest.raises(MismatchError, match="--rslora"):
        run(same, **OUT, lora_r=4, lora_alpha=6.0)


@pytest.mark.parametrize("options", [{}, {"lora_alpha": 16.0}, {"rslora": True}], ids=str)
def test_an_adapter_is_gone_on_from(tmp_path: Path, options: dict[str, Any]) -> None:
    """The held-out loss before the first step is that after the last one of the run that made it."""
    first = run(tmp_path, **OUT, lora_targets=("attn_q=3", "ffn_up=5"), val_split=0.2)
    adapter = str(tmp_path / "lora-2.bin")
    more: dict[str, Any] = {
        "checkpoint_in": "",
        "lora_init": adapter,
        "lora_out": str(tmp_path / "more-ITERATION.gguf"),
    }
    second = run(tmp_path, **OUT, **more, **options, val_split=0.2)
    end, start = ([r.loss for r in reports if isinstance(r, Evaluation)] for reports in (first, second))
    assert start[0] == pytest.approx(end[-1], rel=1e-5)
    assert ranks(tmp_path, "more-2.gguf") == ranks(tmp_path)
    assert losses(second)[0] < losses(first)[0]


def test_an_adapter_of_another_model_is_no_start(tmp_path: Path) -> None:
    run(tmp_path, **OUT)
    other = str(cached_tiny_gguf(type="Q8_0", n_embd=96))
    with pytest.raises(LlamakitError):
        run(tmp_path, model_base=other, checkpoint_in="", lora_init=str(tmp_path / "lora-2.bin"))
    with pytest.raises(UsageError, match="--lora-init brings"):
        run(tmp_path, lora_init="a.gguf", lora_targets=("attn_q",))


def test_the_adapter_is_merged_at_the_end(tmp_path: Path) -> None:
    reports = run(tmp_path, **OUT, merge_out=str(tmp_path / "merged.gguf"))
    assert [r.kind for r in reports if isinstance(r, Saving)][-1] == "model"
    list(merge(MergeConfig(model=cached_tiny_gguf(type="Q8_0"), lora=(tmp_path / "lora-2.bin",),
                           out=tmp_path / "expected.gguf")))  # fmt: skip
    assert (tmp_path / "merged.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"lora_out": ""}, "--merge-out needs an adapter"),
        ({"rope_freq_base": 20000.0}, "--rope-freq-base"),
        ({"merge_out": str(cached_tiny_gguf(type="Q8_0"))}, "is an input of this run"),
    ]
    for options, reason in wrong:
        with pytest.raises(UsageError, match=reason):
            list(finetune(run_config(tmp_path, **({"merge_out": str(tmp_path / "merged.gguf")} | options))))
