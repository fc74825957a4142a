"""Packed tensors and their decoding."""

from llamakit.quant.tensor import QTensor, can_decode, dequantize

__all__ = ["QTensor", "can_decode", "dequantize"]
