"""`llamakit train` beside llama2.c's train.py: tokens per second, measured in turn in one run, and the loss curves.

    python benchmarks/train.py --llama2c CHECKOUT --case 288x32000 --json result.json

Both train the same model from the same initial weights on the same batches, with AdamW, clipping at 1 and the same
learning rate, in bf16 or --dtype, with the same threads. Theirs is model.py of a checkout of llama2.c, under autocast,
compiled by torch.compile unless --eager; what its compiler takes before the first step is printed, and counts in no
ratio. Ours is the loop of `llamakit train`. Each is a child process that works only when asked; the order changes from
round to round.
The text is a random walk over the vocabulary: every token has eight successors, so there is something to learn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import Worker, add_common_options, gemm_rate, load, peak_rss_bytes, serve, write_json

SEED, LEARNING_RATE, BETAS, DECAY = 7, 5e-4, (0.9, 0.95), 0.1
_THEIRS = {
    "token_embd": "tok_embeddings", "output_norm": "norm", "attn_q": "attention.wq", "attn_k": "attention.wk",
    "attn_v": "attention.wv", "attn_output": "attention.wo", "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3", "attn_norm": "attention_norm", "ffn_norm": "ffn_norm",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model of llama2.c's shapes and its batch; steps: of each side in a round."""

    embd: int
    layer: int
    head: int
    vocab: int
    batch: int
    ctx: int
    steps: int


CASES = {
    "288x32000": Case(288, 6, 6, 32000, 8, 256, steps=4),
    "288x512": Case(288, 6, 6, 512, 32, 256, steps=2),
    "tiny": Case(32, 2, 4, 64, 2, 16, steps=2),
}


@dataclass(frozen=True)
class Job:
    """What both children are told."""

    case: str
    threads: int
    llama2c: str
    compile: bool
    dtype: str


def batches(case: Case) -> Callable[[int], Any]:
    """step -> (inputs, targets), int64 (batch, ctx) each."""
    import numpy as np

    rng = np.random.default_rng(SEED)
    successors = rng.integers(0, case.vocab, (case.vocab, 8))

    def batch(step: int) -> Any:
        rng = np.random.default_rng([SEED, step])
        rows = np.empty((case.batch, case.ctx + 1), np.int64)
        rows[:, 0] = rng.integers(0, case.vocab, case.batch)
        choices = rng.integers(0, 8, (case.batch, case.ctx))
        for t in range(case.ctx):
            rows[:, t + 1] = successors[rows[:, t], choices[:, t]]
        return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])

    return batch


def blueprint(case: Case) -> Any:
    """The model of a case, with its initial weights."""
    from llamakit.training.blueprint import from_scratch
    from llamakit.training.train_config import TrainConfig

    config = TrainConfig(embd=case.embd, layer=case.layer, head=case.head, ctx=case.ctx)
    return from_scratch(config, {}, case.vocab, SEED)


def our_step(job: Job) -> Callable[[int], float]:
    """step -> loss, with the parts that `llamakit train` is made of."""
    import ctypes

    import torch

    from llamakit.training.blueprint import build
    from llamakit.training.config import LoopOptions
    from llamakit.training.loop import Parameters
    from llamakit.training.loss import Rows, backpropagate
    from llamakit.training.optim import clip_gradient

    libc = ctypes.CDLL(None)  # as the command line does: freed memory is kept
    libc.mallopt(-1, 2**31 - 1)
    libc.mallopt(-3, 2**30)
    case = CASES[job.case]
    dtype = torch.bfloat16 if job.dtype == "bf16" else torch.float32
    model, named = build(blueprint(case), torch.device("cpu"), dtype)
    config = LoopOptions(adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_decay=DECAY)
    optimizer, batch = Parameters(named, config).optimizer, batches(case)
    model.train()

    def step(number: int) -> float:
        inputs, targets = (torch.from_numpy(x) for x in batch(number))
        loss = backpropagate(model, Rows(inputs, targets), 1 / inputs.numel())
        clip_gradient(optimizer.gradient, 1.0)
        optimizer.step(LEARNING_RATE)
        optimizer.gradient.zero_()
        return loss / inputs.numel()

    return step


def their_step(job: Job) -> Callable[[int], float]:
    """step -> loss, as train.py takes one."""
    import torch

    sys.path.insert(0, job.llama2c)
    from model import ModelArgs, Transformer  # pyright: ignore[reportMissingImports]

    case = CASES[job.case]
    shape = {"dim": case.embd, "n_layers": case.layer, "n_heads": case.head, "n_kv_heads": case.head}
    plain = Transformer(ModelArgs(vocab_size=case.vocab, multiple_of=32, max_seq_len=case.ctx, **shape))
    start = blueprint(case)
    state = {}
    for name in start.names:
        parts = name.split(".")
        theirs = f"layers.{parts[1]}.{_THEIRS[parts[2]]}" if parts[0] == "blk" else _THEIRS[parts[0]]
        state[f"{theirs}.weight"] = start.first(name)
    plain.load_state_dict(state | {"output.weight": state["tok_embeddings.weight"]}, strict=False)
    optimizer = plain.configure_optimizers(DECAY, LEARNING_RATE, BETAS, "cpu")
    model, batch = torch.compile(plain) if job.compile else plain, batches(case)

    def step(number: int) -> float:
        inputs, targets = (torch.from_numpy(x) for x in batch(number))
        with torch.autocast("cpu", torch.bfloat16, enabled=job.dtype == "bf16"):
            model(inputs, targets)
            loss = plain.last_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def child(side: str, job: Job) -> None:
    """Answer requests for steps: their seconds and losses."""
    import torch

    torch.set_num_threads(job.threads)
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # model.py tells what it does; stdout is for answers
        take = our_step(job) if side == "ours" else their_step(job)

    def answer(request: dict[str, Any]) -> Any:
        if "gemm" in request:
            return gemm_rate()
        seconds, losses = [], []
        for number in range(request["first"], request["first"] + request["steps"]):
            start = time.perf_counter()
            losses.append(take(number))
            seconds.append(time.perf_counter() - start)
        alive = time.perf_counter() - started
        return {"seconds": seconds, "losses": losses, "peak": peak_rss_bytes(), "alive_s": alive}

    serve(answer)


def flop_per_token(case: Case) -> float:
    """6 for each weight of a product, and attention's: 6 T C per layer and token, causal."""
    n_ff = 32 * -(-int(8 * case.embd / 3) // 32)
    weights = case.layer * (4 * case.embd**2 + 3 * case.embd * n_ff) + case.vocab * case.embd
    return 6 * weights + 6 * case.ctx * case.embd * case.layer


def compare(job: Job, rounds: int, curve: int) -> dict[str, Any]:
    """Both sides in turn; the medians, their ratio, and how far the losses are apart."""
    case = CASES[job.case]
    workers = {
        side: Worker([__file__, "--child", side, "--job", json.dumps(asdict(job))], job.threads)
        for side in ("ours", "theirs")
    }
    done = dict.fromkeys(workers, 0)
    losses: dict[str, list[float]] = {side: [] for side in workers}

    def take(side: str, steps: int) -> dict[str, Any]:
        found = workers[side].ask({"first": done[side], "steps": steps})
        done[side] += steps
        losses[side] += found["losses"]
        return found

    first = {side: take(side, 1) for side in workers}
    for side in workers:
        take(side, 2)  # warm
    rates: dict[str, list[float]] = {side: [] for side in workers}
    peaks = dict.fromkeys(workers, 0)
    for number in range(rounds):
        for side in sorted(workers, reverse=number % 2 == 1):
            found = take(side, case.steps)
            rates[side].append(case.batch * case.ctx / statistics.median(found["seconds"]))
            peaks[side] = found["peak"]
    for side in workers:
        if curve > done[side]:
            take(side, curve - done[side])
    gemm = workers["ours"].ask({"gemm": True})
    for worker in workers.values():
        worker.close()
    apart = [abs(a - b) for a, b in zip(losses["ours"], losses["theirs"], strict=False)]
    medians = {side: statistics.median(rates[side]) for side in workers}
    return {
        "case": job.case,
        "compiled": job.compile,
        "dtype": job.dtype,
        "tok_per_s": medians,
        "ratio": statistics.median(a / b for a, b in zip(rates["ours"], rates["theirs"], strict=True)),
        "share_of_gemm": medians["ours"] * flop_per_token(case) / gemm,
        "first_step_s": {side: found["alive_s"] for side, found in first.items()},
        "peak_mb": {side: peak / 1e6 for side, peak in peaks.items()},
        "steps": min(done.values()),
        "loss": {side: [round(x, 4) for x in losses[side][:: max(1, len(losses[side]) // 8)]] for side in workers},
        "largest_difference": max(apart),
        "mean_difference": statistics.mean(apart),
        "load": load(),
    }


def show(found: dict[str, Any]) -> None:
    """One case in some lines."""
    rates, first = found["tok_per_s"], found["first_step_s"]
    how = "compiled" if found["compiled"] else "eager"
    share = 100 * found["share_of_gemm"]
    print(f"{found['case']}, {found['dtype']}: ours {rates['ours']:.0f} tok/s, llama2.c ({how}) {rates['theirs']:.0f}")
    print(f"  {found['ratio']:.2f} times; {share:.0f} % of the rate of a product; load {found['load']}")
    print(f"  from start to the end of the first step: ours {first['ours']:.1f} s, llama2.c {first['theirs']:.1f} s")
    print(f"  peak memory: ours {found['peak_mb']['ours']:.0f} MB, llama2.c {found['peak_mb']['theirs']:.0f} MB")
    print(f"  losses over {found['steps']} steps: {found['mean_difference']:.4f} apart on average,"
          f" {found['largest_difference']:.4f} at most")  # fmt: skip
    for side, losses in found["loss"].items():
        print(f"    {side:6s} {losses}")


def main() -> None:
    """Parse, run, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama2c", metavar="PATH", help="a checkout of llama2.c, for its model.py")
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="default: both of 288")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--curve", type=int, default=0, metavar="N", help="compare the losses of N steps")
    parser.add_argument("--eager", action="store_true", help="llama2.c without torch.compile")
    parser.add_argument("--dtype", choices=("bf16", "f32"), default="bf16", help="of both sides; default: bf16")
    parser.add_argument("--child", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    add_common_options(parser)
    options = parser.parse_args()
    if options.child:
        child(options.child, Job(**json.loads(options.job)))
        return
    if not options.llama2c or not (Path(options.llama2c) / "model.py").is_file():
        parser.error("--llama2c PATH: a checkout of llama2.c is needed, the folder with model.py in it")
    results = []
    for case in options.case or ("288x32000", "288x512"):
        job = Job(case, options.threads, options.llama2c, not options.eager, options.dtype)
        results.append(compare(job, options.rounds, options.curve))
        show(results[-1])
    write_json(options.json, results)


if __name__ == "__main__":
    main()
