"""The samples of a training run: read, rendered, fitted to the context, counted, and held out for validation."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llamakit.dataset.chat import ChatSample, read_samples
from llamakit.dataset.chat_records import Problem, Record, data_files, read_records
from llamakit.dataset.config import ChatOptions
from llamakit.dataset.order import shuffled
from llamakit.errors import DataError
from llamakit.tokenizer import Tokenizer
from llamakit.tokenizer.chat_templates import find_chat_template

#: the epoch whose shuffle says what is held out; no run trains in it
_HELD_OUT = -1


@dataclass(frozen=True)
class ChatCounts:
    """What became of the data.

    n_records: records read. n_cut, n_cut_tokens: samples that were too long and lost their end, and the tokens lost;
    n_windowed: those that became several. not_ended: samples with an answer that no end token follows. double_bos:
    samples with a BOS too many, which was taken away. changed, unlike: answers that the template changed, or asks for
    with another text than stands before them. dropped: messages that it left out. schemas: how many records are of
    which. skipped: what was left out. aside: files of a folder that are no data.
    """

    n_records: int
    n_cut: int
    n_cut_tokens: int
    n_windowed: int
    not_ended: int
    double_bos: int
    changed: int
    unlike: int
    dropped: int
    schemas: dict[str, int]
    skipped: tuple[Problem, ...]
    aside: tuple[str, ...]


@dataclass(frozen=True)
class ChatData:
    """Samples of at most ctx + 1 tokens, one behind the other.

    tokens: (n,) int32. trained: (n,) bool, targets of the loss. begins, sizes: (S,) int64. sources: (S,) the record,
    "file:line", of each. sha256: of tokens, targets and bounds.
    """

    tokens: np.ndarray
    trained: np.ndarray
    begins: np.ndarray
    sizes: np.ndarray
    sources: tuple[str, ...]
    sha256: str

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.sizes)

    @property
    def n_trained(self) -> int:
        """Number of tokens that a loss is taken on, in one epoch."""
        return int(self.trained.sum())

    def sample(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n,) int32 of one sample, and which of them are trained (n,) bool."""
        part = slice(int(self.begins[number]), int(self.begins[number] + self.sizes[number]))
        return self.tokens[part], self.trained[part]


def read_chat_data(
    sources: Sequence[str | os.PathLike[str]], tokenizer: Tokenizer, options: ChatOptions, *, ctx: int
) -> tuple[ChatData, ChatCounts]:
    """Read, render and fit everything; options.chat_template becomes the tokenizer's.

    Raises DataError for the first thing that cannot be used, unless options.on_error is "skip", and where nothing is
    left to train on; UsageError for a source or a template that is not there; UnsupportedError where there is no
    template for messages; FormatError for a template that exceeds its limits.
    """
    if options.chat_template is not None:
        tokenizer.chat_template = find_chat_template(options.chat_template)
    files, aside = data_files(sources)
    totals, schemas = Counter[str](), Counter[str]()
    skipped: list[Problem] = []
    pieces: list[Piece] = []
    for item in samples_of(files, tokenizer, options.train_on):
        totals["records"] += 1
        found = item if isinstance(item, Problem) else fitted(item, ctx, options.long_samples)
        if isinstance(found, Problem):
            if options.on_error == "stop":
                raise found.error()
            skipped.append(found)
            continue
        assert isinstance(item, ChatSample)
        schemas[item.schema] += 1
        totals.update(double=item.double_bos, not_ended=not item.ended)
        totals.update(changed=item.changed, unlike=item.unlike, dropped=item.dropped)
        lost = len(item.tokens) - (ctx + 1)
        if lost > 0:
            totals.update({"cut": 1, "lost": lost} if is_cut(item, options.long_samples) else {"windowed": 1})
        pieces += found
    if not pieces:
        first = skipped[0]
        if all(problem.line is None for problem in skipped):  # empty files have no record
            raise first.error()
        raise DataError(
            f"there is nothing to train on: all {len(skipped)} records were skipped (this one: {first.reason})",
            path=first.path,
            line=first.line,
            hint="llamakit data check says what is wrong with each",
        )
    counts = ChatCounts(
        n_records=totals["records"],
        n_cut=totals["cut"],
        n_cut_tokens=totals["lost"],
        n_windowed=totals["windowed"],
        not_ended=totals["not_ended"],
        double_bos=totals["double"],
        changed=totals["changed"],
        unlike=totals["unlike"],
        dropped=totals["dropped"],
        schemas=dict(schemas),
        skipped=tuple(skipped),
        aside=tuple(str(file) for file in aside),
    )
    return joined(pieces), counts


def samples_of(
    files: Iterable[str | os.PathLike[str]],
    tokenizer: Tokenizer,
    train_on: str,
    on_record: Callable[[Record], None] | None = None,
) -> Iterator[ChatSample | Problem]:
    """The sample of every record of some files, or the problem in its place; problems of reading may come first.

    on_record: called with each record that could be read, before its sample is made. Raises as `read_chat_data` does,
    but never for a record.
    """
    held: list[Problem] = []

    def sound() -> Iterator[Record]:
        for file in files:
            for item in read_records(file):
                if isinstance(item, Problem):
                    held.append(item)
                else:
                    if on_record is not None:
                        on_record(item)
                    yield item

    for sample in read_samples(tokenizer, sound(), train_on):
        yield from held
        held.clear()
        yield sample
    yield from held


@dataclass(frozen=True)
class Piece:
    """A sample, or a window of one, that fits: tokens (n,) int32, trained (n,) bool, and its record, "file:line"."""

    tokens: np.ndarray
    trained: np.ndarray
    source: str


def fitted(sample: ChatSample, ctx: int, long_samples: str) -> list[Piece] | Problem:
    """A sample as pieces of at most ctx + 1 tokens: ctx inputs, and a target behind each.

    long_samples "cut": the end is lost, unless it is a text without answers, which always becomes windows. "window":
    the next piece begins with the last token of the one before, so that each token is a target once; a piece without
    any target that is trained is left out, since nothing is learnt there.
    A Problem where the cut leaves nothing to train on.
    """
    source = f"{sample.path}:{sample.line}"
    if len(sample.tokens) <= ctx + 1:
        return [Piece(sample.tokens, sample.trained, source)]
    if is_cut(sample, long_samples):
        if not sample.trained[: ctx + 1].any():
            first = int(np.argmax(sample.trained)) + 1
            return Problem(
                sample.path,
                sample.line,
                "untrained",
                f"nothing to train on is left of it when it is cut: it has {len(sample.tokens)} tokens, the first that"
                f" is trained is number {first}, and --ctx {ctx} holds {ctx + 1}",
            )
        return [Piece(sample.tokens[: ctx + 1], sample.trained[: ctx + 1], source)]
    pieces = []
    for begin in range(0, len(sample.tokens) - 1, ctx):
        tokens, trained = sample.tokens[begin : begin + ctx + 1], sample.trained[begin : begin + ctx + 1].copy()
        trained[0] = False  # it was a target in the piece before
        if trained.any():
            pieces.append(Piece(tokens, trained, source))
    return pieces


def is_cut(sample: ChatSample, long_samples: str) -> bool:
    """Whether a sample that is too long loses its end. Of a text there is no part that belongs to another."""
    return long_samples == "cut" and not sample.whole


def joined(pieces: Sequence[Piece]) -> ChatData:
    """Pieces as the samples of a run, in their order."""
    tokens = np.concatenate([piece.tokens for piece in pieces]).astype(np.int32)
    trained = np.concatenate([piece.trained for piece in pieces])
    sizes = np.array([len(piece.tokens) for piece in pieces], dtype=np.int64)
    begins = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    digest = hashlib.sha256(tokens.tobytes() + np.packbits(trained).tobytes() + sizes.tobytes()).hexdigest()
    return ChatData(tokens, trained, begins, sizes, tuple(piece.source for piece in pieces), digest)


def hold_out(data: ChatData, share: float, seed: int) -> tuple[ChatData, ChatData | None]:
    """(training, validation): a share of the samples, drawn by the seed, is held out; None where it rounds to none.

    The windows of one record stay together, so that nothing of a validation sample is trained on. At least one record
    is left to train on.
    """
    records = list(dict.fromkeys(data.sources))
    n_held = min(round(share * len(records)), len(records) - 1)
    if n_held <= 0:
        return data, None
    drawn = shuffled(seed, _HELD_OUT, np.arange(n_held, dtype=np.int64), len(records))
    held = {records[i] for i in drawn}
    pieces = [Piece(*data.sample(i), source) for i, source in enumerate(data.sources)]
    return joined([p for p in pieces if p.source not in held]), joined([p for p in pieces if p.source in held])
