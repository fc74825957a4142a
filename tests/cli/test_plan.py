"""`llamakit plan` and `finetune --plan` as people run them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from llamakit.cli import run
from llamakit.cli.finetune import finetune
from llamakit.cli.plan import plan
from tests.tiny import cached_tiny_gguf, tiny_text

MANY = ("nodes", "gpus_per_node", "gpu_memory", "bandwidth", "flops", "shape", "bits_per_weight")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(tiny_text(3000, 5), encoding="utf-8")
    base = str(cached_tiny_gguf(type="Q8_0"))
    return ["--model-base", base, "--train-data", "text.txt", "--ctx", "16", "--batch", "2", "--dtype", "f32"]


def test_plan_has_every_option_of_finetune() -> None:
    theirs, ours = (dict(inspect.signature(f).parameters) for f in (finetune, plan))
    assert set(ours) == (set(theirs) | set(MANY)) - {"plan"}
    assert all(ours[name].default == theirs[name].default for name in theirs if name != "plan")


def test_both_say_the_same_and_write_nothing(files: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", *files]) == 0
    first = capfd.readouterr().out
    assert run(["finetune", *files, "--plan"]) == 0
    second = capfd.readouterr().out
    names = [line[:22].strip() for line in first.splitlines()]
    assert [line[:22].strip() for line in second.splitlines()] == names
    assert {"peak memory", "activations", "disk", "steps", "time", "trained"} <= set(names)
    assert [path.name for path in Path().iterdir()] == ["text.txt"]


def test_json(files: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", *files, "--max-memory", "100G", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["memory_bytes"] == sum(told["memory"].values())
    assert told["options"]["--micro-batch"] == 2 and told["chosen"]


def test_too_little_memory_is_one_line(files: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["finetune", *files, "--max-memory", "1M"]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "--max-memory 1M: nothing fits; the smallest takes" in errors[0]
    assert [path.name for path in Path().iterdir()] == ["text.txt"]


def test_the_end_says_what_it_took(files: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["finetune", *files, "--adam-iter", "2", "--max-memory", "100G", "--report", "report"]) == 0
    out = capfd.readouterr().out
    assert "main: peak memory = " in out and "main: time of an iteration = " in out
    results = json.loads(Path("report/report.json").read_text(encoding="utf-8"))["results"]
    assert results["peak memory, bytes"] > 0 and results["predicted peak memory, bytes"] > 0


def test_many_gpus(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--shape", "70b", "--nodes", "4", "--batch", "32", "--ctx", "4096", "--lora-r", "16"]
    assert run(words) == 0
    out = capfd.readouterr().out
    assert "4 x 8 GPUs" in out and "all weights  sharded" in out and "docs/scale.md" in out
    assert run([*words, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["ranks"] == 32 and len(told["ways"]) == 4 and told["least_ranks"]["full"] == 21


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "2", "--shape", "8b", "--batch", "3"], "--batch 3 does not divide among 16 ranks"),
        (["--nodes", "2", "--shape", "8b", "--batch", "16", "--gpu-memory", "much"], "--gpu-memory is 'much'"),
        (["--nodes", "2", "--shape", "8b", "--batch", "16", "--bandwidth", "0"], "--bandwidth is '0'"),
        ([], "--model-base is missing"),
    ],
)
def test_mistakes(words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", *words]) == 2
    assert message in capfd.readouterr().err
