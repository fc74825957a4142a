"""`llamakit finetune`: the options of llama.cpp's finetune, and what came after it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llamakit import hub
from llamakit.cli import options, render
from llamakit.cli.sources import local
from llamakit.errors import EXIT_INTERRUPTED, EXIT_TERMINATED
from llamakit.training.config import FinetuneConfig

if TYPE_CHECKING:
    from llamakit.training.loop import Control

_D = FinetuneConfig()
_NOT_CONFIG = ("config", "n_gpu_layers", "offline", "json", "report_to", "report_dir")


def finetune(
    model_base: Annotated[
        str,
        typer.Option(
            "--model-base",
            help="GGUF model whose frozen weights the adapter is trained on: a path, hf:user/repo[:QUANT] or a URL.",
            rich_help_panel=options.FILES,
        ),
    ] = _D.model_base,
    train_data: Annotated[
        str, typer.Option("--train-data", help="UTF-8 text to train on.", rich_help_panel=options.FILES)
    ] = _D.train_data,
    checkpoint_in: Annotated[
        str,
        typer.Option(
            "--checkpoint-in",
            help="Checkpoint to go on from; a fresh start where it does not exist.",
            rich_help_panel=options.FILES,
        ),
    ] = _D.checkpoint_in,
    checkpoint_out: Annotated[
        str,
        typer.Option(
            "--checkpoint-out",
            help="Name of the checkpoints; empty: none is written.",
            rich_help_panel=options.FILES,
        ),
    ] = _D.checkpoint_out,
    lora_out: Annotated[
        str,
        typer.Option("--lora-out", help="Name of the adapters; empty: none is written.", rich_help_panel=options.FILES),
    ] = _D.lora_out,
    only_write_lora: Annotated[
        bool,
        typer.Option(
            "--only-write-lora",
            help="Write the adapter of --checkpoint-in and end.",
            rich_help_panel=options.FILES,
        ),
    ] = _D.only_write_lora,
    pattern_fn_it: Annotated[
        str,
        typer.Option(
            "--pattern-fn-it",
            help="What stands for the iteration in file names.",
            rich_help_panel=options.FILES,
        ),
    ] = _D.pattern_fn_it,
    fn_latest: Annotated[
        str,
        typer.Option(
            "--fn-latest",
            help="What replaces it in the name of the newest file.",
            rich_help_panel=options.FILES,
        ),
    ] = _D.fn_latest,
    save_every: Annotated[
        int,
        typer.Option(
            "--save-every", help="Save every N iterations; 0: only at the end.", rich_help_panel=options.FILES
        ),
    ] = _D.save_every,
    keep_last: Annotated[
        int,
        typer.Option(
            "--keep-last",
            help="Keep only the N newest numbered checkpoints and adapters; 0: all.",
            rich_help_panel=options.FILES,
        ),
    ] = _D.keep_last,
    log_file: Annotated[
        str,
        typer.Option("--log-file", help="JSONL file with one object per step.", rich_help_panel=options.FILES),
    ] = _D.log_file,
    report_to: Annotated[
        Literal["none", "tensorboard"],
        typer.Option(
            "--report-to", help="Write losses, learning rate and speed for TensorBoard.", rich_help_panel=options.FILES
        ),
    ] = "none",
    report_dir: Annotated[
        str,
        typer.Option(
            "--report-dir",
            help="Folder of its events.",
            show_default="tensorboard, beside --log-file",
            rich_help_panel=options.FILES,
        ),
    ] = "",
    adam_iter: Annotated[
        int, typer.Option("--adam-iter", help="Iterations of this run.", rich_help_panel=options.TRAINING)
    ] = _D.adam_iter,
    epochs: Annotated[
        int,
        typer.Option(
            "--epochs",
            help="Stop after N passes over the samples in this run; -1: no limit.",
            rich_help_panel=options.TRAINING,
        ),
    ] = _D.epochs,
    batch: Annotated[
        int, typer.Option("-b", "--batch", help="Sequences per micro-step.", rich_help_panel=options.TRAINING)
    ] = _D.batch,
    ctx: Annotated[
        int, typer.Option("-c", "--ctx", help="Tokens per sequence.", rich_help_panel=options.TRAINING)
    ] = _D.ctx,
    grad_acc: Annotated[
        int, typer.Option("--grad-acc", help="Micro-steps per iteration.", rich_help_panel=options.TRAINING)
    ] = _D.grad_acc,
    seed: Annotated[
        int,
        typer.Option(
            "-s",
            "--seed",
            help="Seed of the sample order and the adapter's start; -1: from the clock.",
            rich_help_panel=options.TRAINING,
        ),
    ] = _D.seed,
    use_checkpointing: Annotated[
        bool,
        typer.Option(
            "--use-checkpointing/--no-checkpointing",
            help="Recompute activations in the backward pass instead of keeping them.",
            rich_help_panel=options.TRAINING,
        ),
    ] = _D.use_checkpointing,
    warmup: Annotated[
        int,
        typer.Option(
            "--warmup",
            help="Iterations over which the learning rate rises.",
            rich_help_panel=options.TRAINING,
        ),
    ] = _D.warmup,
    cos_decay_steps: Annotated[
        int,
        typer.Option(
            "--cos-decay-steps",
            help="Iterations of the cosine decay after the warmup.",
            rich_help_panel=options.TRAINING,
        ),
    ] = _D.cos_decay_steps,
    cos_decay_restart: Annotated[
        float,
        typer.Option(
            "--cos-decay-restart",
            help="Each restarted period is this many times as long as the one before.",
            rich_help_panel=options.TRAINING,
        ),
    ] = _D.cos_decay_restart,
    cos_decay_min: Annotated[
        float,
        typer.Option(
            "--cos-decay-min",
            help="The cosine decay ends at this share of the learning rate.",
            rich_help_panel=options.TRAINING,
        ),
    ] = _D.cos_decay_min,
    enable_restart: Annotated[
        bool,
        typer.Option(
            "--enable-restart/--disable-restart",
            help="Start the cosine decay again when it is over.",
            rich_help_panel=options.TRAINING,
        ),
    ] = _D.enable_restart,
    adam_alpha: Annotated[
        float, typer.Option("--adam-alpha", help="Learning rate.", rich_help_panel=options.TRAINING)
    ] = _D.adam_alpha,
    adam_min_alpha: Annotated[
        float,
        typer.Option(
            "--adam-min-alpha", help="Least learning rate, warmup included.", rich_help_panel=options.TRAINING
        ),
    ] = _D.adam_min_alpha,
    adam_decay: Annotated[
        float,
        typer.Option("--adam-decay", help="AdamW's weight decay; 0: plain Adam.", rich_help_panel=options.TRAINING),
    ] = _D.adam_decay,
    adam_decay_min_ndim: Annotated[
        int,
        typer.Option(
            "--adam-decay-min-ndim",
            help="Weight decay applies to tensors of at least N dimensions.",
            rich_help_panel=options.TRAINING,
        ),
    ] = _D.adam_decay_min_ndim,
    adam_beta1: Annotated[
        float,
        typer.Option("--adam-beta1", help="Decay of the first moment.", rich_help_panel=options.TRAINING),
    ] = _D.adam_beta1,
    adam_beta2: Annotated[
        float,
        typer.Option("--adam-beta2", help="Decay of the second moment.", rich_help_panel=options.TRAINING),
    ] = _D.adam_beta2,
    adam_gclip: Annotated[
        float,
        typer.Option(
            "--adam-gclip",
            help="Largest norm of the whole gradient; 0: no clipping.",
            rich_help_panel=options.TRAINING,
        ),
    ] = _D.adam_gclip,
    adam_epsf: Annotated[
        float,
        typer.Option(
            "--adam-epsf",
            help="Stop when the loss changes by less than this share from one iteration to the next; 0: never.",
            rich_help_panel=options.TRAINING,
        ),
    ] = _D.adam_epsf,
    opt_past: Annotated[
        int,
        typer.Option(
            "--opt-past",
            help="Compare the loss with that of N iterations ago, and stop when it hardly changed; 0: never.",
            rich_help_panel=options.TRAINING,
        ),
    ] = _D.opt_past,
    opt_delta: Annotated[
        float,
        typer.Option("--opt-delta", help="What counts as hardly changed, relative.", rich_help_panel=options.TRAINING),
    ] = _D.opt_delta,
    opt_max_no_improvement: Annotated[
        int,
        typer.Option(
            "--opt-max-no-improvement",
            help="Stop after N iterations in a row without a new best loss; 0: never.",
            rich_help_panel=options.TRAINING,
        ),
    ] = _D.opt_max_no_improvement,
    lora_r: Annotated[
        int, typer.Option("--lora-r", help="Rank of the adapter's matrices.", rich_help_panel=options.LORA)
    ] = _D.lora_r,
    lora_alpha: Annotated[
        float | None,
        typer.Option(
            "--lora-alpha",
            help="Scale of the adapter is alpha / rank; the default is --lora-r.",
            rich_help_panel=options.LORA,
        ),
    ] = _D.lora_alpha,
    lora_dropout: Annotated[
        float,
        typer.Option(
            "--lora-dropout",
            help="Share of the adapter's inputs dropped at random in training.",
            rich_help_panel=options.LORA,
        ),
    ] = _D.lora_dropout,
    rank_wq: Annotated[
        int | None,
        typer.Option("--rank-wq", help="Rank for attn_q (default: --lora-r).", rich_help_panel=options.LORA),
    ] = _D.rank_wq,
    rank_wk: Annotated[
        int | None,
        typer.Option("--rank-wk", help="Rank for attn_k (default: --lora-r).", rich_help_panel=options.LORA),
    ] = _D.rank_wk,
    rank_wv: Annotated[
        int | None,
        typer.Option("--rank-wv", help="Rank for attn_v (default: --lora-r).", rich_help_panel=options.LORA),
    ] = _D.rank_wv,
    rank_wo: Annotated[
        int | None,
        typer.Option("--rank-wo", help="Rank for attn_output (default: --lora-r).", rich_help_panel=options.LORA),
    ] = _D.rank_wo,
    rank_ffn_gate: Annotated[
        int | None,
        typer.Option("--rank-ffn-gate", help="Rank for ffn_gate (default: --lora-r).", rich_help_panel=options.LORA),
    ] = _D.rank_ffn_gate,
    rank_ffn_up: Annotated[
        int | None,
        typer.Option("--rank-ffn-up", help="Rank for ffn_up (default: --lora-r).", rich_help_panel=options.LORA),
    ] = _D.rank_ffn_up,
    rank_ffn_down: Annotated[
        int | None,
        typer.Option("--rank-ffn-down", help="Rank for ffn_down (default: --lora-r).", rich_help_panel=options.LORA),
    ] = _D.rank_ffn_down,
    rank_tok_embd: Annotated[
        int | None,
        typer.Option(
            "--rank-tok-embd",
            help="Rank for the token embeddings (default: not trained).",
            rich_help_panel=options.LORA,
        ),
    ] = _D.rank_tok_embd,
    rank_out: Annotated[
        int | None,
        typer.Option(
            "--rank-out",
            help="Rank for the output matrix (default: not trained).",
            rich_help_panel=options.LORA,
        ),
    ] = _D.rank_out,
    rank_att_norm: Annotated[
        int | None,
        typer.Option(
            "--rank-att-norm",
            help="Rank for the attention norms (default: not trained; llama.cpp ignores it).",
            rich_help_panel=options.LORA,
        ),
    ] = _D.rank_att_norm,
    rank_ffn_norm: Annotated[
        int | None,
        typer.Option(
            "--rank-ffn-norm",
            help="Rank for the feed-forward norms (default: not trained; llama.cpp ignores it).",
            rich_help_panel=options.LORA,
        ),
    ] = _D.rank_ffn_norm,
    rank_out_norm: Annotated[
        int | None,
        typer.Option(
            "--rank-out-norm",
            help="Rank for the output norm (default: not trained; llama.cpp ignores it).",
            rich_help_panel=options.LORA,
        ),
    ] = _D.rank_out_norm,
    val_split: Annotated[
        float,
        typer.Option(
            "--val-split",
            help="Share of the tokens, the last ones, that is held out and evaluated; 0: none.",
            rich_help_panel=options.DATA,
        ),
    ] = _D.val_split,
    sample_start: Annotated[
        str,
        typer.Option(
            "--sample-start",
            help="Each occurrence of this text starts a sample; empty: every token does.",
            rich_help_panel=options.DATA,
        ),
    ] = _D.sample_start,
    include_sample_start: Annotated[
        bool,
        typer.Option(
            "--include-sample-start",
            help="The sample start is part of the sample.",
            rich_help_panel=options.DATA,
        ),
    ] = _D.include_sample_start,
    escape: Annotated[
        bool,
        typer.Option("--escape", help="Process escapes such as \\n in the sample start.", rich_help_panel=options.DATA),
    ] = _D.escape,
    overlapping_samples: Annotated[
        bool,
        typer.Option(
            "--overlapping-samples",
            help="Samples reach over the next sample start, up to ctx tokens.",
            rich_help_panel=options.DATA,
        ),
    ] = _D.overlapping_samples,
    fill_with_next_samples: Annotated[
        bool,
        typer.Option(
            "--fill-with-next-samples",
            help="Fill short samples with the next ones instead of end tokens.",
            rich_help_panel=options.DATA,
        ),
    ] = _D.fill_with_next_samples,
    separate_with_eos: Annotated[
        bool,
        typer.Option(
            "--separate-with-eos/--no-separate-with-eos",
            help="An EOS token between filled samples.",
            rich_help_panel=options.DATA,
        ),
    ] = _D.separate_with_eos,
    separate_with_bos: Annotated[
        bool,
        typer.Option(
            "--separate-with-bos/--no-separate-with-bos",
            help="A BOS token between filled samples.",
            rich_help_panel=options.DATA,
        ),
    ] = _D.separate_with_bos,
    sample_random_offsets: Annotated[
        bool,
        typer.Option(
            "--sample-random-offsets",
            help="Start each sample at a random place.",
            rich_help_panel=options.DATA,
        ),
    ] = _D.sample_random_offsets,
    force_reshuffle: Annotated[
        bool,
        typer.Option(
            "--force-reshuffle",
            help="Begin a new shuffled epoch when going on from a checkpoint.",
            rich_help_panel=options.DATA,
        ),
    ] = _D.force_reshuffle,
    restart_data: Annotated[
        bool,
        typer.Option(
            "--restart-data",
            help="Accept another text than the checkpoint was trained on, from its beginning.",
            rich_help_panel=options.DATA,
        ),
    ] = _D.restart_data,
    norm_rms_eps: Annotated[
        float | None,
        typer.Option(
            "--norm-rms-eps",
            help="Epsilon of the norms instead of the model's own.",
            rich_help_panel=options.MODEL,
        ),
    ] = _D.norm_rms_eps,
    rope_freq_base: Annotated[
        float | None,
        typer.Option(
            "--rope-freq-base",
            help="Base of the rotary frequencies instead of the model's own.",
            rich_help_panel=options.MODEL,
        ),
    ] = _D.rope_freq_base,
    rope_freq_scale: Annotated[
        float | None,
        typer.Option(
            "--rope-freq-scale",
            help="Factor on the rotary frequencies instead of the model's own scaling.",
            rich_help_panel=options.MODEL,
        ),
    ] = _D.rope_freq_scale,
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        typer.Option("--device", help="Where to compute.", rich_help_panel=options.COMPUTE),
    ] = _D.device,
    n_gpu_layers: Annotated[
        int,
        typer.Option(
            "-ngl",
            "--n-gpu-layers",
            help="Above 0: compute on CUDA where there is one.",
            rich_help_panel=options.COMPUTE,
        ),
    ] = 0,
    dtype: Annotated[
        Literal["auto", "f32", "bf16"],
        typer.Option(
            "--dtype",
            help="What to compute in; auto: bf16 where the processor multiplies it fast.",
            rich_help_panel=options.COMPUTE,
        ),
    ] = _D.dtype,
    weight_cache: Annotated[
        Literal["auto", "bf16", "none"],
        typer.Option(
            "--weight-cache",
            help="Keep decoded weights (bf16), decode for each use (none), or decide by the free memory (auto).",
            rich_help_panel=options.COMPUTE,
        ),
    ] = _D.weight_cache,
    threads: Annotated[
        int,
        typer.Option(
            "-t",
            "--threads",
            help="CPU threads, at most the cores that there are.",
            rich_help_panel=options.COMPUTE,
        ),
    ] = _D.threads,
    offline: options.OfflineOption = False,
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
) -> None:
    """Train a LoRA adapter on the GGUF model that you have, quantized as it is.

    Example: llamakit finetune --model-base base.gguf --train-data shakespeare.txt --lora-out lora-ITERATION.gguf
    """
    values = {name: value for name, value in locals().items() if name not in _NOT_CONFIG}
    if n_gpu_layers > 0:
        values["device"] = _device_for_layers(device, n_gpu_layers)
    for name in ("model_base", "train_data"):
        if hub.is_remote(values[name]):
            values[name] = str(local(values[name], offline=offline))
    run_config = FinetuneConfig(**values)
    events = Path(report_dir) if report_dir else Path(log_file).parent / "tensorboard"
    if model_base:
        render.loading(run_config.model_base)  # said before torch is imported: nobody waits in silence

    options.keep_freed_memory()

    from llamakit.cli.finetune_view import View
    from llamakit.training.finetune import finetune as run
    from llamakit.training.loop import Control
    from llamakit.training.tensorboard import follow

    options.set_threads(threads)
    control = Control()
    reports = run(run_config, control)
    if report_to == "tensorboard":
        reports = follow(reports, events)
    with View(run_config, json=json) as view, _signals(control, view):
        for report in reports:
            view.show(report)
    codes: dict[int, int] = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_TERMINATED}
    raise typer.Exit(codes.get(control.signal, 0))


def _device_for_layers(device: str, n_gpu_layers: int) -> str:
    """llama.cpp's -ngl: any layer on the GPU means all of the training there."""
    import torch

    if device == "cpu" or torch.cuda.is_available():
        return "cuda" if device != "cpu" else device
    render.warn(f"-ngl {n_gpu_layers}: there is no CUDA device here, computing on the CPU")
    return "cpu"


@contextmanager
def _signals(control: Control, view: Any) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run after the step, saved; SIGUSR1 saves; a second Ctrl-C ends at once."""

    def stop(number: int, _frame: object) -> None:
        if control.signal or not view.training:
            if number == signal.SIGTERM:
                raise SystemExit(EXIT_TERMINATED)
            raise KeyboardInterrupt
        control.signal = number
        os.write(2, b"note: finishing this step, then saving; once more ends at once without saving\n")

    def save(_number: int, _frame: object) -> None:
        control.save = True

    wanted = {signal.SIGINT: stop, signal.SIGTERM: stop, signal.SIGUSR1: save}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
