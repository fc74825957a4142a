"""A text as token ids, cut into chunks of one length: what perplexity and importance matrices are measured on.

The cutting is llama.cpp's (tools/perplexity/perplexity.cpp): the ids stand side by side without overlap, each chunk is
seen by a fresh context, and its first token gives way to BOS where the vocabulary puts one before a text.
"""

from __future__ import annotations

import os

import numpy as np

from llamakit.errors import UsageError
from llamakit.files import read_text
from llamakit.tokenizer import Tokenizer


def read_tokens(path: str | os.PathLike[str], tokenizer: Tokenizer, *, parse_special: bool = False) -> np.ndarray:
    """Token ids (n,) int32 of a text file, with BOS where the vocabulary wants it; one newline at the end is dropped.

    parse_special: control tokens written out in the text become their ids. Raises UsageError for a file that cannot
    be read or is not UTF-8.
    """
    text = read_text(path).removesuffix("\n")
    return np.array(tokenizer.encode(text, add_special=True, parse_special=parse_special), np.int32)


def cut(
    tokens: np.ndarray, n_ctx: int, *, chunks: int = -1, source: str | os.PathLike[str] | None = None
) -> np.ndarray:
    """The first `chunks` (-1: all) whole chunks of some ids, (n_chunk, n_ctx), as they stand in the text.

    source: the text's file, named in errors. Raises UsageError for less than two chunks.
    """
    if len(tokens) < 2 * n_ctx:
        raise _too_short(tokens, f"at least {2 * n_ctx}, two contexts of {n_ctx}", source)
    n_chunk = len(tokens) // n_ctx
    if chunks >= 0:
        n_chunk = min(chunks, n_chunk)
    return tokens[: n_chunk * n_ctx].reshape(n_chunk, n_ctx)


def overlapping(
    tokens: np.ndarray, n_ctx: int, stride: int, *, chunks: int = -1, source: str | os.PathLike[str] | None = None
) -> np.ndarray:
    """The first `chunks` (-1: all) windows of some ids (n_chunk, n_ctx), each `stride` after the one before: a view.

    As llama-perplexity cuts with --ppl-stride; no token gives way to BOS there. Raises UsageError for a text that is
    not longer than a window.
    """
    if len(tokens) <= n_ctx:
        raise _too_short(tokens, f"more than a window of {n_ctx}", source)
    n_chunk = -(-(len(tokens) - n_ctx) // stride)
    if chunks >= 0:
        n_chunk = min(chunks, n_chunk)
    return np.lib.stride_tricks.sliding_window_view(tokens, n_ctx)[::stride][:n_chunk]


def _too_short(tokens: np.ndarray, expected: str, source: str | os.PathLike[str] | None) -> UsageError:
    reason = f"the text has {len(tokens)} tokens (expected {expected})"
    return UsageError(reason, path=source, hint="give a longer text, or a smaller context")


def with_bos(chunks: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The chunks as the model sees them: BOS in the place of each first token where the vocabulary adds one."""
    if not tokenizer.add_bos or tokenizer.bos_id is None:
        return chunks
    seen = chunks.copy()
    seen[:, 0] = tokenizer.bos_id
    return seen
