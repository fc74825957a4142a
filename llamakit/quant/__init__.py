"""Packed tensors, their decoding and their encoding."""

from llamakit.quant.encode import can_encode, quantize, uses_importance
from llamakit.quant.tensor import QTensor, can_decode, dequantize
from llamakit.quant.validate import first_bad_block, first_non_finite

__all__ = [
    "QTensor",
    "can_decode",
    "can_encode",
    "dequantize",
    "first_bad_block",
    "first_non_finite",
    "quantize",
    "uses_importance",
]
