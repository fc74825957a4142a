"""What must not get into a file: weights that are no numbers, and blocks whose scale overflowed."""

from __future__ import annotations

import torch
from torch import Tensor

from llamakit import native
from llamakit.errors import UnsupportedError
from llamakit.ggml import BLOCK_SIZES, GGMLType

_CHUNK = 1 << 18
#: where the float16 scales and offsets stand in a block; layouts stand with the decoders
_HALVES: dict[GGMLType, tuple[int, ...]] = {
    GGMLType.Q4_0: (0,),
    GGMLType.Q4_1: (0, 2),
    GGMLType.Q5_0: (0,),
    GGMLType.Q5_1: (0, 2),
    GGMLType.Q8_0: (0,),
    GGMLType.Q2_K: (80, 82),
    GGMLType.Q3_K: (108,),
    GGMLType.Q4_K: (0, 2),
    GGMLType.Q5_K: (0, 2),
    GGMLType.Q6_K: (208,),
    GGMLType.IQ4_NL: (0,),
    GGMLType.IQ4_XS: (0,),
    GGMLType.TQ1_0: (52,),
    GGMLType.TQ2_0: (64,),
}
_FLOATS = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}


def first_non_finite(rows: Tensor) -> tuple[int, int] | None:
    """Row and column of the first NaN or infinity of rows (n_rows, n_in), or None.

    Block types cannot hold such a value; it would spoil its whole block.
    """
    library = native.library()
    if library is not None and rows.device.type == "cpu" and rows.dtype == torch.float32 and rows.is_contiguous():
        place = library.first_non_finite(rows.data_ptr(), rows.numel())
        return None if place == rows.numel() else divmod(place, rows.shape[1])
    step = max(1, _CHUNK // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        if not _all_finite(part):
            row, column = (~part.isfinite()).nonzero()[0].tolist()
            return start + row, column
    return None


def _all_finite(numbers: Tensor) -> bool:
    """The extremes tell: a NaN is one. Some twenty times as fast as `isfinite`."""
    return not numbers.numel() or bool(torch.stack(numbers.aminmax()).isfinite().all())


def first_bad_block(packed: Tensor, ggml_type: GGMLType) -> tuple[int, int] | None:
    """Row and block of the first block whose scale or offset is NaN or infinite, or None: uint8 (n_rows, row_bytes).

    Finite rows have such blocks where a scale is beyond float16's 65504, or, in MXFP4, where all is smaller than the
    format's exponents go. ggml_validate_row_data in ggml-quants.c refuses the same.
    Raises UnsupportedError for a type that `quantize` does not make.
    """
    n_bytes = BLOCK_SIZES[ggml_type][1]
    blocks = packed.contiguous().view(-1, n_bytes)
    if ggml_type == GGMLType.MXFP4:
        bad = blocks[:, 0] == 0xFF
    elif ggml_type in _HALVES:
        halves = blocks.view(torch.float16)[:, [position // 2 for position in _HALVES[ggml_type]]]
        bad = ~halves.isfinite().all(1)
    elif ggml_type in _FLOATS:
        numbers = blocks.view(_FLOATS[ggml_type]).view(-1)
        if _all_finite(numbers):
            return None
        bad = ~numbers.isfinite()
    else:
        raise UnsupportedError(f"tensor type {GGMLType(ggml_type).name} has no encoder")
    if not bad.any():
        return None
    row, block = divmod(int(bad.int().argmax()), packed.shape[1] // n_bytes)
    return row, block
