"""How many tokens a second a server gives to one client and to eight, beside llama-server: python benchmarks/serve.py

Both sides are processes of their own on the same model, with as many slots and threads, and are asked over HTTP by the
same clients, streaming, greedily, with prompts that have no beginning in common. They take turns, and begin in turn;
while one is measured the other has nothing to do. llama-server is the one that the package xllamacpp carries.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from common import ROOT, add_common_options, environment, load, machine, write_json
from finetune import model_path as smollm2
from generate import model_path
from generate_sides import peer_environment
from models import add_place_options, workplace

_WORDS = ("river", "crown", "boat", "letter", "lantern", "garden", "bridge", "story", "harbour", "candle", "secret")


@contextmanager
def ours(arguments: argparse.Namespace, model: Path) -> Iterator[str]:
    """`llamakit serve`, HOST:PORT."""
    command = [
        sys.executable, "-m", "llamakit", "serve", "-m", model, "--port", "0", "--parallel", str(arguments.slots),
        "--ctx", str(arguments.ctx), "--threads", str(arguments.threads), "--queue", "1000",
    ]  # fmt: skip
    with running(command, environment(arguments.threads), r"listening on http://(\S+)") as address:
        yield address


@contextmanager
def theirs(arguments: argparse.Namespace, model: Path) -> Iterator[str]:
    """llama-server, HOST:PORT."""
    command = [
        sys.executable,
        __file__,
        "--peer",
        json.dumps([str(model), arguments.slots, arguments.ctx, arguments.threads]),
    ]
    with running(command, peer_environment(), r"listening on http://(\S+)") as address:
        yield address


@contextmanager
def running(command: Sequence[Any], env: dict[str, str], pattern: str) -> Iterator[str]:
    """A process for as long as the block lasts, and what it says of its address on stderr."""
    with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(pattern, line):
                break
        else:
            raise RuntimeError("".join(said[-20:]))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        try:
            yield found[1]
        finally:
            process.terminate()


def peer(model: str, slots: int, ctx: int, threads: int) -> None:
    """llama-server until it is killed."""
    import xllamacpp as x  # pyright: ignore[reportMissingImports]

    params = x.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.verbosity, params.warmup = ctx * slots, slots, -1, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    with socket.create_server(("127.0.0.1", 0)) as free:
        params.port = free.getsockname()[1]
    server = x.Server(params)
    print(f"listening on {server.listening_address}", file=sys.stderr, flush=True)
    threading.Event().wait()


def prompt(rng: random.Random, n_words: int) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(n_words))


def ask(address: str, text: str, n: int) -> tuple[int, float]:
    """(tokens of an answer, seconds to the first of them)."""
    body = {
        "prompt": text, "max_tokens": n, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True}, "cache_prompt": False,
    }  # fmt: skip
    connection = http.client.HTTPConnection(address, timeout=600)
    started, first, n_tokens = time.perf_counter(), 0.0, 0
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        for line in answer:
            if not first and line.startswith(b"data: "):
                first = time.perf_counter() - started
            if b'"completion_tokens"' in line:
                n_tokens = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", n_tokens)
    finally:
        connection.close()
    return n_tokens, first


def rate(address: str, n_clients: int, arguments: argparse.Namespace, seed: int) -> dict[str, float]:
    """Tokens a second of all clients together, and the median time to the first token."""

    def work(number: int) -> list[tuple[int, float]]:
        rng = random.Random(1000 * seed + number)
        return [ask(address, prompt(rng, arguments.prompt), arguments.gen) for _ in range(arguments.requests)]

    started = time.perf_counter()
    with ThreadPoolExecutor(n_clients) as pool:
        answers = [answer for answers in pool.map(work, range(n_clients)) for answer in answers]
    seconds = time.perf_counter() - started
    assert all(n == arguments.gen for n, _ in answers), "every answer is as long as it should be"
    return {
        "tok_per_s": sum(n for n, _ in answers) / seconds,
        "first_token_s": statistics.median(first for _, first in answers),
    }


def measure(arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Rounds of both sides, one client and many; the first round warms up and does not count."""
    sides = {"llamakit": ours} if arguments.alone else {"llamakit": ours, "llama-server": theirs}
    found: dict[str, dict[str, list[dict[str, float]]]] = {side: {"1": [], "many": []} for side in sides}
    loads = []
    with ExitStack() as stack:
        addresses = {side: stack.enter_context(start(arguments, model)) for side, start in sides.items()}
        for number in range(arguments.rounds + 1):
            for side in sorted(sides, reverse=bool(number % 2)):
                for name, n_clients in (("1", 1), ("many", arguments.clients)):
                    loads.append(load())
                    found[side][name].append(rate(addresses[side], n_clients, arguments, seed=number))
    return {
        "model": model.stem, "clients": arguments.clients, "slots": arguments.slots, "load": loads,
        "sides": {side: {name: values[1:] for name, values in rates.items()} for side, rates in found.items()},
    }  # fmt: skip


def show(figures: dict[str, Any]) -> None:
    low, high = min(figures["load"]), max(figures["load"])
    print(f"\n{figures['model']}, {figures['slots']} slots; load of the machine {low} to {high}")
    for side, rates in figures["sides"].items():
        one, many = ([value["tok_per_s"] for value in rates[name]] for name in ("1", "many"))
        first = statistics.median(value["first_token_s"] for value in rates["many"])
        gain = statistics.median(b / a for a, b in zip(one, many, strict=True))
        print(
            f"  {side:<12}  1 client {statistics.median(one):6.1f} tok/s, {figures['clients']} clients "
            f"{statistics.median(many):6.1f} tok/s ({gain:.2f} times as many), first token after {1000 * first:.0f} ms"
        )
    if len(figures["sides"]) == 2:
        for name, label in (("1", "1 client"), ("many", f"{figures['clients']} clients")):
            pairs = zip(*(figures["sides"][side][name] for side in ("llamakit", "llama-server")), strict=True)
            found = [a["tok_per_s"] / b["tok_per_s"] for a, b in pairs]
            low, middle, high = min(found), statistics.median(found), max(found)
            print(f"  llamakit / llama-server, {label}: {middle:.2f} ({low:.2f} to {high:.2f})")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", default=["smollm2"], help="GGUF files, smollm2, smollm2-TYPE or SHAPE-TYPE"
    )
    parser.add_argument("--clients", type=int, default=8, help="clients at once (default: 8)")
    parser.add_argument("--slots", type=int, default=8, help="slots of each server (default: 8)")
    parser.add_argument("--ctx", type=int, default=1024, help="tokens of a slot (default: 1024)")
    parser.add_argument("--prompt", type=int, default=40, help="words of a prompt (default: 40)")
    parser.add_argument("--gen", type=int, default=64, help="tokens of an answer (default: 64)")
    parser.add_argument("--requests", type=int, default=2, help="requests of each client in a round (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, after one to warm up (default: 5)")
    parser.add_argument("--alone", action="store_true", help="without llama-server")
    add_place_options(parser)
    add_common_options(parser)
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["--peer"]:
        peer(*json.loads(sys.argv[2]))
        return
    arguments, results = parse(), []
    print(f"{machine()}, {arguments.threads} threads")
    with workplace(arguments.dir, arguments.keep) as directory:
        for name in arguments.models:
            model = smollm2(name, directory) if name == "smollm2" else model_path(name, directory)
            results.append(measure(arguments, model))
            show(results[-1])
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()
