"""`llamakit finetune` as people run it: the old command, its lines, signals, full disks."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llamakit.cli import run
from llamakit.cli.finetune_view import step_line
from llamakit.formats.adapter import read_adapter
from llamakit.training.report import StepReport
from tests.formats.files import split_gguf
from tests.formats.torch_models import meta_model
from tests.helpers import assert_error, called, cli, render_in_this_process, warm
from tests.tiny import cached_tiny_gguf, tiny_text
from tests.warm import Process

COMMAND = """finetune --model-base base.gguf --checkpoint-in chk-LATEST.gguf --checkpoint-out chk-ITERATION.gguf \
  --lora-out lora-ITERATION.bin --train-data shakespeare.txt --save-every 10 --threads 2 --adam-iter 30 --batch 4 \
  --ctx 64 --use-checkpointing"""
STEP = re.compile(
    r"^train_opt_callback: iter= *\d+ sample=\d+/\d+ sched=\d+\.\d{6} loss=\d+\.\d{6}"
    r" dt=(\d+\.\dms|(\d+d )?\d\d:\d\d:\d\d) eta=(\d+\.\dms|(\d+d )?\d\d:\d\d:\d\d) \|-*>$"
)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Two threads on tiny matrices only wait for each other."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with the files that the old command names."""
    (tmp_path / "base.gguf").symlink_to(cached_tiny_gguf(type="Q8_0"))
    (tmp_path / "shakespeare.txt").write_text(tiny_text(6000, 3))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_old_command_runs_as_written(place, capsys):
    assert run(shlex.split(COMMAND)) == 0
    out = capsys.readouterr().out
    steps = [line for line in out.splitlines() if line.startswith("train_opt_callback")]
    assert len(steps) == 30 and all(STEP.match(line) for line in steps)
    names = {p.name for p in place.iterdir() if not p.name.startswith(".")}
    numbered = {f"{kind}-{n}.{ext}" for kind, ext in (("chk", "gguf"), ("lora", "bin")) for n in (10, 20, 30, "LATEST")}
    assert names == numbered | {"base.gguf", "shakespeare.txt"}
    for line in ("main: seed: ", "main: model base = 'base.gguf'", "print_params: n_vocab               : ",
                 "print_lora_params: n_rank_wq             : 4", "main: total train_iterations 0",
                 "main: lora_size = ", "main: opt_size  = ", "tokenize_file: total number of samples: ",
                 "main: number of training tokens: ", "main: number of unique tokens: ", "main: begin training",
                 "main: predicted peak memory = ", "save_checkpoint_lora_file: saving to chk-10.gguf",
                 "save_as_llama_lora: saving to lora-LATEST.bin", "main: total training time: "):  # fmt: skip
        assert line in out, line
    assert run(shlex.split(COMMAND)) == 0
    assert "main: total train_iterations 30" in capsys.readouterr().out
    assert (place / "lora-60.bin").exists()
    assert read_adapter(place / "lora-LATEST.bin").stamps is not None


def test_tensorboard_is_reported_to(place, capsys):
    """Beside the log by default; the same command goes on with the same folder."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (place / "logs").mkdir()
    words = [*shlex.split(COMMAND), "--adam-iter", "2", "--ctx", "16", "--log-file", "logs/log.jsonl"]
    for _ in range(2):
        assert run([*words, "--report-to", "tensorboard"]) == 0
    events = EventAccumulator(str(place / "logs" / "tensorboard"))
    events.Reload()
    logged = [json.loads(line) for line in (place / "logs" / "log.jsonl").read_text().splitlines()]
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([line["loss"] for line in logged])
    assert [event.step for event in events.Scalars("validation/loss")] == [0, 2, 4]
    assert run([*words, "--report-to", "tensorboard", "--report-dir", "elsewhere"]) == 0
    assert any((place / "elsewhere").iterdir())
    assert run([*words, "--report-to", "tensorboard", "--report-dir", "base.gguf"]) == 2
    assert "base.gguf: is a file, the folder of the events is needed" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["meta", "huggingface"])
def test_a_folder_is_a_base(place, capsys, kind):
    """The adapter of a folder is at home on the folder and on the GGUF made of it, whatever context was named."""
    made = meta_model(place / "base")
    if kind == "huggingface":
        assert run(["convert", str(made), "-o", "hf", "--ctx", "96"]) == 0
        made = place / "hf"
    words = ["--train-data", "shakespeare.txt", "--adam-iter", "1", "--batch", "1", "--checkpoint-out", ""]
    assert run(["finetune", "--model-base", str(made), "--ctx", "8", "--lora-out", "lora.gguf", *words]) == 0
    assert run(["convert", str(made), "-o", "made.gguf", "--ctx", "96"]) == 0
    for model in (str(made), "made.gguf"):
        capsys.readouterr()
        assert run(["generate", "-m", model, "--ctx", "32", "--lora", "lora.gguf", "-p", "a", "-n", "1"]) == 0
        assert "another model" not in capsys.readouterr().err
    assert run(["finetune", "--model-base", "made.gguf", "--ctx", "97", *words]) == 2
    assert "--ctx 97 is more than the model's context of 96" in capsys.readouterr().err


def test_both_spellings_of_the_ranks_and_underscores(place):
    base = ["finetune", "--model_base", "base.gguf", "--train_data", "shakespeare.txt", "--adam_iter", "1",
            "--batch", "1", "--ctx", "8", "--no-flash", "--checkpoint_out", ""]  # fmt: skip
    assert run([*base, "--rank-ffn_gate", "2", "--rank-ffn-up", "3", "--rank_ffn_down", "1", "--lora-out", "a"]) == 0
    ranks = {name.split(".")[2]: a.shape[0] for name, (a, _) in read_adapter(place / "a").tensors.items()}
    assert (ranks["ffn_gate"], ranks["ffn_up"], ranks["ffn_down"], ranks["attn_q"]) == (2, 3, 1, 4)


@pytest.mark.slow
def test_json_is_the_only_thing_on_stdout(place):
    result = cli(*shlex.split(COMMAND), "--json", "--adam-iter", "2", cwd=place)
    summary = json.loads(result.stdout)
    assert summary["iterations"] == 2 and summary["files"] == ["chk-LATEST.gguf", "lora-LATEST.bin"]
    assert summary["last_step"]["step"] == 2
    assert "train_opt_callback" in result.stderr and result.stderr.startswith("loading base.gguf")


def test_a_config_file_sets_options_and_the_command_line_wins(place, capsys):
    (place / "run.toml").write_text(
        'model-base = "base.gguf"\ntrain_data = "shakespeare.txt"\nadam-iter = 2\nctx = 8\n'
    )
    assert run(["finetune", "--config", "run.toml", "--adam-iter", "1", "--batch", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("train_opt_callback") == 1 and "n_ctx                 : 8" in out
    (place / "bad.toml").write_text("adam-itre = 2\n")
    assert run(["finetune", "--config", "bad.toml"]) == 2
    assert "adam_iter" in capsys.readouterr().err.replace("-", "_")


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ("--model-base nowhere.gguf", ("nowhere.gguf", "No such file")),
        ("--train-data nowhere.txt", ("nowhere.txt", "No such file")),
        ("--train-data empty.txt", ("empty.txt", "empty")),
        ("--model-base shakespeare.txt", ("shakespeare.txt",)),
        ("--checkpoint-in shakespeare.txt", ("shakespeare.txt",)),
        ("--lora-out nowhere/lora.bin", ("nowhere", "cannot be written")),
        ("--lora-out base.gguf", ("base.gguf", "input")),
        ("--lora-out chk-ITERATION.gguf", ("chk-LATEST.gguf", "one would replace the other")),
        ("--log-file lora-LATEST.bin", ("lora-LATEST.bin", "one would replace the other")),
        ("--train-data /dev/zero", ("/dev/zero", "no file that can be read whole")),
        ("--grad-acc 0", ("--grad-acc is 0",)),
        ("--lora-r 0", ("--lora-r",)),
        ("--lora-r 100000", ("rank 100000",)),
        ("--ctx 0", ("--ctx",)),
        ("--ctx 100000", ("--ctx 100000",)),
        ("--batch nine", ("--batch",)),
        ("--no-such-flag", ("--no-such-flag",)),
        ("--device cuda", ("cuda",)),
    ],
)
def test_bad_input_gives_one_line_and_writes_nothing(place, capsys, arguments, fragments):
    import torch

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    (place / "empty.txt").write_text("")
    before = sorted(p.name for p in place.iterdir())
    assert run([*shlex.split(COMMAND), *arguments.split()]) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and all(f in errors[0] for f in fragments), lines
    assert sorted(p.name for p in place.iterdir()) == before


ENDLESS = [*shlex.split(COMMAND), "--adam-iter", "100000", "--ctx", "16", "--threads", "1"]


def start(place, *arguments):
    """A run in a process of its own, once its first step is done."""
    process = Process(*ENDLESS, *arguments, cwd=place)
    for line in process.stdout:
        if line.startswith("train_opt_callback"):
            return process
    raise AssertionError(process.stderr.read())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_ends_with_its_code(place, number, code):
    process = start(place, "--save-every", "0")
    process.send_signal(number)
    out, err = process.communicate(timeout=250)
    assert process.returncode == code, err
    assert "saving to chk-LATEST.gguf" in out and "Traceback" not in err
    assert (place / "chk-LATEST.gguf").exists() and (place / "lora-LATEST.bin").exists()
    assert run([*shlex.split(COMMAND), "--adam-iter", "1", "--ctx", "16"]) == 0


@pytest.mark.slow
def test_sigusr1_saves_and_goes_on_and_a_killed_run_leaves_its_lock_to_the_next(place, capfd):
    process = start(place, "--save-every", "0")
    process.send_signal(signal.SIGUSR1)
    for line in process.stdout:
        if "save_as_llama_lora: saving to lora-LATEST.bin" in line:
            break
    assert process.poll() is None
    process.send_signal(signal.SIGSTOP)  # it holds its lock, and leaves the processor to the others
    second = called(capfd, *shlex.split(COMMAND), "--ctx", "16")
    assert_error(second, 2, "another run")
    process.kill()
    process.communicate()
    again = called(capfd, *shlex.split(COMMAND), "--adam-iter", "1", "--ctx", "16")
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_leaves_the_old_files(place):
    short = (*shlex.split(COMMAND), "--adam-iter", "2", "--ctx", "16", "--save-every", "1")
    assert run(list(short)) == 0
    before = {p.name: p.read_bytes() for p in place.iterdir() if p.suffix in (".gguf", ".bin")}
    result = warm(*short, "--threads", "1", cwd=place, largest_file=20_000)
    assert_error(result, 3, "cannot save", "intact")
    assert {p.name: p.read_bytes() for p in place.iterdir() if p.suffix in (".gguf", ".bin")} == before
    assert not [p for p in place.iterdir() if ".tmp-" in p.name]


def test_a_step_line_is_the_old_tools():
    step = StepReport(7, 6.547876, 1e-3, 0.999891, 29, 7366, 0.024, 10.0, 1.0, 13, False)
    line = step_line(step, 0.024, 6.804158)
    assert line == (
        "train_opt_callback: iter=     7 sample=29/7366 sched=0.999891 loss=6.547876 dt=24.0ms eta=312.0ms |---->"
    )


@pytest.mark.prove
def test_the_start_says_what_is_loaded_within_five_seconds(place, record_property):
    """Of processor time, which other programs on the machine do not lengthen."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llamakit", *shlex.split(COMMAND), "--adam-iter", "0"],
        cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    first, stat = process.stderr.readline(), Path(f"/proc/{process.pid}/stat").read_text()
    user, system = stat.rpartition(")")[2].split()[11:13]
    said_after_s = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    process.communicate()
    record_property("seconds of processor time until finetune says what it loads", said_after_s)
    assert "loading base.gguf" in first and said_after_s < 5


def test_a_model_in_parts_gives_the_same_adapter(place):
    parts = split_gguf(place / "m.gguf", cached_tiny_gguf(type="Q8_0"), 8)
    options = "--train-data shakespeare.txt --seed 1 --adam-iter 1 --batch 1 --ctx 8 --checkpoint-out ''"
    adapters = []
    for base in ("base.gguf", str(parts[1])):
        assert run(["finetune", "--model-base", base, "--lora-out", "out.gguf", *shlex.split(options)]) == 0
        adapters.append((place / "out.gguf").read_bytes())
    assert adapters[0] == adapters[1]
    assert run(["finetune", "--model-base", base, "--lora-out", str(parts[2]), *shlex.split(options)]) == 2


def test_questions_and_answers(place, capfd, monkeypatch):
    """What a user sees of a chat: the data, the answers before and after, and the proof."""
    render_in_this_process(monkeypatch)
    monkeypatch.setattr("llamakit.training.recorder.save_figure", lambda *_: None)  # drawn in tests/training
    rows = [f'{{"prompt": "Who is {n}?", "completion": "The king {n}."}}' for n in range(9)]
    (place / "chat.jsonl").write_text("\n".join([*rows, '{"prompt": "x", "completion": ""}']) + "\n")
    words = shlex.split(
        "finetune --model-base base.gguf --train-data chat.jsonl --chat-template llama2 --on-error skip --adam-iter 2"
        " --save-best --val-split 0.2 --sample-prompt Who? --sample-tokens 3 --report page --warmup 1 --no-pack"
    )
    result = called(capfd, *words)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for line in ("main: questions and answers from chat.jsonl", "main: number of records: 10 (9 prompt/completion)",
                 "main: number of samples: 7", "main: rows of an epoch: 7, a sample each", "main: held-out samples: 2",
                 'main: asked "Who?"', "main:   before: ", "main:   after:  ", "main: verified: max |dlogit| = ",
                 "main: the adapter changes the base: max |dlogit| = "):  # fmt: skip
        assert any(found.startswith(line) for found in lines), line
    assert "chat.jsonl:10" in result.stderr and "skipped" in result.stderr
    assert (place / "ggml-lora-BEST-f32.gguf").exists() and (place / "page" / "report.html").exists()
    summary = json.loads(called(capfd, *words, "--json").stdout)
    assert summary["samples"][0]["prompt"] == "Who?" and summary["verified"]["max_dlogit"] < 1
    assert_error(called(capfd, *words[:5], "--checkpoint-in", "", "--chat-template", "llama2"), 2, "chat.jsonl:10")
    assert_error(called(capfd, *words, "--checkpoint-in", "", "--adam-alpha", "0"), 1, "the adapter changes nothing")
