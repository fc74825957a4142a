"""Numbers -> packed rows, for the types that have an encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from llamakit.errors import UnsupportedError
from llamakit.ggml import GGMLType

_DENSE = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}


def quantize(rows: Tensor, ggml_type: GGMLType, *, imatrix: Tensor | None = None) -> Tensor:
    """float32 (n_rows, n_in) -> uint8 (n_rows, row_bytes). Raises UnsupportedError for a type without an encoder."""
    if ggml_type in _DENSE:
        return rows.to(_DENSE[ggml_type]).contiguous().view(torch.uint8).view(len(rows), -1)
    blocks = rows.reshape(-1, 32)
    if ggml_type is GGMLType.Q8_0:
        scale = blocks.abs().amax(1, keepdim=True) / 127
        inverse = torch.where(scale > 0, 1 / scale, 0)
        scaled = blocks * inverse
        level = torch.trunc(scaled + torch.copysign(torch.full_like(scaled, 0.5), scaled)).to(torch.int8)
        packed = [scale.half().view(torch.uint8), level.view(torch.uint8)]
    elif ggml_type is GGMLType.Q4_0:
        largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        scale = largest / -8
        inverse = torch.where(scale != 0, 1 / scale, 0)
        level = (blocks * inverse + 8.5).clamp(0, 15).to(torch.uint8)
        packed = [scale.half().view(torch.uint8), level[:, :16] | level[:, 16:] << 4]
    else:
        raise UnsupportedError(f"tensor type {GGMLType(ggml_type).name} has no encoder")
    return torch.cat(packed, 1).view(len(rows), -1)
