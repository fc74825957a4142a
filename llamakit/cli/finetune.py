"""`llamakit finetune`: the options of llama.cpp's finetune, and what came after it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from llamakit import hub
from llamakit.cli import chat_data_options as chat
from llamakit.cli import full_options as full_
from llamakit.cli import launch, options, plan_options, render
from llamakit.cli import loop_options as loop
from llamakit.cli import lora_options as lora
from llamakit.cli.run_signals import exit_code, stopping_signals
from llamakit.cli.sources import local
from llamakit.training.config import FinetuneConfig

_D = FinetuneConfig()
_NOT_CONFIG = (
    "config",
    "devices",
    "sample_prompt",
    "lora_targets",
    "n_gpu_layers",
    "offline",
    "json",
    "report_to",
    "report_dir",
    "report",
    "plan",
)


def finetune(
    model_base: Annotated[
        str,
        typer.Option(
            "--model-base",
            help="Model to train on, any GGUF or a Hugging Face folder: a path, hf:user/repo[:QUANT] or a URL.",
            rich_help_panel=options.FILES,
        ),
    ] = _D.model_base,
    train_data: Annotated[
        str,
        typer.Option(
            "--train-data",
            help="UTF-8 text to train on, or questions and answers: JSON, JSON lines, CSV, a folder with these.",
            rich_help_panel=options.FILES,
        ),
    ] = _D.train_data,
    checkpoint_in: loop.CheckpointInOption = _D.checkpoint_in,
    checkpoint_out: loop.CheckpointOutOption = _D.checkpoint_out,
    lora_out: Annotated[
        str,
        typer.Option("--lora-out", help="Name of the adapters; empty: none is written.", rich_help_panel=options.FILES),
    ] = _D.lora_out,
    lora_format: lora.LoraFormatOption = _D.lora_format,
    only_write_lora: Annotated[
        bool,
        typer.Option(
            "--only-write-lora",
            help="Write the adapter of --checkpoint-in and end.",
            rich_help_panel=options.FILES,
        ),
    ] = _D.only_write_lora,
    full: full_.FullOption = _D.full,
    model_out: full_.ModelOutOption = _D.model_out,
    outtype: full_.OuttypeOption = _D.outtype,
    only_write_model: full_.OnlyWriteModelOption = _D.only_write_model,
    pattern_fn_it: loop.PatternFnItOption = _D.pattern_fn_it,
    fn_latest: loop.FnLatestOption = _D.fn_latest,
    save_every: loop.SaveEveryOption = _D.save_every,
    keep_last: loop.KeepLastOption = _D.keep_last,
    log_file: Annotated[
        str,
        typer.Option("--log-file", help="JSONL file with one object per step.", rich_help_panel=options.FILES),
    ] = _D.log_file,
    report_to: loop.ReportToOption = "none",
    report_dir: loop.ReportDirOption = "",
    report: loop.ReportOption = "",
    adam_iter: loop.AdamIterOption = _D.adam_iter,
    epochs: loop.EpochsOption = _D.epochs,
    batch: loop.BatchOption = _D.batch,
    ctx: Annotated[
        int, typer.Option("-c", "--ctx", help="Tokens per sequence.", rich_help_panel=options.TRAINING)
    ] = _D.ctx,
    grad_acc: loop.GradAccOption = _D.grad_acc,
    micro_batch: loop.MicroBatchOption = _D.micro_batch,
    seed: loop.SeedOption = _D.seed,
    use_checkpointing: loop.UseCheckpointingOption = _D.use_checkpointing,
    warmup: loop.WarmupOption = _D.warmup,
    cos_decay_steps: loop.CosDecayStepsOption = _D.cos_decay_steps,
    cos_decay_restart: Annotated[
        float,
        typer.Option(
            "--cos-decay-restart",
            help="Each restarted period is this many times as long as the one before.",
            rich_help_panel=options.TRAINING,
        ),
    ] = _D.cos_decay_restart,
    cos_decay_min: loop.CosDecayMinOption = _D.cos_decay_min,
    enable_restart: Annotated[
        bool,
        typer.Option(
            "--enable-restart/--disable-restart",
            help="Start the cosine decay again when it is over.",
            rich_help_panel=options.TRAINING,
        ),
    ] = _D.enable_restart,
    adam_alpha: loop.AdamAlphaOption = _D.adam_alpha,
    adam_min_alpha: loop.AdamMinAlphaOption = _D.adam_min_alpha,
    adam_decay: loop.AdamDecayOption = _D.adam_decay,
    adam_decay_min_ndim: loop.AdamDecayMinNdimOption = _D.adam_decay_min_ndim,
    adam_beta1: loop.AdamBeta1Option = _D.adam_beta1,
    adam_beta2: loop.AdamBeta2Option = _D.adam_beta2,
    adam_gclip: loop.AdamGclipOption = _D.adam_gclip,
    adam_epsf: loop.AdamEpsfOption = _D.adam_epsf,
    opt_past: loop.OptPastOption = _D.opt_past,
    opt_delta: loop.OptDeltaOption = _D.opt_delta,
    opt_max_no_improvement: loop.OptMaxNoImprovementOption = _D.opt_max_no_improvement,
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
    rslora: lora.RsLoraOption = _D.rslora,
    lora_targets: lora.LoraTargetsOption = None,
    lora_init: lora.LoraInitOption = _D.lora_init,
    merge_out: lora.MergeOutOption = _D.merge_out,
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
            help="Share of the data, a text's last tokens or any samples of a chat, that is held out; 0: none.",
            rich_help_panel=options.DATA,
        ),
    ] = _D.val_split,
    val_data: chat.ValDataOption = _D.val_data,
    anchor_data: chat.AnchorDataOption = _D.anchor_data,
    anchor_weight: chat.AnchorWeightOption = _D.anchor_weight,
    anchor_batch: chat.AnchorBatchOption = _D.anchor_batch,
    chat_template: chat.ChatTemplateOption = _D.chat_template,
    train_on: chat.TrainOnOption = _D.train_on,
    pack: chat.PackOption = _D.pack,
    long_samples: chat.LongSamplesOption = _D.long_samples,
    on_error: chat.OnErrorOption = _D.on_error,
    sample_prompt: chat.SamplePromptOption = None,
    sample_tokens: chat.SampleTokensOption = _D.sample_tokens,
    save_best: chat.SaveBestOption = _D.save_best,
    patience: chat.PatienceOption = _D.patience,
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
    device: loop.DeviceOption = _D.device,
    devices: loop.DevicesOption = "1",
    shard: loop.ShardOption = _D.shard,
    n_gpu_layers: Annotated[
        int,
        typer.Option(
            "-ngl",
            "--n-gpu-layers",
            help="Above 0: compute on CUDA where there is one.",
            rich_help_panel=options.COMPUTE,
        ),
    ] = 0,
    dtype: loop.DtypeOption = _D.dtype,
    weight_cache: Annotated[
        Literal["auto", "bf16", "none"],
        typer.Option(
            "--weight-cache",
            help="Keep decoded weights (bf16), decode for each use (none), or decide by the free memory (auto).",
            rich_help_panel=options.COMPUTE,
        ),
    ] = _D.weight_cache,
    threads: loop.ThreadsOption = _D.threads,
    max_memory: plan_options.MaxMemoryOption = _D.max_memory,
    plan: plan_options.PlanOption = False,
    offline: options.OfflineOption = False,
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
) -> None:
    """Train a LoRA adapter on the model that you have, quantized as it is, or all of its weights.

    Example: llamakit finetune --model-base base.gguf --train-data shakespeare.txt --lora-out lora-ITERATION.gguf
    """
    values = {name: value for name, value in locals().items() if name not in _NOT_CONFIG}
    if n_gpu_layers > 0:
        values["device"] = _device_for_layers(device, n_gpu_layers)
    for name in ("model_base", "train_data", "val_data", "anchor_data", "lora_init"):
        if hub.is_remote(values[name]):
            values[name] = str(local(values[name], offline=offline))
    run_config = FinetuneConfig(
        **values, sample_prompt=tuple(sample_prompt or ()), lora_targets=tuple(lora_targets or ())
    )
    n_ranks = launch.number_of_ranks(devices, run_config.device)
    if n_ranks > 1 and not plan:
        raise typer.Exit(launch.launch(n_ranks, batch))
    events = Path(report_dir) if report_dir else Path(log_file).parent / "tensorboard"
    if model_base and not plan:
        render.loading(run_config.model_base)  # said before torch is imported: nobody waits in silence

    (options.keep_freed_memory if shard == "none" else options.give_back_freed_memory)()

    from llamakit.cli.finetune_view import View
    from llamakit.cli.plan_view import show_plan
    from llamakit.training.finetune import finetune as run
    from llamakit.training.loop import Control
    from llamakit.training.run_folder import keep_report
    from llamakit.training.tensorboard import follow

    options.set_threads(launch.threads_of_a_rank(threads))
    if plan:
        show_plan(run_config, json=json)
        return
    control = Control()
    with launch.joined(run_config.device) as dist:
        reports = run(run_config, control, dist)
        if report and dist.is_main:
            command = shlex.join(["llamakit", *sys.argv[1:]])
            reports = keep_report(reports, run_config, command, report, append=dist.restarts > 0)
        if report_to == "tensorboard" and dist.is_main:
            reports = follow(reports, events)
        shown = View(run_config, json=json) if dist.is_main else launch.Silent()
        with shown as view, stopping_signals(control, view):
            for told in reports:
                view.show(told)
    raise typer.Exit(exit_code(control))


def _device_for_layers(device: str, n_gpu_layers: int) -> str:
    """llama.cpp's -ngl: any layer on the GPU means all of the training there."""
    import torch

    if device == "cpu" or torch.cuda.is_available():
        return "cuda" if device != "cpu" else device
    render.warn(f"-ngl {n_gpu_layers}: there is no CUDA device here, computing on the CPU")
    return "cpu"
