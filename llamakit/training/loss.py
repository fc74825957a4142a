"""Cross entropy, and divergence from the base, over a large vocabulary without ever holding a (tokens, vocabulary)
float32 tensor.

Shapes: N tokens, B rows, T places of a row, C n_embd, V n_vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llamakit.dataset.packing import ChatBatch
from llamakit.dataset.text import Batch
from llamakit.kernels import train
from llamakit.model import Llama
from llamakit.model.lora import without_adapters
from llamakit.model.recompute import weighted_sum
from llamakit.model.trained import TiedLinear, TrainedLinear

# Logits of one chunk: 64 MB in bf16 at a vocabulary of 128k, an efficient product, nothing to notice in memory.
CHUNK_TOKENS = 256
# Where the output matrix is trained each chunk adds a whole gradient of it: fewer chunks, of so many logits at most.
CHUNK_LOGITS_TRAINED = 1 << 25
# The float32 copy is made for so many logits at a time: 1 MB, which stays in the L2 cache.
_TILE_LOGITS = 1 << 18


@dataclass(frozen=True)
class Rows:
    """Rows of a micro-step on a device: tokens and targets (B, T) int64.

    trained: (B, T) bool, which targets have a loss; None: all of them. positions (B, T) int64 and segments (B, T) int:
    where rows have several samples; None: a row is one.
    """

    tokens: Tensor
    targets: Tensor
    trained: Tensor | None = None
    positions: Tensor | None = None
    segments: Tensor | None = None

    @property
    def n_trained(self) -> int:
        """How many targets have a loss."""
        return self.targets.numel() if self.trained is None else int(self.trained.sum())

    def to(self, device: torch.device) -> Rows:
        """The same on a device."""
        rest = (x if x is None else x.to(device) for x in (self.trained, self.positions, self.segments))
        return Rows(self.tokens.to(device), self.targets.to(device), *rest)

    def parts(self, size: int) -> Iterator[tuple[int, Rows]]:
        """The same, at most `size` rows at a time, in order, each part with the number of its first row."""
        for at in range(0, len(self.tokens), size):
            some = slice(at, at + size)
            rest = (x if x is None or x.dim() == 1 else x[some] for x in (self.trained, self.positions, self.segments))
            yield at, Rows(self.tokens[some], self.targets[some], *rest)


def rows_of(batch: Batch | ChatBatch, device: torch.device, rows: slice = slice(None)) -> Rows:
    """A batch, or some rows of it, as a model takes it."""
    tokens, targets = (torch.from_numpy(x[rows]).to(device) for x in (batch.inputs, batch.targets))
    if isinstance(batch, Batch):
        return Rows(tokens, targets)
    trained = torch.from_numpy(batch.trained[rows]).to(device)
    if not batch.packed:  # padding stands behind each sample: a causal mask hides it
        return Rows(tokens, targets, trained)
    positions, segments = (torch.from_numpy(x[rows]).to(device) for x in (batch.positions, batch.segments))
    return Rows(tokens, targets, trained, positions, segments)


class _CrossEntropySum(torch.autograd.Function):
    """Sum of -log softmax(logits)[target]; weight times its gradient is formed in the same sweep, in place of the
    logits, whatever gradient the sum itself is given."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, weight: float) -> Tensor:
        if train.usable(logits) and logits.is_contiguous():
            losses = train.cross_entropy_(logits, targets, weight if ctx.needs_input_grad[0] else 0.0)
            ctx.save_for_backward(logits)
            return losses.sum(dtype=torch.float64).float()
        n, v = logits.shape
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        rows = max(1, _TILE_LOGITS // v)
        for start in range(0, n, rows):
            part, wanted = logits[start : start + rows], targets[start : start + rows, None]
            tile = part.float()
            tile -= tile.amax(dim=1, keepdim=True)
            chosen = tile.gather(1, wanted)
            sums = tile.exp_().sum(dim=1, keepdim=True)
            total += (sums.log() - chosen).sum(dtype=torch.float64)
            if ctx.needs_input_grad[0]:
                tile *= weight / sums
                tile.scatter_add_(1, wanted, torch.full_like(chosen, -weight))
                part.copy_(tile)
        ctx.save_for_backward(logits)
        return total.float()

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.saved_tensors[0], None, None


class _DivergenceSum(torch.autograd.Function):
    """Sum of KL(softmax(base) || softmax(logits)); weight times its gradient is formed in place of the logits."""

    @staticmethod
    def forward(ctx, logits: Tensor, base: Tensor, weight: float) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        rows = max(1, _TILE_LOGITS // logits.shape[1])
        for part, other in zip(logits.split(rows), base.split(rows), strict=True):
            ours, theirs = part.float().log_softmax(1), other.float().log_softmax(1)
            wanted = theirs.exp()
            total += theirs.sub_(ours).mul_(wanted).sum(dtype=torch.float64)
            part.copy_(ours.exp_().sub_(wanted).mul_(weight))
        ctx.save_for_backward(logits)
        return total.float()

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.saved_tensors[0], None, None


def _chunk_tokens(model: Llama) -> int:
    if isinstance(model.output, TrainedLinear):
        return max(CHUNK_TOKENS, CHUNK_LOGITS_TRAINED // model.config.n_vocab)
    return CHUNK_TOKENS


def _sharded_part(module: nn.Module) -> Any:
    """What holds a module's rows where they lie on several ranks: itself, the base of a LoRA, the embedding that it is
    tied to; None where it is whole."""
    part = module.embedding if isinstance(module, TiedLinear) else getattr(module, "base", module)
    return part if hasattr(part, "unshard") else None


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """A module whose rows lie on several ranks, whole for the time of several uses; each rank may use it as often as it
    likes then. Any other module is whole already."""
    part = _sharded_part(module)
    if part is None:
        yield
        return
    part.unshard()
    try:
        yield
    finally:
        part.reshard()


@contextmanager
def _one_of_several(model: Llama, *, last: bool) -> Iterator[None]:
    """A backward pass through the output matrix, before that through the model: gradients of a matrix whose rows lie on
    several ranks are added up on each, and go to their owners with the last."""
    part = _sharded_part(model.output)
    if part is None:
        yield
        return
    whole: Any = model
    whole.set_is_last_backward(False)
    part.set_requires_gradient_sync(last)
    try:
        yield
    finally:
        whole.set_is_last_backward(True)
        part.set_requires_gradient_sync(True)


def evaluate_loss(model: Llama, rows: Rows) -> float:
    """Sum of the losses of the trained targets, float32 per token; no gradient."""
    with torch.no_grad():
        hidden = model(rows.tokens, rows.positions, segments=rows.segments).flatten(0, 1)
        wanted = rows.targets.flatten()
        if rows.trained is not None:
            chosen = rows.trained.flatten()
            hidden, wanted = hidden[chosen], wanted[chosen]
        with gathered(model.output):
            return sum(
                float(
                    _CrossEntropySum.apply(
                        model.output(hidden[at : at + CHUNK_TOKENS]), wanted[at : at + CHUNK_TOKENS], 1.0
                    )
                )
                for at in range(0, len(wanted), CHUNK_TOKENS)
            )


def backpropagate(model: Llama, rows: Rows, weight: float) -> float:
    """Add the gradient of weight * (sum of token losses) to the parameters; returns the sum of token losses."""
    chosen = None if rows.trained is None else rows.trained.flatten()
    wanted = rows.targets.flatten() if chosen is None else rows.targets.flatten()[chosen]
    hidden = model(rows.tokens, rows.positions, segments=rows.segments)
    return _through_output(
        model, hidden, chosen, lambda logits, some: _CrossEntropySum.apply(logits, wanted[some], weight)
    )


def backpropagate_divergence(model: Llama, rows: Rows, weight: float) -> float:
    """Add the gradient of weight * (sum over the trained places of the divergence from the model without its adapters)
    to the parameters; returns that sum, in nats.

    Learning without Forgetting (Li and Hoiem 2016, arXiv 1606.09282), with the whole distribution as the target.
    """
    chosen = None if rows.trained is None else rows.trained.flatten()
    with torch.no_grad(), without_adapters(model):
        base = model(rows.tokens, rows.positions, segments=rows.segments).flatten(0, 1)
        base = base if chosen is None else base[chosen]
    hidden = model(rows.tokens, rows.positions, segments=rows.segments)
    bare_output = getattr(model.output, "base", model.output)

    def divergence(logits: Tensor, some: slice) -> Tensor:
        with torch.no_grad():
            wanted = bare_output(base[some])
        return _DivergenceSum.apply(logits, wanted, weight)

    return _through_output(model, hidden, chosen, divergence)


def _through_output(
    model: Llama, hidden: Tensor, chosen: Tensor | None, loss_of: Callable[[Tensor, slice], Tensor]
) -> float:
    """Backpropagate a loss of the logits of hidden states (B, T, C), of the chosen (B * T,) bool; returns its sum.

    The output matrix is applied chunk by chunk, its gradient taken at once, so that one chunk's logits are all that
    ever exists of them. Hidden states that are not chosen do not reach it. loss_of: logits (n, V) -> the sum of theirs,
    whose gradient is the one that is wanted; which of the chosen they are.
    """
    flat = hidden.detach().flatten(0, 1)
    flat = flat if chosen is None else flat[chosen]
    d_hidden, total = torch.empty_like(flat), 0.0
    size = _chunk_tokens(model)
    with gathered(model.output):
        # A rank without a trained token takes part in the sums of the others.
        starts = range(0, len(flat), size) or range(_sharded_part(model.output) is not None)
        for at in starts:
            some = slice(at, at + size)
            chunk = flat[some].detach().requires_grad_()
            loss = loss_of(model.output(chunk), some)
            with _one_of_several(model, last=at == starts[-1]):
                loss.backward()
            total += float(loss.detach())
            d_hidden[some] = chunk.grad  # pyright: ignore[reportArgumentType]
    if chosen is not None:
        d_all = torch.zeros_like(hidden).flatten(0, 1)
        d_all[chosen] = d_hidden
        d_hidden = d_all
    if hidden.requires_grad:
        weighted_sum(hidden, d_hidden.view_as(hidden)).backward()
    return total
