"""Options of `finetune` about training all weights: that it does, and the models that come of it."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from llamakit.cli.options import FILES, TRAINING

FullOption = Annotated[
    bool,
    typer.Option(
        "--full",
        help="Train all weights, and write a model instead of an adapter: 16 bytes of memory a weight.",
        rich_help_panel=TRAINING,
    ),
]
ModelOutOption = Annotated[
    str,
    typer.Option("--model-out", help="Name of the models of --full; empty: none is written.", rich_help_panel=FILES),
]
OuttypeOption = Annotated[
    Literal["f32", "f16", "bf16"],
    typer.Option("--outtype", help="Type of the matrices in them.", rich_help_panel=FILES),
]
OnlyWriteModelOption = Annotated[
    bool,
    typer.Option(
        "--only-write-model",
        help="Write the model of --checkpoint-in, a checkpoint of --full, and end.",
        rich_help_panel=FILES,
    ),
]
