"""Options of a plan: what a run will take, and what it may take."""

from __future__ import annotations

from typing import Annotated

import typer

from llamakit.cli import options

MaxMemoryOption = Annotated[
    str,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="Choose micro-batch, checkpointing and weight cache so that the run fits, as in 3G; the losses stay.",
        rich_help_panel=options.COMPUTE,
    ),
]
PlanOption = Annotated[
    bool,
    typer.Option(
        "--plan",
        help="Say what the run would take, memory, disk and time, and end; no weights are loaded.",
        rich_help_panel=options.OUTPUT,
    ),
]
