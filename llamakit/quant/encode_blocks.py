"""What every encoder is made of: packing of levels into bytes, and the importance of weights.

Shapes: N blocks of B weights, G groups of a block that share a scale. Levels are packed 8 at a time, as int64 words,
the inverse of what blocks.py does. Layouts stand with the decoders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llamakit.quant.encode_search import accumulate, lanes, root


class Importance(NamedTuple):
    """How much each weight of some blocks matters: column, float32 (N, B), is the importance matrix's share of it;
    row_power, float32 (N,), the mean square of the row that the block is of."""

    column: Tensor
    row_power: Tensor


def pack(levels: Tensor, shifts: Sequence[int], pieces: int = 1) -> Tensor:
    """Bit fields of every byte: byte = OR of plane << shift; a negative shift goes to the right.

    levels: uint8 (N, pieces * planes * W), small enough for their fields -> uint8 (N, pieces * W).
    """
    n = levels.shape[0]
    planes = levels.view(torch.int64).view(n * pieces, len(shifts), -1)
    out = planes[:, 0] << shifts[0]
    for plane, shift in enumerate(shifts[1:], 1):
        out.bitwise_or_(planes[:, plane] << shift)
    return out.view(n, -1).view(torch.uint8)


def pack_bits(bits: Tensor) -> Tensor:
    """Bytes of 0 or 1 to bits, the first the lowest: uint8 (N, 8 K) -> (N, K).

    The product collects the eight lowest bits of a word in its uppermost byte.
    """
    return (bits.view(torch.int64) * 0x0102040810204080 >> 56).to(torch.uint8)


def half_bytes(x: Tensor) -> Tensor:
    """Float32 (N,) as the two bytes of a float16, rounded half to even: uint8 (N, 2)."""
    return x.to(torch.float16).view(torch.uint8).view(-1, 2)


def join(*fields: Tensor) -> Tensor:
    """The fields of a block in their order: uint8 (N, n_i) -> (N, sum of n_i)."""
    return torch.cat(fields, dim=1)


def power(blocks: Tensor) -> Tensor:
    """The sum of squares of every block, from the first to the last: (N, B) -> (N,)."""
    columns = lanes(blocks, blocks.shape[1])
    return accumulate(columns.mul_(columns))


def weights(blocks: Tensor, importance: Importance, variance: Tensor, size: int) -> Tensor:
    """column * sqrt(variance + x^2) as lanes of groups of `size`; variance: float32 (N,) -> (size, N * G)."""
    deviation = root((blocks * blocks).add_(variance.unsqueeze(1)))
    return lanes(deviation.mul_(importance.column), size)
