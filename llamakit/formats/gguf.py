"""GGUF in one import: the strict reader and the writer, of whole files and of split ones."""

from llamakit.formats.base import TensorData
from llamakit.formats.gguf_reader import GGUFFile
from llamakit.formats.gguf_split import SplitGGUF, open_gguf, write_gguf_split
from llamakit.formats.gguf_values import GGUFValueType, StringArray, ValueType
from llamakit.formats.gguf_writer import Typed, copied_tensor, typed_metadata, write_gguf

__all__ = [
    "GGUFFile",
    "GGUFValueType",
    "SplitGGUF",
    "StringArray",
    "TensorData",
    "Typed",
    "ValueType",
    "copied_tensor",
    "open_gguf",
    "typed_metadata",
    "write_gguf",
    "write_gguf_split",
]
