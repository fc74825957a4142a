"""Merging: llama-export-lora's files to the byte, the other types, and what rounding leaves of a change."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llamakit.conversion import merge as merge_module
from llamakit.conversion.merge import Merged, MergedTensor, MergePlan, merge
from llamakit.conversion.merge_config import MergeConfig
from llamakit.errors import FormatError, LlamakitError, MismatchError, UnsupportedError, UsageError
from llamakit.formats.adapter import Adapter, read_adapter, write_adapter
from llamakit.formats.gguf import GGUFFile
from llamakit.formats.open import open_model
from llamakit.ggml import GGMLType
from llamakit.quant import dequantize
from tests.conversion.merge_files import SHAPES, UNTOUCHED, numbers, write_base, write_lora
from tests.formats.files import ggla_file, llama2c_file
from tests.formats.test_peft import folder
from tests.formats.torch_models import meta_model
from tests.tiny import cached_tiny_gguf

SHARED = Path(os.environ.get("LLAMAKIT_SHARED", Path(__file__).parents[3] / "shared"))

#: (type of the base, rank) -> sha256, first 24 digits, of what llama-export-lora (2026, GCC 12) wrote of `write_base`,
#: `write_lora` of this rank and one of rank 16 times 0.3: built for AVX2, built for AVX-512
EXPORTED = {
    ("F32", 1): ("e26efb710965d8d8bbac86f8", "d5ee474a27048380379d16c4"),
    ("F32", 3): ("1518ccc3215d3e298a608f44", "8ded8fef3a5d4ca5fbec5868"),
    ("F32", 4): ("f20008350f3b0be971711d1a", "5baed4dee736d049e73af926"),
    ("F32", 8): ("fb885a32ffa64c2a10318b19", "8fa3d4fa990523e22ee2ae03"),
    ("F32", 12): ("bdae52f61683ebae2ca87956", "9d411a3e1aac8549b6876066"),
    ("F32", 16): ("f4eec94860ff1508fb2f6e68", "a762be51e46ec31f8005fb39"),
    ("F32", 20): ("ca06b0d3b4337c918ead2bec", "ed63c00b479854ef46c908b7"),
    ("F32", 32): ("1df672284a354634d003f9af", "543197d77c4a1a88a30adcbb"),
    ("F32", 64): ("33af962edb88a36f19b760dc", "1ffcdef673711b3a85136236"),
    ("F16", 8): ("d644ea5d7589173637e70729", "da707c81bb56e8e26cbbdacc"),
    ("BF16", 8): ("2d89e2b293330cc5fe49ed77", "cbd20c364b3eaa98b11c4282"),
}


def merged(base: Path, *lora: Path, out: Path, **options: Any) -> tuple[MergePlan, dict[str, MergedTensor], Merged]:
    plan, *tensors, last = merge(MergeConfig(model=base, lora=lora, out=out, **options))
    assert isinstance(plan, MergePlan) and isinstance(last, Merged)
    assert all(isinstance(tensor, MergedTensor) for tensor in tensors)
    return plan, {tensor.name: tensor for tensor in tensors if isinstance(tensor, MergedTensor)}, last


def weights(path: Path, name: str) -> np.ndarray:
    with open_model(path) as file:
        return dequantize(torch.from_numpy(file.read(name)), file.tensors[name].type).numpy()


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize(("kind", "rank"), EXPORTED, ids=str)
def test_the_file_of_llama_export_lora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, rank: int, lanes: int
) -> None:
    monkeypatch.setattr(merge_module, "vector_lanes", lambda: lanes)
    monkeypatch.setattr(merge_module, "_CHUNK", 640)  # 10 rows at a time
    base = write_base(tmp_path / "base.gguf", GGMLType[kind])
    lora = write_lora(tmp_path / "one.gguf", base, rank)
    scaled = write_lora(tmp_path / "two.gguf", base, 16, alpha=16.0, seed=500)
    plan, tensors, last = merged(base, lora, out=tmp_path / "out.gguf", lora_scaled=((scaled, 0.3),))
    data = (tmp_path / "out.gguf").read_bytes()
    assert hashlib.sha256(data).hexdigest()[:24] == EXPORTED[kind, rank][lanes // 16]
    assert list(tensors) == sorted(SHAPES) and plan.n_tensors == len(SHAPES)
    assert plan.n_changed == last.n_changed == len(SHAPES) - len(UNTOUCHED)
    assert {name for name, tensor in tensors.items() if not tensor.changed} == UNTOUCHED
    assert list(tensors.values())[-1].bytes_done == plan.n_bytes and last.n_bytes == len(data)
    assert (last.kept is None) == (kind == "F32")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no shared files at {SHARED} (LLAMAKIT_SHARED)")
def test_an_old_adapter_gives_what_the_old_export_lora_gave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_module, "vector_lanes", lambda: 16)
    golden = SHARED / "golden/finetune-2024"
    base = SHARED / "golden/stories260K-f32.gguf"
    merged(base, golden / "lora-20.bin", out=tmp_path / "out.gguf")
    with GGUFFile(tmp_path / "out.gguf") as ours, GGUFFile(golden / "merged-lora-20.gguf") as theirs:
        assert ours.tensors.keys() == theirs.tensors.keys()
        for name in theirs.tensors:
            assert ours.read(name).tobytes() == theirs.read(name).tobytes()


def test_same_keeps_the_file_and_says_what_is_left(tmp_path: Path) -> None:
    base = cached_tiny_gguf(type="Q8_0", embedding_type="Q4_0")
    with open_model(base) as file:
        pairs = {
            name: (numbers(2, 64, seed=1), numbers(info.n_rows, 2, seed=2) * np.float32(size))
            for name, size in (("blk.0.attn_q.weight", 0.25), ("token_embd.weight", 1e-4), ("output_norm.weight", 1))
            for info in [file.tensors[name]]
        }
        write_adapter(tmp_path / "lora.gguf", Adapter(2.0, pairs), file)
    plan, tensors, last = merged(base, tmp_path / "lora.gguf", out=tmp_path / "out.gguf", outtype="same")
    assert plan.n_changed == 3
    with GGUFFile(base) as before, GGUFFile(tmp_path / "out.gguf") as after:
        assert list(before.tensors) == list(after.tensors) == list(tensors)
        end = min(info.offset for info in before.tensors.values())
        assert base.read_bytes()[:end] == (tmp_path / "out.gguf").read_bytes()[:end]  # metadata and table
        for name, info in before.tensors.items():
            assert after.tensors[name].type is info.type
            assert name in pairs or before.read(name).tobytes() == after.read(name).tobytes()
    for name in ("blk.0.attn_q.weight", "token_embd.weight"):
        a, b = pairs[name]
        was, got, change = weights(base, name), weights(tmp_path / "out.gguf", name), b @ a
        kept, rmse = tensors[name].kept, tensors[name].rmse
        assert kept is not None and rmse is not None
        assert kept == pytest.approx(((got - was) * change).sum() / (change**2).sum(), abs=1e-4)
        assert rmse == pytest.approx(np.sqrt(np.square(got - was - change).mean()), rel=1e-4)
    assert tensors["blk.0.attn_q.weight"].kept == pytest.approx(1, abs=0.01)
    left = tensors["token_embd.weight"].kept  # far below half a step of Q4_0
    assert left is not None and left < merge_module.LITTLE
    assert tensors["output_norm.weight"].kept is None and tensors["blk.1.attn_q.weight"].rmse is None
    assert last.kept == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("outtype", "file_type"), [("f32", 0), ("f16", 1), ("bf16", 32), ("Q8_0", 7), ("q4_0", 2)])
def test_every_matrix_in_one_type(tmp_path: Path, outtype: str, file_type: int) -> None:
    base = write_base(tmp_path / "base.gguf", GGMLType.F16)
    lora = write_lora(tmp_path / "lora.gguf", base, 4)
    merged(base, lora, out=tmp_path / "exact.gguf", outtype="f32")
    _, tensors, _ = merged(base, lora, out=tmp_path / "out.gguf", outtype=outtype)
    kind = GGMLType[outtype.upper()]
    with GGUFFile(tmp_path / "out.gguf") as file:
        assert list(file.tensors) == list(SHAPES)
        assert file.metadata["general.file_type"] == file_type
        assert ("general.quantization_version" in file.metadata) == (kind.name.startswith("Q"))
        for name, info in file.tensors.items():
            assert info.type is (GGMLType.F32 if len(SHAPES[name]) == 1 else kind)
            error = np.abs(weights(tmp_path / "out.gguf", name) - weights(tmp_path / "exact.gguf", name))
            assert error.max() < {"F32": 1e-9, "F16": 2e-3, "BF16": 2e-2, "Q8_0": 2e-2, "Q4_0": 0.35}[kind.name]
            assert tensors[name].type is info.type


def test_rows_that_are_no_whole_blocks_are_f16(tmp_path: Path) -> None:
    base = cached_tiny_gguf(n_embd=48, n_head=3, n_head_kv=3, n_ff=96)
    with open_model(base) as file:
        pair = (numbers(1, 48, seed=0), numbers(48, 1, seed=1))
        write_adapter(tmp_path / "lora.gguf", Adapter(1.0, {"blk.0.attn_q.weight": pair}), file)
    _, tensors, _ = merged(base, tmp_path / "lora.gguf", out=tmp_path / "out.gguf", outtype="q8_0")
    assert tensors["blk.0.attn_q.weight"].type is tensors["blk.1.ffn_up.weight"].type is GGMLType.F16
    assert tensors["blk.0.ffn_down.weight"].type is GGMLType.Q8_0
    assert tensors["blk.0.attn_norm.weight"].type is GGMLType.F32


def test_adapters_of_different_tensors_and_kinds(tmp_path: Path) -> None:
    """ggla and PEFT in one go, each for other tensors; a base of llama2.c."""
    base = cached_tiny_gguf(tied=True)
    a, b = numbers(64, 2, seed=1), numbers(64, 2, seed=2)
    old = ggla_file(tmp_path / "old.bin", {"blk.1.attn_q.weight.loraA": a, "blk.1.attn_q.weight.loraB": b})
    saved = numbers(64, seed=3)
    new = folder(tmp_path / "new", {"base_model.model.model.norm.weight": saved}, modules_to_save=["norm"])
    plan, tensors, _ = merged(base, old, new, out=tmp_path / "out.gguf")
    assert {name for name, t in tensors.items() if t.changed} == {"blk.1.attn_q.weight", "output_norm.weight"}
    assert np.array_equal(weights(tmp_path / "out.gguf", "output_norm.weight")[0], saved)
    change = weights(tmp_path / "out.gguf", "blk.1.attn_q.weight") - weights(base, "blk.1.attn_q.weight")
    assert np.allclose(change, 2 * b @ a.T, atol=1e-6) and not plan.notes
    for options in ({"lora": (new,), "lora_scaled": ((new, 1.0),)}, {"lora_scaled": ((new, 0.5),)}):
        with pytest.raises(
            MismatchError, match=r"replaces output_norm\.weight whole, (for the second|and cannot be scaled)"
        ):
            list(merge(MergeConfig(model=base, out=tmp_path / "x.gguf", **options)))
    little = llama2c_file(tmp_path / "m.bin", tied=False)
    pair = {"blk.0.attn_q.weight.loraA": numbers(8, 2, seed=4), "blk.0.attn_q.weight.loraB": numbers(8, 2, seed=5)}
    merged(little, ggla_file(tmp_path / "l.bin", pair), out=tmp_path / "out.gguf")
    assert not np.array_equal(
        weights(little, "blk.0.attn_q.weight"), weights(tmp_path / "out.gguf", "blk.0.attn_q.weight")
    )


def test_what_the_user_is_told(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.gguf")
    lora = write_lora(tmp_path / "lora.gguf", base, 2)
    assert merged(base, lora, out=tmp_path / "o.gguf")[0].notes == ()
    quantized = write_base(tmp_path / "f16.gguf", GGMLType.F16)
    assert "another quantization" in merged(quantized, lora, out=tmp_path / "o.gguf")[0].notes[0]
    tied = cached_tiny_gguf(tied=True)
    n_vocab = len(weights(tied, "token_embd.weight"))
    with open_model(tied) as file:
        pair = (numbers(1, 64, seed=0), numbers(n_vocab, 1, seed=1))
        write_adapter(tmp_path / "e.gguf", Adapter(1.0, {"token_embd.weight": pair}), file)
    assert "output too" in merged(tied, tmp_path / "e.gguf", out=tmp_path / "o.gguf")[0].notes[0]


def _other_base(path: Path) -> Path:
    with GGUFFile(write_base(path)) as file:
        vocabulary = [f"u{i}" for i in range(40)]
        from llamakit.formats.gguf import copied_tensor, typed_metadata, write_gguf

        metadata = typed_metadata(file) | {"tokenizer.ggml.tokens": vocabulary}
        write_gguf(path, metadata=metadata, tensors=[copied_tensor(file, name) for name in file.tensors])
    return path


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.gguf")
    lora = write_lora(tmp_path / "lora.gguf", base, 2)
    other = _other_base(tmp_path / "other.gguf")
    (tmp_path / "text").write_text("x")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    cases: list[tuple[type[LlamakitError], str, dict[str, Any]]] = [
        (UsageError, "would be overwritten", {"out": base}),
        (UsageError, "would be overwritten", {"out": lora}),
        (UsageError, "cannot be written", {"out": tmp_path / "missing" / "x"}),
        (MismatchError, "trained on another model", {"model": other}),
        (UnsupportedError, "cannot be written as Q8_1", {"outtype": "q8_1"}),
        (UsageError, "No such file", {"lora": (tmp_path / "missing",)}),
        (FormatError, "is no LoRA adapter", {"lora": (tmp_path / "text",)}),
        (FormatError, "is a text", {"model": tmp_path / "text"}),
        (UnsupportedError, "is an adapter, not a model", {"model": lora}),
    ]
    for error, reason, options in cases:
        config = MergeConfig(**{"model": base, "lora": (lora,), "out": tmp_path / "out.gguf"} | options)
        with pytest.raises(error, match=reason) as caught:
            list(merge(config))
        assert caught.value.exit_code == 2
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    merged(other, lora, out=tmp_path / "out.gguf", force=True)


def test_a_merge_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.gguf")
    lora = write_lora(tmp_path / "lora.gguf", base, 2)
    (tmp_path / "out.gguf").write_text("what was there before")
    reports = merge(MergeConfig(model=base, lora=(lora,), out=tmp_path / "out.gguf"))
    for _ in range(3):
        next(reports)
    assert len(list(tmp_path.iterdir())) == 4
    reports.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(list(tmp_path.iterdir())) == 3
    assert (tmp_path / "out.gguf").read_text() == "what was there before"


def test_options(tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    with pytest.raises(UsageError, match="nothing to merge"):
        MergeConfig(model=base)
    with pytest.raises(UsageError, match=r"--lora-scaled has the scale nan"):
        MergeConfig(model=base, lora_scaled=((base, float("nan")),))
    with pytest.raises(UsageError, match=r"--outtype is 'q9' .expected same or one of f32, f16"):
        MergeConfig(model=base, lora=(base,), outtype="q9")
    config = MergeConfig(model=base, lora=(Path("a"),), lora_scaled=((Path("b"), 0.5),), outtype="q4_K")
    assert config.adapters == ((Path("a"), 1.0), (Path("b"), 0.5)) and config.type is GGMLType.Q4_K


def test_it_is_base_and_adapter(tmp_path: Path) -> None:
    """The merged model computes what the base computes with the adapter on it."""
    from llamakit.model import attach, load_model

    path = cached_tiny_gguf()
    with open_model(path) as base:
        pairs = {
            name: (numbers(r, info.shape[-1], seed=i) * np.float32(0.2), numbers(info.n_rows, r, seed=i + 50))
            for i, (name, info) in enumerate(base.tensors.items())
            for r in [2 if info.n_rows > 1 else 1]
        }
        write_adapter(tmp_path / "lora.gguf", Adapter(0.5, pairs), base)
        model = load_model(base, dtype=torch.float32)
        attach(model, read_adapter(tmp_path / "lora.gguf"))
    merged(path, tmp_path / "lora.gguf", out=tmp_path / "out.gguf")
    tokens = torch.arange(20)[None]
    with open_model(tmp_path / "out.gguf") as file, torch.no_grad():
        ours = load_model(file, dtype=torch.float32)
        logits = [m.logits(m.forward(tokens, torch.arange(20))) for m in (model, ours)]
    assert torch.allclose(*logits, atol=1e-3)


@pytest.mark.parametrize(("size", "scale", "outtype"), [(1.0, 1e39, "f32"), (1e5, 1.0, None), (1e9, 1.0, "q8_0")])
def test_what_is_no_number_is_not_written(tmp_path: Path, size: float, scale: float, outtype: str | None) -> None:
    base = write_base(tmp_path / "b.gguf", GGMLType.F16)
    lora, out = write_lora(tmp_path / "l.gguf", base, 4, size=size), tmp_path / "o.gguf"
    config = MergeConfig(model=base, lora_scaled=((lora, scale),), out=out, outtype=outtype)
    with pytest.raises(UnsupportedError, match="cannot hold") as caught:
        list(merge(config))
    assert "scale" in str(caught.value.hint) and not out.exists()


def test_matrices_that_a_type_cannot_hold_are_told(tmp_path: Path) -> None:
    base = write_base(tmp_path / "b.gguf")
    lora = write_lora(tmp_path / "l.gguf", base, 4)
    plan, tensors, _ = merged(base, lora, out=tmp_path / "o.gguf", outtype="q4_k")
    assert any("5 of 5 matrices become F16" in note and "256" in note for note in plan.notes)
    assert tensors["blk.0.attn_q.weight"].type is GGMLType.F16
    plan, _, _ = merged(base, lora, out=tmp_path / "o.gguf", outtype="q8_0")
    assert not plan.notes


@pytest.mark.parametrize("outtype", [None, "same", "bf16", "q8_0"])
def test_norms_of_a_checkpoint_are_what_llama_cpp_computes_with(tmp_path: Path, outtype: str | None) -> None:
    """In bfloat16, as checkpoints have them, they end llama-perplexity with a failed assertion."""
    meta = meta_model(tmp_path / "meta")
    with open_model(meta, n_ctx=0) as base:
        pair = numbers(2, 64, seed=1), numbers(64, 2, seed=2)
        write_adapter(tmp_path / "l.gguf", Adapter(2.0, {"blk.0.attn_q.weight": pair}), base)
        assert base.tensors["output_norm.weight"].type is GGMLType.BF16
        norm = dequantize(torch.from_numpy(base.read("output_norm.weight")), GGMLType.BF16).numpy()
    _, tensors, _ = merged(meta, tmp_path / "l.gguf", out=tmp_path / "o.gguf", outtype=outtype, ctx=64)
    assert all(t.type is GGMLType.F32 for t in tensors.values() if len(t.shape) == 1)
    assert np.array_equal(weights(tmp_path / "o.gguf", "output_norm.weight"), norm)
