"""The training loop: batches in order, gradients, one optimizer step, what the step did.

Shapes: B batch, T ctx.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llamakit.dataset.order import SampleOrder
from llamakit.dataset.text import BatchBuilder
from llamakit.errors import DivergedError
from llamakit.model import Llama
from llamakit.model.layers import Dropout
from llamakit.training.config import FinetuneConfig
from llamakit.training.loss import backpropagate
from llamakit.training.optim import AdamW, clip_gradient, schedule
from llamakit.training.report import StepReport
from llamakit.training.state import Progress, Weights

# So many steps in a row without a finite loss, and the run is over.
_MOST_SKIPPED = 5


@dataclass
class Control:
    """How a running loop is asked to stop (signal number) or to save; set from a signal handler or another thread."""

    signal: int = 0
    save: bool = False


class Parameters:
    """The LoRA pairs that are trained, by base tensor name, and AdamW's state of them."""

    def __init__(self, pairs: Mapping[str, tuple[Tensor, Tensor]], config: FinetuneConfig) -> None:
        self.pairs = dict(pairs)
        self.flat = [tensor for pair in self.pairs.values() for tensor in pair]
        self.optimizer = AdamW(self.flat, config)

    def _moments(self) -> dict[str, tuple[Tensor, ...]]:
        """m and v of A, then of B, by base tensor name."""
        moments = self.optimizer.moments()
        return {name: moments[2 * i] + moments[2 * i + 1] for i, name in enumerate(self.pairs)}

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Weights], updates: int) -> None:
        """Put back what `snapshot` gave; without moments the optimizer starts anew."""
        moments = self._moments()
        for name, saved in weights.items():
            arrays = (saved.a, saved.b, *(saved.moments or ()))
            for tensor, array in zip((*self.pairs[name], *moments[name]), arrays, strict=False):
                tensor.copy_(torch.from_numpy(array))
            if saved.moments is not None:
                self.optimizer.updates = updates

    def snapshot(self) -> dict[str, Weights]:
        """Copies of all pairs and moments, float32."""
        moments = self._moments() if self.optimizer.updates else {}
        return {
            name: Weights(_copy(a), _copy(b), tuple(map(_copy, moments[name])) if moments else None)  # pyright: ignore[reportArgumentType]
            for name, (a, b) in self.pairs.items()
        }


def _copy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy().copy()


class Trainer:
    """Takes steps. All that they change is in `progress`, `order` and `parameters`."""

    def __init__(
        self,
        model: Llama,
        parameters: Parameters,
        builder: BatchBuilder,
        order: SampleOrder,
        progress: Progress,
        config: FinetuneConfig,
        dropout: Dropout,
    ) -> None:
        self.model, self.parameters, self.builder = model, parameters, builder
        self.order, self.progress, self.config, self.dropout = order, progress, config, dropout
        self._device = parameters.flat[0].device
        self._begin, self._epochs_before, self._skipped = time.perf_counter(), progress.epochs, 0

    def step(self, left: int) -> StepReport:
        """One iteration; left: how many are to come. A step without a finite loss and gradient changes nothing."""
        started = time.perf_counter()
        config, progress = self.config, self.progress
        first_sample = min(1 + self.order.next_sample, self.order.count)
        loss = self._accumulate()
        gradient = self.parameters.optimizer.take_gradient()
        norm = clip_gradient(gradient, config.adam_gclip)
        progress.iterations += 1
        factor = schedule(progress.iterations, config)
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if skipped:
            self._skipped += 1
        else:
            self._skipped = 0
            self.parameters.optimizer.step(gradient, factor * config.adam_alpha)
            progress.updates += 1
        now = time.perf_counter()
        n_tokens = config.grad_acc * config.batch * config.ctx
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
        )

    def _accumulate(self) -> float:
        """Gradients of one iteration's micro-steps; returns the mean token loss of all of them."""
        config, progress, total = self.config, self.progress, 0.0
        n_tokens = config.grad_acc * config.batch * config.ctx
        for micro in range(config.grad_acc):
            batch = self.builder.build(self.order, config.batch)
            self.dropout.key = progress.iterations * config.grad_acc + micro
            inputs, targets = (torch.from_numpy(x).to(self._device) for x in (batch.inputs, batch.targets))
            total += backpropagate(self.model, inputs, targets, 1 / n_tokens)
            progress.samples += batch.used
            progress.tokens += config.batch * config.ctx
            progress.epochs += self.order.advance(batch.used)
        progress.order_epoch, progress.next_sample = self.order.epoch, self.order.next_sample
        return total / n_tokens

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
