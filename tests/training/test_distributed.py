"""Several ranks train as one: the same samples, losses, checkpoints; what differs between them is found and told."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llamakit.cli import launch
from llamakit.errors import UsageError
from llamakit.formats.gguf import GGUFFile
from llamakit.formats.open import open_model
from llamakit.model.layers import Dropout
from llamakit.training.checkpoint import read_checkpoint
from llamakit.training.distributed import Dist
from llamakit.training.finetune import finetune
from llamakit.training.loop import Control, agree
from llamakit.training.report import Begin, Evaluation, Loading, Remark, StepReport
from llamakit.training.state import Progress, TrainState, place, resume_remarks
from llamakit.training.train import train
from tests.helpers import ROOT
from tests.tiny import cached_tiny_gguf, session_directory, tiny_text
from tests.training.ranks import run_ranks
from tests.training.runs import run_config
from tests.training.train_runs import train_config

QUESTIONS = [
    {"prompt": "the king " * (1 + i % 3), "completion": "the old queen sang. " * (1 + i % 3)} for i in range(40)
]


# ---- one process alone: no group, nothing happens ---------------------------------------------------------------------


def test_alone_there_is_nothing_to_do() -> None:
    dist, given = Dist(), Control()
    tensor = torch.ones(3)
    dist.add_up(tensor)
    dist.send([tensor])
    dist.check_same({"a": 1}, str)
    agree(dist, given, given)
    assert dist.is_main and dist.claim() and not dist.joined
    assert dist.sum([1.5, 2]) == [1.5, 2] and tensor.tolist() == [1, 1, 1]
    assert [item for item, counts in dist.share("abc") if counts] == list("abc") and dist.from_main(lambda: 7) == 7


def test_shares_of_an_evaluation_are_even_where_all_must_take_part() -> None:
    ranks = [Dist(rank, 2) for rank in range(2)]
    assert [list(dist.share("abc")) for dist in ranks] == [[("a", True), ("c", True)], [("b", True)]]
    for dist in ranks:
        dist.sharded = True
    assert list(ranks[1].share("abc")) == [("b", True), ("c", False)]


@pytest.mark.parametrize("n", [0, 1, 3, 4, 8, 9])
def test_rows_are_shared_out_whole(n: int) -> None:
    rows = [list(range(n))[Dist(rank, 4).rows(n)] for rank in range(4)]
    assert [row for part in rows for row in part] == list(range(n))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(UsageError, match="--batch 6 does not divide by 4 ranks") as caught:
        Dist(0, 4).check_batch(6)
    assert caught.value.hint == "give --batch 8, or another number of ranks"
    Dist(0, 4).check_batch(8)


def test_dropout_of_a_row_does_not_depend_on_its_process() -> None:
    x = torch.ones(4 * 5, 8)
    whole, part = Dropout(0.5), Dropout(0.5)
    whole.rows, part.rows = range(4), range(2, 4)
    assert torch.equal(whole.mask(x, 3)[10:], part.mask(x[10:], 3))
    assert not torch.equal(whole.mask(x, 3)[:5], whole.mask(x, 3)[5:10])


def test_another_number_of_ranks_is_told() -> None:
    settings: dict[str, Any] = {}
    cpu = torch.device("cpu")
    saved = TrainState({}, settings, place(cpu, 2), Progress(), {})
    (remark,) = resume_remarks(saved, settings, place(cpu))
    assert remark == Remark("note", "ranks 1 (was 2): results are no longer exact to the last bit")
    assert not list(resume_remarks(saved, settings, place(cpu, 2)))
    assert "ranks" not in place(cpu)


def test_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert launch.place() is None
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "x", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    here = launch.place()
    assert here is not None and (here.rank, here.world, here.local_world, here.restarts) == (3, 4, 1, 0)
    assert here.job.startswith(f"{os.getppid()}-")  # `none` is every static run's name
    monkeypatch.setenv("RANK", "three")
    with pytest.raises(UsageError, match="not as torchrun makes it"):
        launch.place()


@pytest.mark.parametrize(("devices", "message"), [("0", "'0'"), ("x", "'x'"), ("-1", "'-1'")])
def test_devices_that_cannot_be(devices: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"--devices is {message} .expected a number from 1, or all"):
        launch.number_of_ranks(devices, "cpu")
    assert launch.number_of_ranks("all", "cpu") == 1 and launch.number_of_ranks("3", "cpu") == 3


# ---- several ----------------------------------------------------------------------------------------------------------


def followed(reports: Any) -> dict[str, list[Any]]:
    """What a run said of its steps and evaluations, and what a person would be told."""
    told: dict[str, list[Any]] = {"loss": [], "norm": [], "sample": [], "tokens": [], "held out": [], "remarks": []}
    for report in reports:
        if isinstance(report, StepReport):
            told["loss"].append(report.loss)
            told["norm"].append(report.grad_norm)
            told["sample"].append(report.sample)
            told["tokens"].append(report.n_tokens)
        if isinstance(report, Evaluation):
            told["held out"].append((report.loss, report.n_tokens))
        if isinstance(report, Remark):
            told["remarks"].append(report.text)
    return told


def tune(dist: Dist, config: Any) -> dict[str, list[Any]]:
    return followed(finetune(config, dist=dist))


def teach(dist: Dist, config: Any) -> dict[str, list[Any]]:
    return followed(train(config, dist=dist))


def chat_config(directory: Path, **options: Any) -> Any:
    """Packed and masked questions and answers, LoRA on Q4_K, accumulation, dropout, an anchor."""
    directory.mkdir(parents=True, exist_ok=True)
    data = directory / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    anchor = directory / "anchor.txt"
    anchor.write_text(tiny_text(500, 3))
    defaults = {
        "anchor_data": str(anchor), "anchor_batch": 3, "model_base": str(cached_tiny_gguf(type="Q4_K")), "train_data": str(data), "val_split": 0.2, "pack": True,
        "chat_template": "chatml", "batch": 4, "grad_acc": 2, "ctx": 128, "lora_dropout": 0.1, "adam_iter": 3,
        "save_every": 2, "lora_out": "",
    }  # fmt: skip
    return run_config(directory, **(defaults | options))


def assert_alike(mine: dict[str, list[Any]], theirs: dict[str, list[Any]], relative: float) -> None:
    assert mine["sample"] == theirs["sample"] and mine["tokens"] == theirs["tokens"]
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=relative)
    assert mine["norm"] == pytest.approx(theirs["norm"], rel=relative)
    assert [n for _, n in mine["held out"]] == [n for _, n in theirs["held out"]]
    assert [x for x, _ in mine["held out"]] == pytest.approx([x for x, _ in theirs["held out"]], rel=relative)


@pytest.mark.slow
def test_two_ranks_are_as_one(tmp_path: Path) -> None:
    """Packing, masks, accumulation, dropout and evaluation in three steps; the campaign below has twenty."""
    (alone,) = run_ranks(1, tune, chat_config(tmp_path / "one"))
    both = run_ranks(2, tune, chat_config(tmp_path / "two"))
    assert len(alone["loss"]) == 3
    for mine in both:
        assert_alike(mine, alone, 1e-5)
    assert both[0]["loss"] == both[1]["loss"]
    # what two ranks saved, one goes on from, and three; the curve is that of one run
    (longer,) = run_ranks(1, tune, chat_config(tmp_path / "longer", adam_iter=5))
    (one,) = run_ranks(1, tune, chat_config(tmp_path / "two", adam_iter=2))
    assert one["loss"] == pytest.approx(longer["loss"][3:], rel=1e-5)
    assert "ranks 1 (was 2): results are no longer exact to the last bit" in one["remarks"]
    assert read_checkpoint(tmp_path / "two/chk-LATEST.gguf").progress.iterations == 5


def another_option(dist: Dist, config: Any) -> Any:
    if dist.rank == 1:
        config = dataclasses.replace(config, adam_alpha=0.5)
    return tune(dist, config)


def another_text(dist: Dist, config: Any) -> Any:
    if dist.rank == 1:
        text = Path(config.train_data).with_name("other.txt")
        text.write_text(Path(config.train_data).read_text() + "the end")
        config = dataclasses.replace(config, train_data=str(text))
    return tune(dist, config)


def missing_base(dist: Dist, config: Any) -> Any:
    return tune(dist, dataclasses.replace(config, model_base="gone.gguf") if dist.rank == 1 else config)


@pytest.mark.slow
def test_ranks_that_differ_are_refused(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    told = run_ranks(2, another_option, config)
    assert told == ["MismatchError: --adam-alpha is 0.5 on rank 1, and 0.001 on rank 0"] * 2
    told = run_ranks(2, another_text, config)
    expected = r"MismatchError: the training text \(sha256\) is [0-9a-f]{16} on rank 1, and [0-9a-f]{16} on rank 0"
    assert all(re.fullmatch(expected, text) for text in told), told
    told = run_ranks(2, missing_base, config)
    assert told[0].startswith("LostRankError: contact with another rank is lost") and "gone.gguf" in told[1]
    assert not (tmp_path / "chk-LATEST.gguf").exists()


# ---- the command line -------------------------------------------------------------------------------------------------


def arguments(directory: Path, **options: Any) -> list[str]:
    """Of a run from nothing on, that writes into a directory."""
    config = run_config(directory, log_file=str(directory / "log.jsonl"), checkpoint_in="", **options)
    return ["finetune", *as_arguments(config)]


def as_arguments(config: Any) -> list[str]:
    """The options that say what a config does."""
    default = type(config)()
    changed = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    changed = {name: value for name, value in changed.items() if value != getattr(default, name)}
    return [part for name, value in changed.items() for part in ("--" + name.replace("_", "-"), str(value))]


def start(command: list[str], *, temporary: Path | None = None, **kwargs: Any) -> subprocess.Popen[str]:
    """A process; what it leaves behind it leaves in `temporary`, or where it is removed after the tests."""
    folder = str(temporary or session_directory())
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": folder}
    return subprocess.Popen(
        [sys.executable, "-m", *command], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
        **kwargs,
    )  # fmt: skip


def torchrun(n: int, *more: str) -> list[str]:
    return ["torch.distributed.run", "--standalone", f"--nproc-per-node={n}", *more, "-m", "llamakit"]


def logged(directory: Path) -> dict[int, float]:
    """Step -> loss; of a step that was done again the later one."""
    lines = (directory / "log.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


@pytest.mark.slow
def test_devices_starts_the_ranks_and_one_speaks(tmp_path: Path) -> None:
    command = arguments(tmp_path, adam_iter=4)
    (alone,) = run_ranks(
        1, tune, run_config(tmp_path / "..", adam_iter=4, checkpoint_out="", lora_out=str(tmp_path / "x.bin"))
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = start(["llamakit", *command, "--devices", "2"], temporary=temporary)
    out, err = done.communicate(timeout=240)
    assert not list(temporary.iterdir())
    assert done.returncode == 0, err
    assert out.count("iter=     4") == 1 and out.count("main: verified") == 1
    assert "Traceback" not in err and "WARNING" not in err and err.count("loading text") <= 1
    assert list(logged(tmp_path).values()) == pytest.approx(alone["loss"], rel=1e-5)
    assert read_checkpoint(tmp_path / "chk-LATEST.gguf").place["ranks"] == 2


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_one_line(tmp_path: Path) -> None:
    done = start(["llamakit", *arguments(tmp_path, batch=3), "--devices", "2"])
    out, err = done.communicate(timeout=60)
    assert done.returncode == 2 and not out
    assert err.splitlines()[-2:] == [
        "error: --batch 3 does not divide by 2 ranks: it counts the sequences of all of them",
        "hint: give --batch 4, or another number of ranks",
    ]


def test_what_is_asked_for_while_the_ranks_agree_is_not_lost() -> None:
    given, agreed = Control(), Control()

    class Slow(Dist):
        """A signal comes while this rank waits for the others."""

        def most(self, values: Sequence[float]) -> list[float]:
            given.signal, given.save = signal.SIGTERM, True
            return list(values)

    agree(Slow(), given, agreed)
    assert (agreed.signal, agreed.save) == (0, False)
    agree(Dist(), given, agreed)
    assert (agreed.signal, agreed.save) == (signal.SIGTERM, True)
    assert (given.signal, given.save) == (signal.SIGTERM, False)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ours", pytest.param("torchrun", marks=pytest.mark.prove)])
def test_sigterm_to_the_launcher_saves(tmp_path: Path, launcher: str) -> None:
    command = arguments(tmp_path, adam_iter=100_000, save_every=10, ctx=8)
    ours = ["llamakit", *command, "--devices", "2"]
    process = start(ours if launcher == "ours" else [*torchrun(2), *command])
    wait_for(tmp_path / "chk-LATEST.gguf", process)
    process.terminate()
    _, err = process.communicate(timeout=60)
    saved = read_checkpoint(tmp_path / "chk-LATEST.gguf").progress.iterations
    assert saved == max(logged(tmp_path)), err  # the very step in which it was stopped
    assert err.count("finishing this step, then saving") == 1
    if launcher == "ours":
        assert process.returncode == 143 and "Traceback" not in err


@pytest.mark.prove
def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    process = start(["llamakit", *arguments(tmp_path, adam_iter=100_000, save_every=1, ctx=8), "--devices", "2"])
    wait_for(tmp_path / "chk-LATEST.gguf", process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert [line for line in err.splitlines() if line.startswith("error")] == [
        "error: rank 1 was ended by SIGKILL; the last checkpoint is intact"
    ]
    read_checkpoint(tmp_path / "chk-LATEST.gguf")


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """Process numbers of the ranks that a launcher has started, by rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    ranks = {}
    for child in children:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it has ended meanwhile
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            ranks |= {int(item[5:]): int(child) for item in environment if item.startswith(b"RANK=")}
    return [ranks[rank] for rank in sorted(ranks)]


def survived(directory: Path, seed: int, undisturbed: dict[int, float]) -> None:
    """A run of which one rank is killed at a random instant: the launcher starts the ranks anew, which go on."""
    rng = random.Random(seed)
    command = arguments(directory, adam_iter=len(undisturbed), save_every=3, ctx=8, keep_last=2)
    process = start([*torchrun(2, "--max-restarts=3"), *command])
    wait_for(directory / "log.jsonl", process)
    time.sleep(rng.random() * 3)
    ranks = ranks_of(process)
    if process.poll() is None and len(ranks) == 2:
        os.kill(rng.choice(ranks), signal.SIGKILL)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert logged(directory) == pytest.approx(undisturbed, rel=1e-5), err
    progress = read_checkpoint(directory / "chk-LATEST.gguf").progress
    assert progress.iterations == len(undisturbed)
    assert not [path for path in directory.iterdir() if ".tmp-" in path.name]


def campaign(tmp_path: Path, n: int, steps: int) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    config = run_config(
        whole, adam_iter=steps, ctx=8, checkpoint_out="", checkpoint_in="", lora_out=str(whole / "x.bin")
    )
    (alone,) = run_ranks(1, tune, config)
    undisturbed = dict(enumerate(alone["loss"], 1))
    for i in range(n):
        directory = tmp_path / str(i)
        directory.mkdir()
        survived(directory, i, undisturbed)


@pytest.mark.slow
def test_a_killed_rank_is_started_again(tmp_path: Path) -> None:
    campaign(tmp_path, 1, 60)


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_twenty_kills(tmp_path: Path) -> None:
    campaign(tmp_path, 20, 200)


CAMPAIGN = {"adam_iter": 20, "save_every": 10}


@pytest.mark.prove
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("dtype", "relative"), [("f32", 1e-5), ("bf16", 5e-3)])
@pytest.mark.parametrize("world", [2, 4])
def test_twenty_steps_of_a_lora(tmp_path: Path, world: int, dtype: str, relative: float) -> None:
    (alone,) = run_ranks(1, tune, chat_config(tmp_path / "one", dtype=dtype, **CAMPAIGN))
    for mine in run_ranks(world, tune, chat_config(tmp_path / "several", dtype=dtype, **CAMPAIGN)):
        assert_alike(mine, alone, relative)


@pytest.mark.prove
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("dtype", "relative"), [("f32", 1e-5), ("bf16", 5e-3)])
@pytest.mark.parametrize("world", [2, 4])
def test_twenty_steps_of_all_weights(tmp_path: Path, world: int, dtype: str, relative: float) -> None:
    # at ten times the rate of real runs bfloat16's roundings grow into half a percent of a gradient's norm by themselves
    options: dict[str, Any] = {
        "dtype": dtype,
        "adam_alpha": 1e-3,
        "batch": 4,
        "grad_acc": 2,
        "dropout": 0.1,
        **CAMPAIGN,
    }
    (alone,) = run_ranks(1, teach, train_config(tmp_path / "one", **options))
    for mine in run_ranks(world, teach, train_config(tmp_path / "several", **options)):
        assert_alike(mine, alone, relative)


@pytest.mark.prove
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("worlds", [(2, 1), (2, 4), (1, 2), (4, 1)])
def test_resumed_on_another_number_of_ranks(tmp_path: Path, worlds: tuple[int, int]) -> None:
    (alone,) = run_ranks(1, tune, chat_config(tmp_path / "one", adam_iter=10))
    (first, *_) = run_ranks(worlds[0], tune, chat_config(tmp_path / "some", adam_iter=5))
    (then, *_) = run_ranks(worlds[1], tune, chat_config(tmp_path / "some", adam_iter=5))
    assert first["loss"] + then["loss"] == pytest.approx(alone["loss"], rel=1e-5)


# ---- a base of which each rank holds its rows -------------------------------------------------------------------------


def read_and_tune(dist: Dist, config: Any) -> tuple[dict[str, list[Any]], int, int]:
    """What `tune` gives, and bytes of matrices that this rank read before the first step, and those of the file."""
    read = GGUFFile.read
    n_read, n_all = 0, 0

    def counted(self: GGUFFile, name: str, start: int = 0, stop: int | None = None) -> Any:
        nonlocal n_read
        rows = read(self, name, start, stop)
        n_read += rows.nbytes if self.tensors[name].n_rows > 1 else 0
        return rows

    GGUFFile.read = counted  # pyright: ignore[reportAttributeAccessIssue]
    told: dict[str, list[Any]] = {}
    try:
        reports = finetune(config, dist=dist)
        before_steps: list[Any] = []
        for report in reports:
            before_steps.append(report)
            if isinstance(report, Loading):  # of the text: the fingerprint of the base has been taken
                n_read = 0
            if isinstance(report, Begin):
                break
        n_before = n_read
        told = followed([*before_steps, *reports])
    finally:
        GGUFFile.read = read
    with open_model(config.model_base) as file:
        n_all = sum(info.n_bytes for info in file.tensors.values() if info.n_rows > 1)
    return told, n_before, n_all


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False], ids=["recomputed", "kept"])
def test_a_sharded_base_gives_the_same(tmp_path: Path, checkpointing: bool) -> None:
    """Ranks have other numbers of trained tokens, of held-out batches, and at an epoch's end of rows."""
    options: dict[str, Any] = {"use_checkpointing": checkpointing, "val_split": 0.4, "rank_out": 2, "adam_iter": 4}
    options |= {
        "batch": 2,
        "grad_acc": 2,
        "ctx": 100,
        "lora_dropout": 0.0,
        "lora_out": str(tmp_path / "lora-ITERATION.gguf"),
    }
    (alone,) = run_ranks(1, tune, chat_config(tmp_path / "one", **options))
    both = run_ranks(2, read_and_tune, chat_config(tmp_path / "two", shard="full", **options))
    for told, n_read, n_all in both:
        assert_alike(told, alone, 1e-5)
        assert n_read == pytest.approx(n_all / 2, rel=0.01)
    (then,) = run_ranks(1, tune, chat_config(tmp_path / "two", **options | {"adam_iter": 1}))
    assert len(then["loss"]) == 1


@pytest.mark.slow
def test_what_cannot_be_sharded_is_one_line(tmp_path: Path) -> None:
    told = run_ranks(2, tune, run_config(tmp_path, shard="full", sample_prompt=("The king",)))
    assert told == ["UsageError: --sample-prompt needs the whole model on one device"] * 2
    told = run_ranks(2, teach, train_config(tmp_path, shard="full", micro_batch=1))
    assert told == ["UsageError: --micro-batch is for a model that lies whole on each device"] * 2
