"""All weights trained, of which each rank holds its rows: as one rank would, saved together, gone on with by any number."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as torch_dist

from llamakit.cli.options import give_back_freed_memory
from llamakit.conversion.inspect import inspect
from llamakit.errors import FormatError, SaveError, UnsupportedError
from llamakit.formats.gguf import GGUFFile
from llamakit.formats.open import open_model
from llamakit.model import load_config
from llamakit.native import using
from llamakit.training.checkpoint import file_name, open_arrays, read_checkpoint
from llamakit.training.checkpoint_folder import FolderArrays, folder_files, read_folder, save_shares, write_folder
from llamakit.training.cluster import Cluster, Job, job_of, traffic_bytes
from llamakit.training.config import FinetuneConfig
from llamakit.training.distributed import Dist
from llamakit.training.finetune import finetune
from llamakit.training.report import StepReport
from llamakit.training.state import Progress, TrainState
from llamakit.training.train import train
from llamakit.training.train_config import TrainConfig
from tests.tiny import cached_tiny_gguf
from tests.training.ranks import run_ranks
from tests.training.test_distributed import (
    as_arguments,
    assert_alike,
    chat_config,
    ranks_of,
    read_and_tune,
    start,
    teach,
    torchrun,
    tune,
    wait_for,
)
from tests.training.train_runs import train_config

# A rate at which twenty steps in bf16 do not go their own way after each other rounding.
STEPS: dict[str, Any] = {"batch": 4, "grad_acc": 2, "adam_alpha": 1e-3, "sample_tokens": 0}


def taught(directory: Path, **options: Any) -> TrainConfig:
    """A run of `train` that accumulates; its vocabulary does not divide by the ranks."""
    return train_config(directory, **(STEPS | options))


def tuned(directory: Path, **options: Any) -> Any:
    """A run of `finetune --full` on packed and masked questions and answers."""
    defaults = {
        "full": True, "model_base": str(cached_tiny_gguf(type="Q8_0")), "lora_dropout": 0.0, "adam_alpha": 1e-4,
        "model_out": str(directory / "model-ITERATION.gguf"), "outtype": "f32", "lora_out": FinetuneConfig.lora_out,
        "anchor_data": "",
    }  # fmt: skip
    return chat_config(directory, **(defaults | options))


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with GGUFFile(path) as file:
        return {name: file.read(name).view(np.float32).reshape(info.shape) for name, info in file.tensors.items()}


def assert_same_model(mine: Path, theirs: Path, tolerance: float = 1e-5) -> None:
    found, expected = arrays_of(mine), arrays_of(theirs)
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=tolerance, err_msg=name)


# ---- the same as one rank ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"tie": True}, {"tie": False, "use_checkpointing": True}], ids=["tied", "untied"])
def test_sharded_training_gives_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    (alone,) = run_ranks(1, teach, taught(tmp_path / "one", **options))
    for told in run_ranks(2, teach, taught(tmp_path / "two", shard="full", **options)):
        assert_alike(told, alone, 1e-5)
    assert_same_model(tmp_path / "two/out/model-LATEST.gguf", tmp_path / "one/out/model-LATEST.gguf")


def teach_without_native_code(dist: Dist, config: TrainConfig) -> Any:
    """With native code --compile has no effect on a CPU."""
    with using(None):
        return teach(dist, config)


@pytest.mark.prove
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_compiled_blocks_are_sharded_too(tmp_path: Path) -> None:
    (alone,) = run_ranks(1, teach_without_native_code, taught(tmp_path / "one"))
    for told in run_ranks(2, teach_without_native_code, taught(tmp_path / "two", shard="full", compile=True)):
        assert_alike(told, alone, 1e-5)


@pytest.mark.slow
def test_sharded_fine_tuning_gives_the_same(tmp_path: Path) -> None:
    """Ranks have other numbers of trained tokens, of held-out batches, and at an epoch's end of rows."""
    options: dict[str, Any] = {"batch": 2, "ctx": 100, "val_split": 0.4, "adam_iter": 4}
    (alone,) = run_ranks(1, tune, tuned(tmp_path / "one", **options))
    for told, n_read, n_all in run_ranks(2, read_and_tune, tuned(tmp_path / "two", shard="full", **options)):
        assert_alike(told, alone, 1e-5)
        assert n_read == pytest.approx(n_all / 2, rel=0.01)
    assert_same_model(tmp_path / "two/model-LATEST.gguf", tmp_path / "one/model-LATEST.gguf")


@pytest.mark.prove
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("dtype", "relative"), [("f32", 1e-5), ("bf16", 5e-3)])
@pytest.mark.parametrize("world", [2, 4])
def test_twenty_steps_of_sharded_training(tmp_path: Path, world: int, dtype: str, relative: float) -> None:
    options: dict[str, Any] = {"dtype": dtype, "adam_iter": 20, "save_every": 10, "eval_every": 10, "dropout": 0.1}
    (alone,) = run_ranks(1, teach, taught(tmp_path / "one", **options))
    for told in run_ranks(world, teach, taught(tmp_path / "several", shard="full", **options)):
        assert_alike(told, alone, relative)


@pytest.mark.prove
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("dtype", "relative"), [("f32", 1e-5), ("bf16", 5e-3)])
@pytest.mark.parametrize("world", [2, 4])
def test_twenty_steps_of_sharded_fine_tuning(tmp_path: Path, world: int, dtype: str, relative: float) -> None:
    options: dict[str, Any] = {"dtype": dtype, "adam_iter": 20, "save_every": 10, "outtype": "bf16"}
    (alone,) = run_ranks(1, tune, tuned(tmp_path / "one", **options))
    for told in run_ranks(world, tune, tuned(tmp_path / "several", shard="full", **options)):
        assert_alike(told, alone, relative)


def peak_bytes(dist: Dist, config: Any) -> int:
    """The peak of a rank beyond what it has with torch imported, a save included."""
    give_back_freed_memory()
    import torch.distributed.checkpoint
    import torch.distributed.fsdp  # noqa: F401

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert all(report is not None for report in train(config, dist=dist))
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


@pytest.mark.prove
def test_a_share_takes_a_share_of_the_memory(tmp_path: Path) -> None:
    """41 million weights, 20 bytes each replicated; of 16 bytes a rank has half, and a block at a time."""
    options: dict[str, Any] = {"embd": 512, "layer": 12, "ff": 1536, "head_kv": 4, "batch": 2, "adam_iter": 2}
    options |= {"use_checkpointing": True, "val_split": 0.0, "eval_every": 0, "eval_iters": 1, "grad_acc": 1}
    whole, share = (
        max(run_ranks(2, peak_bytes, taught(tmp_path / shard, shard=shard, **options))) for shard in ("none", "full")
    )
    assert share < 0.65 * whole


# ---- what crosses the wire --------------------------------------------------------------------------------------------


def received(dist: Dist, run: Any, config: Any) -> list[float]:
    """Bytes that this rank receives in each step, counted at torch's collectives, over a ring."""
    total, steps = 0.0, list[float]()
    share = (dist.world - 1) / dist.world

    def counted(name: str, times: float, size: Any) -> None:
        collective = getattr(torch_dist, name)

        def count(*arguments: Any, **named: Any) -> Any:
            nonlocal total
            total += share * times * size(*arguments, **named).nbytes
            return collective(*arguments, **named)

        setattr(torch_dist, name, count)

    counted("all_reduce", 2, lambda tensor, *_, **__: tensor)
    new = hasattr(torch_dist, "all_gather_single")  # what torch 2.13 calls them
    counted("all_gather_single" if new else "all_gather_into_tensor", 1, lambda output_tensor, *_, **__: output_tensor)
    counted("reduce_scatter_single" if new else "reduce_scatter_tensor", 1, lambda *_, input, **__: input)
    before = 0.0
    for report in run(config, dist=dist):
        if isinstance(report, StepReport):
            steps.append(total - before)
        before = total
    return steps


TABLES = {"embd": 32, "ff": 64, "layer": 3, "dtype": "bf16", "ctx": 16, "eval_every": 0, "save_every": 0}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False], ids=["recomputed", "kept"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_training_moves_what_plan_says(tmp_path: Path, tied: bool, checkpointing: bool) -> None:
    config = taught(tmp_path, shard="full", tie=tied, use_checkpointing=checkpointing, **TABLES)
    counted = run_ranks(2, received, train, config)
    assert all(isinstance(steps, list) for steps in counted), counted
    with open_model(tmp_path / "out/model-LATEST.gguf") as file:
        shape = load_config(file)
    job = Job(shape=shape, base_bytes=0, table_bytes=0, adapter=0, rows=2, ctx=16, grad_acc=config.grad_acc)
    assert counted[0][1:] == pytest.approx([traffic_bytes(job, 2, "full", "full")] * 3, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "anchored"), [(True, False), (False, True), (True, True)])
def test_an_adapter_on_a_sharded_base_moves_what_plan_says(tmp_path: Path, checkpointing: bool, anchored: bool) -> None:
    options: dict[str, Any] = {"val_split": 0.0, "save_every": 0, "adam_iter": 4, "use_checkpointing": checkpointing}
    config = chat_config(
        tmp_path, shard="full", lora_dropout=0.0, **({} if anchored else {"anchor_data": ""}), **options
    )
    counted = run_ranks(2, received, finetune, config)
    assert all(isinstance(steps, list) for steps in counted), counted
    ranks = Cluster(nodes=1, gpus_per_node=2, gpu_bytes=10**9, bandwidth=1e9, flop_per_s=1e9)
    assert counted[0][1:] == pytest.approx([traffic_bytes(job_of(config, ranks), 2, "lora", "full")] * 3, rel=0.05)


# ---- checkpoints ------------------------------------------------------------------------------------------------------


def resumed(tmp_path: Path, worlds: tuple[int, ...]) -> None:
    """Three steps on each number of ranks, one after the other, have the curve of one rank."""
    (alone,) = run_ranks(1, teach, taught(tmp_path / "one", adam_iter=3 * len(worlds), save_every=0))
    losses = []
    for part, world in enumerate(worlds, 1):
        shard = "full" if world > 1 else "none"
        options = {"adam_iter": 3 * part, "cos_decay_steps": 3 * len(worlds) - 2, "save_every": 0}
        (told, *_) = run_ranks(world, teach, taught(tmp_path / "some", shard=shard, **options))
        assert isinstance(told, dict), told
        losses += told["loss"]
        latest = tmp_path / "some/out/checkpoint-LATEST.gguf"
        assert latest.is_symlink() == (world > 1)
        assert read_checkpoint(latest, "train_model").progress.iterations == 3 * part
    assert losses == pytest.approx(alone["loss"], rel=1e-5)
    assert_same_model(tmp_path / "some/out/model-LATEST.gguf", tmp_path / "one/out/model-LATEST.gguf")


@pytest.mark.slow
def test_a_folder_is_resumed_by_one_rank_and_a_file_by_several(tmp_path: Path) -> None:
    resumed(tmp_path, (2, 1, 2))


@pytest.mark.prove
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("worlds", [(2, 4), (4, 1), (1, 2), (4, 2)])
def test_sharded_training_resumed_on_another_number_of_ranks(tmp_path: Path, worlds: tuple[int, int]) -> None:
    resumed(tmp_path, worlds)


@pytest.mark.slow
def test_the_contract_of_checkpoints_holds_for_folders(tmp_path: Path) -> None:
    """-LATEST is a relative link to the newest, of which --keep-last keeps two; replicas read a folder as well."""
    options: dict[str, Any] = {"save_every": 1, "keep_last": 2, "adam_iter": 4, "warmup": 0, "lr_schedule": "constant"}
    told = run_ranks(2, teach, taught(tmp_path, shard="full", **options))
    assert all(isinstance(each, dict) for each in told), told
    out = tmp_path / "out"
    assert os.readlink(out / "checkpoint-LATEST.gguf") == "checkpoint-4.gguf"
    assert sorted(path.name for path in out.glob("checkpoint-[0-9]*")) == ["checkpoint-3.gguf", "checkpoint-4.gguf"]
    assert {"__0_0.distcp", "__1_0.distcp"} < folder_files(out / "checkpoint-4.gguf")
    assert not list(out.glob(".*tmp*"))
    written = out / "model-4.gguf"
    copy = {"checkpoint_in": str(out / "checkpoint-4.gguf"), "model_out": str(tmp_path / "again.gguf")}
    run_ranks(1, teach, taught(tmp_path, only_write_model=True, checkpoint_out="", **copy))
    assert (tmp_path / "again.gguf").read_bytes() == written.read_bytes()
    told = run_ranks(2, teach, taught(tmp_path, **options | {"adam_iter": 5}))
    assert [len(each["loss"]) for each in told] == [1, 1]
    assert sorted(path.name for path in out.glob("checkpoint-[0-9]*")) == ["checkpoint-4.gguf", "checkpoint-5.gguf"]
    assert (out / "checkpoint-LATEST.gguf").is_file()


# ---- the command line -------------------------------------------------------------------------------------------------


def command_of(directory: Path, **options: Any) -> list[str]:
    """A sharded run of the command line, which logs into its folder."""
    return ["train", *as_arguments(taught(directory, shard="full", ctx=8, threads=1, eval_every=0, **options))]


@pytest.mark.slow
def test_sigterm_saves_what_all_ranks_hold(tmp_path: Path) -> None:
    process = start(["llamakit", *command_of(tmp_path, adam_iter=100_000, save_every=10), "--devices", "2"])
    latest = tmp_path / "out/checkpoint-LATEST.gguf"
    wait_for(latest, process)
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143 and "Traceback" not in err and "Warning" not in err, err
    assert read_checkpoint(latest, "train_model").progress.iterations == max(steps_of(tmp_path))
    assert not [path for path in (tmp_path / "out").iterdir() if ".tmp-" in path.name]


def steps_of(directory: Path) -> dict[int, float]:
    """Step -> loss; of a step that was done again the later one."""
    records = map(json.loads, (directory / "out/metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if record.get("event", "step") == "step"}


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_kills_while_shares_are_saved(tmp_path: Path) -> None:
    """Five runs, of which one rank is killed at a random instant: the launcher starts them anew, which go on."""
    options: dict[str, Any] = {"adam_iter": 60, "save_every": 1}
    (alone,) = run_ranks(1, teach, taught(tmp_path / "one", ctx=8, eval_every=0, **options))
    for seed in range(5):
        directory, rng = tmp_path / str(seed), random.Random(seed)
        process = start([*torchrun(2, "--max-restarts=3"), *command_of(directory, **options)])
        wait_for(directory / "out/checkpoint-LATEST.gguf", process)
        time.sleep(rng.random() * 2)
        ranks = ranks_of(process)
        if process.poll() is None and len(ranks) == 2:
            os.kill(rng.choice(ranks), signal.SIGKILL)
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        assert list(steps_of(directory).values()) == pytest.approx(alone["loss"], rel=1e-5), err
        assert read_checkpoint(directory / "out/checkpoint-LATEST.gguf", "train_model").progress.iterations == 60
        assert not [path for path in (directory / "out").iterdir() if ".tmp-" in path.name]


# ---- a folder alone: one process writes and reads it ------------------------------------------------------------------


def a_state() -> TrainState:
    return TrainState({"--seed": 7}, {}, {}, Progress(iterations=3), {})


def written(path: Path) -> dict[str, torch.Tensor]:
    tensors = {"a": torch.arange(12.0).view(4, 3), "b": torch.ones(5), "a.m": torch.zeros(4, 3)}
    write_folder(path, a_state(), "train_model", lambda folder: save_shares(folder, tensors, Dist()))
    return tensors


def test_a_folder_reads_back_and_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "chk-3"
    tensors = written(path)
    written(path)
    state = read_checkpoint(path, "train_model")
    assert isinstance(state, TrainState) and state.progress.iterations == 3 and state.identity == {"--seed": 7}
    assert {name: array.tolist() for name, array in state.arrays.items()} == {n: t.tolist() for n, t in tensors.items()}
    assert [path.name for path in tmp_path.iterdir()] == ["chk-3"]
    with pytest.raises(FormatError, match="is no checkpoint of this kind of training"):
        read_checkpoint(path, "finetune_full")


def test_inspect_says_what_a_folder_is(tmp_path: Path) -> None:
    path = tmp_path / "chk-3"
    tensors = written(path)
    report = inspect(path)
    assert (report.kind, report.format) == ("checkpoint", "torch.distributed.checkpoint")
    assert report.facts == {"iterations": 3, "files": 1}
    assert {row.name: row.shape for row in report.tensors} == {name: t.shape for name, t in tensors.items()}
    with pytest.raises(UnsupportedError, match="is a folder with a training checkpoint, not a model"):
        open_model(path)
    for broken in ("{}", '{"state": {"progress": {"iterations": 1}}, "files": {}, "tensors": {"w": 1}}', "["):
        (path / "llamakit.json").write_text(broken)
        with pytest.raises(FormatError, match="chk-3"):
            inspect(path)


def test_torch_reads_a_folder_too(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    tensors = written(tmp_path / "chk")
    found = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(found, checkpoint_id=tmp_path / "chk", no_dist=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("what", ["cut", "flipped", "gone", "index", "escapes", "state"])
def test_a_damaged_folder_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "chk"
    written(path)
    (data,) = path.glob("*.distcp")
    index = json.loads((path / "llamakit.json").read_text())
    if what == "cut":
        data.write_bytes(data.read_bytes()[:-1])
    elif what == "flipped":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif what == "gone":
        data.unlink()
    elif what == "index":
        (path / "llamakit.json").write_text("{")
    elif what == "escapes":
        shutil.copy(data, tmp_path / data.name)
        index["files"] = {f"../{name}": value for name, value in index["files"].items()}
    else:
        index["state"]["progress"]["iterations"] = 4
    if what in ("escapes", "state"):
        (path / "llamakit.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="the checkpoint is damaged"):
        read_folder(path, "train_model")


def test_what_fails_while_a_folder_is_written_leaves_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / "chk"
    written(path)

    def fails(folder: Path) -> dict[str, Any]:
        (folder / "__0_0.distcp").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(SaveError, match="No space left"):
        write_folder(path, a_state(), "train_model", fails)
    assert len(FolderArrays(path)) == 3 and [p.name for p in tmp_path.iterdir()] == ["chk"]


class Elsewhere(Dist):
    """A rank beside which another one has a disk of its own."""

    def gather(self, value: Any) -> list[Any]:
        return [value, {"__0_0.distcp": None}]


def test_ranks_that_do_not_see_the_same_disk_are_named(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="rank 1 cannot save: it does not see the files of other ranks") as caught:
        save_shares(tmp_path, {"a": torch.ones(3)}, Elsewhere())
    assert caught.value.hint is not None and "on a disk that all machines see" in caught.value.hint


def test_a_file_is_read_by_rows_as_well(tmp_path: Path) -> None:
    run = taught(tmp_path, adam_iter=2)
    run_ranks(1, teach, run)
    path = file_name(run.placed().checkpoint_out, run, 2)
    whole = read_checkpoint(path, "train_model")
    light = read_checkpoint(path, "train_model", light=True)
    arrays = open_arrays(path)
    assert list(light.arrays) == list(whole.arrays)
    assert all(np.array_equal(arrays[name], array) for name, array in whole.arrays.items())
