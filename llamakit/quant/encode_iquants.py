"""Encoders of IQ4_NL and IQ4_XS: the inverse of what iquants.py has of them.

Both take blocks, float32 (N, B) contiguous, and their importance or None, and give uint8 (N, block_bytes), equal to
ggml's (ggml-quants.c).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llamakit.quant.encode_blocks import Importance, half_bytes, join, pack, power, weights
from llamakit.quant.encode_search import TINY, accumulate, divide, lanes, largest, nearest, unlanes
from llamakit.quant.tables import HALF_STEPS, code_book_index, code_book_values

_SIZE, _REACH = 32, 7
#: the first value of the code book: what the largest magnitude is first mapped to
_FIRST = -127


def _half_steps(x: Tensor, inverse: Tensor, out: Tensor) -> Tensor:
    """floor(2 x inverse) within what the tables know, as int32 indices; NaN is above all."""
    scaled = torch.mul(x, inverse * 2, out=out).floor_().nan_to_num_(HALF_STEPS).clamp_(-HALF_STEPS, HALF_STEPS)
    return scaled.add_(HALF_STEPS).int()


def _nearest_values(x: Tensor, scale: Tensor) -> Tensor:
    """Codes of the values nearest to x / scale, or to 0 where scale is 0: uint8 (S, N)."""
    inverse = divide(1, scale).masked_fill_(scale == 0, 0)
    steps = _half_steps(x, inverse, torch.empty_like(x))
    return code_book_index("IQ4_NL", x.device).index_select(0, steps.view(-1)).view(x.shape)


def _search(x: Tensor, weight: Tensor) -> Tensor:
    """The scale of every group (S, N) -> (N,), 16 tries."""
    peak = largest(x)
    zero = peak.abs() < TINY
    peak.masked_fill_(zero, torch.inf)
    values, level = code_book_values("IQ4_NL", x.device), torch.empty_like(x)
    products = x.new_empty(x.shape[0], 2, x.shape[1])

    def sums(inverse: Tensor) -> tuple[Tensor, Tensor]:
        steps = _half_steps(x, inverse, level)
        torch.index_select(values, 0, steps.view(-1), out=level.view(-1))
        weighted = torch.mul(weight, level, out=products[:, 0])
        torch.mul(weighted, level, out=products[:, 1])
        weighted.mul_(x)
        total = accumulate(products)
        return total[0], total[1]

    # 1 / (peak / -127): rounded twice, unlike -127 / peak.
    qx, qq = sums(divide(1, (-peak).div_(_FIRST)))
    scale = torch.where(qq > 0, qx / qq, 0.0)
    best = scale * qx
    for k in range(-_REACH, _REACH + 1):
        qx, qq = sums(divide(_FIRST + k, peak))
        better = (qq > 0).logical_and_(qx * qx > best * qq)
        torch.where(better, qx / qq, scale, out=scale)
        torch.where(better, scale * qx, best, out=best)
    return scale.masked_fill_(zero, 0)


def _group_weights(blocks: Tensor, x: Tensor, importance: Importance | None) -> Tensor:
    """Squares, or importance * sqrt(2 * mean square of the block + x^2), as lanes."""
    if importance is None:
        return x * x
    return weights(blocks, importance, power(blocks).mul_(2 / blocks.shape[1]), _SIZE)


def iq4_nl(blocks: Tensor, importance: Importance | None) -> Tensor:
    """Codes are those for the scale before its rounding to float16."""
    x = lanes(blocks, _SIZE)
    scale = _search(x, _group_weights(blocks, x, importance))
    return join(half_bytes(scale), pack(unlanes(_nearest_values(x, scale), len(blocks)), (0, 4)))


def iq4_xs(blocks: Tensor, importance: Importance | None) -> Tensor:
    """The group scale of the largest magnitude becomes -32 d; codes are those for d before its rounding to float16."""
    x = lanes(blocks, _SIZE)
    scale = _search(x, _group_weights(blocks, x, importance)).view(len(blocks), -1)
    d = largest(scale.t()).neg_().div_(32)
    inverse = divide(1, d).masked_fill_(d == 0, 0).unsqueeze(1)
    levels = nearest(scale * inverse).clamp_(-32, 31)
    codes = unlanes(_nearest_values(x, (d.unsqueeze(1) * levels).view(-1)), len(blocks))
    levels.add_(32)
    low = levels[:, 0::2] & 0x0F | (levels[:, 1::2] & 0x0F) << 4
    shifts = torch.arange(0, 16, 2, dtype=torch.int32, device=x.device)
    high = (levels >> 4 << shifts).sum(1, dtype=torch.int32).to(torch.int16).view(torch.uint8).view(-1, 2)
    return join(half_bytes(d), high, low.to(torch.uint8), pack(codes, (0, 4), pieces=8))
