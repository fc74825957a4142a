"""The doctor of training data: what would be refused, what would be lost, and what the model would learn from it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from llamakit.dataset.chat import ChatSample, ending_of
from llamakit.dataset.chat_data import Piece, fitted, is_cut, joined, samples_of
from llamakit.dataset.chat_records import Problem, Record, data_files
from llamakit.dataset.config import CheckConfig
from llamakit.dataset.literal import find_literal, foreign_marks, marks_in
from llamakit.dataset.packing import ChatBatches
from llamakit.tokenizer import Tokenizer
from llamakit.tokenizer.chat_templates import find_chat_template

_MOST_BINS, _EXAMPLES = 12, 3
#: widths of a histogram's bars, in tokens, times powers of ten
_WIDTHS = (1, 2, 5)


@dataclass(frozen=True)
class Finding:
    """Something to know that is no reason to refuse a sample. kind: a word; n: how often; text: what it means, in one
    line; examples: the first places, "file:line"."""

    kind: str
    n: int
    text: str
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Checked:
    """So many records have been looked at."""

    n_records: int


@dataclass(frozen=True)
class CheckReport:
    """What there is to know about some training data and a model.

    template: "the model's own", or the one that was named; None where no record needs one. family: of which kind it is,
    where that is known. ending: what it writes behind an answer; end_token: the end token in there. schemas: how many
    records are of which. n_refused: records that cannot be used, by kind in `refused`. n_tokens, n_trained: of the
    samples as they are, uncut. shortest, median, p95, longest: tokens of a sample; longest_source: the longest's place.
    histogram: (least, most, number of samples) of each bar. ctx: tokens of a row. n_cut: samples that lose their end,
    n_lost: tokens that they lose; n_windowed: samples that become several. n_rows: rows of an epoch when short samples
    share them, filled to `filled`. aside: files of a folder that are no data.
    """

    files: tuple[str, ...]
    template: str | None
    family: str | None
    ending: str
    end_token: str | None
    schemas: dict[str, int]
    n_records: int
    n_refused: int
    refused: dict[str, int]
    n_samples: int
    n_tokens: int
    n_trained: int
    shortest: int
    median: float
    p95: float
    longest: int
    longest_source: str
    histogram: tuple[tuple[int, int, int], ...]
    ctx: int
    n_cut: int
    n_windowed: int
    n_lost: int
    n_rows: int
    filled: float
    findings: tuple[Finding, ...]
    aside: tuple[str, ...]

    @property
    def is_clean(self) -> bool:
        """Whether nothing is refused, and there is something to train on."""
        return not self.n_refused and self.n_samples > 0


def check(
    sources: Sequence[str | os.PathLike[str]], tokenizer: Tokenizer, config: CheckConfig, *, ctx: int
) -> Iterator[Problem | Checked | CheckReport]:
    """Look at every record: each problem as it is found, how far it is now and then, the report at the end.

    ctx: tokens of a row. config.chat_template becomes the tokenizer's. Raises UsageError for a source or a template
    that is not there, UnsupportedError where messages need a template and there is none, FormatError for a template
    that exceeds its limits; never for a record.
    """
    template = "the model's own"
    if config.chat_template is not None:
        tokenizer.chat_template = find_chat_template(config.chat_template)
        template = config.chat_template
    files, aside = data_files(sources)
    doctor = _Doctor(tokenizer, config, ctx)
    for item in samples_of(files, tokenizer, config.train_on, doctor.look_at):
        problem = doctor.take(item)
        if problem is not None:
            yield problem
        if doctor.n_records % 1000 == 0:
            yield Checked(doctor.n_records)
    yield doctor.report(files, template, [str(file) for file in aside])


def histogram(lengths: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """(least, most, number) of at most 12 bars of equal width that hold every length."""
    if not lengths:
        return ()
    low, high = min(lengths), max(lengths)
    widths = (width * 10**power for power in range(9) for width in _WIDTHS)
    width = next(w for w in widths if high // w - low // w < _MOST_BINS)
    counts = Counter(length // width for length in lengths)
    return tuple((b * width, b * width + width - 1, counts[b]) for b in range(low // width, high // width + 1))


@dataclass
class _Notes:
    """Places of one kind of finding."""

    n: int = 0
    places: list[str] = field(default_factory=list)
    words: Counter[str] = field(default_factory=Counter)

    def add(self, place: str, n: int = 1, words: Sequence[str] = ()) -> None:
        self.n += n
        self.words.update(words)
        if len(self.places) < _EXAMPLES:
            self.places.append(place)


class _Doctor:
    """Counts what passes."""

    def __init__(self, tokenizer: Tokenizer, config: CheckConfig, ctx: int) -> None:
        self._tokenizer, self._config, self._ctx = tokenizer, config, ctx
        self.n_records = 0
        self._refused, self._schemas = Counter[str](), Counter[str]()
        self._notes: dict[str, _Notes] = {}
        self._seen: dict[bytes, str] = {}
        self._pieces: list[Piece] = []
        self._lengths: list[int] = []
        self._n_trained, self._n_cut, self._n_windowed, self._n_lost = 0, 0, 0, 0
        self._longest = (0, "")
        self._family = find_literal(tokenizer.chat_template or "")

    def _note(self, kind: str, place: str, n: int = 1, words: Sequence[str] = ()) -> None:
        if n:
            self._notes.setdefault(kind, _Notes()).add(place, n, words)

    def look_at(self, record: Record) -> None:
        """What a record holds that a model would read as something else than text."""
        place = f"{record.path}:{record.line}"
        if record.messages:
            found = [mark for message in record.messages for mark in marks_in(message.content, self._tokenizer)]
            self._note("marks", place, bool(found), list(dict.fromkeys(found)))
            return
        foreign = foreign_marks(record.text, self._tokenizer)
        self._note("foreign", place, bool(foreign), foreign)
        family = find_literal(record.text)
        if family is not None and self._family is not None and family is not self._family:
            self._note("mismatch", place, 1, [family.name])

    def take(self, item: ChatSample | Problem) -> Problem | None:
        """Count a sample, or why there is none; gives back the problem."""
        self.n_records += 1
        found = item if isinstance(item, Problem) else fitted(item, self._ctx, self._config.long_samples)
        if isinstance(found, Problem):
            self._refused[found.kind] += 1
            return found
        assert isinstance(item, ChatSample)
        place, n = f"{item.path}:{item.line}", len(item.tokens)
        self._schemas[item.schema] += 1
        self._lengths.append(n)
        self._n_trained += int(item.trained.sum())
        self._longest = max(self._longest, (n, place), key=lambda pair: pair[0])
        if n > self._ctx + 1:
            cut = is_cut(item, self._config.long_samples)
            self._n_cut += cut
            self._n_windowed += not cut
            self._n_lost += n - (self._ctx + 1) if cut else 0
        first = self._seen.setdefault(item.tokens.tobytes(), place)
        self._note("duplicate", f"{place} is {first}", first != place)
        self._note("double BOS", place, item.double_bos)
        self._note("no end", place, not item.ended)
        self._note("changed", place, item.changed)
        self._note("unlike", place, item.unlike)
        self._note("dropped", place, item.dropped)
        self._pieces += found
        return None

    def _findings(self) -> tuple[Finding, ...]:
        bos, own = _spelled(self._tokenizer, self._tokenizer.bos_id), self._family.name if self._family else "?"
        meanings = {
            "duplicate": "samples that are the same as an earlier one, and count twice",
            "double BOS": f"samples that begin with two {bos}, of which one is taken away",
            "no end": "samples with an answer that no end token of the vocabulary follows: to stop is not learnt",
            "marks": "samples with {words} within their messages, which a model reads as turns, not as text",
            "foreign": "texts with {words}, no special tokens of this vocabulary: spelled out in letters",
            "mismatch": f"texts in another template ({{words}}) than the model's, which is {own}'s",
            "changed": "answers that the template changes: what it drops from them is not learnt",
            "unlike": "answers that follow another text here than the one that the template asks them with",
            "dropped": "messages that the template leaves out: a system message that it does not know, perhaps",
        }
        return tuple(
            Finding(kind, notes.n, text.replace("{words}", ", ".join(list(notes.words)[:6])), tuple(notes.places))
            for kind, text in meanings.items()
            if (notes := self._notes.get(kind)) is not None
        )

    def report(self, files: Sequence[os.PathLike[str]], template: str, aside: Sequence[str]) -> CheckReport:
        """Everything, at the end."""
        needs_template = any(schema != "text" for schema in self._schemas)
        ending = ending_of(self._tokenizer) if needs_template else None
        n_rows, filled = 0, 0.0
        if self._pieces:
            data = joined(self._pieces)
            n_rows = ChatBatches(data, ctx=self._ctx, pack=True, pad=0).n_rows(0, 0)
            filled = float((data.sizes - 1).sum()) / (n_rows * self._ctx)
        lengths = np.array(self._lengths or [0])
        return CheckReport(
            files=tuple(str(file) for file in files),
            template=template if needs_template else None,
            family=self._family.name if self._family and needs_template else None,
            ending=ending.text if ending else "",
            end_token=_spelled(self._tokenizer, ending.token) if ending and ending.token is not None else None,
            schemas=dict(self._schemas),
            n_records=self.n_records,
            n_refused=sum(self._refused.values()),
            refused=dict(self._refused),
            n_samples=len(self._lengths),
            n_tokens=int(lengths.sum()),
            n_trained=self._n_trained,
            shortest=int(lengths.min()),
            median=float(np.median(lengths)),
            p95=float(np.percentile(lengths, 95)),
            longest=self._longest[0],
            longest_source=self._longest[1],
            histogram=histogram(self._lengths),
            ctx=self._ctx,
            n_cut=self._n_cut,
            n_windowed=self._n_windowed,
            n_lost=self._n_lost,
            n_rows=n_rows,
            filled=filled,
            findings=self._findings(),
            aside=tuple(aside),
        )


def _spelled(tokenizer: Tokenizer, id: int | None) -> str:
    return "" if id is None else tokenizer.piece(id, special=True).decode("utf-8", "replace")
