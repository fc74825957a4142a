"""Fine-tuning all weights: the same run as an adapter's, whose product is a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llamakit.errors import FormatError, LlamakitError, MismatchError, UnsupportedError, UsageError
from llamakit.formats.gguf import write_gguf
from llamakit.formats.gguf_writer import copied_tensor, typed_metadata
from llamakit.formats.open import open_model
from llamakit.ggml import GGMLType
from llamakit.inference.verify import verify
from llamakit.model import load_config, load_model
from llamakit.quant import dequantize
from llamakit.training import finetune_full
from llamakit.training.blueprint import build, from_file, write_model
from llamakit.training.checkpoint import read_checkpoint
from llamakit.training.config import FinetuneConfig
from llamakit.training.loop import Parameters
from llamakit.training.proof import logits_of
from llamakit.training.report import (
    ChatFacts,
    Counters,
    Evaluation,
    Finished,
    ModelFacts,
    Plan,
    Remark,
    Report,
    Sample,
    Saving,
    Verified,
)  # fmt: skip
from llamakit.training.run_folder import keep_report
from llamakit.training.train import train
from tests.helpers import render_in_this_process
from tests.tiny import cached_tiny_gguf
from tests.training.runs import losses, run, run_config
from tests.training.test_finetune_chat import chat, of
from tests.training.train_runs import train_config

ALPHA = 2e-3


def full_options(directory: Path, **options: Any) -> dict[str, Any]:
    """Of a run that trains all weights of a quantized base."""
    names = {"lora_out": FinetuneConfig().lora_out, "model_out": str(directory / "model-ITERATION.gguf")}
    return {"full": True, "adam_alpha": ALPHA, "warmup": 0, "adam_iter": 2, **names, **options}


def full(directory: Path, **options: Any) -> list[Report]:
    return run(directory, **full_options(directory, **options))


def weights(path: Path | str) -> dict[str, np.ndarray]:
    with open_model(path) as file:
        return {
            name: dequantize(torch.from_numpy(file.read(name)), info.type).view(info.shape).numpy()
            for name, info in file.tensors.items()
        }


def test_all_weights_of_a_quantized_base_are_trained(tmp_path: Path) -> None:
    reports = full(tmp_path, adam_iter=4, val_split=0.2, sample_prompt=("The king",), sample_tokens=3)
    trained, base = weights(tmp_path / "model-4.gguf"), weights(cached_tiny_gguf(type="Q8_0"))
    assert trained.keys() == base.keys() and all((trained[n] != base[n]).any() for n in base)
    assert losses(reports)[-1] < losses(reports)[0]
    evaluations = of(Evaluation, reports)
    assert evaluations[-1].loss < evaluations[0].loss
    assert [s.step for s in of(Sample, reports)] == [0, 2, 4]
    n_weights = sum(w.size for w in trained.values())
    (facts,), (counters,), (plan,) = (of(kind, reports) for kind in (ModelFacts, Counters, Plan))
    assert not facts.ranks and counters.trained_parameters == n_weights and counters.what == "model"
    assert plan.memory_bytes > 16 * n_weights and plan.step_s > 0
    (verified,) = of(Verified, reports)
    assert verified.path == str(tmp_path / "model-4.gguf") and verified.difference <= 1e-4 < verified.change
    moved = sum(float(((trained[n] - base[n]) ** 2).sum(dtype="f8")) for n in base)
    power = sum(float((base[n] ** 2).sum(dtype="f8")) for n in base)
    assert verified.weights == pytest.approx((moved / power) ** 0.5, rel=1e-6)
    assert of(Finished, reports)[0].files == (str(tmp_path / "chk-LATEST.gguf"), str(tmp_path / "model-LATEST.gguf"))
    assert (tmp_path / "model-LATEST.gguf").read_bytes() == (tmp_path / "model-4.gguf").read_bytes()


def test_a_step_is_that_of_train_s_own_leaves(tmp_path: Path) -> None:
    """One step without decay or clipping is train's: the same model, parameters and optimizer."""
    reports = full(tmp_path, adam_iter=1, adam_decay=0.0, adam_gclip=0.0, val_split=0.0)
    state = read_checkpoint(tmp_path / "chk-1.gguf", "finetune_full")
    with open_model(cached_tiny_gguf(type="Q8_0")) as file:
        _, named = build(from_file(file, {}), torch.device("cpu"), torch.float32)
    parameters = Parameters(named, run_config(tmp_path))
    for name, (m, v) in zip(named, parameters.optimizer.moments(), strict=True):
        m.copy_(torch.from_numpy(state.arrays[f"{name}.m"]))
        v.copy_(torch.from_numpy(state.arrays[f"{name}.v"]))
        step = (m / 0.1) / ((v / 0.001).sqrt() + 1e-8)
        torch.testing.assert_close(torch.from_numpy(state.arrays[name]), named[name].detach() - ALPHA * step)
    assert len(losses(reports)) == 1


@pytest.mark.parametrize("options", [{}, {"dtype": "bf16", "grad_acc": 2, "use_checkpointing": False}], ids=str)
def test_a_resume_is_exact(tmp_path: Path, options: dict[str, Any]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for directory in (whole, parts):
        directory.mkdir()
    straight = full(whole, adam_iter=5, **options)
    first, second = full(parts, adam_iter=2, **options), full(parts, adam_iter=3, **options)
    assert losses(straight) == losses(first) + losses(second)
    assert (whole / "model-5.gguf").read_bytes() == (parts / "model-5.gguf").read_bytes()
    states = [read_checkpoint(directory / "chk-5.gguf", "finetune_full") for directory in (whole, parts)]
    assert all((states[0].arrays[name] == states[1].arrays[name]).all() for name in states[0].arrays)


def test_questions_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render_in_this_process(monkeypatch)
    options = {"val_split": 0.2, "save_best": True, "save_every": 1, "patience": 2, "adam_iter": 12}
    options = full_options(tmp_path, sample_prompt=("Who?",), sample_tokens=3, **options) | {"adam_alpha": 0.05}
    reports = chat(tmp_path, **options)
    (facts,) = of(ChatFacts, reports)
    assert 0 < facts.n_trained < facts.n_tokens and facts.packed
    assert of(Finished, reports)[0].reason.startswith("--patience 2")
    evaluations = [e for e in of(Evaluation, reports) if e.when != "start"]
    best = max(i for i, e in enumerate(evaluations) if e.is_best) + 1
    assert (tmp_path / "model-BEST.gguf").read_bytes() == (tmp_path / f"model-{best}.gguf").read_bytes()


@pytest.mark.parametrize("outtype", ["f16", "bf16"])
def test_outtype_rounds_matrices_and_nothing_else(tmp_path: Path, outtype: str) -> None:
    reports = full(tmp_path, outtype=outtype)
    state = read_checkpoint(tmp_path / "chk-2.gguf", "finetune_full")
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[outtype]
    with open_model(tmp_path / "model-2.gguf") as file:
        assert file.metadata["general.file_type"] == {"f16": 1, "bf16": 32}[outtype]
        types = {info.type for info in file.tensors.values() if len(info.shape) == 2}
        assert types == {GGMLType[outtype.upper()]}
        assert file.tensors["output_norm.weight"].type is GGMLType.F32
    for name, written in weights(tmp_path / "model-2.gguf").items():
        trained = torch.from_numpy(state.arrays[name])
        assert np.array_equal(written, (trained.to(dtype).float() if trained.dim() == 2 else trained).numpy()), name
    assert 0 < of(Verified, reports)[0].difference < 0.2  # what rounding does to logits of 10 or so


def test_what_f16_cannot_hold_is_said(tmp_path: Path) -> None:
    with open_model(cached_tiny_gguf()) as file:
        blueprint = from_file(file, {})
        arrays = {"blk.0.attn_q.weight": np.full(blueprint.names["blk.0.attn_q.weight"], 1e6, np.float32)}
        with pytest.raises(UnsupportedError, match=r"blk\.0\.attn_q\.weight has weights that F16"):
            write_model(tmp_path / "model.gguf", arrays, blueprint, "f16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"tied": True}, {"biases": True}, {"type": "Q4_K"}, {"type": "BF16"}], ids=str)
def test_any_base(tmp_path: Path, options: dict[str, Any]) -> None:
    base = str(cached_tiny_gguf(**options))
    reports = full(tmp_path, model_base=base, adam_iter=1)
    assert of(Verified, reports)[0].difference <= 1e-4
    assert weights(tmp_path / "model-1.gguf").keys() == weights(base).keys()


def test_what_the_command_line_changes_is_in_the_model(tmp_path: Path) -> None:
    """The proof compares logits: a model without these keys would be another one."""
    options = {"norm_rms_eps": 1e-3, "rope_freq_base": 500.0, "rope_freq_scale": 0.5}
    reports = full(tmp_path, adam_iter=1, **options)
    assert of(Verified, reports)[0].difference <= 1e-4
    with open_model(tmp_path / "model-1.gguf") as file:
        shape = load_config(file)
    assert shape.rope_base == 500 and shape.rms_eps == pytest.approx(1e-3) and shape.rope_scaling.factor == 2


def test_a_model_that_is_its_base_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LlamakitError, match="the model is its base: no weight was changed") as error:
        full(tmp_path, adam_alpha=0.0, adam_decay=0.0)
    assert error.value.path == tmp_path / "model-2.gguf" and "--adam-alpha" in str(error.value.hint)
    with pytest.raises(LlamakitError, match="changes are too small for bf16") as error:
        full(tmp_path, adam_alpha=1e-9, outtype="bf16", checkpoint_in="", model_base=str(_bf16_base(tmp_path)))
    assert "--outtype f32" in str(error.value.hint)


def _bf16_base(directory: Path) -> Path:
    """A base all of whose weights bf16 can hold: norms, too."""
    with open_model(cached_tiny_gguf()) as file:
        blueprint = from_file(file, {})
        arrays = {n: blueprint.first(n).bfloat16().float().numpy() for n in blueprint.names}
        arrays |= {n: np.ones_like(a) * 1e3 for n, a in arrays.items() if a.ndim == 1}  # too large for a tiny step
        write_model(directory / "bf16.gguf", arrays, blueprint, "bf16")
    return directory / "bf16.gguf"


def test_a_file_that_is_not_what_was_trained_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(path: Path, arrays: Any, blueprint: Any, outtype: Any) -> None:
        changed = arrays["blk.1.ffn_up.weight"].copy()
        changed[3, 3] += 1e-3
        write_model(path, {**arrays, "blk.1.ffn_up.weight": changed}, blueprint, outtype)

    monkeypatch.setattr(finetune_full, "write_model", wrong)
    with pytest.raises(LlamakitError, match=r"blk\.1\.ffn_up\.weight reads back with other weights"):
        full(tmp_path)


def test_a_model_whose_metadata_is_wrong_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(path: Path, arrays: Any, blueprint: Any, outtype: Any) -> None:
        write_model(path, arrays, blueprint, outtype)
        with open_model(path) as file:
            tensors = [copied_tensor(file, name) for name in file.tensors]
            metadata = typed_metadata(file) | {"llama.rope.freq_base": 50.0}
            write_gguf(path, metadata=metadata, tensors=tensors)

    monkeypatch.setattr(finetune_full, "write_model", wrong)
    with pytest.raises(LlamakitError, match="what was written is not what was trained") as error:
        full(tmp_path)
    assert "--only-write-model" in str(error.value.hint)


def test_the_model_of_a_checkpoint_is_written_again(tmp_path: Path) -> None:
    full(tmp_path)
    expected = (tmp_path / "model-2.gguf").read_bytes()
    for path in tmp_path.glob("model-*"):
        path.unlink()
    reports = full(tmp_path, only_write_model=True, train_data="")
    assert [r.kind for r in of(Saving, reports)] == ["model", "model"]
    assert (tmp_path / "model-LATEST.gguf").read_bytes() == (tmp_path / "model-2.gguf").read_bytes() == expected
    other = str(cached_tiny_gguf(type="Q8_0", seed=5))
    with pytest.raises(MismatchError, match="base model"):
        full(tmp_path, only_write_model=True, model_base=other)
    with pytest.raises(UsageError, match="--only-write-model needs a checkpoint"):
        full(tmp_path, only_write_model=True, checkpoint_in=str(tmp_path / "none.gguf"))


def test_checkpoints_of_other_trainings_are_refused(tmp_path: Path) -> None:
    full(tmp_path, adam_iter=1)
    with pytest.raises(FormatError, match=r"expected training.type 'finetune_lora', got 'finetune_full'"):
        run(tmp_path)
    with pytest.raises(FormatError, match=r"expected training.type 'train_model', got 'finetune_full'"):
        list(train(train_config(tmp_path, checkpoint_in=str(tmp_path / "chk-1.gguf"))))
    with pytest.raises(MismatchError, match="--ctx is 16 in the checkpoint, and 8"):
        full(tmp_path, ctx=8)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lora_r": 8}, "--lora-r is for an adapter, and --full trains all weights"),
        ({"rank_wq": 2}, "--rank-wq is for an adapter"),
        ({"lora_targets": ("attn_q",)}, "--lora-targets is for an adapter"),
        ({"lora_init": "a.gguf"}, "--lora-init is for an adapter"),
        ({"merge_out": "m.gguf"}, "--merge-out is for an adapter"),
        ({"rslora": True}, "--rslora is for an adapter"),
        ({"lora_out": "lora.gguf"}, "--lora-out is for an adapter"),
        ({"only_write_lora": True}, "--only-write-lora is for an adapter"),
        ({"weight_cache": "none"}, "--weight-cache is for an adapter"),
        ({"full": False}, "--model-out needs --full"),
        ({"full": False, "model_out": "model-ITERATION.gguf", "outtype": "f16"}, "--outtype needs --full"),
        ({"model_out": "", "checkpoint_out": ""}, "--model-out and --checkpoint-out are both empty"),
        ({"model_out": "model.gguf", "save_best": True}, "--save-best needs ITERATION in the name of --model-out"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_options_that_do_not_belong_together(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        full(tmp_path, **options)


def test_steps_that_are_too_large_and_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 100_000})
    monkeypatch.setattr(finetune_full.shutil, "disk_usage", lambda _path: usage)
    warned = [r.text for r in of(Remark, full(tmp_path, adam_iter=1, adam_alpha=1e-3)) if r.level == "warning"]
    assert warned[0].startswith("--adam-alpha 0.001 is much for all weights")
    assert warned[1].startswith("the saves of this run take 0.0 GB") and "--keep-last 2" in warned[1]


def test_the_report_of_a_run(tmp_path: Path) -> None:
    folder, options = tmp_path / "report", full_options(tmp_path, val_split=0.2, adam_iter=4, save_best=True)
    config = run_config(tmp_path, **options)
    list(keep_report(finetune_full_reports(config), config, "llamakit finetune --full", folder))
    told = json.loads((folder / "report.json").read_text())
    assert told["model"]["trained"] == "all weights" and told["results"]["relative change of the weights"] > 0
    files = {Path(file["name"]).name for file in told["files"]}
    assert {"chk-LATEST.gguf", "model-LATEST.gguf", "model-BEST.gguf"} <= files and "model-2.gguf" not in files


def finetune_full_reports(config: FinetuneConfig) -> Any:
    from llamakit.training.finetune import finetune

    return finetune(config)


def test_the_model_is_one_for_every_command(tmp_path: Path) -> None:
    """It is read as any other, and train goes on with it."""
    full(tmp_path, adam_iter=1)
    model = tmp_path / "model-1.gguf"
    with open_model(model) as file, open_model(model) as again:
        assert verify(file, again).passed
        logits = logits_of(load_model(file), torch.arange(5))
        assert torch.isfinite(logits).all()
    reports = train(train_config(tmp_path, init_from=str(model), vocab_model="", adam_iter=1, ctx=8))
    assert [report.iterations for report in reports if isinstance(report, Finished)] == [1]


def test_a_folder_of_hugging_face_is_a_base(tmp_path: Path) -> None:
    from llamakit.conversion.convert import convert
    from llamakit.conversion.convert_config import ConvertConfig

    folder = tmp_path / "hf"
    convert(ConvertConfig(source=cached_tiny_gguf(), out=folder))
    reports = full(tmp_path, model_base=str(folder), adam_iter=1)
    assert of(Verified, reports)[0].difference <= 1e-4
