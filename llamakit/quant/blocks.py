"""What every block codec is made of: levels times scales plus offsets, and the extraction of packed bits.

Shapes: N blocks, G groups of a block that share a scale, S weights of a group.

Bits are extracted from 8 bytes at a time, as int64 words: what a shift brings in from the neighbouring byte is masked
out. Little-endian byte order is assumed, as in the files.

Signed levels are left in the upper bits of their byte with the top bit inverted: k bits there, read as int8, are
(level - 2^(k-1)) * 2^(8-k). The power of two is taken out of the scale, which is exact in float32, signed zeros and
infinities included, because the scales are products of a float16 and a small integer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Levels(NamedTuple):
    """Weights before the arithmetic: weight = level * scale (+ offset).

    level: int8, uint8 or float32, N * G * S elements in the order of the weights; scale, offset: float32 (N, G). The
    product is exact in float32 for every type, so that only the sum rounds.
    """

    level: Tensor
    scale: Tensor
    offset: Tensor | None = None


def take(blocks: Tensor, start: int, n_bytes: int) -> Tensor:
    """Contiguous copy of n_bytes of every block: uint8 (N, block_bytes) -> (N, n_bytes)."""
    # Not narrow_copy, which runs on one thread; not contiguous(), which gives a view where there is one block.
    return blocks[:, start : start + n_bytes].clone(memory_format=torch.contiguous_format)


def words(blocks: Tensor, start: int, n_bytes: int, pieces: int = 1) -> Tensor:
    """The same bytes as int64 words, every block's cut into equal pieces: (N * pieces, n_bytes / pieces / 8)."""
    return take(blocks, start, n_bytes).view(torch.int64).view(len(blocks) * pieces, -1)


def half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at an even position of every block, as float32 (N, 1)."""
    position = start // 2
    return blocks.view(torch.float16)[:, position : position + 1].float()


def repeat_byte(byte: int, n_bytes: int = 8) -> int:
    """The signed integer whose n_bytes bytes are all `byte`."""
    return int.from_bytes(bytes([byte]) * n_bytes, "little", signed=True)


def planes(packed: Tensor, shifts: Iterable[int], mask: int) -> Tensor:
    """Bit fields of every byte, one plane per shift: (byte >> shift) & mask; a negative shift goes to the left.

    packed: int64 or int32 words (M, W), M pieces -> (M, planes, W). The planes of a piece follow each other: that is
    the order of the weights in GGML.
    """
    shifts = tuple(shifts)
    out = packed.new_empty(packed.shape[0], len(shifts), packed.shape[1])
    for plane, right in enumerate(shifts):
        if right > 0:
            torch.bitwise_right_shift(packed, right, out=out[:, plane])
        elif right < 0:
            torch.bitwise_left_shift(packed, -right, out=out[:, plane])
        else:
            out[:, plane] = packed
    return out.bitwise_and_(repeat_byte(mask, packed.itemsize))


def merged(low: Tensor, high: Tensor) -> Tensor:
    """low | high of two sets of planes with as many words, in low's memory."""
    return low.view(-1).bitwise_or_(high.view(-1))
