"""Runs killed at random instants: what is on disk always loads, and the next run goes on."""

import multiprocessing
import random
import time

import pytest

from llamakit.formats.adapter import read_adapter
from llamakit.formats.open import open_model
from llamakit.training.checkpoint import read_checkpoint
from llamakit.training.finetune import finetune
from llamakit.training.report import StepReport
from tests.tiny import cached_tiny_gguf
from tests.training.runs import run_config

# Children come from a process that imported torch and did nothing else: a fork of this one could inherit held locks.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["llamakit.training.finetune", "tests.training.runs"])
OPTIONS = {"adam_iter": 10_000, "save_every": 1, "batch": 1, "ctx": 8, "keep_last": 3, "val_split": 0.0}


def train(directory, options):
    """Train and save after every step until killed; runs in a child process."""
    for _ in finetune(run_config(directory, **options)):
        pass


def killed_run(directory, rng, options):
    """A child process that is killed at a random instant after its first save."""
    latest, before = directory / "chk-LATEST.gguf", _stamp(directory / "chk-LATEST.gguf")
    child = PROCESSES.Process(target=train, args=(directory, options))
    child.start()
    for _ in range(6000):  # a loaded machine may need long for the first save
        if _stamp(latest) != before or not child.is_alive():
            break
        time.sleep(0.01)
    time.sleep(rng.random() * 0.2)
    child.kill()
    child.join()


def _stamp(path):
    return path.stat().st_mtime_ns if path.exists() else 0


def campaign(tmp_path, n, **options):
    rng, options = random.Random(1), OPTIONS | options
    run_config(tmp_path)  # writes the text, outside the children
    highest = 0
    for _ in range(n):
        killed_run(tmp_path, rng, options)
        latest = tmp_path / "chk-LATEST.gguf"
        if latest.exists():
            iterations = read_checkpoint(latest).progress.iterations
            assert iterations >= highest
            highest = iterations
        for path in tmp_path.glob("chk-*.gguf"):
            read_checkpoint(path)
        with open_model(cached_tiny_gguf(type="Q8_0")) as base:
            for path in tmp_path.glob("lora-*"):
                read_adapter(path, base)
    assert highest > 0
    reports = list(finetune(run_config(tmp_path, **(options | {"adam_iter": 1}))))
    assert [r.step for r in reports if isinstance(r, StepReport)] == [highest + 1]
    assert not [p for p in tmp_path.iterdir() if ".tmp-" in p.name]


@pytest.mark.slow
def test_a_few_kills(tmp_path):
    campaign(tmp_path, 4)


@pytest.mark.slow
def test_a_few_kills_with_folders(tmp_path):
    """A numbered folder is whole or absent, and so is what LATEST leads to."""
    campaign(tmp_path, 4, lora_format="peft", lora_out=str(tmp_path / "lora-ITERATION"))
    assert (tmp_path / "lora-LATEST").is_symlink()


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_two_hundred_kills(tmp_path):
    campaign(tmp_path, 200)
