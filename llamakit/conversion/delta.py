"""B @ A in float32 with the roundings of ggml's matrix product, so that a merge equals llama-export-lora's to the bit.

Over a handful of ranks the order of the additions is the only freedom that a product has. ggml (ggml-cpu, vec.cpp and
llamafile/sgemm.cpp) has two orders, and both depend on how many floats a vector of the processor holds, `lanes`: 16
with AVX-512, 8 with AVX2.

- The rank is a multiple of lanes, n_in of 4, and there is more than one row: each lane l adds up the ranks l,
  l + lanes, ... with fused multiply-adds, and the lanes are added pairwise, l and l + lanes/2 first.
- Otherwise: one sum from the first rank to the last. GCC multiplies whole blocks of lanes/2 ranks at a time, whose
  products are thus rounded before they are added; the last ranks, fewer than a block, are fused multiply-adds.

Measured with llama-export-lora of 2026 built by GCC 12, for both widths: equal to the last bit for every rank that is a
multiple of lanes or below 4 * lanes. Beyond, and on other processors, the last bit may differ. Matrix products of BLAS
are of no use here: their order depends on the shape.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def vector_lanes() -> int:
    """Floats in a vector of this processor, as ggml built for it uses them: 16 with AVX-512, else 8."""
    return 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


def low_rank_product(b: Tensor, a: Tensor, *, n_out: int, lanes: int) -> Tensor:
    """b (rows, r) @ a (r, n_in), float32 -> float32 (rows, n_in); b may be some rows of a matrix of n_out rows."""
    rank, n_in = a.shape
    if rank % lanes == 0 and n_in % 4 == 0 and n_out > 1:
        return _sum_of_lanes(b, a, 0, 1, lanes)
    return _sum_in_order(b, a, rank // (lanes // 2) * (lanes // 2))


def _sum_of_lanes(b: Tensor, a: Tensor, first: int, step: int, lanes: int) -> Tensor:
    """The lanes first, first + step, ... added pairwise; depth first, so that few of them exist at a time."""
    if step == lanes:
        return _sum_in_order(b[:, first::lanes], a[first::lanes], 0)
    half = _sum_of_lanes(b, a, first, 2 * step, lanes)
    return half.add_(_sum_of_lanes(b, a, first + step, 2 * step, lanes))


def _sum_in_order(b: Tensor, a: Tensor, n_rounded: int) -> Tensor:
    """Rank after rank: the first n_rounded with rounded products, the rest fused."""
    total = b[:, :1] * a[0]
    product = torch.empty_like(total)
    for k in range(1, a.shape[0]):
        x, y = b[:, k : k + 1], a[k]
        if k < n_rounded:
            total.add_(torch.mul(x, y, out=product))
        elif _addcmul_is_fused():
            total.addcmul_(x, y)
        else:
            total = _fused(x, y, total)
    return total


def _fused(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x * y + z, float32, rounded once.

    The product is exact in float64, the sum is not: it is rounded to odd there (Boldo and Melquiond 2008), so that the
    second rounding, to float32, gives what a single one would.
    """
    product, addend = x.double() * y.double(), z.double()
    total = product + addend
    there = total - product
    error = (product - (total - there)) + (addend - there)
    bits = total.view(torch.int64)
    away = torch.where((error > 0) == (total > 0), 1, -1)
    bits += torch.where((error != 0) & (bits & 1 == 0), away, 0)
    return total.float()


@cache
def _addcmul_is_fused() -> bool:
    """Whether this build of torch rounds `addcmul` once, as most do: over ten times as fast as doing it by hand."""
    generator = torch.Generator().manual_seed(0)
    b, a, z = (torch.randn(*shape, generator=generator) for shape in ((37, 3), (3, 1021), (37, 1021)))
    exact = _fused(b[:, 1:2], a[1], z)
    return torch.equal(z.addcmul_(b[:, 1:2], a[1]), exact)
