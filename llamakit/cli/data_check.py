"""`llamakit data check`, the doctor of training data, and `data show` of questions and answers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from llamakit.cli import render
from llamakit.cli.chat_data_options import ChatTemplateOption, LongSamplesOption, TrainOnOption
from llamakit.cli.options import DATA, FILES, ConfigOption, JsonOption, OfflineOption
from llamakit.cli.sources import local
from llamakit.dataset.config import CheckConfig
from llamakit.errors import EXIT_OK, EXIT_USAGE, UsageError
from llamakit.files import escape_control

if TYPE_CHECKING:
    import numpy as np

    from llamakit.dataset.chat import ChatSample
    from llamakit.dataset.check import CheckReport
    from llamakit.formats.base import ModelFile
    from llamakit.tokenizer import Tokenizer

_D = CheckConfig
_BAR = 40


@dataclass(frozen=True)
class ShownSamples:
    """Which samples `data show` prints of questions and answers, and how. first: number of the first, from 0."""

    chat_template: str | None
    train_on: str
    first: int
    count: int
    ids: bool
    json: bool
    offline: bool


def check(
    sources: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Text, JSON lines, JSON, CSV, or a folder of these.")
    ],
    model: Annotated[
        str, typer.Option("-m", metavar="MODEL", help="The base: its vocabulary and template.", rich_help_panel=FILES)
    ],
    chat_template: ChatTemplateOption = _D.chat_template,
    ctx: Annotated[
        int,
        typer.Option("--ctx", "-c", min=0, help="Tokens per sequence; 0: the model's context.", rich_help_panel=DATA),
    ] = _D.ctx,
    train_on: TrainOnOption = _D.train_on,
    long_samples: LongSamplesOption = _D.long_samples,
    offline: OfflineOption = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> int:
    """Say what is wrong with training data, and what a model would learn from it. Exit 2: something is refused."""
    from llamakit.dataset.chat_records import Problem
    from llamakit.dataset.check import CheckReport
    from llamakit.dataset.check import check as look

    settings = CheckConfig(ctx=ctx, chat_template=chat_template, train_on=train_on, long_samples=long_samples)
    file, tokenizer = _base(model, offline)
    problems: list[dict[str, object]] = []
    report: CheckReport | None = None
    with render.Progress("records", None, beside_output=True) as bar:
        for item in look(sources, tokenizer, settings, ctx=ctx or _context(file)):
            if isinstance(item, CheckReport):
                report = item
            elif not isinstance(item, Problem):
                bar.update(item.n_records)
            elif json:
                problems.append(asdict(item))
            else:
                render.say(f"{item.path}:{item.line or 1}: {item.reason}")
    assert report is not None  # the doctor's last word
    if json:
        render.print_json({**asdict(report), "problems": problems, "is_clean": report.is_clean})
    else:
        _print(report)
    return EXIT_OK if report.is_clean else EXIT_USAGE


def show_samples(source: str, model: str, options: ShownSamples) -> int:
    """Print samples as the model will see them, the trained part in colour, or in brackets without it.

    Returns the exit code: 2 where a record among them cannot be used. Raises as `check` does.
    """
    from llamakit.dataset.chat_data import samples_of
    from llamakit.dataset.chat_records import Problem, data_files
    from llamakit.tokenizer.chat_templates import find_chat_template

    _, tokenizer = _base(model, options.offline)
    if options.chat_template is not None:
        tokenizer.chat_template = find_chat_template(options.chat_template)
    code, shown = EXIT_OK, list[dict[str, object]]()
    items = samples_of(data_files([source])[0], tokenizer, options.train_on)
    for item in islice(items, options.first, options.first + options.count):
        if isinstance(item, Problem):
            code = EXIT_USAGE
            render.error(f"{item.path}:{item.line or 1}: {item.reason}")
        elif options.json:
            shown.append({**vars(item), "text": _text(tokenizer, item.tokens)})
        else:
            _print_sample(tokenizer, item, options.ids)
    if options.json:
        render.print_json({"samples": shown})
    return code


def _base(model: str, offline: bool) -> tuple[ModelFile, Tokenizer]:
    from llamakit.formats.open import open_model
    from llamakit.tokenizer import load_tokenizer

    file = open_model(local(model, offline=offline), n_ctx=0)
    tokenizer = load_tokenizer(file)
    for warning in tokenizer.warnings:
        render.warn(warning)
    return file, tokenizer


def _context(file: ModelFile) -> int:
    """The context that a model was trained for. Raises UsageError where the file does not say."""
    context = file.metadata.get("llama.context_length")
    if not isinstance(context, int) or context < 1:
        raise UsageError("does not say how long the model's context is", path=file.path, hint="give one with --ctx N")
    return context


def _text(tokenizer: Tokenizer, tokens: Sequence[int] | np.ndarray) -> str:
    """What tokens say, special ones spelled out."""
    return b"".join(tokenizer.piece(int(id), special=True) for id in tokens).decode("utf-8", "replace")


def _print_sample(tokenizer: Tokenizer, sample: ChatSample, ids: bool) -> None:
    """A line about the sample, then its text, special tokens spelled out."""
    n, n_trained = len(sample.tokens), int(sample.trained.sum())
    render.heading(f"{sample.path}:{sample.line}  {sample.schema}, {n} tokens, {n_trained} trained")
    if ids:
        render.say(f"[{', '.join(map(str, sample.tokens.tolist()))}]")
    colored = render.has_color(sys.stdout)
    pieces: list[str] = []
    at = 0
    while at < n:
        trained = bool(sample.trained[at])
        end = at + 1
        while end < n and bool(sample.trained[end]) == trained:
            end += 1
        text = "\n".join(map(escape_control, _text(tokenizer, sample.tokens[at:end]).split("\n")))
        pieces.append(text if not trained else render.good(text) if colored else f"\u27e6{text}\u27e7")
        at = end
    print("".join(pieces).rstrip("\n") + "\n")


def _print(report: CheckReport) -> None:
    """What the doctor found, for a person."""
    if report.template is not None:
        family = f" ({report.family})" if report.family else ""
        end = f"answers end with {report.end_token}" if report.end_token else "answers end with no end token"
        _row("template", f"{report.template}{family}; {end}")
    schemas = ", ".join(f"{n:,} {schema}" for schema, n in report.schemas.items()) or "none that can be used"
    refused = ", ".join(f"{n:,} {kind}" for kind, n in report.refused.items())
    _row("records", f"{report.n_records:,}: {schemas}" + (f"; refused: {refused}" if refused else ""))
    if report.aside:
        _row("aside", f"files that are no data: {len(report.aside):,} ({_first(report.aside)})")
    if report.n_samples:
        _print_samples(report)
    for finding in report.findings:
        render.say(f"warning    {finding.text}: {finding.n:,} ({_first(finding.examples, finding.n)})")
    if report.is_clean:
        render.say("nothing is refused" + (", see the warnings" if report.findings else ""))
    else:
        render.say(f"refused: {report.n_refused:,} of {report.n_records:,} records")


def _print_samples(report: CheckReport) -> None:
    share = 100 * report.n_trained / report.n_tokens
    _row("samples", f"{report.n_samples:,}, {report.n_tokens:,} tokens, {report.n_trained:,} trained ({share:.1f} %)")
    _row(
        "length",
        f"{report.shortest:,} to {report.longest:,} tokens, median {report.median:,.0f}, 95 % up to {report.p95:,.0f}"
        f" (longest: {report.longest_source})",
    )
    most = max(n for _, _, n in report.histogram)
    width = len(f"{report.histogram[-1][1]:,}")
    for low, high, n in report.histogram:
        bar = "#" * max(round(_BAR * n / most), 1) + f" {n:,}" if n else ""
        render.say(f"  {low:>{width},}-{high:<{width},}  {bar}".rstrip())
    if report.n_cut or report.n_windowed:
        cut = f"{report.n_cut:,} are cut, {report.n_lost:,} tokens are lost" if report.n_cut else ""
        windows = f"{report.n_windowed:,} become windows" if report.n_windowed else ""
        _row("long", f"beyond --ctx {report.ctx}: {'; '.join(filter(None, (cut, windows)))}")
    _row("packed", f"{report.n_rows:,} rows of {report.ctx:,} tokens an epoch, {100 * report.filled:.0f} % full")


def _row(label: str, text: str) -> None:
    render.say(f"{label:<10} {text}")


def _first(places: Sequence[str], n: int | None = None) -> str:
    shown = ", ".join(places[:3])
    return f"{shown}, ..." if (len(places) if n is None else n) > min(3, len(places)) else shown
