"""How well a model predicts a text: llama-perplexity's estimate, and its file of log-probabilities.

Shapes: B chunks, T n_ctx, N scored positions of a chunk, C n_embd, V n_vocab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llamakit.errors import FormatError
from llamakit.formats.kl_base import row_words
from llamakit.inference.config import PerplexityConfig
from llamakit.model import Llama

# Logits that are in memory at a time.
_LOGIT_BYTES = 1 << 26
#: how far below the largest logit upstream's 16 bits reach
_CLIP = 16.0


@dataclass(frozen=True)
class Estimate:
    """The estimate after `chunk` chunks (from 1): perplexity, its standard error, mean negative log-likelihood in
    nats and its standard error, over `count` tokens."""

    chunk: int
    ppl: float
    error: float
    nll: float
    nll_error: float
    count: int


@torch.inference_mode()  # of a generator: while it computes, not while the caller does
def scored_logits(model: Llama, seen: np.ndarray, config: PerplexityConfig) -> Iterator[tuple[int, int, Tensor]]:
    """(chunk, first of its scored positions, logits (n, V) float32) for chunks (B, T), in order, bounded in memory."""
    device = next(model.output_norm.parameters()).device
    n_ctx = seen.shape[1]
    n_seq, first = max(1, config.batch // n_ctx), config.first_scored(n_ctx)
    step = max(1, _LOGIT_BYTES // (4 * model.config.n_vocab))
    for start in range(0, len(seen), n_seq):
        tokens = torch.from_numpy(seen[start : start + n_seq].astype(np.int64)).to(device)
        hidden = model(tokens)[:, first:-1]
        for i, rows in enumerate(hidden):
            for at in range(0, len(rows), step):
                yield start + i, at, model.logits(rows[at : at + step])


def perplexity(
    model: Llama,
    tokens: np.ndarray,
    seen: np.ndarray,
    config: PerplexityConfig,
    *,
    write: Callable[[np.ndarray], None] | None = None,
) -> Iterator[Estimate]:
    """The running estimate after every chunk; the last one is the result.

    tokens: (B, T) as they stand in the text, seen: as the model sees them (`chunks.with_bos`). write: takes the
    log-probabilities as rows of upstream's 16-bit format. Raises FormatError for logits that are no numbers.
    """
    n_ctx = tokens.shape[1]
    first = config.first_scored(n_ctx)
    n_rows = n_ctx - 1 - first
    total = total2 = 0.0
    count = 0
    for chunk, at, logits in scored_logits(model, seen, config):
        targets = tokens[chunk, first + 1 + at : first + 1 + at + len(logits)]
        nll = negative_log_likelihood(logits, targets)
        total, total2, count = total + float(nll.sum()), total2 + float((nll * nll).sum()), count + len(nll)
        if not math.isfinite(total):
            raise FormatError(f"the model gives no finite numbers (chunk {chunk + 1} of the text)")
        if write is not None:
            write(pack_log_probs(logits))
        if at + len(logits) == n_rows:
            yield estimate(chunk + 1, total, total2, count)


def estimate(chunk: int, total: float, total2: float, count: int) -> Estimate:
    """Upstream's estimate from sums of the negative log-likelihood and of its square."""
    mean = total / count
    variance = total2 / count - mean * mean
    nll_error = math.sqrt(variance / (count - 1)) if variance > 0 and count > 1 else 0.0
    ppl = math.exp(min(mean, 700.0))
    return Estimate(chunk, ppl, ppl * nll_error, mean, nll_error, count)


def negative_log_likelihood(logits: Tensor, targets: np.ndarray) -> Tensor:
    """(n,) float64 of logits (n, V) float32 and token ids (n,): summed in float64, as upstream does."""
    top = logits.amax(dim=-1)
    log_sum = (logits - top[:, None]).exp_().sum(dim=-1, dtype=torch.float64).log()
    index = torch.from_numpy(targets.astype(np.int64)).to(logits.device)
    return top.double() + log_sum - logits.gather(-1, index[:, None])[:, 0].double()


def pack_log_probs(logits: Tensor) -> np.ndarray:
    """Rows (n, row_words) uint16 of upstream's base file: 65535 steps from the clip at max - 16 up to the maximum."""
    n, n_vocab = logits.shape
    top = logits.amax(dim=-1, keepdim=True)
    low = torch.maximum(logits.amin(dim=-1, keepdim=True), top - _CLIP)
    log_sum = (logits - top).exp_().sum(dim=-1, keepdim=True, dtype=torch.float64).log().float()
    scale = (top - low) / 65535.0
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    steps = ((logits - low).clamp_(min=0).mul_(inverse)).round_().to(torch.int32).cpu().numpy()
    rows = np.zeros((n, row_words(n_vocab)), "<u2")
    rows[:, :4] = torch.cat([scale, low - top - log_sum], dim=-1).cpu().numpy().astype("<f4").view("<u2")
    rows[:, 4 : 4 + n_vocab] = steps
    return rows
