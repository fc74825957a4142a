"""The products with the narrow matrices of LoRA pairs: by native code where it is faster, else by torch.

Shapes: N tokens, n numbers of a token, R rank, small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from llamakit.kernels import train

# Up to this rank the tiles of a matrix library are mostly empty; beyond, its products are faster.
_MOST_RANKS = 8


class NarrowProducts(Protocol):
    """What LoRA's passes are made of."""

    def kept(self, m: Tensor) -> Tensor:
        """m (R, n) float32 as the products take it."""
        ...

    def narrow(self, xs: Sequence[Tensor], ms: Sequence[Tensor]) -> Tensor:
        """Every x m^T beside one another, (N, sum of R), of x (N, n_i) and m (R_i, n_i)."""
        ...

    def widen_(self, y: Tensor, low: Tensor, m: Tensor) -> Tensor:
        """y (N, n) += low m, of low (N, R), which may be a part of what `narrow` gave."""
        ...

    def outer(self, low: Tensor, x: Tensor) -> Tensor:
        """low^T x, (R, n) float32."""
        ...


class _Native:
    """In float32 whatever x and y are, which are rounded once."""

    def kept(self, m: Tensor) -> Tensor:
        return m.contiguous()

    def narrow(self, xs: Sequence[Tensor], ms: Sequence[Tensor]) -> Tensor:
        ranks = [len(m) for m in ms]
        low = torch.empty(len(xs[0]), sum(ranks))
        for x, m, part in zip(xs, ms, low.split(ranks, dim=1), strict=True):
            train.narrow(x.contiguous(), m, part)
        return low

    def widen_(self, y: Tensor, low: Tensor, m: Tensor) -> Tensor:
        return train.widen_(y, low, m)

    def outer(self, low: Tensor, x: Tensor) -> Tensor:
        return train.outer(low, x.contiguous())


class _Torch:
    """In the activations' type throughout."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def kept(self, m: Tensor) -> Tensor:
        return m.to(self._dtype)

    def narrow(self, xs: Sequence[Tensor], ms: Sequence[Tensor]) -> Tensor:
        parts = [x @ m.t() for x, m in zip(xs, ms, strict=True)]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def widen_(self, y: Tensor, low: Tensor, m: Tensor) -> Tensor:
        return y.addmm_(low, m)

    def outer(self, low: Tensor, x: Tensor) -> Tensor:
        return (low.t() @ x).float()


def products_for(x: Tensor, rank: int) -> NarrowProducts:
    """The products to use for activations like x (N, n) and pairs of at most this rank."""
    return _Native() if rank <= _MOST_RANKS and train.usable(x) else _Torch(x.dtype)
