"""Options of every training run, `finetune` and `train`: files, steps, schedule, optimizer, place."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from llamakit.cli import options

CheckpointInOption = Annotated[
    str,
    typer.Option(
        "--checkpoint-in",
        help="Checkpoint to go on from; a fresh start where it does not exist.",
        rich_help_panel=options.FILES,
    ),
]
CheckpointOutOption = Annotated[
    str,
    typer.Option(
        "--checkpoint-out",
        help="Name of the checkpoints; empty: none is written.",
        rich_help_panel=options.FILES,
    ),
]
PatternFnItOption = Annotated[
    str,
    typer.Option(
        "--pattern-fn-it",
        help="What stands for the iteration in file names.",
        rich_help_panel=options.FILES,
    ),
]
FnLatestOption = Annotated[
    str,
    typer.Option(
        "--fn-latest",
        help="What replaces it in the name of the newest file.",
        rich_help_panel=options.FILES,
    ),
]
SaveEveryOption = Annotated[
    int,
    typer.Option("--save-every", help="Save every N iterations; 0: only at the end.", rich_help_panel=options.FILES),
]
KeepLastOption = Annotated[
    int,
    typer.Option(
        "--keep-last",
        help="Keep only the N newest numbered checkpoints and adapters; 0: all.",
        rich_help_panel=options.FILES,
    ),
]
ReportToOption = Annotated[
    Literal["none", "tensorboard"],
    typer.Option(
        "--report-to", help="Write losses, learning rate and speed for TensorBoard.", rich_help_panel=options.FILES
    ),
]
ReportDirOption = Annotated[
    str,
    typer.Option(
        "--report-dir",
        help="Folder of its events.",
        show_default="tensorboard, beside --log-file",
        rich_help_panel=options.FILES,
    ),
]
ReportOption = Annotated[
    str,
    typer.Option(
        "--report",
        metavar="FOLDER",
        help="Folder for report.html, the whole run on one page, report.json and metrics.jsonl; empty: none.",
        rich_help_panel=options.FILES,
    ),
]
AdamIterOption = Annotated[
    int, typer.Option("--adam-iter", help="Iterations of this run.", rich_help_panel=options.TRAINING)
]
EpochsOption = Annotated[
    int,
    typer.Option(
        "--epochs",
        help="Stop after N passes over the samples in this run; -1: no limit.",
        rich_help_panel=options.TRAINING,
    ),
]
BatchOption = Annotated[
    int,
    typer.Option("-b", "--batch", help="Sequences per micro-step, of all devices.", rich_help_panel=options.TRAINING),
]
GradAccOption = Annotated[
    int, typer.Option("--grad-acc", help="Micro-steps per iteration.", rich_help_panel=options.TRAINING)
]
MicroBatchOption = Annotated[
    int,
    typer.Option(
        "--micro-batch",
        help="Sequences of a micro-step that are computed at a time, to the same losses; 0: all of them.",
        rich_help_panel=options.TRAINING,
    ),
]
SeedOption = Annotated[
    int,
    typer.Option(
        "-s",
        "--seed",
        help="Seed of the sample order and the adapter's start; -1: from the clock.",
        rich_help_panel=options.TRAINING,
    ),
]
WarmupOption = Annotated[
    int,
    typer.Option(
        "--warmup",
        help="Iterations over which the learning rate rises.",
        rich_help_panel=options.TRAINING,
    ),
]
CosDecayStepsOption = Annotated[
    int,
    typer.Option(
        "--cos-decay-steps",
        help="Iterations of the cosine decay after the warmup.",
        rich_help_panel=options.TRAINING,
    ),
]
CosDecayMinOption = Annotated[
    float,
    typer.Option(
        "--cos-decay-min",
        help="The cosine decay ends at this share of the learning rate.",
        rich_help_panel=options.TRAINING,
    ),
]
OptPastOption = Annotated[
    int,
    typer.Option(
        "--opt-past",
        help="Compare the loss with that of N iterations ago, and stop when it hardly changed; 0: never.",
        rich_help_panel=options.TRAINING,
    ),
]
OptDeltaOption = Annotated[
    float,
    typer.Option("--opt-delta", help="What counts as hardly changed, relative.", rich_help_panel=options.TRAINING),
]
OptMaxNoImprovementOption = Annotated[
    int,
    typer.Option(
        "--opt-max-no-improvement",
        help="Stop after N iterations in a row without a new best loss; 0: never.",
        rich_help_panel=options.TRAINING,
    ),
]
AdamEpsfOption = Annotated[
    float,
    typer.Option(
        "--adam-epsf",
        help="Stop when the loss changes by less than this share from one iteration to the next; 0: never.",
        rich_help_panel=options.TRAINING,
    ),
]
AdamAlphaOption = Annotated[
    float, typer.Option("--adam-alpha", help="Learning rate.", rich_help_panel=options.TRAINING)
]
AdamMinAlphaOption = Annotated[
    float,
    typer.Option("--adam-min-alpha", help="Least learning rate, warmup included.", rich_help_panel=options.TRAINING),
]
AdamDecayOption = Annotated[
    float,
    typer.Option("--adam-decay", help="AdamW's weight decay; 0: plain Adam.", rich_help_panel=options.TRAINING),
]
AdamDecayMinNdimOption = Annotated[
    int,
    typer.Option(
        "--adam-decay-min-ndim",
        help="Weight decay applies to tensors of at least N dimensions.",
        rich_help_panel=options.TRAINING,
    ),
]
AdamBeta1Option = Annotated[
    float,
    typer.Option("--adam-beta1", help="Decay of the first moment.", rich_help_panel=options.TRAINING),
]
AdamBeta2Option = Annotated[
    float,
    typer.Option("--adam-beta2", help="Decay of the second moment.", rich_help_panel=options.TRAINING),
]
AdamGclipOption = Annotated[
    float,
    typer.Option(
        "--adam-gclip",
        help="Largest norm of the whole gradient; 0: no clipping.",
        rich_help_panel=options.TRAINING,
    ),
]
UseCheckpointingOption = Annotated[
    bool,
    typer.Option(
        "--use-checkpointing/--no-checkpointing",
        help="Recompute activations in the backward pass instead of keeping them.",
        rich_help_panel=options.TRAINING,
    ),
]
DevicesOption = Annotated[
    str,
    typer.Option(
        "--devices",
        metavar="N|all",
        help="Processes that share each batch, one for each GPU; on a CPU they share its cores.",
        rich_help_panel=options.COMPUTE,
    ),
]
ShardOption = Annotated[
    Literal["none", "full", "auto"],
    typer.Option(
        "--shard",
        help="The model whole on each device (none), or a share of its rows (full); auto: full where it does not fit.",
        rich_help_panel=options.COMPUTE,
    ),
]
DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option("--device", help="Where to compute.", rich_help_panel=options.COMPUTE),
]
DtypeOption = Annotated[
    Literal["auto", "f32", "bf16"],
    typer.Option(
        "--dtype",
        help="What to compute in; auto: bf16 where the processor multiplies it fast.",
        rich_help_panel=options.COMPUTE,
    ),
]
ThreadsOption = Annotated[
    int,
    typer.Option(
        "-t",
        "--threads",
        help="CPU threads, at most the cores that there are.",
        rich_help_panel=options.COMPUTE,
    ),
]
