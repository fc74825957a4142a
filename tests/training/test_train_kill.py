"""Runs of `train` killed at random instants: what is on disk always loads, and the next run goes on."""

import multiprocessing
import random
import time
from pathlib import Path

import pytest

from llamakit.formats.open import open_model
from llamakit.training.checkpoint import read_checkpoint
from llamakit.training.report import StepReport
from llamakit.training.train import train
from tests.training.train_runs import EXACT, run_train, train_config

# Children come from a process that imported torch and did nothing else: a fork of this one could inherit held locks.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["llamakit.training.train", "tests.training.train_runs"])
OPTIONS = {**EXACT, "adam_iter": 100_000, "save_every": 1, "keep_last": 3, "eval_every": 3, "val_split": 0.2}


def work(directory: Path) -> None:
    """Train and save after every step until killed; runs in a child process."""
    for _ in train(train_config(directory, **OPTIONS)):
        pass


def stamp(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def killed_run(directory: Path, rng: random.Random) -> None:
    """A child process that is killed at a random instant after its first save."""
    latest = directory / "out/checkpoint-LATEST.gguf"
    before = stamp(latest)
    child = PROCESSES.Process(target=work, args=(directory,))
    child.start()
    for _ in range(6000):  # a loaded machine may need long for the first save
        if stamp(latest) != before or not child.is_alive():
            break
        time.sleep(0.01)
    time.sleep(rng.random() * 0.2)
    child.kill()
    child.join()


def campaign(directory: Path, n: int) -> None:
    rng = random.Random(1)
    train_config(directory)  # writes the text, outside the children
    highest, out = 0, directory / "out"
    for _ in range(n):
        killed_run(directory, rng)
        state = read_checkpoint(out / "checkpoint-LATEST.gguf", "train_model")
        assert state.progress.iterations >= highest
        highest = state.progress.iterations
        for path in out.glob("checkpoint-*.gguf"):
            read_checkpoint(path, "train_model")
        for path in out.glob("model-*.gguf"):
            open_model(path).close()
    assert highest > 0
    reports = run_train(directory, **(OPTIONS | {"adam_iter": highest + 1}))
    assert [r.step for r in reports if isinstance(r, StepReport)] == [highest + 1]
    assert not [p for p in out.iterdir() if ".tmp-" in p.name]


@pytest.mark.slow
def test_a_few_kills(tmp_path: Path) -> None:
    campaign(tmp_path, 3)


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_a_hundred_kills(tmp_path: Path) -> None:
    campaign(tmp_path, 100)
