"""What every model file looks like from inside the house: metadata with GGUF keys, tensors with GGUF names.

A reader of a format is a `ModelFile`; a writer takes metadata and `TensorData` in the same dialect. So N readers and
M writers make every conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from llamakit.ggml import GGMLType, row_bytes


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in its file.

    shape: rows first (numpy's order, the reverse of ggml's ne); the last axis is the row, the fastest one.
    offset: bytes from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one packed row."""
        return row_bytes(self.shape[-1], self.type) if self.shape else row_bytes(1, self.type)

    @property
    def n_rows(self) -> int:
        """Rows: the product of all axes but the last (1 for a vector)."""
        return prod(self.shape[:-1])

    @property
    def n_bytes(self) -> int:
        """Packed bytes of the whole tensor."""
        return self.n_rows * self.row_bytes

    @property
    def n_elements(self) -> int:
        """Number of weights."""
        return prod(self.shape)


class TensorData(NamedTuple):
    """One tensor to be written.

    shape: rows first, in elements. data: its packed bytes, as an array of any dtype and shape (uint8 rows, or
    float32 for F32), or a function that gives such an array, or an iterable of such arrays (slices, in
    order), when it is the tensor's turn: memory then holds no more than one of them.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    data: np.ndarray | Callable[[], np.ndarray | Iterable[np.ndarray]]


class ModelFile(Protocol):
    """An opened file: metadata under GGUF's keys, tensors under GGUF's names; the only source of tensors.

    metadata values are int, float, bool, str, a numpy array, or a sequence of str.
    """

    path: Path

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Keys as in the GGUF specification, whatever the format of the file."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """In the order of the file."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Packed rows [start, stop) of a tensor as a fresh, writable uint8 array (rows, row_bytes).

        Raises KeyError for an unknown name, FormatError when the file is shorter than it was when opened.
        """
        ...

    def close(self) -> None:
        """Give files back to the system; `read` fails afterwards, metadata and the tensor table stay."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...
