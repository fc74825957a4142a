"""Encoders of the types with one scale per 32 weights, of the ternary ones and of MXFP4: the inverse of simple.py.

Every function takes blocks, float32 (N, B) contiguous, and gives uint8 (N, block_bytes), equal to ggml's
(ggml-quants.c). Those that use an importance matrix take it as a second argument, or None.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llamakit.quant.encode_blocks import Importance, half_bytes, join, pack, pack_bits, weights
from llamakit.quant.encode_search import divide, fit_scale, fit_scale_and_min, lanes, largest, over, smallest, unlanes
from llamakit.quant.simple import mxfp4_scale

#: the largest float32 below 0.5: adding it and cutting off the fraction rounds half away from zero, as roundf does
_BELOW_HALF = 0.49999997
#: where |x| / d goes from one value of the E2M1 code book (0 1 2 3 4 6 8 12) to the next; the midpoint is the lower's
_E2M1_MIDPOINTS = (0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, 0 where scale is 0: (N,) -> (N, 1)."""
    return divide(1, scale).masked_fill_(scale == 0, 0).unsqueeze(1)


def _cut(x: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
    """Towards zero to integers. The smallest scales have infinite inverses, and what these give is no number: it is
    taken as 0, the low byte of what x86 converts it to."""
    if not inverse.isfinite().all():
        x = torch.where(x.isfinite(), x, 0.0)
    return x.to(dtype)


def _symmetric(blocks: Tensor, importance: Importance | None, n_max: int) -> tuple[Tensor, Tensor]:
    """d (N, 2) and levels (N, 32) in 0..2 n_max - 1 of x ~ d (level - n_max)."""
    columns = lanes(blocks, 32)
    if importance is not None:
        fit = fit_scale(columns, weights(blocks, importance, importance.row_power, 32), n_max)
        return half_bytes(fit.scale), unlanes(fit.levels, len(blocks))
    scale = largest(columns).div_(-n_max)
    inverse = _inverse(scale)
    levels = _cut((blocks * inverse).add_(n_max + 0.5), inverse, torch.uint8)
    return half_bytes(scale), levels.clamp_(max=2 * n_max - 1)


def _with_minimum(blocks: Tensor, importance: Importance | None, n_max: int) -> tuple[Tensor, Tensor, Tensor]:
    """d and m (N, 2) and levels (N, 32) in 0..n_max of x ~ d level + m."""
    columns = lanes(blocks, 32)
    if importance is not None:
        weight = weights(blocks, importance, importance.row_power, 32)
        fit = fit_scale_and_min(columns, weight, n_max, start=-0.9, step=0.05, count=36)
        assert fit.low is not None
        return half_bytes(fit.scale), half_bytes(fit.low), unlanes(fit.levels, len(blocks))
    low = smallest(columns)
    scale = over((columns.amax(0) - low).add_(0.0), n_max)  # never -0
    inverse = _inverse(scale)
    levels = _cut((blocks - low.unsqueeze(1)).mul_(inverse).add_(0.5), inverse, torch.uint8)
    return half_bytes(scale), half_bytes(low), levels.clamp_(max=n_max)


def _fives(levels: Tensor) -> tuple[Tensor, Tensor]:
    """The fifth bits, (N, 4), and the nibbles, (N, 16), of levels (N, 32) in 0..31."""
    return pack_bits(levels >> 4), pack(levels & 0x0F, (0, 4))


def q4_0(blocks: Tensor, importance: Importance | None) -> Tensor:
    """The largest magnitude, with its sign, becomes level 0, or a search."""
    scale, levels = _symmetric(blocks, importance, 8)
    return join(scale, pack(levels, (0, 4)))


def q4_1(blocks: Tensor, importance: Importance | None) -> Tensor:
    """From the smallest to the largest in 15 steps, or a search."""
    scale, low, levels = _with_minimum(blocks, importance, 15)
    return join(scale, low, pack(levels, (0, 4)))


def q5_0(blocks: Tensor, importance: Importance | None) -> Tensor:
    """As Q4_0."""
    scale, levels = _symmetric(blocks, importance, 16)
    return join(scale, *_fives(levels))


def q5_1(blocks: Tensor, importance: Importance | None) -> Tensor:
    """As Q4_1."""
    scale, low, levels = _with_minimum(blocks, importance, 31)
    return join(scale, low, *_fives(levels))


def _rounded(blocks: Tensor, scale: Tensor) -> Tensor:
    """x / scale, half away from zero, as int8: (N, B)."""
    inverse = _inverse(scale)
    scaled = blocks * inverse
    return _cut(torch.full_like(scaled, _BELOW_HALF).copysign_(scaled).add_(scaled), inverse, torch.int8)


def q8_0(blocks: Tensor) -> Tensor:
    """The largest magnitude becomes 127."""
    scale = over(blocks.abs().amax(1), 127)
    return join(half_bytes(scale), _rounded(blocks, scale).view(torch.uint8))


def tq1_0(blocks: Tensor) -> Tensor:
    """The largest magnitude is the scale. Five trits a byte, the first the most significant, as a fraction of 256."""
    scale = blocks.abs().amax(1)
    trits = _rounded(blocks, scale).add_(1).int()
    groups = ((trits[:, :160], 5, 0), (trits[:, 160:240], 5, 0), (trits[:, 240:], 4, 1))
    packed = []
    for part, n_trits, n_more in groups:
        digits = part.unflatten(1, (n_trits, -1))
        number = digits[:, 0]
        for k in range(1, n_trits):
            number = number * 3 + digits[:, k]
        number = number * 3**n_more
        packed.append(((number * 256 + 242) // 243).to(torch.uint8))
    return join(*packed, half_bytes(scale))


def tq2_0(blocks: Tensor) -> Tensor:
    """The largest magnitude is the scale."""
    scale = blocks.abs().amax(1)
    levels = _rounded(blocks, scale).add_(1).view(torch.uint8)
    return join(pack(levels, (0, 2, 4, 6), pieces=2), half_bytes(scale))


def mxfp4(blocks: Tensor) -> Tensor:
    """The exponent of the largest magnitude, less 2; the nearest value of the code book, the smaller one of two.

    The logarithm is taken in float64 and rounded, since a value just below a power of two counts as that power.
    """
    largest_ = blocks.abs().amax(1)
    exponent = largest_.double().log2_().float().floor_().add_(125)
    exponent = (exponent.masked_fill_(largest_ == 0, 0).int() & 0xFF).to(torch.uint8).unsqueeze(1)
    scale = mxfp4_scale(exponent)
    magnitude = blocks.abs()
    levels = torch.zeros_like(blocks, dtype=torch.uint8)
    for midpoint in _E2M1_MIDPOINTS:
        levels.add_(magnitude > scale * midpoint)
    levels.add_(((blocks < 0) & (levels > 0)).to(torch.uint8), alpha=8)
    return join(exponent, pack(levels, (0, 4)))
