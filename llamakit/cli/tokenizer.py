"""`llamakit tokenizer`: a vocabulary of one's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from llamakit.cli import render
from llamakit.cli.corpus_options import (
    VOCABULARY,
    CoverageOption,
    ErrorsOption,
    FormatOption,
    InputOption,
    InputsArgument,
    NameOption,
    SeedOption,
    SplitOnOption,
    TextKeyOption,
    corpus,
    log_reading,
)
from llamakit.cli.options import FILES, ConfigOption, JsonOption, OfflineOption
from llamakit.dataset.prepare_config import TrainTokenizerConfig
from llamakit.errors import UsageError
from llamakit.files import as_argument

_D = TrainTokenizerConfig


def train(
    inputs: InputsArgument = None,
    input_option: InputOption = None,
    name: NameOption = _D.name,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            metavar="FILE",
            help="tokenizer.model to write, or a .gguf.  [required]",
            rich_help_panel=FILES,
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option("--vocab-size", metavar="N", help="Tokens.  [required]", rich_help_panel=VOCABULARY),
    ] = None,
    character_coverage: CoverageOption = _D.character_coverage,
    format: FormatOption = _D.format,
    text_key: TextKeyOption = _D.text_key,
    split_on: SplitOnOption = _D.split_on,
    errors: ErrorsOption = _D.errors,
    seed: SeedOption = _D.seed,
    offline: OfflineOption = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Make a vocabulary from a text, as llama2.c does: SentencePiece BPE, bytes for what it does not know."""
    if out is None or vocab_size is None:
        missing = "no file to write is named" if out is None else "the size of the vocabulary is not given"
        raise UsageError(missing, hint="name them, such as: -o tokenizer.model --vocab-size 4096")
    settings = TrainTokenizerConfig(
        inputs=corpus(inputs, input_option, offline=offline), name=name, out=out, vocab_size=vocab_size,
        character_coverage=character_coverage, format=format, text_key=text_key, split_on=split_on, errors=errors,
        seed=seed,
    )  # fmt: skip
    from llamakit.dataset.new_tokenizer import ReadingCorpus, train_tokenizer

    for report in train_tokenizer(settings, stdin=sys.stdin.buffer):
        if isinstance(report, ReadingCorpus):
            log_reading(report.n_files, report.n_bytes)
        elif json:
            render.print_json(vars(report))
        else:
            longest = ", ".join(repr(text.replace("\u2581", " ")) for text in report.longest)
            render.say(
                f"{report.path}: {report.n_vocab} tokens, {report.n_characters} of them single characters, "
                f"in {render.human_duration(report.elapsed_s)}"
            )
            render.say(f"longest: {longest}")
            render.hint(f"llamakit data prepare INPUT --vocab-model {as_argument(report.path)} -o DIR")
