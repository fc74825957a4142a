"""`llamakit train`: a model from nothing; its options are those of llama.cpp's train-text-from-scratch and llama2.c."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from llamakit import hub
from llamakit.cli import launch, options, render
from llamakit.cli import loop_options as loop
from llamakit.cli.corpus_options import ErrorsOption
from llamakit.cli.run_signals import exit_code, stopping_signals
from llamakit.cli.sources import local
from llamakit.training.train_config import TrainConfig, as_toml

_D = TrainConfig()
_REPEATED = ("sample_prompt", "export")
_NOT_CONFIG = ("config", "devices", "offline", "json", "print_config", "report_to", "report_dir", *_REPEATED)


def train(
    train_data: Annotated[
        str,
        typer.Option(
            "--train-data",
            help="Text file, folder of texts, or tokens that `data prepare` or llama2.c wrote.",
            rich_help_panel=options.FILES,
        ),
    ] = _D.train_data,
    vocab_model: Annotated[
        str,
        typer.Option(
            "--vocab-model",
            help="Model or vocabulary file whose vocabulary is taken: GGUF, tokenizer.model, tokenizer.json.",
            rich_help_panel=options.FILES,
        ),
    ] = _D.vocab_model,
    vocab_size: Annotated[
        int,
        typer.Option(
            "--vocab-size",
            help="Train a new vocabulary of N pieces on the text; 0: take --vocab-model's, or the tokens' own.",
            rich_help_panel=options.DATA,
        ),
    ] = _D.vocab_size,
    errors: ErrorsOption = _D.errors,
    val_split: Annotated[
        float,
        typer.Option(
            "--val-split",
            help="Share of a text's documents that is held out and evaluated.",
            rich_help_panel=options.DATA,
        ),
    ] = _D.val_split,
    init_from: Annotated[
        str,
        typer.Option(
            "--init-from",
            help="scratch, resume, or a model whose weights are trained on; empty: resume where it is possible.",
            rich_help_panel=options.FILES,
        ),
    ] = _D.init_from,
    out_dir: Annotated[
        str, typer.Option("--out-dir", help="Folder of the run.", rich_help_panel=options.FILES)
    ] = _D.out_dir,
    checkpoint_in: loop.CheckpointInOption = _D.checkpoint_in,
    checkpoint_out: loop.CheckpointOutOption = _D.checkpoint_out,
    model_out: Annotated[
        str,
        typer.Option("--model-out", help="Name of the models; empty: none is written.", rich_help_panel=options.FILES),
    ] = _D.model_out,
    only_write_model: Annotated[
        bool,
        typer.Option(
            "--only-write-model", help="Write the model of --checkpoint-in and end.", rich_help_panel=options.FILES
        ),
    ] = _D.only_write_model,
    export: Annotated[
        list[str] | None,
        typer.Option(
            "--export",
            help="Format besides GGUF for the last model: llama2c, hf, modelfile; repeatable.",
            show_default="none",
            rich_help_panel=options.FILES,
        ),
    ] = None,
    save_every: loop.SaveEveryOption = _D.save_every,
    keep_last: loop.KeepLastOption = _D.keep_last,
    log_file: Annotated[
        str,
        typer.Option(
            "--log-file",
            help="JSONL file with one object per step and evaluation; empty: none.",
            rich_help_panel=options.FILES,
        ),
    ] = _D.log_file,
    pattern_fn_it: loop.PatternFnItOption = _D.pattern_fn_it,
    fn_latest: loop.FnLatestOption = _D.fn_latest,
    embd: Annotated[int, typer.Option("--embd", help="Width of the model.", rich_help_panel=options.MODEL)] = _D.embd,
    layer: Annotated[int, typer.Option("--layer", help="Blocks.", rich_help_panel=options.MODEL)] = _D.layer,
    head: Annotated[int, typer.Option("--head", help="Attention heads.", rich_help_panel=options.MODEL)] = _D.head,
    head_kv: Annotated[
        int, typer.Option("--head-kv", help="Key/value heads; 0: as many as --head.", rich_help_panel=options.MODEL)
    ] = _D.head_kv,
    ff: Annotated[
        int,
        typer.Option(
            "--ff",
            help="Width of the feed-forward units; 0: 8/3 of --embd, rounded up to --multiple-of.",
            rich_help_panel=options.MODEL,
        ),
    ] = _D.ff,
    multiple_of: Annotated[
        int,
        typer.Option("--multiple-of", help="What the default of --ff is a multiple of.", rich_help_panel=options.MODEL),
    ] = _D.multiple_of,
    ctx: Annotated[
        int,
        typer.Option(
            "-c", "--ctx", help="Tokens per sequence, and the model's context.", rich_help_panel=options.MODEL
        ),
    ] = _D.ctx,
    tie: Annotated[
        bool,
        typer.Option(
            "--tie/--no-tie", help="Use the embeddings as the output matrix too.", rich_help_panel=options.MODEL
        ),
    ] = _D.tie,
    dropout: Annotated[
        float,
        typer.Option(
            "--dropout",
            help="Share of embeddings, attention weights and each unit's outputs dropped at random, as in llama2.c.",
            rich_help_panel=options.MODEL,
        ),
    ] = _D.dropout,
    norm_rms_eps: Annotated[
        float, typer.Option("--norm-rms-eps", help="Epsilon of the norms.", rich_help_panel=options.MODEL)
    ] = _D.norm_rms_eps,
    rope_freq_base: Annotated[
        float, typer.Option("--rope-freq-base", help="Base of the rotary frequencies.", rich_help_panel=options.MODEL)
    ] = _D.rope_freq_base,
    report_to: loop.ReportToOption = "none",
    report_dir: loop.ReportDirOption = "",
    adam_iter: Annotated[
        int,
        typer.Option(
            "--adam-iter",
            help="Iterations in total; a resumed run goes on up to them.",
            rich_help_panel=options.TRAINING,
        ),
    ] = _D.adam_iter,
    epochs: loop.EpochsOption = _D.epochs,
    max_minutes: Annotated[
        float,
        typer.Option(
            "--max-minutes",
            help="End after so much time, the learning rate decayed by then; 0: no limit.",
            rich_help_panel=options.TRAINING,
        ),
    ] = _D.max_minutes,
    batch: loop.BatchOption = _D.batch,
    grad_acc: loop.GradAccOption = _D.grad_acc,
    micro_batch: loop.MicroBatchOption = _D.micro_batch,
    seed: Annotated[
        int,
        typer.Option(
            "-s",
            "--seed",
            help="Seed of the weights, the order and the split; -1: from the clock.",
            rich_help_panel=options.TRAINING,
        ),
    ] = _D.seed,
    lr_schedule: Annotated[
        Literal["cosine", "linear", "constant"],
        typer.Option(
            "--lr-schedule", help="How the learning rate falls after the warmup.", rich_help_panel=options.TRAINING
        ),
    ] = _D.lr_schedule,
    warmup: loop.WarmupOption = _D.warmup,
    cos_decay_steps: loop.CosDecayStepsOption = _D.cos_decay_steps,
    cos_decay_min: loop.CosDecayMinOption = _D.cos_decay_min,
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
    eval_every: Annotated[
        int,
        typer.Option(
            "--eval-every", help="Evaluate every N iterations; 0: only at the end.", rich_help_panel=options.EVALUATION
        ),
    ] = _D.eval_every,
    eval_iters: Annotated[
        int,
        typer.Option(
            "--eval-iters",
            help="Batches of training and held-out text for an evaluation; at the end all of the held-out text.",
            rich_help_panel=options.EVALUATION,
        ),
    ] = _D.eval_iters,
    eval_only: Annotated[
        bool,
        typer.Option(
            "--eval-only", help="Evaluate all of the held-out text and end.", rich_help_panel=options.EVALUATION
        ),
    ] = _D.eval_only,
    patience: Annotated[
        int,
        typer.Option(
            "--patience",
            help="Stop after N evaluations in a row without a better held-out loss; 0: never.",
            rich_help_panel=options.EVALUATION,
        ),
    ] = _D.patience,
    sample_prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--sample-prompt",
            help="What a sample at each evaluation begins with; repeatable.",
            show_default="an empty one",
            rich_help_panel=options.EVALUATION,
        ),
    ] = None,
    sample_tokens: Annotated[
        int,
        typer.Option(
            "--sample-tokens", help="Tokens of each sample; 0: no samples.", rich_help_panel=options.EVALUATION
        ),
    ] = _D.sample_tokens,
    device: loop.DeviceOption = _D.device,
    devices: loop.DevicesOption = "1",
    shard: loop.ShardOption = _D.shard,
    dtype: loop.DtypeOption = _D.dtype,
    use_checkpointing: loop.UseCheckpointingOption = _D.use_checkpointing,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the model with torch.compile: slow to start, for CUDA.",
            rich_help_panel=options.COMPUTE,
        ),
    ] = _D.compile,
    threads: loop.ThreadsOption = _D.threads,
    offline: options.OfflineOption = False,
    config: options.ConfigOption = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print every option as TOML, for --config, and end.")
    ] = False,
    json: options.JsonOption = False,
) -> None:
    """Train a new Llama on a text, or all weights of one that is there.

    Example: llamakit train --train-data text.txt --vocab-size 2048 --out-dir run --adam-iter 1000
    """
    values = {name: value for name, value in locals().items() if name not in _NOT_CONFIG}
    for name in ("train_data", "vocab_model", "init_from"):
        if hub.is_remote(values[name]):
            values[name] = str(local(values[name], offline=offline))
    prompts = _D.sample_prompt if sample_prompt is None else tuple(sample_prompt)
    run_config = TrainConfig(**values, sample_prompt=prompts, export=tuple(export or ()))
    if print_config:
        for line in as_toml(run_config).splitlines():
            render.say(line)
        return
    n_ranks = launch.number_of_ranks(devices, run_config.device)
    if n_ranks > 1:
        raise typer.Exit(launch.launch(n_ranks, batch))
    events = Path(report_dir) if report_dir else Path(out_dir) / "tensorboard"

    (options.keep_freed_memory if shard == "none" else options.give_back_freed_memory)()

    from llamakit.cli.train_view import TrainView
    from llamakit.training.loop import Control
    from llamakit.training.run_folder import keep_records
    from llamakit.training.tensorboard import check_tensorboard, follow
    from llamakit.training.train import train as run

    options.set_threads(launch.threads_of_a_rank(threads))
    control = Control()
    goes_on = bool(checkpoint_in) and init_from != "scratch" and Path(run_config.placed().checkpoint_in).exists()
    command = shlex.join(["llamakit", *sys.argv[1:]])
    with launch.joined(run_config.device) as dist:
        reports = run(run_config, control, dist)
        if dist.is_main:
            reports = keep_records(reports, run_config, command, append=goes_on or dist.restarts > 0)
        if report_to == "tensorboard" and dist.is_main:
            check_tensorboard(events)
            reports = follow(reports, events)
        shown = TrainView(run_config, json=json) if dist.is_main else launch.Silent()
        with shown as view, stopping_signals(control, view):
            for report in reports:
                view.show(report)
    raise typer.Exit(exit_code(control))
