"""Options of training on questions and answers: how they are rendered, what is learnt of them, what is shown."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from llamakit.cli.options import DATA, EVALUATION

ChatTemplateOption = Annotated[
    str | None,
    typer.Option(
        "--chat-template",
        metavar="NAME|FILE",
        help="Template instead of the model's own: one of llama.cpp's names, or a Jinja file.",
        rich_help_panel=DATA,
    ),
]
TrainOnOption = Annotated[
    Literal["all", "assistant", "last"],
    typer.Option("--train-on", help="Tokens with a loss: all, the answers', the last answer's.", rich_help_panel=DATA),
]
LongSamplesOption = Annotated[
    Literal["cut", "window"],
    typer.Option("--long-samples", help="Samples beyond --ctx are cut, or become several.", rich_help_panel=DATA),
]
PackOption = Annotated[
    bool,
    typer.Option(
        "--pack/--no-pack",
        help="Several short samples share a row, apart from each other; else rows of like lengths share a batch.",
        rich_help_panel=DATA,
    ),
]
OnErrorOption = Annotated[
    Literal["stop", "skip"],
    typer.Option(
        "--on-error",
        help="A sample that cannot be used stops the run, or is left out and counted.",
        rich_help_panel=DATA,
    ),
]
ValDataOption = Annotated[
    str,
    typer.Option(
        "--val-data",
        help="Data to evaluate, of the same kind, instead of a share of the training data.",
        rich_help_panel=DATA,
    ),
]
AnchorDataOption = Annotated[
    str,
    typer.Option(
        "--anchor-data",
        metavar="FILE",
        help="Text or records on which the adapter is to change nothing: its divergence from the base joins the loss.",
        rich_help_panel=DATA,
    ),
]
AnchorWeightOption = Annotated[
    float, typer.Option("--anchor-weight", help="Weight of that divergence.", rich_help_panel=DATA)
]
AnchorBatchOption = Annotated[
    int, typer.Option("--anchor-batch", help="Rows of it in each iteration.", rich_help_panel=DATA)
]
SamplePromptOption = Annotated[
    list[str] | None,
    typer.Option(
        "--sample-prompt",
        help="Asked before, at each save and at the end: a question for a chat, a beginning for a text; repeatable.",
        rich_help_panel=EVALUATION,
    ),
]
SampleTokensOption = Annotated[
    int, typer.Option("--sample-tokens", help="Tokens of each of its answers at most.", rich_help_panel=EVALUATION)
]
SaveBestOption = Annotated[
    bool,
    typer.Option(
        "--save-best",
        help="Keep the adapter or model of the best held-out loss, with BEST in place of the pattern.",
        rich_help_panel=EVALUATION,
    ),
]
PatienceOption = Annotated[
    int,
    typer.Option(
        "--patience",
        help="Stop after N evaluations in a row without a better held-out loss; 0: never.",
        rich_help_panel=EVALUATION,
    ),
]
