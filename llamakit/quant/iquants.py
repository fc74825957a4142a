"""The IQ types: levels from a grid or a code book. Layouts: ggml-common.h; formulas: ggml-quants.c.

Every function takes contiguous blocks, uint8 (N, block_bytes).
A word of a grid holds 4 or 8 weights; it is looked up whole, and multiplied by as many signs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llamakit.quant.blocks import Levels, half, planes, take, words
from llamakit.quant.tables import expand_bits, grid, look_up, sign_words


def _unsigned16(blocks: Tensor, start: int, n_bytes: int) -> Tensor:
    """Little-endian 16-bit words as int32 (N, n_bytes / 2), none negative."""
    return take(blocks, start, n_bytes).view(torch.int16).int() & 0xFFFF


def _from_grid(name: str, index: Tensor) -> Tensor:
    """Grid rows of int32 indices (N, K) -> int8 (N, 256)."""
    return grid(name, index.device).index_select(0, index.reshape(-1)).view(torch.int8).view(index.shape[0], -1)


def _from_signs(index: Tensor) -> Tensor:
    """1 or -1 of seven-bit sign indices, int32 (N, 32) -> int8 (N, 256)."""
    return sign_words(index.device).index_select(0, index.reshape(-1)).view(torch.int8).view(index.shape[0], -1)


def _from_sign_bits(packed: Tensor) -> Tensor:
    """-1 where a bit is set, else 1: uint8 (N, 32) -> int8 (N, 256)."""
    return expand_bits(packed, clear=1, set_=0xFF).view(torch.int8)


def _nibble_scales(packed: Tensor) -> Tensor:
    """Nibbles in order, low ones first: uint8 (N, B) -> (N, 2 B)."""
    return torch.stack([packed & 0x0F, packed >> 4], dim=-1).flatten(1)


def _sevens_and_scale(blocks: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """32-bit words of four 7-bit sign indices and a 4-bit scale -> signs (N, 256), d (0.5 + scale) (N, 8)."""
    shifts = torch.tensor([0, 7, 14, 21], dtype=torch.int32, device=packed.device)
    signs = _from_signs(((packed.unsqueeze(-1) >> shifts) & 127).flatten(1))
    return signs, half(blocks, 0) * (0.5 + ((packed >> 28) & 15).float())


def iq2_xxs(blocks: Tensor) -> Levels:
    """f16 d; 8 times 4 bytes of grid indices and 4 of signs and scale."""
    pairs = take(blocks, 2, 64).view(torch.int32).view(-1, 8, 2)
    index = pairs[..., 0].contiguous().view(torch.uint8).int()
    signs, scale = _sevens_and_scale(blocks, pairs[..., 1])
    level = _from_grid("IQ2_XXS", index).mul_(signs)
    return Levels(level, scale * 0.25)


def iq2_xs(blocks: Tensor) -> Levels:
    """f16 d; 32 u16 of 9 bits of grid index and 7 of signs; 8 bytes of nibble scales."""
    packed = _unsigned16(blocks, 2, 64)
    level = _from_grid("IQ2_XS", packed & 511).mul_(_from_signs(packed >> 9))
    return Levels(level, _quarter_scales(blocks, 66))


def _quarter_scales(blocks: Tensor, start: int) -> Tensor:
    """d (0.5 + scale) / 4 with 16 nibble scales, (N, 16)."""
    return half(blocks, 0) * (0.5 + _nibble_scales(take(blocks, start, 8)).float()) * 0.25


def iq2_s(blocks: Tensor) -> Levels:
    """f16 d; 32 bytes of grid index; 32 of sign bits; 8 of upper index bits; 8 of nibble scales."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.int32, device=blocks.device)
    high = ((take(blocks, 66, 8).int().unsqueeze(-1) >> shifts) & 3).flatten(1)
    level = _from_grid("IQ2_S", take(blocks, 2, 32).int() | high << 8)
    level.mul_(_from_sign_bits(take(blocks, 34, 32)))
    return Levels(level, _quarter_scales(blocks, 74))


def iq3_xxs(blocks: Tensor) -> Levels:
    """f16 d; 64 bytes of grid index; 8 u32 of signs and scale."""
    signs, scale = _sevens_and_scale(blocks, take(blocks, 66, 32).view(torch.int32))
    level = _from_grid("IQ3_XXS", take(blocks, 2, 64).int()).mul_(signs)
    return Levels(level, scale * 0.5)


def iq3_s(blocks: Tensor) -> Levels:
    """f16 d; 64 bytes of grid index; 8 of upper index bits; 32 of sign bits; 4 of nibble scales: d (1 + 2 sc)."""
    shifts = torch.arange(8, dtype=torch.int32, device=blocks.device)
    high = ((take(blocks, 66, 8).int().unsqueeze(-1) >> shifts) & 1).flatten(1)
    level = _from_grid("IQ3_S", take(blocks, 2, 64).int() | high << 8)
    level.mul_(_from_sign_bits(take(blocks, 74, 32)))
    scale = half(blocks, 0) * (1 + 2 * _nibble_scales(take(blocks, 106, 4)))
    return Levels(level, scale)


def iq1_s(blocks: Tensor) -> Levels:
    """f16 d; 32 bytes of grid index; 8 u16 of upper index bits, scale and shift: d (1 + 2 sc)(grid +- 1/8)."""
    packed = _unsigned16(blocks, 34, 16)
    shifts = torch.tensor([0, 3, 6, 9], dtype=torch.int32, device=blocks.device)
    high = ((packed.unsqueeze(-1) >> shifts) & 7).flatten(1)
    level = _from_grid("IQ1_S", take(blocks, 2, 32).int() | high << 8).view(-1, 8, 32)
    level.add_(1 - 2 * (packed >> 15).to(torch.int8).unsqueeze(-1))
    scale = half(blocks, 0) / 8 * (1 + 2 * ((packed >> 12) & 7)).float()
    return Levels(level, scale)


def iq1_m(blocks: Tensor) -> Levels:
    """32 bytes of grid index; 16 of upper index bits and shifts; 4 u16 of 3-bit scales and a quarter of f16 d each."""
    packed = _unsigned16(blocks, 48, 8)
    quarters = [(packed[:, k : k + 1] >> 12) << 4 * k for k in range(4)]
    d = (quarters[0] | quarters[1] | quarters[2] | quarters[3]).to(torch.int16).view(torch.float16).float()
    shifts = torch.tensor([0, 3, 6, 9], dtype=torch.int32, device=blocks.device)
    scale = d / 8 * (1 + 2 * ((packed.unsqueeze(-1) >> shifts) & 7).flatten(1)).float()
    high = _nibble_scales(take(blocks, 32, 16)).int()
    level = _from_grid("IQ1_S", take(blocks, 0, 32).int() | (high & 7) << 8).view(-1, 32, 8)
    level.add_(1 - 2 * (high >> 3).to(torch.int8).unsqueeze(-1))
    return Levels(level, scale)


def iq4_nl(blocks: Tensor) -> Levels:
    """f16 d; 16 bytes of nibbles through a code book."""
    return Levels(look_up("IQ4_NL", planes(words(blocks, 2, 16), (0, 4), 0x0F)), half(blocks, 0))


def iq4_xs(blocks: Tensor) -> Levels:
    """f16 d; u16 of upper scale bits; 4 bytes of lower ones; 128 of nibbles: d (sc - 32) table(q), 8 groups of 32."""
    level = look_up("IQ4_NL", planes(words(blocks, 8, 128, pieces=8), (0, 4), 0x0F))
    shifts = torch.arange(0, 16, 2, dtype=torch.int32, device=blocks.device)
    high = (_unsigned16(blocks, 2, 2) >> shifts) & 3
    scale = (_nibble_scales(take(blocks, 4, 4)).int() | high << 4) - 32
    return Levels(level, half(blocks, 0) * scale.float())
