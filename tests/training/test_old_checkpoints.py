"""Checkpoints of llama.cpp's own finetune: written here as it wrote them, and its real ones where they are at hand."""

import os
from pathlib import Path

import numpy as np
import pytest

from llamakit.errors import LlamakitError, MismatchError
from llamakit.formats.adapter import read_adapter
from llamakit.formats.gguf import TensorData, Typed, write_gguf
from llamakit.formats.gguf_reader import GGUFValueType
from llamakit.ggml import GGMLType
from llamakit.training.checkpoint import OldCheckpoint, read_checkpoint
from llamakit.training.lora import paired
from llamakit.training.report import Counters, Remark, StepReport
from tests.tiny import cached_tiny_gguf
from tests.training.runs import run

KINDS = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_down", "ffn_up")


def write_old(path, config, rank=3):
    """As save_checkpoint_lora_file wrote it: A (n_in, r), B (n_out, r), counters, ranks, moments in a flat tensor."""
    rng = np.random.default_rng(0)
    shapes = config.tensor_shapes()
    order = ["token_embd", "output_norm", "output"] + [f"blk.{i}.{k}" for i in range(config.n_layer) for k in KINDS]
    tensors, ranks = [], {}
    for name in order:
        shape = shapes[f"{name}.weight"]
        n_out, n_in = shape if len(shape) == 2 else (1, shape[0])
        r = 1 if "norm" in name else rank
        ranks[name.rpartition(".")[2]] = r
        for suffix, n in (("lora_a", n_in), ("lora_b", n_out)):
            values = rng.standard_normal((n, r)).astype(np.float32) * 0.02
            # ggml drops outer axes of size 1
            stored = values.reshape(-1) if n == 1 else values
            tensors.append(TensorData(f"{name}.weight.{suffix}", stored.shape, GGMLType.F32, values))
    tensors.append(TensorData("optimizer.adam.first_moments", (7,), GGMLType.F32, np.zeros(7, np.float32)))
    u64 = GGUFValueType.UINT64
    metadata = {"training.type": "finetune_lora", "general.architecture": "llama", "general.file_type": 0}
    metadata |= {f"training.lora.rank.{kind}": r for kind, r in ranks.items()}
    metadata |= {
        "training.file_version": 1,
        "training.iteration_count": Typed(20, u64),
        "training.sample_count": Typed(80, u64),
        "training.token_count": Typed(2560, u64),
        "training.epoch_count": Typed(0, u64),
        "training.shuffle.rng_state": "1 2 3",
    }
    write_gguf(path, metadata=metadata, tensors=tensors)


@pytest.fixture
def old(tmp_path):
    from llamakit.formats.open import open_model
    from llamakit.model import load_config

    write_old(tmp_path / "old.gguf", load_config(open_model(cached_tiny_gguf(type="Q8_0"))))
    return tmp_path / "old.gguf"


def test_lora_tensors_and_counters_are_taken(tmp_path, old):
    saved = read_checkpoint(old)
    assert isinstance(saved, OldCheckpoint)
    assert saved.arrays["blk.0.attn_k.weight.lora_a"].shape[0] == 3
    reports = run(tmp_path, checkpoint_in=str(old), adam_iter=1, adam_alpha=0.0, lora_r=3)
    counters = next(r for r in reports if isinstance(r, Counters))
    assert (counters.iterations, counters.samples, counters.tokens, counters.updates) == (20, 80, 2560, 0)
    assert [r.step for r in reports if isinstance(r, StepReport)] == [21]
    said = " ".join(r.text for r in reports if isinstance(r, Remark))
    assert "shuffle state" in said and "optimizer moments" in said
    adapter = read_adapter(tmp_path / "lora-21.bin")
    for name, pair in paired(saved.arrays).items():
        for mine, theirs in zip(adapter.tensors[name], pair, strict=True):
            assert np.array_equal(mine, theirs.reshape(mine.shape)), name
    again = run(tmp_path, adam_iter=1, lora_r=3, rank_tok_embd=3, rank_out=3, rank_att_norm=1, rank_ffn_norm=1,
                rank_out_norm=1)  # fmt: skip
    assert [r.step for r in again if isinstance(r, StepReport)] == [22]


def test_a_rank_that_is_given_must_agree(tmp_path, old):
    with pytest.raises(MismatchError, match="attn_q is 3 in the checkpoint, and 5"):
        run(tmp_path, checkpoint_in=str(old), rank_wq=5)


def test_a_factor_that_the_old_tool_left_out_is_warned_of(tmp_path, old):
    reports = run(tmp_path, checkpoint_in=str(old), adam_iter=1, lora_alpha=6.0)
    assert any("alpha / rank" in r.text for r in reports if isinstance(r, Remark) and r.level == "warning")


def test_a_checkpoint_for_another_model_is_refused(tmp_path, old):
    other = cached_tiny_gguf(type="Q8_0", n_layer=3)
    with pytest.raises(LlamakitError) as caught:
        run(tmp_path, checkpoint_in=str(old), model_base=str(other), lora_r=3)
    assert caught.value.exit_code == 2


def golden():
    shared = Path(os.environ.get("LLAMAKIT_SHARED", Path(__file__).parents[2].parent / "shared")) / "golden"
    if not shared.is_dir():
        pytest.skip("the files that llama.cpp wrote are not at hand (LLAMAKIT_SHARED)")
    return shared


def test_the_real_ones_load_and_equal_the_adapters_beside_them(tmp_path):
    place = golden()
    saved = read_checkpoint(place / "finetune-2024" / "chk-20.gguf")
    assert isinstance(saved, OldCheckpoint)
    assert (saved.progress.iterations, saved.progress.samples, saved.progress.tokens) == (20, 80, 2560)
    adapter = read_adapter(place / "finetune-2024" / "lora-20.bin")
    for name, (a, b) in adapter.tensors.items():
        old_a, old_b = paired(saved.arrays)[name]
        assert np.allclose(old_b @ old_a * 2, b @ a * adapter.scale(name), atol=1e-7), name  # alpha 8, rank 4
    reports = run(
        tmp_path,
        model_base=str(place / "stories260K-f32.gguf"),
        train_data=str(place / "text12k.txt"),
        checkpoint_in=str(place / "finetune-2024" / "chk-20.gguf"),
        ctx=32,
        batch=4,
        adam_iter=2,
        lora_alpha=8.0,
        val_split=0.0,
    )
    steps = [r for r in reports if isinstance(r, StepReport)]
    assert [s.step for s in steps] == [21, 22] and steps[0].n_samples == 7366
