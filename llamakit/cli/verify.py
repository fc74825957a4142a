"""`llamakit verify A B`: do two files hold the same model?"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from llamakit.cli import render
from llamakit.cli.options import COMPUTE, MODEL, JsonOption, OfflineOption, ThreadsOption, set_threads
from llamakit.cli.sources import local
from llamakit.errors import EXIT_FAILURE, EXIT_OK

if TYPE_CHECKING:
    from llamakit.formats.base import ModelFile
    from llamakit.inference.verify import VerifyReport

_ANY_CONTEXT = 2048  # nothing is computed with it


def verify(
    expected: Annotated[str, typer.Argument(metavar="A", help="A model: the one that is right.")],
    written: Annotated[str, typer.Argument(metavar="B", help="A model that should be the same, in any format.")],
    ctx: Annotated[
        int | None,
        typer.Option(
            "--ctx",
            metavar="N",
            help="Context length, where one of both lacks it.",
            show_default="the other's",
            rich_help_panel=MODEL,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Which rows and tokens are looked at.")] = 0,
    forward: Annotated[
        bool | None,
        typer.Option(
            "--forward/--no-forward",
            help="Compare the logits of 64 tokens.",
            show_default="below 2 GB",
            rich_help_panel=COMPUTE,
        ),
    ] = None,
    threads: ThreadsOption = None,
    offline: OfflineOption = False,
    json: JsonOption = False,
) -> int:
    """Compare two models, whatever their formats: weights, vocabulary, and what they answer. Exit 1: they differ."""
    from llamakit.formats.open import check_is_model, open_model
    from llamakit.inference.verify import verify as compare

    set_threads(threads)
    first, second = local(expected, offline=offline), local(written, offline=offline)
    with open_model(first, n_ctx=ctx or 0) as a, open_model(second, n_ctx=ctx or 0) as b:
        check_is_model(a)
        check_is_model(b)
        report = compare(*_with_a_context(a, b), seed=seed, forward=forward)
    if json:
        render.print_json(asdict(report) | {"passed": report.passed})
    else:
        print_report(report)
    return EXIT_OK if report.passed else EXIT_FAILURE


def _with_a_context(a: ModelFile, b: ModelFile) -> tuple[ModelFile, ModelFile]:
    """A source that states no context has the other's; two of them are compared whatever theirs is."""
    from llamakit.formats.borrowed import with_metadata
    from llamakit.formats.meta import MetaModel

    key = "llama.context_length"
    context = a.metadata.get(key, b.metadata.get(key, _ANY_CONTEXT))
    pair = [
        with_metadata(f, {key: context}) if key not in f.metadata and isinstance(f, MetaModel) else f for f in (a, b)
    ]
    return pair[0], pair[1]


def print_report(report: VerifyReport) -> None:
    """The report in a few lines: the verdict on stdout, notes on stderr."""
    for text in report.notes:
        render.note(text)
    for failure in report.failures:
        render.say(f"different: {failure}")
    if report.passed:
        render.say(f"verified: {summary(report)}")
    if report.worst:
        render.say(f"largest error: {report.worst[0]}, {report.worst[1]:.2g} (relative root mean square)")


def summary(report: VerifyReport) -> str:
    """`291 tensors, max |dlogit| = 0, KL = 0`."""
    text = f"{report.n_tensors} tensors"
    if report.n_equal < report.n_tensors:
        text += f" ({report.n_equal} equal)"
    if report.vocabulary == "equal":
        text += ", vocabulary equal"
    if report.max_dlogit is not None and report.kl is not None:
        text += f", max |dlogit| = {report.max_dlogit:.3g}, KL = {report.kl:.3g}"
    return text
