"""What a run will take, from the header of its base, its data and its options; and two short measurements.

Shapes: T ctx, N tokens at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from llamakit.files import available_memory_bytes
from llamakit.formats.base import ModelFile
from llamakit.formats.open import size_on_disk
from llamakit.model import ModelConfig
from llamakit.model.device import can_prepack, dtype_name
from llamakit.model.layers import SLAB_WEIGHTS, QuantizedLinear, Scratch
from llamakit.quant import QTensor
from llamakit.training.config import FinetuneConfig
from llamakit.training.fit import CACHES, Choice, chosen
from llamakit.training.memory import Footprint, Kept, cache_sizes, kept_by, memory_of
from llamakit.training.outcome import resident_bytes
from llamakit.training.report import ChatFacts, DataFacts, Plan

# What a step does beside its products grows with n_embd, they with its square: at so many channels each takes as long
# (measured on models of 576 and 2,048 channels, which work at 47 to 60 and 81 to 84 % of the product rate).
_EVEN_EMBD = 450
_PROBE_TOKENS, _PROBED = 512, "blk.0.ffn_gate.weight"
# A file of tensors has a name and a place for each, besides their numbers.
_HEADER_BYTES = 4096
_WEIGHT, _MOMENTS = 4, 8


def measured_s(runs: int, work: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def efficiency(shape: ModelConfig) -> float:
    """Share of a step's time that its products take."""
    return shape.n_embd / (shape.n_embd + _EVEN_EMBD)


def step_operations(shape: ModelConfig, n_tokens: int, ctx: int, *, checkpointing: bool, full: bool) -> float:
    """Floating point operations of a step over n_tokens in sequences of ctx.

    Two for each weight and token forward, two back to the input, two to the weight where it is trained, and two more
    where the forward pass is computed again; causal attention is half of 4 T H D for each layer.
    """
    passes = (6 if full else 4) + (2 if checkpointing else 0)
    attention = 2 * ctx * shape.n_head * shape.head_dim * shape.n_layer
    return float(n_tokens * passes * (shape.n_matmul + attention))


def anchor_operations(shape: ModelConfig, n_tokens: int, ctx: int, *, checkpointing: bool) -> float:
    """Floating-point operations for n_tokens of an anchor: those of a step, and forward once more, without adapters."""
    forward = step_operations(shape, n_tokens, ctx, checkpointing=False, full=False) / 2
    return forward + step_operations(shape, n_tokens, ctx, checkpointing=checkpointing, full=False)


def _probed(base: ModelFile, device: torch.device) -> QuantizedLinear:
    """Zeros instead of some rows of a matrix of the base, in its type: their time is the same, and nothing is read."""
    info = base.tensors[_PROBED]
    rows = min(info.n_rows, max(1, SLAB_WEIGHTS // info.shape[-1]))
    packed = torch.zeros(rows, info.n_bytes // info.n_rows, dtype=torch.uint8, device=device)
    return QuantizedLinear(QTensor(packed, info.type, (rows, info.shape[-1])), scratch=Scratch())


def step_seconds(
    base: ModelFile, run: Footprint, config: FinetuneConfig, dtype: torch.dtype, device: torch.device
) -> float:
    """Predicted seconds of one iteration: its operations at the rate of a matrix of the base, measured now, and the
    decoding of weights that are not kept decoded."""
    layer, n_tokens = _probed(base, device), config.batch * config.ctx * config.grad_acc
    x: Tensor = torch.zeros(min(run.rows * config.ctx, _PROBE_TOKENS), layer.shape[1], dtype=dtype, device=device)
    n_weights = layer.shape[0] * layer.shape[1]
    decode = measured_s(2, lambda: layer.dense(dtype)) if layer.is_packed(dtype) else 0.0
    (layer.prepack if run.kept == "twice" else layer.keep_dense)(dtype)
    rate = 2 * len(x) * n_weights / max(measured_s(3, lambda: layer.product(x)), 1e-9)
    operations = step_operations(run.shape, n_tokens, run.ctx, checkpointing=run.checkpointing, full=run.full)
    if run.anchored:
        n_tokens = config.anchor_batch * config.ctx
        operations += anchor_operations(run.shape, n_tokens, run.ctx, checkpointing=run.checkpointing)
    seconds = operations / (rate * efficiency(run.shape))
    if run.kept == "none" and not run.full:
        passes = (3 if run.checkpointing else 2) * math.ceil(config.batch / run.rows) * config.grad_acc
        seconds += decode / n_weights * run.shape.n_matmul * passes
    return seconds


def disk_bytes(config: FinetuneConfig, trained: int, n_steps: int) -> dict[str, int]:
    """Bytes of the files that are there when the run is over, by kind; a -LATEST is another name of the newest."""
    saves = 1 if not config.save_every else max(1, -(-n_steps // config.save_every))
    files = min(saves, config.keep_last) if config.keep_last else saves
    found = {
        "checkpoints": files * (trained * (_WEIGHT + _MOMENTS) + _HEADER_BYTES) if config.checkpoint_out else 0,
        "adapters": files * (trained * _WEIGHT + _HEADER_BYTES // 2) if config.lora_out and not config.full else 0,
        "models": files * trained * (4 if config.outtype == "f32" else 2) if config.model_out and config.full else 0,
        "merged model": size_on_disk(config.model_base) if config.merge_out else 0,
    }
    return {name: size for name, size in found.items() if size}


def n_iterations(config: FinetuneConfig, rows_of_an_epoch: int) -> int:
    """Iterations of this run: --adam-iter, or fewer where --epochs are over before."""
    if config.epochs < 0:
        return config.adam_iter
    return min(config.adam_iter, -(-config.epochs * rows_of_an_epoch // (config.batch * config.grad_acc)))


def footprint(
    config: FinetuneConfig,
    shape: ModelConfig,
    base: ModelFile,
    *,
    trained: int,
    dtype: torch.dtype,
    device: torch.device,
    held_out: int,
    full: bool = False,
    n_shares: int = 1,
) -> Footprint:
    """What of a run decides over its memory. trained: numbers; held_out: tokens to evaluate."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory_bytes()
    sizes = cache_sizes(shape, base.tensors, dtype.itemsize)
    weight_cache = config.weight_cache if n_shares == 1 else "none"
    kept: Kept = kept_by(weight_cache, sizes, free, twice=can_prepack(device, dtype))
    return Footprint(
        shape=shape,
        tensors=base.tensors,
        trained=trained,
        full=full,
        rows=config.micro_rows,
        ctx=config.ctx,
        checkpointing=config.use_checkpointing,
        kept=kept,
        item=dtype.itemsize,
        held_out=held_out,
        native=device.type == "cpu",
        n_shares=n_shares,
        anchored=bool(config.anchor_data),
    )


def make_plan(
    config: FinetuneConfig,
    base: ModelFile,
    run: Footprint,
    facts: DataFacts | ChatFacts,
    *,
    dtype: torch.dtype,
    device: torch.device,
    n_ranks: int = 1,
) -> tuple[FinetuneConfig, Plan]:
    """The options of a run that is about to load its base, within --max-memory, and what it will take.

    n_ranks: that train together, config.batch being this one's share of the sequences.
    Raises UsageError where nothing fits into --max-memory.
    """
    interpreter = resident_bytes() if device.type == "cpu" else 0
    choice = Choice(config, run)
    if config.max_memory:
        choice = chosen(config, run, interpreter, twice=can_prepack(device, dtype))
    config, run = choice.config, choice.run
    rows, share = _rows_and_share(facts)
    n_steps = n_iterations(config, -(-rows // n_ranks))
    memory = memory_of(run, interpreter)
    plan = Plan(
        device=device.type,
        dtype=dtype_name(dtype),
        threads=torch.get_num_threads(),
        weights_kept_dense=run.kept != "none",
        memory_bytes=memory.total,
        step_s=step_seconds(base, run, config, dtype, device),
        n_steps=n_steps,
        memory=memory.parts(),
        trained_parameters=run.trained,
        n_tokens=n_steps * n_ranks * config.batch * config.grad_acc * config.ctx,
        trained_share=share,
        disk=disk_bytes(config, run.trained, n_steps),
        options=_told(config, run),
        chosen=choice.why,
    )
    return config, plan


def held_out_tokens(facts: DataFacts | ChatFacts, ctx: int) -> int:
    """Tokens that an evaluation takes at most, padding included."""
    return facts.n_held_out * ctx if isinstance(facts, ChatFacts) else facts.n_validation_tokens


def _rows_and_share(facts: DataFacts | ChatFacts) -> tuple[int, float]:
    """Rows of an epoch, and which share of the tokens has a loss."""
    if isinstance(facts, ChatFacts):
        return facts.n_rows, facts.n_trained / max(1, facts.n_tokens)
    return facts.n_samples, 1.0


def _told(config: FinetuneConfig, run: Footprint) -> Mapping[str, object]:
    told: dict[str, object] = {
        "--batch": config.batch,
        "--grad-acc": config.grad_acc,
        "--micro-batch": run.rows,
        "--ctx": config.ctx,
        "--use-checkpointing": run.checkpointing,
    }
    return told if run.full else told | {"--weight-cache": CACHES[run.kept]}
