"""Packed weights in memory, and their decoding in bounded pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from llamakit import native
from llamakit.errors import MismatchError, UnsupportedError
from llamakit.ggml import BLOCK_SIZES, GGMLType
from llamakit.quant import iquants, kquants, simple
from llamakit.quant.blocks import Levels
from llamakit.quant.tables import grid

_DENSE = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}
_UNPACK: dict[GGMLType, Callable[[Tensor], Levels]] = {
    GGMLType.Q4_0: simple.q4_0,
    GGMLType.Q4_1: simple.q4_1,
    GGMLType.Q5_0: simple.q5_0,
    GGMLType.Q5_1: simple.q5_1,
    GGMLType.Q8_0: simple.q8_0,
    GGMLType.TQ1_0: simple.tq1_0,
    GGMLType.TQ2_0: simple.tq2_0,
    GGMLType.MXFP4: simple.mxfp4,
    GGMLType.NVFP4: simple.nvfp4,
    GGMLType.Q2_K: kquants.q2_k,
    GGMLType.Q3_K: kquants.q3_k,
    GGMLType.Q4_K: kquants.q4_k,
    GGMLType.Q5_K: kquants.q5_k,
    GGMLType.Q6_K: kquants.q6_k,
    GGMLType.IQ2_XXS: iquants.iq2_xxs,
    GGMLType.IQ2_XS: iquants.iq2_xs,
    GGMLType.IQ2_S: iquants.iq2_s,
    GGMLType.IQ3_XXS: iquants.iq3_xxs,
    GGMLType.IQ3_S: iquants.iq3_s,
    GGMLType.IQ1_S: iquants.iq1_s,
    GGMLType.IQ1_M: iquants.iq1_m,
    GGMLType.IQ4_NL: iquants.iq4_nl,
    GGMLType.IQ4_XS: iquants.iq4_xs,
}
#: the grids that native decoders look up, in the order of native/codec.h; and whose each is
_GRIDS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S")
_GRID_OF = {GGMLType[name]: name for name in _GRIDS} | {GGMLType.IQ1_M: "IQ1_S"}
# Weights decoded at a time. The temporaries take about 8 bytes per weight: on CPU few enough to stay in the caches,
# many enough that the operators' own costs do not count; elsewhere launches are what costs.
_CHUNK_CPU, _CHUNK_OTHER = 1 << 19, 1 << 23


@dataclass(frozen=True)
class QTensor:
    """A tensor as it is in its file.

    data: packed rows, uint8 (rows, row_bytes); type: how they are packed; shape: rows first, the row last.
    """

    data: Tensor
    type: GGMLType
    shape: tuple[int, ...]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights in dtype, in `shape`. Raises UnsupportedError for a type without a decoder."""
        return dequantize(self.data, self.type, dtype).view(self.shape)


def can_decode(ggml_type: GGMLType) -> bool:
    """Whether `dequantize` knows the type."""
    return ggml_type in _DENSE or ggml_type in _UNPACK


def dequantize(
    data: Tensor, ggml_type: GGMLType, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """Decode packed rows: uint8 (rows, row_bytes) -> dtype (rows, n_in), on data's device.

    In float32 the result equals `gguf.quants.dequantize` bit for bit; in bfloat16 or float16 it is that value, rounded
    once. out: where to write, (rows, n_in) on the same device; its dtype counts then. Beyond the result it needs a few
    megabytes on CPU, whatever the size, and under 200 MB on an accelerator.
    Raises UnsupportedError for a type without a decoder, MismatchError when the rows are not whole blocks or `out`
    does not fit.
    """
    if not can_decode(ggml_type):
        raise UnsupportedError(f"tensor type {GGMLType(ggml_type).name} has no decoder")
    n_in = _row_elements(data, ggml_type)
    if out is None:
        out = torch.empty(data.shape[0], n_in, dtype=dtype, device=data.device)
    elif out.shape != (data.shape[0], n_in) or out.device != data.device or not out.is_floating_point():
        raise MismatchError(
            f"out is {tuple(out.shape)} {out.dtype} on {out.device} "
            f"(expected a floating ({data.shape[0]}, {n_in}) on {data.device})"
        )
    chunk = _CHUNK_CPU if data.device.type == "cpu" else _CHUNK_OTHER
    if data.numel() == 0:
        return out
    if data.is_contiguous() and out.is_contiguous() and data.data_ptr() % 8 == 0 and data.storage_offset() % 8 == 0:
        _decode_rows(data, ggml_type, out, chunk)
        return out
    step = max(1, chunk // n_in)
    for start in range(0, data.shape[0], step):
        rows = data[start : start + step].clone(memory_format=torch.contiguous_format)
        part = out[start : start + step]
        if part.is_contiguous():
            _decode_rows(rows, ggml_type, part, chunk)
        else:
            part.copy_(dequantize(rows, ggml_type, out.dtype))
    return out


def _row_elements(data: Tensor, ggml_type: GGMLType) -> int:
    """Weights of a row of data; raises MismatchError when it is not made of whole blocks."""
    n_elements, n_bytes = BLOCK_SIZES[ggml_type]
    if data.dtype != torch.uint8 or data.dim() != 2:
        raise MismatchError(f"packed rows are {tuple(data.shape)} {data.dtype} (expected 2 axes of torch.uint8)")
    if data.shape[1] % n_bytes:
        raise MismatchError(
            f"a packed row of {data.shape[1]} bytes is not made of whole {ggml_type.name} blocks of {n_bytes} bytes"
        )
    return data.shape[1] // n_bytes * n_elements


def _decode_rows(data: Tensor, ggml_type: GGMLType, out: Tensor, chunk: int) -> None:
    """Decode contiguous data into contiguous out, chunk weights at a time: blocks do not depend on their row."""
    if ggml_type in _DENSE:
        out.copy_(data.view(_DENSE[ggml_type]))
        return
    if out.device.type == "cpu" and _decode_native(data, ggml_type, out):
        return
    n_elements, n_bytes = BLOCK_SIZES[ggml_type]
    blocks, weights = data.view(-1, n_bytes), out.view(-1, n_elements)
    step = chunk // n_elements
    scratch = weights
    if out.dtype != torch.float32:
        scratch = torch.empty(min(step, len(blocks)), n_elements, device=out.device)
    for start in range(0, len(blocks), step):
        part, target = blocks[start : start + step], weights[start : start + step]
        exact = target if scratch is weights else scratch[: len(part)]
        _combine(_UNPACK[ggml_type](part), exact)
        if exact is not target:
            target.copy_(exact)


def _decode_native(data: Tensor, ggml_type: GGMLType, out: Tensor) -> bool:
    """Decode contiguous data into contiguous out with the native library; False where it is not there or lacks this."""
    library, bf16 = native.library(), out.dtype == torch.bfloat16
    if library is None or not (bf16 or out.dtype == torch.float32) or not library.can_decode(ggml_type, bf16=bf16):
        return False
    if ggml_type in _GRID_OF:
        _hand_over(_GRID_OF[ggml_type])
    block = BLOCK_SIZES[ggml_type]
    n_blocks = data.numel() // block[1]
    library.decode(ggml_type, data.data_ptr(), out.data_ptr(), n_blocks, block, torch.get_num_threads(), bf16=bf16)
    return True


@cache
def _hand_over(name: str) -> None:
    """Tell the native library where a grid is; the table's cache keeps it there."""
    library = native.library()
    assert library is not None
    library.set_grid(_GRIDS.index(name), grid(name, torch.device("cpu")).data_ptr())


def _combine(levels: Levels, out: Tensor) -> None:
    """out = level * scale + offset: float32 (N, G * S). Passes that are vectorized; a fused one is not."""
    level, scale, offset = levels
    groups, scale = out.view(scale.numel(), -1), scale.view(-1, 1)
    if level.dtype == torch.float32:
        torch.mul(level.view(groups.shape), scale, out=groups)
    else:
        out.copy_(level.view(out.shape))
        groups.mul_(scale)
    if offset is not None:
        groups.add_(offset.view(-1, 1))
