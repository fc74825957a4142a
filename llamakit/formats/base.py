"""What every model file looks like from inside the house: metadata with GGUF keys, tensors with GGUF names.

A reader of a format is a `ModelFile`; a writer takes metadata and `TensorData` in the same dialect. So N readers and
M writers make every conversion.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import numpy as np

from llamakit.errors import LlamakitError
from llamakit.ggml import GGMLType, row_bytes

_T = TypeVar("_T")


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

    def n_bytes_as(self, ggml_type: GGMLType) -> int:
        """Packed bytes that the whole tensor would have in another type, whose blocks fit its rows."""
        return self.n_rows * row_bytes(self.shape[-1] if self.shape else 1, ggml_type)

    def row_range(self, start: int, stop: int | None) -> tuple[int, int]:
        """Rows [start, stop) with None for all that follow. Raises ValueError for rows that are not there."""
        stop = self.n_rows if stop is None else stop
        if not 0 <= start <= stop <= self.n_rows:
            raise ValueError(f"rows {start}..{stop} of {self.name}, which has {self.n_rows}")
        return start, stop


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


def read_back(open_file: Callable[[Path], _T], written: Path, what: str = "file") -> _T:
    """What has just been written, opened; when it cannot be, that is the disk's fault, not a broken input.

    Raises OSError, which `atomic_path` and its like turn into a SaveError that names the target.
    """
    try:
        return open_file(written)
    except LlamakitError as error:
        raise OSError(errno.EIO, f"the {what} does not read back as written: {error.reason}") from error


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
