"""What a fine-tuning run trains, and what becomes of it: the pairs of an adapter, or all weights of the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llamakit.model import Llama
from llamakit.model.layers import Dropout
from llamakit.training.checkpoint import Product
from llamakit.training.config import Cache
from llamakit.training.distributed import Dist
from llamakit.training.report import Remark, Report


class Subject(Protocol):
    """Whatever it is, the run around it is the same: data, steps, evaluations, checkpoints, and a proof at the end."""

    @property
    def product(self) -> Product:
        """What is saved beside each checkpoint."""
        ...

    @property
    def ranks(self) -> Mapping[str, int]:
        """Rank by kind of tensor, 0: not trained; empty where all weights are."""
        ...

    @property
    def alpha(self) -> float:
        """Of an adapter's scale."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on, besides the base, the data and the order."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The trained tensors of a checkpoint."""
        ...

    def remarks(self) -> Iterator[Remark]:
        """What there is to say before training."""
        ...

    def build(
        self, seed: int, device: torch.device, dtype: torch.dtype, *, dropout: Dropout, weight_cache: Cache, dist: Dist
    ) -> Built:
        """The model as it starts, and what of it is trained: float32, by name in checkpoints.

        weight_cache: how the weights of a frozen base are kept, see `load_model`. dist: the ranks, which may have a
        share of it each.
        """
        ...

    def prove(
        self, path: Path, tokens: Tensor, logits: Tensor, named: Mapping[str, Tensor], dist: Dist
    ) -> Iterator[Report]:
        """What was written at path is what was trained: it gives the logits (T, n_vocab) of tokens (T,).

        named: as `build` gave it, trained. dist: the ranks that do this together. Raises LlamakitError where it is not,
        or where it changes nothing.
        """
        ...

    def finish(self, path: Path) -> Iterator[Report]:
        """What is made of the finished product at path."""
        ...


Built = tuple[Llama, dict[str, Tensor]]
