"""How long the small things take: opening a file, the help, the stamps; and what a model's loading holds.

    python benchmarks/startup.py

Goals: a GGUF with a 32k vocabulary opens in under 60 ms; `llamakit --help` answers in under 0.3 s without torch; both
stamps of a base model take under 50 ms; loading never holds more than the file and what the compute needs.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import Worker, add_common_options, environment, load, peak_rss_bytes, serve, status_bytes, write_json
from models import add_place_options, make, workplace


def help_seconds(runs: int, threads: int) -> dict[str, Any]:
    """Median seconds of `llamakit --help`, of an empty Python, and whether torch was imported."""

    def seconds(*arguments: str) -> float:
        taken = []
        for _ in range(runs):
            begin = time.perf_counter()
            subprocess.run([sys.executable, *arguments], env=environment(threads), capture_output=True, check=True)
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken)

    code = "import sys\nfrom llamakit.cli import run\nrun(['--help'])\n"
    code += "print('torch' in sys.modules, file=sys.stderr)"
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment(threads), capture_output=True, check=True, text=True
    )
    return {
        "help_s": seconds("-m", "llamakit", "--help"),
        "python_s": seconds("-c", "pass"),
        "torch_imported": ran.stderr.strip().splitlines()[-1] != "False",
    }


def child(path: str) -> None:
    """In a process of its own: time of open and stamps, memory of loading."""
    import torch

    from llamakit.formats.open import open_model
    from llamakit.formats.stamps import base_stamps
    from llamakit.model import load_model
    from llamakit.tokenizer import load_tokenizer

    def best(work: Any, runs: int = 5) -> float:
        taken = []
        for _ in range(runs):
            begin = time.perf_counter()
            work()
            taken.append(time.perf_counter() - begin)
        return min(taken)

    def answer(_: dict[str, Any]) -> Any:
        file = open_model(path)
        figures = {
            "open_s": best(lambda: open_model(path)),
            "stamps_s": best(lambda: base_stamps(file)),
            "tokenizer_s": best(lambda: load_tokenizer(file), 2),
            "imports_bytes": status_bytes("VmRSS"),
        }
        model = load_model(file, dtype=torch.bfloat16, weight_cache="none")
        assert model.blk is not None
        return {**figures, "loading_peak_bytes": peak_rss_bytes(), "file_bytes": Path(path).stat().st_size}

    serve(answer)


def show(figures: dict[str, Any]) -> None:
    torch_too = "torch imported" if figures["torch_imported"] else "torch not imported"
    held = (figures["loading_peak_bytes"] - figures["imports_bytes"]) / 1e9
    ms = {name: 1000 * value for name, value in figures.items() if name.endswith("_s")}
    print(f"llamakit --help      {ms['help_s']:7.0f} ms (python alone {ms['python_s']:.0f}), {torch_too}")
    print(f"open, 32k vocabulary {ms['open_s']:7.1f} ms")
    print(f"both stamps          {ms['stamps_s']:7.1f} ms")
    print(f"tokenizer            {ms['tokenizer_s']:7.1f} ms")
    print(f"loading              {held:7.3f} GB beyond the imports; the file has {figures['file_bytes'] / 1e9:.3f} GB")
    print(f"load average         {load()}")


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        child(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description="Measure start-up times and the memory of loading.")
    parser.add_argument("--model", default="1b-q8_0", help="SHAPE-TYPE of models.py, or a file (default: 1b-q8_0)")
    parser.add_argument("--runs", type=int, default=10, help="runs of --help (default: 10)")
    add_place_options(parser)
    add_common_options(parser)
    arguments = parser.parse_args()
    with workplace(arguments.dir, arguments.keep) as directory:
        given = Path(arguments.model)
        path = given if given.is_file() else make(arguments.model, directory)
        worker = Worker([__file__, "--worker", str(path)], arguments.threads)
        figures = worker.ask({}) | help_seconds(arguments.runs, arguments.threads)
        worker.close()
    show(figures)
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
