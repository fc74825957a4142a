"""`llamakit finetune` on questions and answers beside TRL's SFTTrainer with PEFT: tokens per second and peak memory.

    python benchmarks/instruct.py --case smollm2-4x512 --json result.json

Both train a LoRA (rank 8, alpha 8, on the seven matrices of each block) on data/llamakit-instruct.jsonl, rendered by
the model's own chat template, with the loss on all tokens, AdamW, clipping at 1, as many threads, the same precision,
and without checkpointing unless --use-checkpointing. Ours packs samples into rows on the GGUF, and computes all rows
of a step at once, or as many as --micro-batch says: the same losses and steps, and less memory; TRL gets what
`llamakit convert` makes of it, and trains in three ways: packed into as many rows of the same length, padded with as
many samples, and padded with as many samples as our rows hold. One round finds the fastest, and that one alternates
with ours. Tokens are those that go through the model, padding not counted; peak memory is that of the whole process,
from its start. Each side is a child process that works only when asked. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue
from typing import Any

from common import ROOT, Worker, add_common_options, environment, load, peak_rss_bytes, serve, write_json
from finetune import SEED, model_path
from models import add_place_options, workplace

DATA = ROOT / "data" / "llamakit-instruct.jsonl"
LEARNING_RATE = 2e-4
_MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """What is measured: rows of so many places; steps: of each side in a round."""

    model: str
    batch: int
    ctx: int
    rank: int
    steps: int


CASES = {
    "smollm2-4x512": Case("smollm2", 4, 512, 8, steps=2),
    "smollm2-2x256": Case("smollm2", 2, 256, 8, steps=2),
    "tiny": Case("tiny-q8_0", 2, 256, 4, steps=2),
}


@dataclass(frozen=True)
class Job:
    """What a child is told. batch: rows of a step."""

    model: str
    hf: str
    batch: int
    ctx: int
    rank: int
    threads: int
    dtype: str
    use_checkpointing: bool
    micro_batch: int
    packing: bool = True


@dataclass(frozen=True)
class Step:
    """tokens: that went through the model, without padding; samples: None where the side does not tell."""

    loss: float
    tokens: int
    samples: int | None = None


# ---- the children ------------------------------------------------------------------------------------------------


def our_steps(job: Job) -> Iterator[Step]:
    """Steps of `llamakit finetune --train-on all`."""
    from llamakit.training.config import FinetuneConfig
    from llamakit.training.finetune import finetune
    from llamakit.training.report import StepReport

    config = FinetuneConfig(
        model_base=job.model,
        train_data=str(DATA),
        train_on="all",
        checkpoint_in="",
        checkpoint_out="",
        lora_out=str(Path(job.hf).parent / "bench-lora-ITERATION.gguf"),
        save_every=0,
        val_split=0.0,
        adam_iter=1_000_000,
        adam_alpha=LEARNING_RATE,
        adam_decay=0.0,
        warmup=0,
        cos_decay_min=1.0,
        batch=job.batch,
        micro_batch=job.micro_batch,
        ctx=job.ctx,
        seed=SEED,
        lora_r=job.rank,
        use_checkpointing=job.use_checkpointing,
        device="cpu",
        dtype=job.dtype,  # pyright: ignore[reportArgumentType]
        threads=job.threads,
    )
    tokens, sample = 0, 1
    for report in finetune(config):
        if isinstance(report, StepReport):
            # An epoch's first step has the last one's samples behind it, and begins at 1 again.
            yield Step(report.loss, report.n_tokens - tokens, max(0, report.sample - sample) or None)
            tokens, sample = report.n_tokens, report.sample


def trl_steps(job: Job) -> Iterator[Step]:
    """Steps of SFTTrainer, which has a thread of its own and waits in it until the next one is asked for."""
    asked, done = Queue[None](), Queue[Step | BaseException]()

    def work() -> None:
        try:
            asked.get()
            _trl_trainer(job, asked, done).train()
        except BaseException as error:
            done.put(error)

    threading.Thread(target=work, daemon=True).start()
    while True:
        asked.put(None)
        step = done.get()
        if isinstance(step, BaseException):
            raise step
        yield step


def _trl_trainer(job: Job, asked: Queue[None], done: Queue[Step | BaseException]) -> Any:
    import torch
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(job.threads)  # OpenMP has a number for each thread
    bf16 = job.dtype == "bf16"
    config = SFTConfig(
        output_dir=str(Path(job.hf).parent / "trl"),
        per_device_train_batch_size=job.batch,
        max_steps=1_000_000,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        max_length=job.ctx,
        packing=job.packing,
        bf16=bf16,
        use_cpu=True,
        gradient_checkpointing=job.use_checkpointing,
        seed=SEED,
        logging_steps=1,
        logging_first_step=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    tokens = 0

    class Paced(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            nonlocal tokens
            if logs and "loss" in logs:
                done.put(Step(float(logs["loss"]), int(logs["num_tokens"]) - tokens))
                tokens = int(logs["num_tokens"])
                asked.get()

    rows = [{"messages": json.loads(line)["messages"]} for line in DATA.read_text().splitlines()]
    dtype = torch.bfloat16 if bf16 else torch.float32
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.hf, dtype=dtype, attn_implementation="sdpa"),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job.hf),
        peft_config=LoraConfig(r=job.rank, lora_alpha=job.rank, target_modules=_MATRICES, lora_dropout=0.0),
        callbacks=[Paced()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def worker(role: str, job: Job) -> None:
    """A child: takes steps when asked."""
    import torch

    torch.set_num_threads(job.threads)
    if role == "ours":
        from llamakit.cli.options import keep_freed_memory

        keep_freed_memory()  # as the command does
    steps = (our_steps if role == "ours" else trl_steps)(job)

    def answer(request: dict[str, Any]) -> Any:
        begin, cpu_begin = time.perf_counter(), time.process_time()
        taken = [asdict(next(steps)) for _ in range(request["n"])]
        seconds, cpu_s = time.perf_counter() - begin, time.process_time() - cpu_begin
        return {"seconds": seconds, "cpu_s": cpu_s, "steps": taken, "peak_bytes": peak_rss_bytes()}

    serve(answer)


# ---- the parent --------------------------------------------------------------------------------------------------


def convert(model: Path, directory: Path, threads: int) -> Path:
    """The Hugging Face folder of a GGUF, in bf16, made by `llamakit convert`."""
    folder = directory / f"{model.stem}-hf"
    if not folder.exists():
        command = [sys.executable, "-m", "llamakit", "convert", str(model), "-o", str(folder)]
        subprocess.run(
            [*command, "--outtype", "bf16", "--no-verify"],
            check=True, env=environment(threads), stdout=subprocess.DEVNULL,
        )  # fmt: skip
    return folder


def rate(taken: dict[str, Any], key: str = "seconds") -> float:
    """Tokens per second of a turn, or per second of the processor's time (cpu_s)."""
    return sum(step["tokens"] for step in taken["steps"]) / taken[key]


def start(role: str, job: Job) -> Worker:
    quiet = {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}
    arguments = [__file__, "--worker", role, json.dumps(asdict(job))]
    return Worker(arguments, job.threads, env=environment(job.threads) | quiet)


def measure(name: str, case: Case, directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one case; returns its figures."""
    model = model_path(case.model, directory)
    hf = convert(model, directory, arguments.threads)
    job = Job(
        str(model), str(hf), case.batch, case.ctx, case.rank, arguments.threads, arguments.dtype,
        arguments.use_checkpointing, arguments.micro_batch,
    )  # fmt: skip
    ours = start("ours", job)
    warm = ours.ask({"n": 3})
    samples = [step["samples"] for step in warm["steps"] if step["samples"]]
    ways, tried = _ways(job, max(case.batch, round(statistics.mean(samples)))), {}
    for way, its_job in ways.items():
        peer = start("trl", its_job)
        first = peer.ask({"n": 1})
        tried[way] = {"tok_per_s": rate(peer.ask({"n": case.steps})), "first_loss": first["steps"][0]["loss"]}
        peer.close()
    best = max(tried, key=lambda way: tried[way]["tok_per_s"])
    peer = start("trl", ways[best])
    losses = {"ours": [step["loss"] for step in warm["steps"]], "trl": []}
    losses["trl"] += [step["loss"] for step in peer.ask({"n": 1})["steps"]]
    rates: dict[str, list[float]] = {"ours": [], "trl": []}
    cpu_rates: dict[str, list[float]] = {"ours": [], "trl": []}
    taken: dict[str, Any] = {}
    for number in range(arguments.rounds):
        for side, child in sorted({"ours": ours, "trl": peer}.items(), reverse=number % 2 == 1):
            taken[side] = child.ask({"n": case.steps})
            rates[side].append(rate(taken[side]))
            cpu_rates[side].append(rate(taken[side], "cpu_s"))
            losses[side] += [step["loss"] for step in taken[side]["steps"]]
    for child in (ours, peer):
        child.close()
    ratios = [a / b for a, b in zip(rates["ours"], rates["trl"], strict=True)]
    cpu_ratios = [a / b for a, b in zip(cpu_rates["ours"], cpu_rates["trl"], strict=True)]
    return {
        "case": name,
        "dtype": arguments.dtype,
        "checkpointing": arguments.use_checkpointing,
        "trl": {"way": best, "tried": tried},
        "tok_per_s": {side: statistics.median(values) for side, values in rates.items()},
        "tokens_a_step": {
            side: statistics.mean(step["tokens"] for step in found["steps"]) for side, found in taken.items()
        },
        "tok_per_cpu_s": {side: statistics.median(values) for side, values in cpu_rates.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "cpu_ratio": statistics.median(cpu_ratios),
        "peak_bytes": {side: found["peak_bytes"] for side, found in taken.items()},
        "losses": losses,
        "load": load(),
    }


def _ways(job: Job, samples: int) -> dict[str, Job]:
    """In which ways TRL trains; samples: that our rows of a step hold."""
    told = vars(job)
    return {
        "packed": job,
        f"padded, {job.batch} samples": Job(**told | {"packing": False}),
        f"padded, {samples} samples": Job(**told | {"packing": False, "batch": samples}),
    }


def show(found: dict[str, Any]) -> None:
    """One case in some lines."""
    speed, peak, losses, ratios = found["tok_per_s"], found["peak_bytes"], found["losses"], found["ratios"]
    checkpointing = "with" if found["checkpointing"] else "without"
    print(f"\n{found['case']}: {found['dtype']}, {checkpointing} checkpointing; TRL is fastest {found['trl']['way']}")
    for way, tried in found["trl"]["tried"].items():
        print(f"  TRL {way}: {tried['tok_per_s']:.1f} tokens/s, first loss {tried['first_loss']:.4f}")
    print(
        f"  tokens/s   ours {speed['ours']:8.1f}   TRL {speed['trl']:8.1f}"
        f"   ratio {found['ratio']:.2f} (rounds {min(ratios):.2f} to {max(ratios):.2f})"
    )
    cpu = found["tok_per_cpu_s"]
    print(f"  of CPU s   ours {cpu['ours']:8.1f}   TRL {cpu['trl']:8.1f}   ratio {found['cpu_ratio']:.2f}")
    print(
        f"  peak RSS   ours {peak['ours'] / 1e9:8.2f}   TRL {peak['trl'] / 1e9:8.2f} GB"
        f"   ratio {peak['ours'] / peak['trl']:.2f}"
    )
    tokens = found["tokens_a_step"]
    print(f"  a step     ours {tokens['ours']:8.0f}   TRL {tokens['trl']:8.0f} tokens")
    for side in ("ours", "trl"):
        print(
            f"  loss       {side:4s} {losses[side][0]:.4f} at first, {losses[side][-1]:.4f} after {len(losses[side])}"
        )
    print(f"  load average {found['load']}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare `llamakit finetune` on questions and answers with TRL.")
    parser.add_argument("--case", choices=CASES, action="append", help="repeatable (default: smollm2-4x512)")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of both sides (default: 4)")
    parser.add_argument("--dtype", choices=("auto", "bf16", "f32"), default="auto",
                        help="of both sides; auto: bf16 where the processor multiplies it (default: auto)")  # fmt: skip
    parser.add_argument("--micro-batch", type=int, default=0, help="rows that ours computes at a time (default: all)")
    parser.add_argument("--use-checkpointing", action="store_true", help="both compute activations twice")
    add_place_options(parser)
    add_common_options(parser)
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], Job(**json.loads(sys.argv[3])))
        return
    arguments = parse()
    if arguments.dtype == "auto":
        import torch

        from llamakit.model.device import dtype_name, training_dtype

        arguments.dtype = dtype_name(training_dtype("auto", torch.device("cpu")))
    results = []
    with workplace(arguments.dir, arguments.keep) as directory:
        for name in arguments.case or ["smollm2-4x512"]:
            results.append(measure(name, CASES[name], directory, arguments))
            show(results[-1])
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()
