"""Options of `finetune` about its adapter: what is trained, from where it starts, and into what it is merged."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from llamakit.cli.options import FILES, LORA

RsLoraOption = Annotated[
    bool,
    typer.Option("--rslora", help="Scale of the adapter is alpha / sqrt(rank): for large ranks.", rich_help_panel=LORA),
]
LoraTargetsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--lora-targets",
        metavar="PATTERN[=RANK]",
        help="Train these instead of the seven matrices: kinds (attn_q), names (blk.3.attn_q), patterns (blk.[0-3].*);"
        " several with commas, or again.",
        rich_help_panel=LORA,
    ),
]
LoraInitOption = Annotated[
    str,
    typer.Option(
        "--lora-init",
        help="Adapter to begin with, in any format that is read; its tensors and ranks are trained on.",
        rich_help_panel=LORA,
    ),
]
MergeOutOption = Annotated[
    str,
    typer.Option(
        "--merge-out",
        help="GGUF file for the base with the finished adapter merged in, the best one with --save-best.",
        rich_help_panel=FILES,
    ),
]
LoraFormatOption = Annotated[
    Literal["gguf", "peft"],
    typer.Option("--lora-format", help="Write GGUF files, or folders that PEFT loads.", rich_help_panel=FILES),
]
