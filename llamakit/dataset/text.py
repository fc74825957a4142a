"""Plain text as training samples, cut as llama.cpp's `finetune` cut it.

Without --sample-start every token starts a sample of ctx tokens (overlapping windows). With it, each occurrence of
the pattern starts one. Shapes: B batch, T ctx.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llamakit.dataset.config import SampleOptions
from llamakit.dataset.order import SampleOrder
from llamakit.errors import DataError
from llamakit.files import process_escapes, read_text
from llamakit.tokenizer import Tokenizer

# Below this many windows of ctx tokens a text is too short to give any of it away for validation.
_MIN_WINDOWS_FOR_VALIDATION = 20


@dataclass(frozen=True)
class Samples:
    """Token ids (n,) int32 and the samples in them: begins (S,) and sizes (S,) int64."""

    tokens: np.ndarray
    begins: np.ndarray
    sizes: np.ndarray


@dataclass(frozen=True)
class TrainingText:
    """A tokenized text: the samples to train on, the held-out tokens (m,) int32, its hash, what to warn about."""

    train: Samples
    validation: np.ndarray
    sha256: str
    warnings: tuple[str, ...]


def read_training_text(path: str | Path, tokenizer: Tokenizer, options: SampleOptions) -> TrainingText:
    """Tokenize a UTF-8 text and cut it. The last val_split of the tokens is held out, never trained on.

    Raises DataError for a missing, empty or too short text.
    """
    text = read_text(path)
    if not text:
        raise DataError("is empty: there is nothing to train on", path=path)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if options.sample_start:
        train, validation, warnings = _cut_at_pattern(text, tokenizer, options)
    else:
        train, validation, warnings = _cut_windows(text, tokenizer, options)
    if len(train.tokens) < 2:
        raise DataError(f"has {len(train.tokens)} tokens to train on (expected at least 2)", path=path)
    return TrainingText(train, validation, digest, tuple(warnings))


def _n_validation(n_tokens: int, options: SampleOptions) -> int:
    if options.val_split <= 0 or n_tokens < _MIN_WINDOWS_FOR_VALIDATION * options.ctx:
        return 0
    return int(n_tokens * options.val_split)


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.array(tokenizer.encode(text, add_special=False, parse_special=False), dtype=np.int32)


def _cut_windows(text: str, tokenizer: Tokenizer, options: SampleOptions) -> tuple[Samples, np.ndarray, list[str]]:
    tokens = _encode(tokenizer, text)
    n = len(tokens) - _n_validation(len(tokens), options)
    train, validation = tokens[:n], tokens[n:]
    count = max(1, n - options.ctx)
    sizes = np.full(count, min(options.ctx, n), dtype=np.int64)
    return Samples(train, np.arange(count, dtype=np.int64), sizes), validation, []


def _pattern_starts(data: bytes, pattern: bytes) -> list[int]:
    """Byte positions of the pattern, searched on behind each occurrence; [0] where it does not occur."""
    starts, at = [], data.find(pattern)
    while at >= 0:
        starts.append(at)
        at = data.find(pattern, at + len(pattern))
    return starts or [0]


def _piece(data: bytes, begin: int, end: int) -> str:
    """Bytes [begin, end) as text; an end inside a UTF-8 sequence moves to the next character."""
    while end < len(data) and data[end] & 0xC0 == 0x80:
        end += 1
    return data[begin : max(begin, end)].decode()


def _cut_at_pattern(text: str, tokenizer: Tokenizer, options: SampleOptions) -> tuple[Samples, np.ndarray, list[str]]:
    pattern = (process_escapes(options.sample_start) if options.escape else options.sample_start).encode()
    data = text.encode()
    starts, warnings = _pattern_starts(data, pattern), []
    if pattern not in data:
        warnings.append(f"the sample start {pattern.decode()!r} does not occur in the text: all of it is one sample")
    offset = 0 if options.include_sample_start else len(pattern)
    begins = [min(start + offset, len(data)) for start in starts]
    ends = [*starts[1:], len(data)]
    pieces = [_encode(tokenizer, _piece(data, b, e)) for b, e in zip(begins, ends, strict=True)]
    kept = _n_training_pieces(pieces, options)
    train, validation = pieces[:kept], pieces[kept:]
    if options.overlapping_samples:
        longest = max(len(tokenizer.piece(i, special=True)) for i in range(tokenizer.n_vocab))
        cut = ends[kept - 1]  # no training sample reaches into the held-out text
        reach = [min(begin + options.ctx * longest, cut) for begin in begins[:kept]]
        train = [_encode(tokenizer, _piece(data, b, e)) for b, e in zip(begins, reach, strict=False)]
    sizes = np.array([len(piece) for piece in train], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    warnings += _size_warnings(sizes, options.ctx)
    held_out = np.concatenate(validation) if validation else np.empty(0, dtype=np.int32)
    return Samples(np.concatenate(train), offsets, sizes), held_out, warnings


def _n_training_pieces(pieces: list[np.ndarray], options: SampleOptions) -> int:
    """How many whole samples are trained on: the last ones are held out while they stay within val_split."""
    budget, kept = _n_validation(sum(map(len, pieces)), options), len(pieces)
    while budget and kept > 1 and len(pieces[kept - 1]) <= budget:
        kept -= 1
        budget -= len(pieces[kept])
    return kept


def _size_warnings(sizes: np.ndarray, ctx: int) -> list[str]:
    """The three warnings of the old tool about samples that do not fit the context."""
    longer, shorter, empty = int((sizes > ctx).sum()), int((sizes < ctx).sum()), int((sizes == 0).sum())
    median = float(np.median(sizes))
    warnings = []
    if longer:
        warnings.append(
            f"{longer} of {len(sizes)} samples are longer than the context of {ctx}"
            f" (longest {int(sizes.max())}, median {median:.0f} tokens): their ends are only seen with"
            " --sample-random-offsets"
        )
    if shorter:
        warnings.append(
            f"{shorter} of {len(sizes)} samples are shorter than the context of {ctx} (median {median:.0f} tokens):"
            " they are padded with end tokens; --fill-with-next-samples fills them with text"
        )
    if empty:
        warnings.append(f"{empty} of {len(sizes)} samples are empty")
    return warnings


@dataclass(frozen=True)
class Batch:
    """inputs and targets (B, T) int64: targets are the inputs shifted by one; used: samples that it consumed."""

    inputs: np.ndarray
    targets: np.ndarray
    used: int

    @property
    def n_tokens(self) -> int:
        """Tokens that go through the model."""
        return self.targets.size

    @property
    def n_trained(self) -> int:
        """Tokens that have a loss: all."""
        return self.targets.size


class BatchBuilder:
    """Rows of a batch from samples, in an order: BOS first, then the sample; what is left is EOS, and counts.

    With fill_with_next_samples a row goes on with the next samples instead, separated by EOS or BOS as asked.
    """

    def __init__(self, samples: Samples, options: SampleOptions, *, bos: int, eos: int, n_vocab: int) -> None:
        self._samples, self._options = samples, options
        self._bos, self._eos, self._n_vocab = bos, eos, n_vocab

    def build(self, order: SampleOrder, batch: int) -> Batch:
        """The next `batch` rows; the order itself is not moved."""
        rows, used = [], 0
        for _ in range(batch):
            row, n = self._row(order, used)
            rows.append(row)
            used += n
        targets = np.stack(rows)
        inputs = np.concatenate([np.full((batch, 1), self._bos), targets[:, :-1]], axis=1)
        return Batch(inputs.astype(np.int64), targets, used)

    def _sample(self, order: SampleOrder, ahead: int) -> np.ndarray:
        i = order.sample(ahead)
        begin, size = int(self._samples.begins[i]), int(self._samples.sizes[i])
        return self._samples.tokens[begin : begin + size]

    def _row(self, order: SampleOrder, ahead: int) -> tuple[np.ndarray, int]:
        row = np.full(self._options.ctx, self._eos, dtype=np.int64)
        tokens = self._sample(order, ahead)
        if self._options.sample_random_offsets and len(tokens) > 1:
            tokens = tokens[int((len(tokens) - 1) * order.uniform(ahead)) :]
        used, at = 1, 0
        separators = [self._eos] * self._options.separate_with_eos + [self._bos] * self._options.separate_with_bos
        while True:
            n = min(len(tokens), self._options.ctx - at)
            row[at : at + n] = np.clip(tokens[:n], 0, self._n_vocab - 1)
            at += n
            if at >= self._options.ctx or not self._options.fill_with_next_samples:
                return row, used
            for separator in separators[: self._options.ctx - at]:
                row[at], at = separator, at + 1
            if at >= self._options.ctx:
                return row, used
            tokens = self._sample(order, ahead + used)
            if len(tokens) == 0:
                at += 1  # an empty sample leaves the EOS that the old tool put there
            used += 1
