"""One 7B Q4_0 fine-tuning job through the command line: seconds per step and memory, and where the time goes.

    python benchmarks/seven_b.py --dir /tmp/models

The job is the one that people gave up with the old tool: batch 4, ctx 64, --use-checkpointing, here with
--weight-cache none. Beside it stand the two parts that cannot be avoided: the products at the machine's measured
rate, and decoding every matrix three times (forward, recomputed forward, input gradient).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import add_common_options, environment, gemm_rate, load, median_s, step_flop, write_json
from models import SHAPES, add_place_options, make, make_text, workplace

BATCH, CTX, PASSES = 4, 64, 3


def train(model: Path, directory: Path, *, steps: int, threads: int) -> dict[str, Any]:
    """Run `llamakit finetune` and return seconds of each step, of the whole run, and its peak resident memory."""
    log = directory / "seven_b.jsonl"
    command = [sys.executable, "-m", "llamakit", "finetune"]
    command += ["--model-base", str(model), "--train-data", str(make_text(directory / "text.txt"))]
    command += ["--checkpoint-in", "", "--checkpoint-out", "", "--lora-out", str(directory / "seven_b-lora.gguf")]
    command += ["--batch", str(BATCH), "--ctx", str(CTX), "--adam-iter", str(steps), "--seed", "1", "--val-split", "0"]
    command += ["--use-checkpointing", "--weight-cache", "none", "--device", "cpu", "--threads", str(threads)]
    command += ["--log-file", str(log)]
    begin = time.perf_counter()
    child = subprocess.Popen(command, env=environment(threads), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"llamakit finetune failed: exit code {os.waitstatus_to_exitcode(status)}")
    rates = [json.loads(line)["tok_per_s"] for line in log.read_text().splitlines()]
    return {
        "step_s": [BATCH * CTX / rate for rate in rates],
        "total_s": time.perf_counter() - begin,
        "peak_bytes": usage.ru_maxrss * 1024,
        "cpu_s": usage.ru_utime + usage.ru_stime,
    }


def parts(model: Path, shape: Any, threads: int) -> dict[str, float]:
    """Seconds of a step's products at the measured rate, and of its decoding."""
    import torch

    from llamakit.formats.open import open_model
    from llamakit.model.device import faster_dtype
    from llamakit.quant import dequantize

    torch.set_num_threads(threads)
    rate = gemm_rate()
    file = open_model(model)
    info = file.tensors["blk.0.ffn_gate.weight"]
    packed = torch.from_numpy(file.read(info.name))
    out = torch.empty(info.shape, dtype=faster_dtype(torch.device("cpu")))
    decode = median_s(lambda: dequantize(packed, info.type, out=out), 3) / info.n_elements
    flop = step_flop(shape, batch=BATCH, ctx=CTX, checkpointing=True)
    return {
        "gemm_flop_per_s": rate,
        "products_s": flop / rate,
        "decode_weights_per_s": 1 / decode,
        # The output matrix is outside the recomputed blocks: decoded twice, not three times.
        "decode_s": decode * (PASSES * shape.n_matmul - shape.n_vocab * shape.n_embd),
    }


def show(name: str, job: dict[str, Any], measured: dict[str, float]) -> None:
    step = statistics.median(job["step_s"][1:] or job["step_s"])
    print(f"{name}, batch {BATCH} x {CTX}, --use-checkpointing --weight-cache none")
    print(f"  seconds a step   {step:7.1f}   (all: {', '.join(f'{s:.1f}' for s in job['step_s'])})")
    print(f"  peak RSS         {job['peak_bytes'] / 1e9:7.2f} GB")
    print(f"  whole command    {job['total_s']:7.1f} s, {job['cpu_s']:.0f} s of CPU")
    rate = measured["gemm_flop_per_s"] / 1e9
    print(f"  products         {measured['products_s']:7.1f} s at the {rate:.0f} GFLOP/s of a 2048^3 product")
    speed = measured["decode_weights_per_s"] / 1e9
    print(f"  decoding         {measured['decode_s']:7.1f} s at {speed:.2f} G weights/s, three passes")
    print(f"  load average     {load()}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a random 7B Q4_0 model for a few steps.")
    parser.add_argument("--model", default="7b-q4_0", help="SHAPE-TYPE of models.py (default: 7b-q4_0)")
    parser.add_argument("--steps", type=int, default=3, help="steps; the first does not count (default: 3)")
    add_place_options(parser)
    add_common_options(parser)
    arguments = parser.parse_args()
    with workplace(arguments.dir, arguments.keep) as directory:
        model, shape = make(arguments.model, directory), SHAPES[arguments.model.partition("-")[0]]
        job = train(model, directory, steps=arguments.steps, threads=arguments.threads)
        measured = parts(model, shape, arguments.threads)
    show(arguments.model, job, measured)
    write_json(arguments.json, {"model": arguments.model, "job": job, "parts": measured})


if __name__ == "__main__":
    main()
