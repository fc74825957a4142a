"""Text on which a model in training is held to what its base predicts, so that it does not forget what it is not
taught: Learning without Forgetting (Li and Hoiem 2016, arXiv 1606.09282)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llamakit.dataset.order import shuffled
from llamakit.training.loss import Rows


@dataclass(frozen=True)
class Anchor:
    """Rows (1, T) of a text, some of which are compared with the base in each iteration.

    weight: of their mean divergence beside the loss. batch: rows of an iteration, over all ranks. sha256: of the text.
    """

    rows: Sequence[Rows]
    weight: float
    batch: int
    seed: int
    sha256: str

    def chosen(self, iteration: int) -> list[Rows]:
        """The rows of an iteration, from 1: a function of its number, in a new order each time that all were used."""
        begin, count = (iteration - 1) * self.batch, len(self.rows)
        places = [divmod(begin + i, count) for i in range(self.batch)]
        return [self.rows[int(shuffled(self.seed, epoch, np.array([at]), count)[0])] for epoch, at in places]
