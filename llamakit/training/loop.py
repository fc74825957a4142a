"""The training loop: batches in order, gradients, one optimizer step, what the step did.

Shapes: B batch, T ctx.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llamakit.dataset.order import SampleOrder
from llamakit.dataset.packing import ChatBatch
from llamakit.dataset.text import Batch
from llamakit.errors import DivergedError
from llamakit.model import Llama
from llamakit.model.layers import Dropout
from llamakit.training.anchor import Anchor
from llamakit.training.config import LoopOptions
from llamakit.training.distributed import Dist
from llamakit.training.loss import backpropagate, backpropagate_divergence, rows_of
from llamakit.training.optim import AdamW, clip_gradient, is_sharded, like_rows, row_range
from llamakit.training.report import StepReport
from llamakit.training.state import MOMENT_SUFFIXES, Progress, StoredArrays

# So many steps in a row without a finite loss, and the run is over.
_MOST_SKIPPED = 5


@dataclass
class Control:
    """How a running loop is asked to stop (signal number) or to save; set from a signal handler or another thread."""

    signal: int = 0
    save: bool = False


def agree(dist: Dist, given: Control, agreed: Control) -> None:
    """What any rank was asked for becomes what all do: they stop, or save, after the same step."""
    if given is agreed:
        return
    asked = given.save
    number, save = dist.most([given.signal, asked])
    agreed.signal, agreed.save = int(number), agreed.save or bool(save)
    # What came while the ranks agreed is for the next step: it may not be written over.
    if agreed.signal:
        given.signal = agreed.signal
    if asked:
        given.save = False


class Batches(Protocol):
    """Where batches come from."""

    def build(self, order: SampleOrder, batch: int) -> Batch | ChatBatch:
        """The next `batch` rows; the order itself is not moved."""
        ...


class Parameters:
    """What is trained, by name, and AdamW's state of it."""

    def __init__(self, named: Mapping[str, Tensor], config: LoopOptions) -> None:
        self.named = dict(named)
        self.optimizer = AdamW(list(self.named.values()), config)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.named.items()}

    @property
    def n_numbers(self) -> int:
        """How many numbers are trained."""
        return sum(tensor.numel() for tensor in self.named.values())

    @torch.no_grad()
    def restore(self, arrays: Mapping[str, np.ndarray], updates: int) -> None:
        """Put back what `snapshot` gave; without moments the optimizer starts anew."""
        has_moments = False
        for (name, tensor), moments in zip(self.named.items(), self.optimizer.moments(), strict=True):
            tensor.copy_(torch.from_numpy(arrays[name]))
            for suffix, moment in zip(MOMENT_SUFFIXES, moments, strict=True):
                if name + suffix in arrays:
                    moment.copy_(torch.from_numpy(arrays[name + suffix]))
                    has_moments = True
        self.optimizer.updates = updates if has_moments else 0

    @torch.no_grad()
    def restore_moments(self, moments: Mapping[str, tuple[np.ndarray, np.ndarray]], updates: int) -> None:
        """Go on with another program's AdamW, which has taken so many steps; both moments of every tensor, by name."""
        for (name, tensor), mine in zip(self.named.items(), self.optimizer.moments(), strict=True):
            for moment, array in zip(mine, moments[name], strict=True):
                moment.copy_(torch.from_numpy(array[slice(*row_range(tensor))]))
        self.optimizer.updates = updates

    def send(self, dist: Dist) -> None:
        """Rank 0's weights, moments and number of updates to all ranks."""
        dist.send(self.optimizer.state)
        self.optimizer.updates = int(dist.main_number(self.optimizer.updates))

    @property
    def sharded(self) -> bool:
        """Whether each rank holds rows of them."""
        return any(map(is_sharded, self.named.values()))

    def tensors(self, *, moments: bool | None = None) -> dict[str, Tensor]:
        """All tensors, and their moments where there are any; of a sharded one as shares of it."""
        found = {name: tensor.detach() for name, tensor in self.named.items()}
        if self.optimizer.updates if moments is None else moments:
            for (name, tensor), pair in zip(self.named.items(), self.optimizer.moments(), strict=True):
                found |= {name + s: like_rows(tensor, m) for s, m in zip(MOMENT_SUFFIXES, pair, strict=True)}
        return found

    def fill(self, arrays: StoredArrays, updates: int) -> None:
        """Put back the share of this rank from what is stored, where the other ranks do the same."""
        has_moments = all(name + suffix in arrays for name in self.named for suffix in MOMENT_SUFFIXES)
        with torch.no_grad():
            arrays.fill(self.tensors(moments=has_moments), together=True)
        self.optimizer.updates = updates if has_moments else 0

    def snapshot(self) -> dict[str, np.ndarray]:
        """All tensors and moments, float32; on a CPU they are views, good until the next step."""
        arrays = {}
        for (name, tensor), moments in zip(self.named.items(), self.optimizer.moments(), strict=True):
            arrays[name] = _as_array(tensor)
            if self.optimizer.updates:
                arrays |= {name + suffix: _as_array(m) for suffix, m in zip(MOMENT_SUFFIXES, moments, strict=True)}
        return arrays


def _as_array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


class Trainer:
    """Takes steps. All that they change is in `progress`, `order` and `parameters`."""

    def __init__(
        self,
        model: Llama,
        parameters: Parameters,
        batches: Batches,
        order: SampleOrder,
        progress: Progress,
        config: LoopOptions,
        dropout: Dropout,
        factor: Callable[[int], float],
        dist: Dist,
        *,
        epochs_before: int,
        anchor: Anchor | None = None,
    ) -> None:
        """factor: share of the learning rate for an iteration, from 1. dist: the ranks that share each batch.
        epochs_before: that were over when the run began. anchor: what the model is to predict as its base does."""
        self.model, self.parameters, self.batches = model, parameters, batches
        self.order, self.progress, self.config, self.dropout = order, progress, config, dropout
        self._factor, self._dist, self._anchor = factor, dist, anchor
        self._device = next(iter(parameters.named.values())).device
        self._begin, self._epochs_before, self._skipped = time.perf_counter(), epochs_before, 0

    def step(self, left: int) -> StepReport:
        """One iteration; left: how many are to come. A step without a finite loss and gradient changes nothing."""
        started = time.perf_counter()
        config, progress, optimizer = self.config, self.progress, self.parameters.optimizer
        first_sample = min(1 + self.order.next_sample, self.order.count)
        loss, n_tokens, divergence = self._accumulate()
        norm = clip_gradient(optimizer.gradient, config.adam_gclip, optimizer.gradient_norm(self._dist))
        progress.iterations += 1
        factor = self._factor(progress.iterations)
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if skipped:
            self._skipped += 1
        else:
            self._skipped = 0
            optimizer.step(factor * config.adam_alpha)
            progress.updates += 1
        optimizer.gradient.zero_()
        now = time.perf_counter()
        return StepReport(
            step=progress.iterations,
            loss=loss,
            lr=factor * config.adam_alpha,
            sched=factor,
            sample=first_sample,
            n_samples=self.order.count,
            step_s=now - started,
            tok_per_s=n_tokens / (now - started),
            elapsed_s=now - self._begin,
            steps_left=left,
            skipped=skipped,
            grad_norm=norm,
            n_tokens=progress.tokens,
            divergence=divergence,
        )

    def _accumulate(self) -> tuple[float, int, float | None]:
        """Gradients of one iteration's micro-steps; the mean loss of their trained tokens, all their tokens, and how
        far the anchor's rows are from the base.

        Every rank makes the whole batches, computes its rows, and weighs them by the trained tokens of all rows: the
        sum over ranks is what one rank would have. The ranks meet once, behind the last micro-step, but for the rows
        of sharded weights: their gradient goes to its owners with each, since no rank has room for all of it.
        """
        config, progress, total = self.config, self.progress, 0.0
        batches = list(self._next_batches())
        n_trained = sum(batch.n_trained for batch in batches)
        for micro, batch in enumerate(batches):
            mine = self._dist.rows(len(batch.inputs))
            counts = mine.start < mine.stop  # an epoch's last rows may be fewer than the ranks
            if not (counts or self._dist.sharded):
                continue
            mine = mine if counts else slice(0, 1)
            self.dropout.key = progress.iterations * config.grad_acc + micro
            for at, rows in rows_of(batch, self._device, mine).parts(config.micro_rows):
                self.dropout.rows = range(mine.start + at, mine.start + at + len(rows.tokens))
                total += counts * backpropagate(self.model, rows, counts / n_trained)
        divergence = self._hold()
        self.parameters.optimizer.add_up(self._dist)
        total, divergence = self._dist.sum([total, divergence])
        progress.order_epoch, progress.next_sample = self.order.epoch, self.order.next_sample
        return total / n_trained, sum(batch.n_tokens for batch in batches), divergence if self._anchor else None

    def _hold(self) -> float:
        """This rank's share of the anchor's gradient, and of the mean divergence of its rows from the base, in nats."""
        anchor = self._anchor
        if anchor is None:
            return 0.0
        chosen = anchor.chosen(self.progress.iterations)
        n_tokens, total = sum(rows.n_trained for rows in chosen), 0.0
        self.dropout.key = self.progress.iterations * self.config.grad_acc
        for (at, rows), counts in self._dist.share(enumerate(chosen)):
            row = self.config.batch + at  # behind those of a batch: dropout's masks belong to a row
            self.dropout.rows = range(row, row + 1)
            weight = counts * anchor.weight / n_tokens
            total += counts * backpropagate_divergence(self.model, rows.to(self._device), weight) / n_tokens
        return total

    def _next_batches(self) -> Iterator[Batch | ChatBatch]:
        """The micro-batches of one iteration: all are made before the first is used, since all their tokens count."""
        for _ in range(self.config.grad_acc):
            batch = self.batches.build(self.order, self.config.batch)
            self.progress.samples += batch.used
            self.progress.tokens += batch.n_tokens
            self.progress.epochs += self.order.advance(batch.used)
            yield batch

    @property
    def diverged(self) -> bool:
        """Five steps in a row had no finite loss or gradient."""
        return self._skipped >= _MOST_SKIPPED

    def check_diverged(self) -> None:
        """Raises DivergedError after five steps in a row without a finite loss and gradient."""
        if self.diverged:
            raise DivergedError(
                f"training diverged: {_MOST_SKIPPED} steps in a row without a finite loss,"
                f" up to iteration {self.progress.iterations}",
                hint="a lower --adam-alpha or a longer --warmup may help; the last good checkpoint is intact",
            )

    def why_stop(self, report: StepReport) -> str:
        """The old tool's early stops (ggml's Adam), and --epochs; empty: go on."""
        config, progress, loss = self.config, self.progress, report.loss
        if report.skipped:
            return ""
        previous, progress.previous_loss = progress.previous_loss, loss
        reason = ""
        if config.epochs > 0 and progress.epochs - self._epochs_before >= config.epochs:
            reason = f"--epochs {config.epochs}: the samples were all seen"
        if previous is not None and loss and abs(loss - previous) / abs(loss) < config.adam_epsf:
            reason = f"--adam-epsf {config.adam_epsf:g}: the loss hardly changed"
        if config.opt_past and loss:
            progress.past_losses = [*progress.past_losses, loss][-config.opt_past - 1 :]
            past = progress.past_losses
            if len(past) > config.opt_past and abs((past[0] - loss) / loss) < config.opt_delta:
                reason = f"--opt-past {config.opt_past}: the loss hardly changed"
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.no_improvement = loss, 0
        else:
            progress.no_improvement += 1
        if 0 < config.opt_max_no_improvement <= progress.no_improvement:
            reason = f"--opt-max-no-improvement {config.opt_max_no_improvement}: no better loss"
        return reason
