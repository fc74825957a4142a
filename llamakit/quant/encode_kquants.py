"""Encoders of the K-quants: the inverse of kquants.py.

Every function takes blocks, float32 (N, 256) contiguous, and their importance or None, and gives uint8
(N, block_bytes), equal to ggml's (ggml-quants.c). First every group of 16 or 32 weights is fitted by itself; then the
scales of a block are quantized, the header is packed, and the levels are taken anew from the scales as the decoder will
see them. Where such a scale is 0, the levels of the first fit stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llamakit.quant.encode_blocks import Importance, half_bytes, join, pack, power, weights
from llamakit.quant.encode_search import (
    TINY,
    Fit,
    accumulate,
    divide,
    fit_positive,
    fit_scale,
    fit_scale_and_min,
    fit_scale_by_descent,
    lanes,
    largest,
    nearest,
    over,
    root,
    unlanes,
)
from llamakit.quant.kquants import q3_k_scales, q45_k_scales

#: the smallest float32 above 0
_SMALLEST = 2.0**-149


def _requantize(x: Tensor, fit: Fit, scale: Tensor, offset: Tensor | None, low: int, high: int) -> Tensor:
    """The levels nearest to (x - offset) / scale, less `low`: uint8 (N, 256).

    x: (S, N * G); scale, offset: (N, G) as the decoder has them.
    """
    n_blocks, scale = len(scale), scale.reshape(-1)
    shifted = x if offset is None else x - offset.reshape(-1)
    levels = nearest(shifted / scale).clamp_(low, high).sub_(low).to(torch.uint8)
    kept = scale == 0
    if kept.any():
        levels = torch.where(kept, fit.levels, levels)
    return unlanes(levels, n_blocks)


def _fit_with_min(
    blocks: Tensor, importance: Importance | None, size: int, n_max: int, start: float, count: int
) -> tuple[Tensor, Fit, Tensor | None]:
    """Lanes x, their fit, and, with an importance, the sum of weights of every group.

    start, count: of the search without importance, whose weights are the magnitudes themselves in groups of 16, and in
    groups of 32 these and their root mean square.
    """
    x = lanes(blocks, size)
    if importance is not None:
        # Twice the mean square where groups are of 32.
        variance = power(blocks).mul_(size // 16).div_(256)
        weight = weights(blocks, importance, variance, size)
        return x, fit_scale_and_min(x, weight, n_max, start=-0.9, step=0.05, count=36), accumulate(weight)
    weight = x.abs()
    if size == 32:
        weight.add_(root(accumulate(x * x).div_(32)))
    return x, fit_scale_and_min(x, weight, n_max, start=start, step=0.1, count=count, absolute=size == 16), None


def _quantized_by_largest(values: Tensor, n_max: int) -> tuple[Tensor, Tensor]:
    """Values (N, G) as bytes times a scale (N,): the largest becomes n_max. Negative values wrap around, as in ggml."""
    peak = values.amax(1).clamp_(min=0).add_(0.0)  # never -0
    inverse = divide(n_max, peak).masked_fill_(peak == 0, 0).unsqueeze(1)
    return nearest(values * inverse).bitwise_and_(0xFF), over(peak, n_max)


def _scales_and_mins(fit: Fit, sum_w: Tensor | None, n_blocks: int, n_max: int) -> tuple[Tensor, Tensor, Tensor]:
    """The scales and mins of every block: int32 (2, N, G) in 0..255, d and dmin float32 (2, N)."""
    assert fit.low is not None
    both = torch.stack([fit.scale, -fit.low]).view(2 * n_blocks, -1)
    if sum_w is None:
        levels, scale = _quantized_by_largest(both, n_max)
    else:
        weight = sum_w.view(n_blocks, -1).repeat(2, 1)
        found = fit_positive(both.t().contiguous(), weight.t().contiguous(), n_max)
        levels, scale = found.levels.t().int(), found.scale
    levels, scale = levels.reshape(2, n_blocks, -1), scale.view(2, n_blocks)
    return levels[0], levels[1], scale


def q2_k(blocks: Tensor, importance: Importance | None) -> Tensor:
    """Groups of 16, with the smallest error in magnitude, or weighted least squares."""
    x, fit, sum_w = _fit_with_min(blocks, importance, 16, 3, -0.5, 15)
    scales, mins, d = _scales_and_mins(fit, sum_w, len(blocks), 15)
    packed = (scales | mins << 4).to(torch.uint8)
    decoded = d.half().float().unsqueeze(2)
    levels = _requantize(x, fit, decoded[0] * (packed & 0x0F), -(decoded[1] * (packed >> 4)), 0, 3)
    return join(packed, pack(levels, (0, 2, 4, 6), pieces=2), half_bytes(d[0]), half_bytes(d[1]))


def _six_bit_header(scales: Tensor, mins: Tensor, d: Tensor) -> Tensor:
    """f16 d; f16 dmin; 12 bytes of the scales and mins of Q4_K and Q5_K: uint8 (N, 16)."""
    first = [values[:, :4] | values[:, 4:] >> 4 << 6 for values in (scales, mins)]
    last = scales[:, 4:] & 0x0F | (mins[:, 4:] & 0x0F) << 4
    twelve = torch.cat([*first, last], dim=1).to(torch.uint8)
    return join(half_bytes(d[0]), half_bytes(d[1]), twelve)


def q4_k(blocks: Tensor, importance: Importance | None) -> Tensor:
    """Groups of 32."""
    x, fit, sum_w = _fit_with_min(blocks, importance, 32, 15, -1.0, 20)
    scales, mins, d = _scales_and_mins(fit, sum_w, len(blocks), 63)
    if sum_w is None:
        scales, mins = scales.clamp_(max=63), mins.clamp_(max=63)
    header = _six_bit_header(scales, mins, d)
    levels = _requantize(x, fit, *q45_k_scales(header), 0, 15)
    return join(header, pack(levels, (0, 4), pieces=4))


def q5_k(blocks: Tensor, importance: Importance | None) -> Tensor:
    """Groups of 32."""
    x, fit, sum_w = _fit_with_min(blocks, importance, 32, 31, -0.5, 15)
    scales, mins, d = _scales_and_mins(fit, sum_w, len(blocks), 63)
    header = _six_bit_header(scales.clamp_(max=63), mins.clamp_(max=63), d)
    levels = _requantize(x, fit, *q45_k_scales(header), 0, 31)
    return join(header, pack(levels >> 4, range(8)), pack(levels & 0x0F, (0, 4), pieces=4))


def _by_signed_largest(values: Tensor, n_max: int, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """Values (N, G) as int32 (N, G) times a scale (N,): the one of the largest magnitude becomes -n_max.

    Third, which blocks have no magnitude from `least` on, and so levels and a scale of 0: bool (N, 1).
    """
    peak = largest(values.t())
    zero = peak.abs() < least
    inverse = divide(-n_max, peak)
    scale = divide(1, inverse).masked_fill_(zero, 0)
    return nearest(values * inverse.masked_fill_(zero, 0).unsqueeze(1)), scale, zero.unsqueeze(1)


def q3_k(blocks: Tensor, importance: Importance | None) -> Tensor:
    """Groups of 16: levels improved one after the other, or a weighted search for the scales and for theirs."""
    x = lanes(blocks, 16)
    if importance is None:
        fit = fit_scale_by_descent(x, 4)
        scales, d, zero = _by_signed_largest(fit.scale.view(len(blocks), 16), 32, _SMALLEST)
        # All scales zero: ggml leaves the bytes at zero, which stand for -32.
        scales = scales.clamp_(-32, 31).add_(32).masked_fill_(zero, 0)
    else:
        weight = weights(blocks, importance, power(blocks).mul_(2).div_(256), 16)
        fit = fit_scale(x, weight, 4)
        sums = accumulate(weight).view(-1, 16).t().contiguous()
        found = fit_scale(fit.scale.view(-1, 16).t().contiguous(), sums, 32)
        scales, d = found.levels.t().int(), found.scale
    low = scales[:, :8] & 0x0F | (scales[:, 8:] & 0x0F) << 4
    high = (scales >> 4).view(-1, 4, 4)
    high = high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6
    packed = torch.cat([low, high], dim=1).to(torch.uint8)
    decoded = d.half().float().unsqueeze(1) * q3_k_scales(packed)
    levels = _requantize(x, fit, decoded, None, -4, 3)
    low_bits = pack(levels & 0x03, (0, 2, 4, 6), pieces=2)
    return join(pack(levels >> 2, range(8)), low_bits, packed, half_bytes(d))


def q6_k(blocks: Tensor, importance: Importance | None) -> Tensor:
    """Groups of 16, weighted by the square or by the importance alone."""
    x = lanes(blocks, 16)
    fit = fit_scale(x, x * x if importance is None else lanes(importance.column, 16), 32)
    scales, d, zero = _by_signed_largest(fit.scale.view(len(blocks), 16), 128, TINY)
    scales = scales.clamp_(max=127).to(torch.int8)
    decoded = d.half().float().unsqueeze(1) * scales
    levels = _requantize(x, fit, decoded, None, -32, 31)
    out = join(
        pack(levels & 0x0F, (0, 4), pieces=2),
        pack(levels >> 4, (0, 2, 4, 6), pieces=2),
        scales.view(torch.uint8),
        half_bytes(d),
    )
    return out.masked_fill_(zero, 0)
