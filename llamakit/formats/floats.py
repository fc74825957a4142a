"""Packed rows of the three plain float types <-> float32, in numpy: for small matrices, where torch is not wanted."""

from __future__ import annotations

import numpy as np

from llamakit.ggml import GGMLType


def to_float32(packed: np.ndarray, ggml_type: GGMLType) -> np.ndarray:
    """Packed uint8 of F32, F16 or BF16 -> float32 of the same rows. Raises ValueError for another type."""
    if ggml_type is GGMLType.F32:
        return packed.view("<f4")
    if ggml_type is GGMLType.F16:
        return packed.view("<f2").astype(np.float32)
    if ggml_type is GGMLType.BF16:
        return (packed.view("<u2").astype(np.uint32) << 16).view(np.float32)
    raise ValueError(f"{ggml_type.name} is no plain float type")


def from_float32(values: np.ndarray, ggml_type: GGMLType) -> np.ndarray:
    """float32 (rows, n) -> packed uint8 (rows, row_bytes), rounded to nearest, ties to even; infinite beyond F16.

    Raises ValueError for another type than F32, F16 and BF16.
    """
    values = np.ascontiguousarray(values, "<f4")
    if ggml_type is GGMLType.F32:
        return values.view(np.uint8)
    if ggml_type is GGMLType.F16:
        with np.errstate(over="ignore"):
            return values.astype("<f2").view(np.uint8)
    if ggml_type is GGMLType.BF16:
        bits = values.view("<u4")
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        quiet = bits >> 16 | 0x40
        return np.where(np.isnan(values), quiet, rounded).astype("<u2").view(np.uint8)
    raise ValueError(f"{ggml_type.name} is no plain float type")
