"""Rows of weights packed into blocks: the inverse of `dequantize`, equal to ggml's encoders byte for byte on CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llamakit import native
from llamakit.errors import MismatchError, UnsupportedError
from llamakit.ggml import BLOCK_SIZES, GGMLType, row_bytes
from llamakit.quant import encode_iquants, encode_kquants, encode_simple
from llamakit.quant.encode_blocks import Importance
from llamakit.quant.encode_search import accumulate, over

_DENSE = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}
_PLAIN: dict[GGMLType, Callable[[Tensor], Tensor]] = {
    GGMLType.Q8_0: encode_simple.q8_0,
    GGMLType.TQ1_0: encode_simple.tq1_0,
    GGMLType.TQ2_0: encode_simple.tq2_0,
    GGMLType.MXFP4: encode_simple.mxfp4,
}
_WEIGHTED: dict[GGMLType, Callable[[Tensor, Importance | None], Tensor]] = {
    GGMLType.Q4_0: encode_simple.q4_0,
    GGMLType.Q4_1: encode_simple.q4_1,
    GGMLType.Q5_0: encode_simple.q5_0,
    GGMLType.Q5_1: encode_simple.q5_1,
    GGMLType.Q2_K: encode_kquants.q2_k,
    GGMLType.Q3_K: encode_kquants.q3_k,
    GGMLType.Q4_K: encode_kquants.q4_k,
    GGMLType.Q5_K: encode_kquants.q5_k,
    GGMLType.Q6_K: encode_kquants.q6_k,
    GGMLType.IQ4_NL: encode_iquants.iq4_nl,
    GGMLType.IQ4_XS: encode_iquants.iq4_xs,
}
_ROW_POWER = frozenset({GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1})
# Weights encoded at a time. The searches take about 40 bytes per weight: on CPU few enough for the caches, many enough
# that the operators' own costs do not count; elsewhere launches are what costs.
_CHUNK_CPU, _CHUNK_OTHER = 1 << 18, 1 << 22


def can_encode(ggml_type: GGMLType) -> bool:
    """Whether `quantize` knows the type."""
    return ggml_type in _DENSE or ggml_type in _PLAIN or ggml_type in _WEIGHTED


def uses_importance(ggml_type: GGMLType) -> bool:
    """Whether an importance matrix makes a difference to the type."""
    return ggml_type in _WEIGHTED


def quantize(rows: Tensor, ggml_type: GGMLType, *, imatrix: Tensor | None = None) -> Tensor:
    """Encode rows: float32 (n_rows, n_in) -> uint8 (n_rows, row_bytes), on their device.

    imatrix: float32 (n_in,), how much an error in each column matters; types that have no use for it ignore it. On CPU
    the bytes equal those of `ggml_quantize_chunk` on x86-64 where rows and scales are finite. Beyond the result it
    needs some twenty megabytes there, whatever the size; native code needs none. F32 may share its memory with rows.
    Raises UnsupportedError for a type without an encoder, MismatchError when the rows are not whole blocks or the
    imatrix does not fit.
    """
    if not can_encode(ggml_type):
        raise UnsupportedError(f"tensor type {GGMLType(ggml_type).name} has no encoder")
    _check(rows, ggml_type, imatrix)
    if ggml_type in _DENSE:
        return rows.to(_DENSE[ggml_type]).contiguous().view(torch.uint8)
    n_elements, n_bytes = BLOCK_SIZES[ggml_type]
    out = torch.empty(len(rows), row_bytes(rows.shape[1], ggml_type), dtype=torch.uint8, device=rows.device)
    if not out.numel():
        return out
    rows, imatrix = rows.contiguous(), imatrix if ggml_type in _WEIGHTED else None
    if rows.device.type == "cpu" and _encode_native(rows, ggml_type, imatrix, out):
        return out
    source = _Source(rows, n_elements, imatrix, ggml_type)
    packed = out.view(-1, n_bytes)
    step = max(1, (_CHUNK_CPU if rows.device.type == "cpu" else _CHUNK_OTHER) // n_elements)
    for start in range(0, len(packed), step):
        blocks, importance = source.blocks(start, start + step)
        encode = _PLAIN.get(ggml_type)
        packed[start : start + step] = encode(blocks) if encode else _WEIGHTED[ggml_type](blocks, importance)
    return out


def _encode_native(rows: Tensor, ggml_type: GGMLType, imatrix: Tensor | None, out: Tensor) -> bool:
    """Encode contiguous rows into out with the native library; False where it is not there or lacks the type."""
    library = native.library()
    if library is None or not library.can_encode(ggml_type):
        return False
    importance = None if imatrix is None else imatrix.cpu().contiguous()
    library.encode(
        ggml_type,
        rows.data_ptr(),
        None if importance is None else importance.data_ptr(),
        out.data_ptr(),
        (rows.shape[0], rows.shape[1]),
        out.shape[1],
        torch.get_num_threads(),
    )
    return True


def _check(rows: Tensor, ggml_type: GGMLType, imatrix: Tensor | None) -> None:
    if rows.dtype != torch.float32 or rows.dim() != 2:
        raise MismatchError(f"rows to encode are {tuple(rows.shape)} {rows.dtype} (expected 2 axes of torch.float32)")
    n_in, n_elements = rows.shape[1], BLOCK_SIZES[ggml_type][0]
    if n_in % n_elements:
        raise MismatchError(
            f"a row of {n_in} weights is not made of whole {GGMLType(ggml_type).name} blocks of {n_elements} weights"
        )
    if imatrix is not None and (imatrix.shape != (n_in,) or imatrix.dtype != torch.float32):
        raise MismatchError(f"the imatrix is {tuple(imatrix.shape)} {imatrix.dtype} (expected ({n_in},) torch.float32)")


class _Source:
    """Rows cut into blocks, with the importance of each where there is an imatrix."""

    def __init__(self, rows: Tensor, n_elements: int, imatrix: Tensor | None, ggml_type: GGMLType) -> None:
        self._blocks = rows.view(-1, n_elements)
        self._columns = None if imatrix is None else imatrix.to(rows.device).contiguous().view(-1, n_elements)
        needed = imatrix is not None and ggml_type in _ROW_POWER
        self._row_power = _row_power(rows) if needed else rows.new_zeros(len(rows))

    def blocks(self, start: int, stop: int) -> tuple[Tensor, Importance | None]:
        """Blocks start to stop, (N, B), and their importance."""
        blocks = self._blocks[start:stop]
        if self._columns is None:
            return blocks, None
        number = torch.arange(start, start + len(blocks), device=blocks.device)
        per_row = len(self._columns)
        return blocks, Importance(
            self._columns.index_select(0, number % per_row), self._row_power.index_select(0, number // per_row)
        )


def _row_power(rows: Tensor) -> Tensor:
    """The mean square of every row, summed from its first element to its last: (n_rows, n_in) -> (n_rows,).

    Many rows at a time and a few columns: the sum takes one operation per column.
    """
    n_rows, n_in = rows.shape
    out = rows.new_empty(n_rows)
    for start in range(0, n_rows, 4096):
        part = rows[start : start + 4096]
        total = rows.new_zeros(1, len(part))
        for column in range(0, n_in, 32):
            columns = part[:, column : column + 32]
            total = accumulate(torch.cat([total, (columns * columns).t()])).unsqueeze(0)
        out[start : start + 4096] = total[0]
    return over(out, n_in)
