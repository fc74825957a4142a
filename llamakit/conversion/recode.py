"""Tensors on their way from one file to another: read, decoded, encoded and passed on in slices."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from llamakit.errors import UnsupportedError
from llamakit.files import escape_control
from llamakit.formats.base import ModelFile, TensorData, TensorInfo
from llamakit.ggml import GGMLType
from llamakit.quant import dequantize
from llamakit.quant.encode import quantize

# Weights that are in memory at a time: few enough for the caches, many enough that the calls do not count.
_SLICE_WEIGHTS = 1 << 20
_INFINITY = 0x7C00  # float16's bits from here on stand for no finite number
_HALF = {GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}


def recoded(
    file: ModelFile, name: str, wanted: GGMLType, on_slice: Callable[[str, int], None] | None = None
) -> TensorData:
    """A tensor of `file` as a writer takes it, in another type, or as it is where it has that type already.

    on_slice: called with the name and the bytes of each slice that has been handed over.
    Raises, when it is the tensor's turn, UnsupportedError for values that the wanted type cannot hold.
    """
    info = file.tensors[name]

    def slices() -> Iterator[np.ndarray]:
        for part in _slices(file, info, wanted):
            yield part
            if on_slice is not None:
                on_slice(name, part.nbytes)

    return TensorData(name, info.shape, wanted, slices)


def _slices(file: ModelFile, info: TensorInfo, wanted: GGMLType) -> Iterator[np.ndarray]:
    n_rows = info.n_rows if info.n_elements else 0
    step = max(1, _SLICE_WEIGHTS // max(1, info.n_elements // max(1, n_rows)))
    for start in range(0, n_rows, step):
        packed = file.read(info.name, start, min(start + step, n_rows))
        yield packed if info.type == wanted else _recode(file, info, torch.from_numpy(packed), wanted).numpy()


def _recode(file: ModelFile, info: TensorInfo, packed: Tensor, wanted: GGMLType) -> Tensor:
    """Packed rows of one type as packed rows of another, uint8 both."""
    weights = dequantize(packed, info.type)
    if wanted in _HALF:
        halves = weights.to(_HALF[wanted])
        if wanted is GGMLType.F16 and int((halves.view(torch.int16) & 0x7FFF).max()) >= _INFINITY:
            raise UnsupportedError(
                f"tensor {escape_control(info.name)} has values that F16 cannot hold (more than 65504)",
                path=file.path,
                hint="write it as bf16 or f32",
            )
        return halves.view(torch.uint8)
    return quantize(weights, wanted)
