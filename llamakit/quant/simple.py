"""The types with one scale per 32 weights, the ternary ones, and microscaling FP4. Layouts: ggml-common.h.

Every function takes contiguous blocks, uint8 (N, block_bytes).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llamakit.quant.blocks import Levels, half, merged, planes, repeat_byte, take, words
from llamakit.quant.tables import expand_bits, look_up, scales_ue4m3


def q4_0(blocks: Tensor) -> Levels:
    """f16 d; 16 bytes of nibbles, low ones first: (q - 8) d."""
    packed = words(blocks, 2, 16).bitwise_xor_(repeat_byte(0x88))
    return Levels(planes(packed, (-4, 0), 0xF0).view(torch.int8), half(blocks, 0) / 16)


def q4_1(blocks: Tensor) -> Levels:
    """f16 d; f16 m; 16 bytes of nibbles: q d + m."""
    level = planes(words(blocks, 4, 16), (0, 4), 0x0F)
    return Levels(level.view(torch.uint8), half(blocks, 0), half(blocks, 2))


def q5_0(blocks: Tensor) -> Levels:
    """f16 d; 4 bytes of fifth bits; 16 bytes of nibbles: (q - 16) d."""
    # A fifth bit that is not set takes 16 away: 0xF0 above the nibble, as int8.
    fifth = expand_bits(take(blocks, 2, 4), clear=0xF0, set_=0)
    return Levels(merged(planes(words(blocks, 6, 16), (0, 4), 0x0F), fifth).view(torch.int8), half(blocks, 0))


def q5_1(blocks: Tensor) -> Levels:
    """f16 d; f16 m; 4 bytes of fifth bits; 16 bytes of nibbles: q d + m."""
    fifth = expand_bits(take(blocks, 4, 4), clear=0, set_=0x10)
    level = merged(planes(words(blocks, 8, 16), (0, 4), 0x0F), fifth)
    return Levels(level.view(torch.uint8), half(blocks, 0), half(blocks, 2))


def q8_0(blocks: Tensor) -> Levels:
    """f16 d; 32 int8: q d."""
    # All bytes become floats, those of d too: one pass over contiguous memory is faster than leaving them out.
    return Levels(blocks.view(torch.int8).float()[:, 2:], half(blocks, 0))


def tq1_0(blocks: Tensor) -> Levels:
    """48 bytes of 5 trits, 4 bytes of 4 trits, f16 d: (t - 1) d.

    The trits of a byte are the leading base-3 digits of byte / 256; multiplying by 3^k (modulo 256) brings digit k up.
    """
    powers = []
    for start, n_bytes, n_trits in ((0, 32, 5), (32, 16, 5), (48, 4, 4)):
        packed = take(blocks, start, n_bytes)
        powers += [packed * 3**k for k in range(n_trits)]
    fractions = torch.cat(powers, dim=1)
    # The digit is the integer part of 3 * byte / 256: 0 below 86, 2 from 171.
    level = (fractions >= 86).view(torch.int8) + (fractions >= 171).view(torch.int8) - 1
    return Levels(level, half(blocks, 52))


def tq2_0(blocks: Tensor) -> Levels:
    """64 bytes of four 2-bit levels, in two pieces of 32 bytes; f16 d: (q - 1) d."""
    level = planes(words(blocks, 0, 64, pieces=2), (0, 2, 4, 6), 0x03)
    return Levels(level.view(torch.int8).sub_(1), half(blocks, 64))


def mxfp4(blocks: Tensor) -> Levels:
    """u8 exponent; 16 bytes of nibbles: table(q) 2^(e - 128), the table holding E2M1 doubled (OCP MX v1.0)."""
    level = look_up("MXFP4", planes(words(blocks, 1, 16), (0, 4), 0x0F))
    return Levels(level, mxfp4_scale(blocks[:, :1]))


def mxfp4_scale(exponent: Tensor) -> Tensor:
    """2^(e - 128) of bytes of any shape, as float32."""
    exponent = exponent.int()
    # As a float32's exponent field e stands for 2^(e - 127); so e - 1, and the two smallest are subnormal.
    scale = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return scale.view(torch.float32)


def nvfp4(blocks: Tensor) -> Levels:
    """4 scales in unsigned E4M3; per scale 8 bytes of nibbles, low ones first: table(q) scale / 2, as in MXFP4."""
    level = look_up("MXFP4", planes(words(blocks, 4, 32, pieces=4), (0, 4), 0x0F))
    scale = scales_ue4m3(blocks.device).index_select(0, take(blocks, 0, 4).view(-1).int())
    return Levels(level, scale.view(-1, 4))
