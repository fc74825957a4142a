"""`llamakit train` as people run it: its lines, its folder, signals, full disks, bad input."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest

from llamakit.cli import run
from llamakit.formats.open import open_model
from llamakit.training.checkpoint import read_checkpoint
from tests.helpers import assert_error, called, warm
from tests.tiny import cached_tiny_gguf, tiny_text
from tests.warm import Process

SHAPE = "--embd 16 --layer 2 --head 4 --head-kv 2 --ff 24 --ctx 16 --batch 2 --warmup 2 --sample-tokens 4 --dtype f32"
COMMAND = f"train --train-data text.txt --vocab-model vocab.gguf --out-dir run --adam-iter 4 --eval-every 2 {SHAPE}"
#: the same in llama2.c's spelling
THEIRS = """train --train-data=text.txt --vocab_model=vocab.gguf --out_dir=run --max_iters=4 --eval_interval=2 --dim=16
 --n_layers=2 --n_heads=4 --n_kv_heads=2 --ff=24 --max_seq_len=16 --batch_size=2 --warmup_iters=2 --sample_tokens=4
 --dtype=float32 --device=cpu --compile=False"""


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: Any) -> None:
    """Two threads on tiny matrices only wait for each other."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})


@pytest.fixture
def drawn() -> None:
    """The run draws its picture, which takes longer than so small a run itself."""


@pytest.fixture(autouse=True)
def _no_picture(request: Any, monkeypatch: Any) -> None:
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("llamakit.training.recorder.save_figure", lambda *_: None)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: Any) -> Path:
    """A directory with the files that the command names."""
    (tmp_path / "vocab.gguf").symlink_to(cached_tiny_gguf())
    (tmp_path / "text.txt").write_text(tiny_text(4000, 3))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(line: str) -> list[str]:
    return shlex.split(line)


@pytest.mark.usefixtures("drawn")
def test_a_run_its_lines_and_its_folder(place: Path, capsys: Any) -> None:
    assert run(words(COMMAND)) == 0
    out = capsys.readouterr().out
    for part in ("tokens per iteration will be: 32", "step 2: train loss ", "4 | loss ", "4 iterations, "):
        assert part in out, part
    found = {path.name for path in (place / "run").iterdir()}
    assert found >= {"config.toml", "metrics.jsonl", "samples.txt", "report.html", "loss.png", "data", "vocab.gguf",
                     "checkpoint-LATEST.gguf", "model-LATEST.gguf", "model-BEST.gguf"}  # fmt: skip
    assert (place / "run/samples.txt").read_text().count("--- step ") == 2
    assert run([*words(COMMAND), "--adam-iter", "6"]) == 0
    assert "4 | loss" not in (again := capsys.readouterr().out) and "5 | loss" in again
    assert (place / "run/samples.txt").read_text().count("--- step ") == 3


def test_both_spellings_train_the_same_model(place: Path) -> None:
    assert run(words(COMMAND)) == 0
    expected = (place / "run/model-LATEST.gguf").read_bytes()
    (place / "run").rename(place / "before")
    assert run(words(THEIRS)) == 0
    assert (place / "run/model-LATEST.gguf").read_bytes() == expected


def test_the_written_config_does_the_same_again(place: Path) -> None:
    assert run([*words(COMMAND), "--sample-prompt", 'a "quoted" one', "--export", "llama2c"]) == 0
    expected = (place / "run/model-LATEST.gguf").read_bytes()
    assert (place / "run/model.bin").stat().st_size > 0
    (place / "run").rename(place / "before")
    assert run(["train", "--config", "before/config.toml"]) == 0
    assert (place / "run/model-LATEST.gguf").read_bytes() == expected
    assert (place / "run/config.toml").read_text() == (place / "before/config.toml").read_text()


def test_print_config_is_a_config(place: Path, capsys: Any) -> None:
    assert run([*words(COMMAND), "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert not (place / "run").exists() and "embd = 16" in printed
    (place / "c.toml").write_text(printed)
    assert run(["train", "--config", "c.toml", "--print-config"]) == 0
    assert capsys.readouterr().out == printed


def test_json_is_the_only_thing_on_stdout(place: Path, capsys: Any) -> None:
    assert run([*words(COMMAND), "--json"]) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert summary["iterations"] == 4 and "run/model-LATEST.gguf" in summary["files"]
    assert "4 | loss" in captured.err


def test_a_name_for_the_model_unties_it(place: Path, capsys: Any) -> None:
    for more, untied in (((), True), (("--tie",), False)):
        line = [*words(COMMAND), "--out-dir", f"r{untied}", "--model-out", f"m{untied}.gguf", "--adam-iter", "1", *more]
        assert run(line) == 0
        with open_model(place / f"m{untied}.gguf") as file:
            assert ("output.weight" in file.tensors) == untied


def test_evaluating_only_needs_no_model_to_export(place: Path, capsys: Any) -> None:
    assert run([*words(COMMAND), "--eval-only", "--export", "hf"]) == 0
    assert "val loss" in capsys.readouterr().out and not (place / "run/hf").exists()


@pytest.mark.parametrize(
    ("more", "fragments"),
    [
        ("--train-data nowhere.txt", ("nowhere.txt", "No such file")),
        ("--train-data empty.txt", ("empty.txt", "no text")),
        ("--train-data bad.txt", ("bad.txt:2", "UTF-8")),
        ("--train-data short.txt", ("--ctx",)),
        ("--batch 9999", ("--batch 9999",)),
        ("--vocab-model text.txt", ("text.txt",)),
        ("--out-dir text.txt", ("text.txt", "cannot be made")),
        ("--out-dir text.txt/deep", ("text.txt/deep", "cannot be made")),
        ("--checkpoint-in text.txt", ("text.txt",)),
        ("--init-from text.txt", ("text.txt",)),
        ("--init-from resume", ("no such checkpoint",)),
        ("--log-file vocab.gguf", ("vocab.gguf", "input of this run")),
        ("--config typo.toml", ("adam-itre", "adam-iter")),
        ("--config unknown.toml", ("flux",)),
        ("--adam-itre 3", ("--adam-itre",)),
        ("--head 3", ("--embd 16",)),
        ("--export onnx", ("onnx",)),
    ],
)
def test_bad_input_gives_one_line_and_writes_nothing(
    place: Path, capsys: Any, more: str, fragments: tuple[str, ...]
) -> None:
    (place / "empty.txt").write_text("")
    (place / "bad.txt").write_bytes(b"a line\nb\xe4d\n")
    (place / "short.txt").write_text("short")
    (place / "typo.toml").write_text("adam-itre = 3\n")
    (place / "unknown.toml").write_text("flux = 3\n")
    assert run([*words(COMMAND), *words(more)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error: ", "hint: "))]
    errors, said = [line for line in lines if line.startswith("error: ")], " ".join(lines).replace("_", "-")
    assert len(errors) == 1 and all(fragment.replace("_", "-") in said for fragment in fragments), errors
    assert not list(place.rglob("checkpoint-*")) and not list(place.rglob("*.tmp-*"))


def start(place: Path, *more: str) -> Process:
    """A run in a process of its own, once its first step is done."""
    process = Process(
        *words(COMMAND), "--adam-iter", "1000000", "--eval-every", "0", "--save-every", "0", "--threads", "1", *more,
        cwd=place,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if " | loss " in line:
            return process
    raise AssertionError(process.stderr.read())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_ends_with_its_code(place: Path, number: int, code: int) -> None:
    process = start(place)
    process.send_signal(number)
    out, err = process.communicate(timeout=250)
    assert process.returncode == code, err
    assert "Traceback" not in err and "finishing this step" in err
    state = read_checkpoint(place / "run/checkpoint-LATEST.gguf", "train_model")
    assert f"{state.progress.iterations} iterations" in out
    steps = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "event" not in line][-1] == state.progress.iterations
    assert run([*words(COMMAND), "--adam-iter", str(state.progress.iterations + 1)]) == 0


@pytest.mark.slow
def test_sigusr1_saves_and_goes_on_and_a_killed_run_leaves_its_lock_to_the_next(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    process = start(place)
    process.send_signal(signal.SIGUSR1)
    assert process.stdout is not None
    for line in process.stdout:
        if "model-LATEST.gguf" in line:
            break
    assert process.poll() is None
    process.send_signal(signal.SIGSTOP)  # it holds its lock, and leaves the processor to the others
    assert_error(called(capfd, *words(COMMAND)), 2, "another run")
    process.kill()
    process.communicate()
    state = read_checkpoint(place / "run/checkpoint-LATEST.gguf", "train_model")
    assert run([*words(COMMAND), "--adam-iter", str(state.progress.iterations + 1)]) == 0


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_leaves_the_old_files(place: Path) -> None:
    line = [*words(COMMAND), "--save-every", "1"]
    assert run(line) == 0
    before = {path.name: path.read_bytes() for path in (place / "run").glob("*.gguf")}
    result = warm(*line, "--adam-iter", "6", "--threads", "1", cwd=place, largest_file=30_000)
    assert_error(result, 3, "cannot save", "intact")
    assert {path.name: path.read_bytes() for path in (place / "run").glob("*.gguf")} == before
    assert not list(place.rglob("*.tmp-*"))
