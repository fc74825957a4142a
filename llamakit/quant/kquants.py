"""The K-quants: 256 weights with two levels of scales. Layouts: ggml-common.h.

Every function takes contiguous blocks, uint8 (N, block_bytes).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llamakit.quant.blocks import Levels, half, merged, planes, repeat_byte, take, words


def q2_k(blocks: Tensor) -> Levels:
    """16 bytes of (scale, min) nibbles; 64 of 2-bit levels; f16 d; f16 dmin: d sc q - dmin m, 16 groups of 16."""
    level = planes(words(blocks, 16, 64, pieces=2), (0, 2, 4, 6), 0x03)
    scales = take(blocks, 0, 16)
    return Levels(level.view(torch.uint8), half(blocks, 80) * (scales & 0x0F), -half(blocks, 82) * (scales >> 4))


def q3_k(blocks: Tensor) -> Levels:
    """32 bytes of third bits; 64 of 2-bit levels; 12 of 6-bit scales; f16 d: d (sc - 32)(q - 4), 16 groups of 16."""
    # The third bit at the top, inverted, makes a level signed: 32 (q - 4).
    low = planes(words(blocks, 32, 64, pieces=2), (-5, -3, -1, 1), 0x60)
    high = planes(words(blocks, 0, 32).bitwise_not_(), range(-7, 1), 0x80)
    scale = half(blocks, 108) / 32 * q3_k_scales(take(blocks, 96, 12))
    return Levels(merged(low, high).view(torch.int8), scale)


def q3_k_scales(packed: Tensor) -> Tensor:
    """uint8 (N, 12) -> int8 (N, 16) in -32..31: low nibbles in bytes 0-7, the upper two bits in bytes 8-11."""
    low, high = packed.view(torch.int32).split((2, 1), dim=1)
    low = planes(low, (0, 4), 0x0F)
    high = planes(high, (-4, -2, 0, 2), 0x30)
    return merged(low, high).view(torch.int8).view(-1, 16).sub_(32)


def q45_k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """d sc and -dmin m of Q4_K and Q5_K, float32 (N, 8): f16 d; f16 dmin; 12 bytes of 6-bit scales and mins.

    As int32 words of four: bytes 0-3 are the first four scales, 4-7 the first four mins, each with two upper bits of
    the last four on top; bytes 8-11 are the nibbles of the last four scales and mins.
    """
    packed = take(blocks, 4, 12).view(torch.int32)
    nibbles = packed[:, 2]
    both = []
    for kind, right in ((0, 0), (1, 4)):
        six_bits = packed.new_empty(len(blocks), 2)
        six_bits[:, 0] = packed[:, kind] & 0x3F3F3F3F
        last = ((packed[:, kind] >> 2) & 0x30303030).bitwise_or_((nibbles >> right) & 0x0F0F0F0F)
        six_bits[:, 1] = last
        both.append(six_bits.view(torch.uint8))
    return half(blocks, 0) * both[0], -half(blocks, 2) * both[1]


def q4_k(blocks: Tensor) -> Levels:
    """f16 d; f16 dmin; 12 bytes of scales; 128 of nibbles: d sc q - dmin m, 8 groups of 32."""
    level = planes(words(blocks, 16, 128, pieces=4), (0, 4), 0x0F)
    return Levels(level.view(torch.uint8), *q45_k_scales(blocks))


def q5_k(blocks: Tensor) -> Levels:
    """f16 d; f16 dmin; 12 bytes of scales; 32 of fifth bits; 128 of nibbles: d sc q - dmin m, 8 groups of 32."""
    low = planes(words(blocks, 48, 128, pieces=4), (0, 4), 0x0F)
    high = planes(words(blocks, 16, 32), range(-4, 4), 0x10)
    return Levels(merged(low, high).view(torch.uint8), *q45_k_scales(blocks))


def q6_k(blocks: Tensor) -> Levels:
    """128 bytes of nibbles; 64 of upper bits; 16 int8 scales; f16 d: d sc (q - 32), 16 groups of 16."""
    # The upper bits at the top of the byte, the highest inverted, make a level signed: 4 (q - 32).
    low = planes(words(blocks, 0, 128, pieces=2), (-2, 2), 0x3C)
    high = planes(words(blocks, 128, 64, pieces=2).bitwise_xor_(repeat_byte(0xAA)), (-6, -4, -2, 0), 0xC0)
    scale = half(blocks, 208) / 4 * take(blocks, 192, 16).view(torch.int8)
    return Levels(merged(low, high).view(torch.int8), scale)
