"""GGUF in one import: the strict reader and the writer."""

from llamakit.formats.base import TensorData
from llamakit.formats.gguf_reader import GGUFFile
from llamakit.formats.gguf_values import GGUFValueType, StringArray, ValueType
from llamakit.formats.gguf_writer import Typed, copied_tensor, typed_metadata, write_gguf

__all__ = [
    "GGUFFile",
    "GGUFValueType",
    "StringArray",
    "TensorData",
    "Typed",
    "ValueType",
    "copied_tensor",
    "typed_metadata",
    "write_gguf",
]
