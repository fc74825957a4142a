"""The held-out text: some of it is evaluated at each save, all of it at the end.

Shapes: B batch, T ctx.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from llamakit.model import Llama
from llamakit.training.loss import evaluate_loss
from llamakit.training.report import Evaluation

_TOKENS_AT_A_SAVE = 4096


class HeldOut:
    """The held-out text, ready to be evaluated: some of it at a save, all of it at the end."""

    def __init__(self, tokens: np.ndarray, ctx: int, bos: int, model: Llama, device: torch.device) -> None:
        self._tokens, self._ctx, self._bos, self._model, self._device = tokens, ctx, bos, model, device

    def __bool__(self) -> bool:
        return len(self._tokens) > 0

    def evaluate(self, when: Literal["start", "save", "end"]) -> Evaluation:
        """Mean loss and perplexity; `when` decides how much of the text."""
        at_most = None if when == "end" else _TOKENS_AT_A_SAVE
        windows = validation_windows(self._tokens, self._ctx, self._bos, at_most)
        loss, n_tokens = _mean_loss(self._model, windows, self._device)
        return Evaluation(when, loss, float(np.exp(np.float64(loss))), n_tokens, len(self._tokens))


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


def _mean_loss(model: Llama, windows: list[tuple[Tensor, Tensor]], device: torch.device) -> tuple[float, int]:
    """Mean token loss over windows and how many tokens they have; dropout off."""
    model.eval()
    total = sum(evaluate_loss(model, inputs.to(device), targets.to(device)) for inputs, targets in windows)
    model.train()
    n_tokens = sum(targets.numel() for _, targets in windows)
    return total / n_tokens, n_tokens
