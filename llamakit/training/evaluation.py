"""How good a model is on the way: losses of training and held-out text, bits per byte, samples.

Shapes: B batch, T ctx.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import Literal

import numpy as np
import torch

from llamakit.dataset.tokens import Split
from llamakit.dataset.windows import even_windows
from llamakit.inference.config import GenerateConfig
from llamakit.model import Llama
from llamakit.training.answers import Answers
from llamakit.training.corpus import Corpus
from llamakit.training.distributed import Dist
from llamakit.training.loss import Rows, evaluate_loss
from llamakit.training.report import Evaluation, Sample
from llamakit.training.train_config import TrainConfig

_TOKENS_AT_A_TIME = 4096
_SAMPLE_SEED = 1337


class Evaluator:
    """Evaluates and samples a model in training, whose mode and weights it leaves as they are.

    dist: the ranks that share an evaluation.
    """

    def __init__(self, model: Llama, corpus: Corpus, config: TrainConfig, device: torch.device, dist: Dist) -> None:
        """Raises UsageError for a --sample-prompt that leaves no room in the context: now, not hours later."""
        self._model, self._corpus, self._config, self._device, self._dist = model, corpus, config, device, dist
        prompts = config.sample_prompt if config.sample_tokens else ()
        settings = GenerateConfig(n_predict=config.sample_tokens, seed=_SAMPLE_SEED)
        self._answers = Answers(model, corpus.tokenizer, prompts, settings, as_messages=False)

    def evaluate(self, step: int, when: Literal["start", "save", "end"]) -> Evaluation:
        """--eval-iters batches of both parts, evenly spread; at the end all of the held-out part."""
        config, held_out = self._config, self._corpus.data.validation
        at_most = config.eval_iters * config.batch
        train_loss, _ = self._loss(self._corpus.data.train, at_most)
        loss, n_tokens = self._loss(held_out, None if when == "end" else at_most)
        per_token = held_out.n_bytes / held_out.n_tokens if held_out.n_bytes and held_out.n_tokens else None
        return Evaluation(
            when,
            loss,
            float(np.exp(np.float64(loss))),
            n_tokens,
            held_out.n_tokens,
            step=step,
            train_loss=train_loss,
            bits_per_byte=loss / math.log(2) / per_token if per_token and n_tokens else None,
        )

    def seconds_at_the_end(self) -> float:
        """Predicted seconds of the last evaluation and its samples, from a short one."""
        held_out, config = self._corpus.data.validation, self._config
        started = time.perf_counter()
        _, n_tokens = self._loss(held_out, max(1, _TOKENS_AT_A_TIME // config.ctx))
        each = (time.perf_counter() - started) / max(1, n_tokens)
        started = time.perf_counter()
        for _ in self.samples(0):
            pass
        trained = min(config.eval_iters * config.batch * config.ctx, self._corpus.data.train.n_tokens)
        return each * (held_out.n_tokens + trained) + (time.perf_counter() - started)

    def _loss(self, split: Split, at_most: int | None) -> tuple[float, int]:
        """Mean token loss of a part's windows, and their tokens; nan and 0 where there is none."""
        self._model.eval()
        total, n_tokens = 0.0, 0
        per_batch = max(1, _TOKENS_AT_A_TIME // self._config.ctx)
        for rows, counts in self._dist.share(_batches(even_windows(split, self._config.ctx, at_most), per_batch)):
            tokens = torch.from_numpy(rows).to(self._device)
            total += counts * evaluate_loss(self._model, Rows(tokens[:, :-1], tokens[:, 1:]))
            n_tokens += counts * rows[:, 1:].size
        self._model.train()
        total, count = self._dist.sum([total, n_tokens])
        return (total / count if count else math.nan), int(count)

    def samples(self, step: int) -> Iterator[Sample]:
        """What the model says to each --sample-prompt, with the same random numbers each time."""
        return self._answers.samples(step)


def _batches(windows: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Windows of one length at a time, (at most size, T + 1)."""
    for _, alike in groupby(windows, key=len):
        while rows := list(islice(alike, size)):
            yield np.stack(rows)
