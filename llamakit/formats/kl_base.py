"""llama-perplexity's file of a base model's log-probabilities, read and written.

Little-endian: `_logits_`, u32 n_ctx, i32 n_vocab, i32 n_chunk, i32 tokens[n_chunk * n_ctx], then for every scored
position of every chunk (n_ctx / 2 to n_ctx - 2) one row of u16: float32 scale, float32 minimum, n_vocab steps, one word
more where n_vocab is odd. log p = scale * step + minimum. Source: llama.cpp tools/perplexity/perplexity.cpp.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from llamakit.errors import FormatError, UsageError
from llamakit.files import atomic_path

MAGIC = b"_logits_"
_HEADER = len(MAGIC) + 12


def row_words(n_vocab: int) -> int:
    """u16 words of one row."""
    return 2 * ((n_vocab + 1) // 2) + 4


def n_scored(n_ctx: int) -> int:
    """Scored positions of a chunk."""
    return n_ctx - 1 - n_ctx // 2


class KLBaseFile:
    """An opened file: n_ctx, n_vocab, n_chunk, tokens (n_chunk, n_ctx) int32 as they stand in the text.

    Raises UsageError for a file that cannot be read, FormatError for one that is no such file or whose counts do not
    add up to its size.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            size = self.path.stat().st_size
            with self.path.open("rb") as file:
                header = file.read(_HEADER)
        except OSError as error:
            raise UsageError(f"cannot be read: {error.strerror}", path=path) from error
        if header[: len(MAGIC)] != MAGIC or len(header) < _HEADER:
            raise FormatError("is no file of log-probabilities (expected _logits_)", path=path, offset=0)
        self.n_ctx, self.n_vocab, self.n_chunk = (int(n) for n in np.frombuffer(header, "<i4", 3, len(MAGIC)))
        for name, value, least, offset in (
            ("n_ctx", self.n_ctx, 4, 8), ("n_vocab", self.n_vocab, 1, 12), ("n_chunk", self.n_chunk, 1, 16),
        ):  # fmt: skip
            if value < least:
                raise FormatError(f"{name} is {value} (expected {least} or more)", path=path, offset=offset)
        self._shape = (self.n_chunk, n_scored(self.n_ctx), row_words(self.n_vocab))
        self._start = _HEADER + 4 * self.n_chunk * self.n_ctx
        expected = self._start + 2 * self._shape[0] * self._shape[1] * self._shape[2]
        if size != expected:
            raise FormatError(f"has {size} bytes (expected {expected}, by its own counts)", path=path, offset=_HEADER)
        count = self.n_chunk * self.n_ctx
        self.tokens = np.fromfile(path, "<i4", count, offset=_HEADER).reshape(self.n_chunk, self.n_ctx)
        if self.tokens.min() < 0 or self.tokens.max() >= self.n_vocab:
            raise FormatError(f"has tokens outside its vocabulary of {self.n_vocab}", path=path, offset=_HEADER)

    def rows(self, chunk: int) -> np.ndarray:
        """The rows of a chunk, (n_scored, row_words) uint16."""
        _, n_rows, n_words = self._shape
        offset = self._start + 2 * chunk * n_rows * n_words
        rows = np.fromfile(self.path, "<u2", n_rows * n_words, offset=offset).reshape(n_rows, n_words)
        head = np.ascontiguousarray(rows[:, :4]).view("<f4")
        if not np.isfinite(head).all():
            raise FormatError(f"chunk {chunk + 1} has a scale or minimum that is no number", path=self.path)
        return rows


@contextmanager
def kl_base_writer(
    path: str | os.PathLike[str], tokens: np.ndarray, n_vocab: int
) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that takes rows (n, row_words) uint16, all of them in order; the file is there once it is whole.

    tokens: (n_chunk, n_ctx), as they stand in the text. Raises SaveError.
    """
    n_chunk, n_ctx = tokens.shape
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(MAGIC + np.array([n_ctx, n_vocab, n_chunk], "<i4").tobytes())
        file.write(tokens.astype("<i4").tobytes())

        def write(rows: np.ndarray) -> None:
            file.write(rows.astype("<u2", copy=False).tobytes())

        yield write
        file.flush()
