"""Several ranks beside one on the same cores: tokens per second, and peak memory of a rank with a sharded base.

    python benchmarks/scale.py --model SmolLM2-135M-Instruct.Q4_1.gguf --rounds 3 --json scale.json

Each measurement is a run of `llamakit.finetune` of its own, ranks in processes of one thread each that torch's launcher
starts, one rank in a process of as many threads; the order changes from round to round. Memory is a rank's peak beyond
what it holds with torch imported, decoded weights not kept (--weight-cache none) in all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import ROOT, add_common_options, environment, peak_rss_bytes, write_json

_WORDS = "the old king carried a lantern over the bridge and nobody followed him home that winter. "


def rank_main(arguments: argparse.Namespace) -> None:
    """One rank: train, and write what it took into a file of its own."""
    import torch

    from llamakit.cli.options import give_back_freed_memory
    from llamakit.training.config import FinetuneConfig
    from llamakit.training.distributed import Dist, join
    from llamakit.training.finetune import finetune
    from llamakit.training.report import StepReport

    if arguments.shard != "none":
        give_back_freed_memory()  # as the command line does
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist = Dist()
    if "RANK" in os.environ:
        world = int(os.environ["WORLD_SIZE"])
        dist = join(local_rank=0, local_world=world, restarts=0, job="", device="cpu", version="benchmark")
    before = peak_rss_bytes()
    folder = Path(arguments.rank_of)
    config = FinetuneConfig(
        model_base=arguments.model, train_data=str(folder / "text.txt"), checkpoint_in="",
        checkpoint_out=str(folder / "chk.gguf"), lora_out="", adam_iter=arguments.steps + arguments.warm, save_every=0,
        batch=arguments.batch, ctx=arguments.ctx, seed=7, warmup=2, val_split=0.0, shard=arguments.shard,
        use_checkpointing=arguments.checkpointing, weight_cache=arguments.weight_cache, dtype=arguments.dtype,
    )  # fmt: skip
    steps = [report for report in finetune(config, dist=dist) if isinstance(report, StepReport)]
    measured = {
        "tok_per_s": statistics.median(step.tok_per_s for step in steps[arguments.warm :]),
        "loss": steps[-1].loss,
        "peak_bytes": peak_rss_bytes() - before,
    }
    (folder / f"rank-{dist.rank}.json").write_text(json.dumps(measured))
    dist.leave()


def measure(arguments: argparse.Namespace, ranks: int, threads: int, **options: Any) -> list[dict[str, Any]]:
    """What each rank measured."""
    with TemporaryDirectory(dir=arguments.dir) as folder:
        (Path(folder) / "text.txt").write_text(_WORDS * 2000)
        mine = vars(arguments) | options
        command = [str(Path(__file__).resolve()), "--rank-of", folder]
        for name in ("model", "steps", "warm", "batch", "ctx", "shard", "weight_cache", "dtype"):
            command += ["--" + name.replace("_", "-"), str(mine[name])]
        command += ["--checkpointing"] if mine["checkpointing"] else []
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        subprocess.run([sys.executable, *start, *command], env=environment(threads), check=True, cwd=ROOT)
        return [json.loads((Path(folder) / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ratio of N ranks of one thread to one rank of N threads, of each round."""
    n, ratios, sides = arguments.threads, [], {"ranks": 0.0, "threads": 0.0}
    for i in range(arguments.rounds):
        order = ("ranks", "threads") if i % 2 else ("threads", "ranks")
        for side in order:
            found = measure(arguments, n, 1) if side == "ranks" else measure(arguments, 1, n)
            sides[side] = found[0]["tok_per_s"]
        ratios.append(sides["ranks"] / sides["threads"])
        print(f"{n} ranks: {sides['ranks']:.1f} tok/s, {n} threads: {sides['threads']:.1f}, ratio {ratios[-1]:.3f}")
    return {"ratios": ratios, "median": statistics.median(ratios)}


def memory(arguments: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """Peak of the largest rank, replicated and sharded, in a single step."""
    once = {"weight_cache": "none", "steps": 1, "warm": 0}
    peaks = {
        shard: max(rank["peak_bytes"] for rank in measure(arguments, ranks, 1, shard=shard, **once))
        for shard in ("none", "full")
    }
    share = peaks["full"] / peaks["none"]
    print(
        f"{ranks} ranks: {peaks['none'] >> 20} MB each replicated, {peaks['full'] >> 20} MB sharded, {share:.3f} of it"
    )
    return {**peaks, "share": share}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GGUF model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm", type=int, default=2, help="steps before them that are not measured")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--shard", default="none")
    parser.add_argument("--dtype", default="auto", help="auto, bf16 or f32: of every run (default: auto)")
    parser.add_argument("--weight-cache", default="auto")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--memory", type=int, nargs="*", default=[2, 4], metavar="RANKS", help="ranks to measure it on")
    parser.add_argument("--dir", help="where temporary folders are made")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    add_common_options(parser)
    arguments = parser.parse_args(argv)
    if arguments.rank_of:
        rank_main(arguments)
        return
    results: dict[str, Any] = {"speed": speed(arguments)} if arguments.rounds else {}
    results["memory"] = {ranks: memory(arguments, ranks) for ranks in arguments.memory}
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()
