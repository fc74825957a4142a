"""`llamakit data`: a corpus becomes tokens (`prepare`), and what a model will see of it (`show`)."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llamakit.cli import render
from llamakit.cli.chat_data_options import ChatTemplateOption, TrainOnOption
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
from llamakit.cli.data_check import ShownSamples, show_samples
from llamakit.cli.options import COMPUTE, DATA, FILES, OUTPUT, ConfigOption, JsonOption, OfflineOption
from llamakit.cli.sources import local
from llamakit.dataset.prepare_config import PrepareConfig
from llamakit.errors import EXIT_OK, EXIT_TERMINATED, UnsupportedError, UsageError

if TYPE_CHECKING:
    from llamakit.dataset.prepare import Prepared
    from llamakit.dataset.show import Window
    from llamakit.dataset.tokens import TokenData
    from llamakit.tokenizer import Tokenizer

_D = PrepareConfig


def prepare(
    inputs: InputsArgument = None,
    input_option: InputOption = None,
    name: NameOption = _D.name,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="DIR", help="Folder to write.  [required]", rich_help_panel=FILES),
    ] = None,
    format: FormatOption = _D.format,
    text_key: TextKeyOption = _D.text_key,
    split_on: SplitOnOption = _D.split_on,
    errors: ErrorsOption = _D.errors,
    val_split: Annotated[
        float, typer.Option("--val-split", metavar="F", help="Share that is held out; 0: none.", rich_help_panel=DATA)
    ] = _D.val_split,
    seed: SeedOption = _D.seed,
    vocab_model: Annotated[
        str | None,
        typer.Option(
            "--vocab-model",
            metavar="FILE",
            help="Vocabulary of a GGUF, tokenizer.model, tokenizer.json or a model's folder.",
            rich_help_panel=VOCABULARY,
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option("--vocab-size", metavar="N", help="Make a new one of N tokens.", rich_help_panel=VOCABULARY),
    ] = _D.vocab_size,
    character_coverage: CoverageOption = _D.character_coverage,
    dtype: Annotated[
        Literal["auto", "uint16", "uint32"],
        typer.Option("--dtype", help="Type of a token; auto: uint16 where it fits.", rich_help_panel=OUTPUT),
    ] = _D.dtype,
    shard_tokens: Annotated[
        int, typer.Option("--shard-tokens", metavar="N", help="Tokens of a file, about.", rich_help_panel=OUTPUT)
    ] = _D.shard_tokens,
    workers: Annotated[
        int | None,
        typer.Option("--workers", metavar="N", help="Processes.", show_default="all cores", rich_help_panel=COMPUTE),
    ] = _D.workers,
    offline: OfflineOption = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Turn a corpus into tokens to train on, in llama2.c's layout: shards, an index, the vocabulary."""
    if out is None:
        raise UsageError("no folder to write is named", hint="name one with -o DIR")
    settings = PrepareConfig(
        inputs=corpus(inputs, input_option, offline=offline), name=name, out=out, format=format, text_key=text_key,
        split_on=split_on, errors=errors, val_split=val_split, seed=seed,
        vocab_model=local(vocab_model, offline=offline), vocab_size=vocab_size, character_coverage=character_coverage,
        dtype=dtype, shard_tokens=shard_tokens, workers=workers,
    )  # fmt: skip
    _print_prepared(run_prepare(settings), json)


@contextlib.contextmanager
def _signals_clean_up() -> Iterator[Callable[[], None]]:
    """SIGTERM leaves as Ctrl-C does: what was half written is removed. Gives a function to be called now and then: it
    leaves where a signal came whose exception was lost, as Python does with one in a callback of a finished future."""
    came: list[int] = []

    def leave(number: int, frame: object) -> None:
        came.append(number)
        look()

    def look() -> None:
        if came:
            raise KeyboardInterrupt if came[0] == signal.SIGINT else SystemExit(EXIT_TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield look
        return
    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield look
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_prepare(settings: PrepareConfig) -> Prepared:
    """Prepare a corpus with a bar on a terminal, and what there is to know on stderr; what came of it."""
    from llamakit.dataset import prepare as verb

    result: Prepared | None = None
    bar = render.Progress("tokenizing (kB)", total=None, fields=("documents", "tokens"))
    reports = contextlib.closing(verb.prepare(settings, stdin=sys.stdin.buffer))
    with _signals_clean_up() as look, bar, reports as told:
        for report in told:
            look()
            if isinstance(report, verb.Reading):
                log_reading(report.n_files, report.n_bytes)
                bar.set_total(report.n_bytes // 1000)
                if report.n_left_out:
                    render.note(f"{report.n_left_out} files of these folders are left out: their names do not say text")
            elif isinstance(report, verb.TrainingVocabulary):
                render.log(f"making a vocabulary of {report.n_vocab} tokens")
            elif isinstance(report, verb.VocabularyReady):
                for warning in report.warnings:
                    render.warn(warning)
            elif isinstance(report, verb.Encoding):
                documents, tokens = report.n_documents, render.human_count(report.n_tokens)
                bar.update(report.n_bytes // 1000, documents=documents, tokens=tokens)
            elif isinstance(report, verb.Prepared):
                result = report
    assert result is not None
    if result.n_replaced:
        render.warn(f"{result.n_replaced} places that were no UTF-8 are now U+FFFD")
    if not result.n_validation_tokens:
        render.note("nothing is held out: there is no data00.bin, and no loss of unseen text to be seen in training")
    return result


def _print_prepared(report: Prepared, json: bool) -> None:
    if json:
        shards = [vars(shard) for shard in report.shards]
        render.print_json({**vars(report), "bytes_per_token": report.bytes_per_token, "shards": shards})
        return
    render.heading("Example document:")
    render.stream(f"{report.example}\n\n")
    rows = {
        "documents": f"{report.n_documents}",
        "tokens": f"{report.n_tokens} ({report.n_validation_tokens} held out)",
        "bytes per token": f"{report.bytes_per_token:.2f}",
        "longest": f"{report.longest} tokens",
        "empty": f"{report.n_empty}",
        "duplicates": f"{report.n_duplicates}",
        "vocabulary": f"{report.n_vocab} tokens, {report.dtype}",
        "time": render.human_duration(report.elapsed_s),
    }
    for label, value in rows.items():
        render.say(f"{label:<17}{value}")
    for shard in report.shards:
        render.say(f"Saved {report.path / shard.file}, average seqlen: {shard.n_tokens / shard.n_documents:.2f}")


def show(
    path: Annotated[
        str,
        typer.Argument(
            metavar="DIR|FILE",
            help="Folder of tokens, or a .bin file; with -m also text, JSON lines, JSON, CSV or a folder of these.",
            show_default=False,
        ),
    ],
    n: Annotated[int, typer.Option("-n", metavar="N", help="Samples to show.", rich_help_panel=OUTPUT)] = 3,
    first: Annotated[
        int, typer.Option("--first", metavar="N", help="Number of the first.", rich_help_panel=OUTPUT)
    ] = 0,
    ctx: Annotated[int, typer.Option("--ctx", "-c", help="Tokens of a sample.", rich_help_panel=DATA)] = 256,
    split: Annotated[
        Literal["train", "validation"], typer.Option("--split", help="Which part.", rich_help_panel=DATA)
    ] = "train",
    vocab_model: Annotated[
        str | None,
        typer.Option(
            "--vocab-model",
            "-m",
            metavar="FILE",
            help="Vocabulary of tokens that have none beside them; the base of questions and answers.",
            rich_help_panel=FILES,
        ),
    ] = None,
    chat_template: ChatTemplateOption = None,
    train_on: TrainOnOption = "assistant",
    ids: Annotated[bool, typer.Option("--ids", help="Print the ids, too.", rich_help_panel=OUTPUT)] = False,
    offline: OfflineOption = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> int:
    """Print samples as the model will see them, special tokens spelled out, and which part is trained."""
    from llamakit.dataset.show import windows
    from llamakit.dataset.tokens import holds_tokens, open_tokens

    place = Path(path)
    if vocab_model is not None and place.suffix != ".bin" and place.exists() and not holds_tokens(place):
        options = ShownSamples(chat_template, train_on, first=first, count=n, ids=ids, json=json, offline=offline)
        return show_samples(path, vocab_model, options)
    data = open_tokens(_checked(place))
    part = data.train if split == "train" else data.validation
    found = list(windows(data, part, ctx, first=first, n=n))
    tokenizer = _tokenizer(data, local(vocab_model, offline=offline))
    if json:
        render.print_json({"split": split, "samples": [_json_of(window, tokenizer) for window in found]})
        return EXIT_OK
    for window in found:
        stop = window.start + len(window.ids)
        at = f"tokens {window.start} to {stop - 1} of {window.file.name}"
        render.heading(f"{split} {window.number} of {window.count}: {at}")
        if ids or tokenizer is None:
            render.say(f"[{', '.join(map(str, window.ids.tolist()))}]")
        if tokenizer is not None:
            render.stream(_text(window, tokenizer) + "\n")
        render.say()
    if tokenizer is None:
        render.note("no vocabulary is known for these tokens: --vocab-model FILE shows them as text")
    return EXIT_OK


def _checked(path: Path) -> Path:
    """The path, if it can hold tokens at all; what else it is, is told."""
    from llamakit.dataset.tokens import holds_tokens
    from llamakit.formats.open import sniff

    if not path.exists() or holds_tokens(path):
        kind = sniff(path) if path.is_file() else ""
        if not kind.startswith("llama2c"):
            return path
        raise UnsupportedError(f"is no token file ({kind})", path=path, hint=f"llamakit inspect {path}")
    hint = "make tokens of it with: llamakit data prepare; -m MODEL shows questions and answers"
    raise UnsupportedError("holds no tokens (expected a folder of *.bin shards, or such a file)", path=path, hint=hint)


def _tokenizer(data: TokenData, given: Path | None) -> Tokenizer | None:
    from llamakit.dataset.tokens import check_vocabulary
    from llamakit.formats.vocabulary import vocabulary_only
    from llamakit.tokenizer.load import tokenizer_of

    path = given or data.vocabulary_file
    if path is None:
        return None
    vocabulary = vocabulary_only(path)
    if given is not None:
        check_vocabulary(data, vocabulary, given)
    return tokenizer_of(vocabulary, path)


def _text(window: Window, tokenizer: Tokenizer) -> str:
    return b"".join(tokenizer.piece(id, special=True) for id in window.ids.tolist()).decode("utf-8", "replace")


def _json_of(window: Window, tokenizer: Tokenizer | None) -> dict[str, object]:
    text = None if tokenizer is None else _text(window, tokenizer)
    return {**vars(window), "text": text}
