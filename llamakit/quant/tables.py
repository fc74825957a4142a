"""Look-up tables, built once per device; the grids and code books are the `gguf` package's values."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def grid(name: str, device: torch.device) -> Tensor:
    """The rows of an IQ grid, each packed into one word: int64 (rows,) for 8 weights, int32 for 4.

    IQ1's rows hold 8 * value, so that its shift of 1/8 is an integer too.
    """
    from gguf import quants

    codec = getattr(quants, name)
    codec.init_grid()
    rows = torch.from_numpy(codec.grid).reshape(codec.grid_shape)
    if name == "IQ1_S":
        rows = rows * 8
    word = torch.int64 if codec.grid_shape[1] == 8 else torch.int32
    return rows.to(torch.int8).view(word).reshape(-1).to(device)


@cache
def _bit_words(clear: int, set_: int, device: torch.device) -> Tensor:
    """int64 (256,): byte k of word b is `set_` where bit k of b is set, else `clear`."""
    table = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return torch.where(table == 1, set_, clear).to(torch.uint8).view(torch.int64).reshape(-1).to(device)


def expand_bits(packed: Tensor, clear: int, set_: int) -> Tensor:
    """Every bit of uint8 (N, B), lowest first, to a byte: int64 words (N, B)."""
    table = _bit_words(clear, set_, packed.device)
    return table.index_select(0, packed.reshape(-1).int()).view(packed.shape)


@cache
def sign_words(device: torch.device) -> Tensor:
    """int64 (128,): seven sign bits and their parity, each as an int8 of 1 or -1."""
    from gguf.quants import IQ2_XXS

    signs = torch.tensor(list(IQ2_XXS.ksigns)).to(device)
    return _bit_words(1, 0xFF, device)[signs]


@cache
def scales_ue4m3(device: torch.device) -> Tensor:
    """float32 (256,): unsigned E4M3 of every byte, halved; bit 7 is ignored, and 0x7F is 0."""
    byte = torch.arange(256)
    exponent, mantissa = byte >> 3 & 15, (byte & 7).float()
    normal = (1 + mantissa / 8) * torch.exp2(exponent.float() - 7)
    value = torch.where(exponent == 0, mantissa * 2.0**-9, normal) / 2
    value[0x7F] = 0
    return value.to(device)


@cache
def _code_book(name: str, device: torch.device) -> Tensor:
    """int32 (65536,): the four int8 that the code book gives for the nibbles n0, n2, n1, n3 (lowest first)."""
    from gguf import quants

    values = torch.tensor(getattr(quants, name).kvalues, dtype=torch.int8)
    index = torch.arange(65536).unsqueeze(1) >> torch.tensor([0, 8, 4, 12]) & 15
    return values[index].view(torch.int32).reshape(-1).to(device)


#: how far from 0, in halves, the tables below reach: beyond every value of a code book of int8
HALF_STEPS = 270


@cache
def code_book_index(name: str, device: torch.device) -> Tensor:
    """uint8 (2 HALF_STEPS + 1,): which value of the code book is nearest to k / 2, for k from -HALF_STEPS on.

    Midpoints between values are multiples of 1/2 and count as the upper one's, so that floor(2 x) decides for any x.
    """
    from gguf import quants

    values = torch.tensor(getattr(quants, name).kvalues)
    midpoints = values[1:] + values[:-1]
    return (torch.arange(-HALF_STEPS, HALF_STEPS + 1).unsqueeze(1) >= midpoints).sum(1).to(torch.uint8).to(device)


@cache
def code_book_values(name: str, device: torch.device) -> Tensor:
    """float32 (2 HALF_STEPS + 1,): the values that `code_book_index` stands for."""
    from gguf import quants

    values = torch.tensor(getattr(quants, name).kvalues, dtype=torch.float32, device=device)
    return values[code_book_index(name, device).long()]


def look_up(name: str, nibbles: Tensor) -> Tensor:
    """Nibbles, one in each byte of int64 words, through a code book of 16 values -> int8, eight for a word.

    Four at a time: of four bytes with a nibble each, shifting by 12 puts two into the gaps of the other two.
    """
    packed = nibbles.view(torch.int32).view(-1)
    index = (packed >> 12).bitwise_or_(packed).bitwise_and_(0xFFFF)
    return _code_book(name, nibbles.device).index_select(0, index).view(torch.int8)
