"""The held-out part of the data: some of it is evaluated at each save, all of it at the end.

Shapes: B batch, T ctx.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from llamakit.dataset.chat_data import ChatData
from llamakit.dataset.packing import ChatBatches
from llamakit.model import Llama
from llamakit.training.distributed import Dist
from llamakit.training.loss import Rows, evaluate_loss, rows_of
from llamakit.training.report import Evaluation

_TOKENS_AT_A_SAVE, _TOKENS_AT_A_TIME = 4096, 2048
_CPU = torch.device("cpu")


class HeldOutPart(Protocol):
    """What is held out."""

    @property
    def n_tokens(self) -> int:
        """Tokens that have a loss."""
        ...

    def rows(self, at_most: int | None) -> Iterator[tuple[Rows, int]]:
        """Rows, and how many targets of them have a loss; spread evenly, about at_most tokens, or all (None)."""
        ...


class TextPart:
    """Held-out tokens (m,) of a text, in windows of ctx behind a BOS each."""

    def __init__(self, tokens: np.ndarray, ctx: int, bos: int) -> None:
        self._tokens, self._ctx, self._bos = tokens, ctx, bos

    @property
    def n_tokens(self) -> int:
        """All of them have a loss."""
        return len(self._tokens)

    def rows(self, at_most: int | None) -> Iterator[tuple[Rows, int]]:
        """Windows of one length at a time."""
        for inputs, targets in validation_windows(self._tokens, self._ctx, self._bos, at_most):
            yield Rows(inputs, targets), targets.numel()


class ChatPart:
    """Held-out samples, in their own order."""

    def __init__(self, data: ChatData, ctx: int, *, pack: bool, pad: int) -> None:
        batches = ChatBatches(data, ctx=ctx, pack=pack, pad=pad)
        self._batches = list(batches.in_order(max(1, _TOKENS_AT_A_TIME // ctx)))
        self._n_tokens = sum(batch.n_trained for batch in self._batches)

    @property
    def n_tokens(self) -> int:
        """Trained ones."""
        return self._n_tokens

    def rows(self, at_most: int | None) -> Iterator[tuple[Rows, int]]:
        """Whole batches."""
        wanted, each = len(self._batches), sum(batch.n_tokens for batch in self._batches) / len(self._batches)
        if at_most is not None:
            wanted = min(wanted, max(1, round(at_most / each)))
        for i in range(wanted):
            batch = self._batches[i * len(self._batches) // wanted]
            yield rows_of(batch, _CPU), batch.n_trained


class HeldOut:
    """A held-out part, ready to be evaluated: some of it at a save, all of it at the end, or whole each time.

    dist: the ranks that share the work.
    """

    def __init__(
        self, part: HeldOutPart | None, model: Llama, device: torch.device, dist: Dist, *, whole: bool = False
    ) -> None:
        self._part, self._model, self._device, self._dist, self._whole = part, model, device, dist, whole

    def __bool__(self) -> bool:
        return self._part is not None and self._part.n_tokens > 0

    def evaluate(self, when: Literal["start", "save", "end"], step: int = 0) -> Evaluation:
        """Mean loss and perplexity; `when` decides how much of it. step: after which."""
        assert self._part is not None, "the caller asked whether there is one"
        at_most = None if when == "end" or self._whole else _TOKENS_AT_A_SAVE
        self._model.eval()
        total, n_tokens = 0.0, 0
        for (rows, n), counts in self._dist.share(self._part.rows(at_most)):
            total += counts * evaluate_loss(self._model, rows.to(self._device))
            n_tokens += counts * n
        self._model.train()
        total, count = self._dist.sum([total, n_tokens])
        loss = total / count
        with np.errstate(over="ignore"):  # a model that was spoilt has a loss beyond 709
            ppl = float(np.exp(np.float64(loss)))
        return Evaluation(when, loss, ppl, int(count), self._part.n_tokens, step=step)


def validation_windows(tokens: np.ndarray, ctx: int, bos: int, at_most: int | None) -> list[tuple[Tensor, Tensor]]:
    """Held-out tokens (m,) as batches of inputs and targets (B, T): BOS, then ctx tokens, one after another.

    at_most: so many tokens, in windows spread evenly; None: all, the last shorter one included.
    """
    starts: Iterable[int] = range(0, len(tokens), ctx)
    if at_most is not None and len(tokens) > at_most:
        whole = range(0, len(tokens) - ctx + 1, ctx)
        count = max(1, at_most // ctx)
        starts = [whole[i * len(whole) // count] for i in range(min(count, len(whole)))]
    windows = [torch.from_numpy(tokens[at : at + min(ctx, at_most or ctx)].astype(np.int64)) for at in starts]
    pairs = [(torch.cat([torch.tensor([bos]), w[:-1]]), w) for w in windows]
    full = [p for p in pairs if len(p[1]) == len(pairs[0][1])]
    short = [(i[None], t[None]) for i, t in pairs if len(t) != len(pairs[0][1])]
    per_batch = max(1, 2048 // ctx)
    batches = [full[at : at + per_batch] for at in range(0, len(full), per_batch)]
    return [(torch.stack([p[0] for p in b]), torch.stack([p[1] for p in b])) for b in batches] + short
