"""Tensors on their way from one file to another: read, decoded, encoded and passed on in slices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llamakit.errors import FormatError, UnsupportedError
from llamakit.files import escape_control
from llamakit.formats.base import ModelFile, TensorData, TensorInfo
from llamakit.ggml import BLOCK_SIZES, FLOAT_TYPES, GGMLType
from llamakit.quant import can_encode, dequantize, first_bad_block, first_non_finite
from llamakit.quant.encode import quantize

# Weights that are in memory at a time: few enough for the caches, many enough that the calls do not count.
_SLICE_WEIGHTS = 1 << 20


@dataclass
class Rounding:
    """What a tensor lost, over all its rows so far: sums of squares of the weights, and of their errors."""

    power: float = 0.0
    error: float = 0.0

    def add(self, weights: Tensor, written: Tensor) -> None:
        """Take in some rows, float32 both: as they were, and what their packed form stands for; `written` is spent."""
        lost = written.sub_(weights).view(-1)
        self.error += float(lost.dot(lost))
        self.power += float(weights.view(-1).dot(weights.view(-1)))

    @property
    def relative(self) -> float:
        """sqrt(sum (x - q)^2 / sum x^2); 0 for a tensor of zeros."""
        return math.sqrt(self.error / self.power) if self.power else 0.0


def recoded(
    file: ModelFile,
    name: str,
    wanted: GGMLType,
    on_slice: Callable[[str, int], None] | None = None,
    *,
    importance: Tensor | None = None,
    rounding: Rounding | None = None,
    finite: bool = False,
) -> TensorData:
    """A tensor of `file` as a writer takes it, in another type, or as it is where it has that type already.

    on_slice: called with the name and the bytes of each slice that has been handed over. importance: of its columns,
    float32 (matrices, n_in), a row for each expert of a tensor with three axes. rounding: takes in what is lost; where
    the type stays, that is nothing. finite: refuse NaN and infinity even where the wanted type could hold them.
    Raises, when it is the tensor's turn, UnsupportedError for values that the wanted type cannot hold, FormatError
    for what is no finite number; both name the tensor, and where in it.
    """
    info = file.tensors[name]
    rows = _Rows(file, info, wanted, importance, rounding, finite)

    def slices() -> Iterator[np.ndarray]:
        for part in rows.slices():
            yield part
            if on_slice is not None:
                on_slice(name, part.nbytes)

    return TensorData(name, info.shape, wanted, slices)


@dataclass(frozen=True)
class _Rows:
    """The rows of one tensor, on their way."""

    file: ModelFile
    info: TensorInfo
    wanted: GGMLType
    importance: Tensor | None
    rounding: Rounding | None
    finite: bool

    def slices(self) -> Iterator[np.ndarray]:
        """Packed rows, some at a time; none that belong to two experts where each has columns of its own."""
        n_rows = self.info.n_rows if self.info.n_elements else 0
        step = max(1, _SLICE_WEIGHTS // max(1, self.info.n_elements // max(1, n_rows)))
        n_matrices = 1 if self.importance is None else len(self.importance)
        per_matrix = max(1, n_rows // n_matrices)
        for first in range(0, n_rows, per_matrix):
            columns = None if self.importance is None else self.importance[first // per_matrix]
            for start in range(first, min(first + per_matrix, n_rows), step):
                packed = self.file.read(self.info.name, start, min(start + step, first + per_matrix, n_rows))
                yield self._slice(torch.from_numpy(packed), start, columns).numpy()

    def _slice(self, packed: Tensor, start: int, columns: Tensor | None) -> Tensor:
        if self.wanted is self.info.type:
            if self.finite and can_encode(self.info.type):
                self._check_packed(packed, start)
            return packed
        weights = dequantize(packed, self.info.type)
        if self.finite or self.wanted not in FLOAT_TYPES:
            self._check_weights(weights, start)
        encoded = quantize(weights, self.wanted, imatrix=columns)
        self._check_encoded(encoded, weights, start)
        if self.rounding is not None:
            self.rounding.add(weights, dequantize(encoded, self.wanted))
        return encoded

    def _check_packed(self, packed: Tensor, start: int) -> None:
        """A block without a finite scale stands for no numbers."""
        bad = first_bad_block(packed, self.info.type)
        if bad is not None:
            raise self._not_finite(start + bad[0], bad[1] * BLOCK_SIZES[self.info.type][0])

    def _check_weights(self, weights: Tensor, start: int) -> None:
        bad = first_non_finite(weights)
        if bad is not None:
            raise self._not_finite(start + bad[0], bad[1])

    def _not_finite(self, row: int, column: int) -> FormatError:
        name = escape_control(self.info.name)
        return FormatError(f"tensor {name} has NaN or infinity (row {row}, column {column})", path=self.file.path)

    def _check_encoded(self, encoded: Tensor, weights: Tensor, start: int) -> None:
        """Raises UnsupportedError for a scale, or in F16 a weight, beyond float16."""
        whole = self.wanted is GGMLType.F32 or (self.wanted is GGMLType.BF16 and not self.finite)
        bad = None if whole else first_bad_block(encoded, self.wanted)
        if bad is None:
            return
        row, column = start + bad[0], bad[1] * BLOCK_SIZES[self.wanted][0]
        what = "values" if self.wanted in FLOAT_TYPES else "a block"
        largest = float(weights[bad[0], column : column + BLOCK_SIZES[self.wanted][0]].abs().max())
        raise UnsupportedError(
            f"tensor {escape_control(self.info.name)} has {what} that {self.wanted.name} cannot hold (row {row}, "
            f"column {column}: up to {largest:.3g})",
            path=self.file.path,
            hint="write it as bf16 or f32",
        )
