"""The metadata of a quantized file: the source's, and what llama-quantize adds, in its order.

A key that is set anew moves to the end, as in llama.cpp (ggml/src/gguf.cpp): so the two keys of the quantization follow
the source's others, then come the user's and those of the importance matrix. Facts: src/llama-quant.cpp,
tools/quantize/quantize.cpp, string_parse_kv_override of common/common.cpp.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from llamakit.errors import UsageError
from llamakit.files import escape_control
from llamakit.formats.base import ModelFile, TensorInfo
from llamakit.formats.gguf_split import SPLIT_KEYS
from llamakit.formats.gguf_values import GGUFValueType
from llamakit.formats.gguf_writer import Typed, typed_metadata
from llamakit.formats.imatrix import Imatrix
from llamakit.ggml import FILE_TYPES, GGMLType

_QUANTIZATION_VERSION = 2
_GUESSED = 1024
_MAX_TEXT_BYTES, _MAX_KEY_BYTES, _MAX_U32 = 127, 127, 0xFFFFFFFF
#: what a file is called whose tensors are mostly of a type of several mixtures; other names are the type's own
_MIXTURE_OF = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "F32"}


def quantized_metadata(
    source: ModelFile,
    file_type: int,
    *,
    overrides: Iterable[tuple[str, Typed]] = (),
    imatrix: tuple[str, Imatrix, int] | None = None,
    n_layer: int | None = None,
) -> dict[str, Any]:
    """The metadata of the result, as `write_gguf` takes it.

    imatrix: its path as the user gave it, what it holds, and how many of its entries are used. n_layer: of the result,
    where it has fewer.
    """
    metadata = {key: value for key, value in typed_metadata(source).items() if key not in SPLIT_KEYS}

    def put(key: str, value: Any) -> None:
        metadata.pop(key, None)
        metadata[key] = value

    put("general.quantization_version", Typed(_QUANTIZATION_VERSION, GGUFValueType.UINT32))
    put("general.file_type", Typed(file_type, GGUFValueType.UINT32))
    for key, value in overrides:
        put(key, value)
    if imatrix is not None:
        path, content, n_entries = imatrix
        put("quantize.imatrix.file", _cut(path))
        if content.datasets:
            put("quantize.imatrix.dataset", _cut(content.datasets[0]))
        put("quantize.imatrix.entries_count", n_entries)
        if content.chunk_count > 0:
            put("quantize.imatrix.chunks_count", content.chunk_count)
    if n_layer is not None:
        put(f"{source.metadata.get('general.architecture')}.block_count", n_layer)
    return metadata


def _cut(text: str) -> str:
    """As much of a text as llama.cpp's buffer of 128 bytes holds; half a character becomes surrogates."""
    return os.fsencode(text)[:_MAX_TEXT_BYTES].decode("utf-8", "surrogateescape")


def kept_file_type(source: ModelFile, infos: Iterable[TensorInfo]) -> int:
    """general.file_type of a copy: the source's; where it has none, that of most of its tensors, marked as a guess.

    infos: in the order of the output, which decides between types that are equally many.
    """
    stated = source.metadata.get("general.file_type")
    if isinstance(stated, int) and not isinstance(stated, bool):
        return stated
    seen: Counter[GGMLType] = Counter()
    most = GGMLType.F32
    for info in infos:
        seen[info.type] += 1
        if seen[info.type] > seen[most]:
            most = info.type
    numbers = {name: number for number, name in FILE_TYPES.items()}
    return numbers.get(_MIXTURE_OF.get(most.name, most.name), 0) | _GUESSED


def parse_override(text: str) -> tuple[str, Typed]:
    """KEY=TYPE:VALUE as (key, value). Raises UsageError for anything else, and for keys that say how the file is laid
    out."""
    key, equals, rest = text.partition("=")
    kind, colon, value = rest.partition(":")
    shown = f"--override-kv {escape_control(text)}"
    if not equals or not colon or not key:
        raise UsageError(f"{shown} is malformed (expected KEY=TYPE:VALUE, such as general.name=str:mine)")
    if len(key.encode()) > _MAX_KEY_BYTES:
        raise UsageError(f"{shown}: the key is too long (expected at most {_MAX_KEY_BYTES} bytes)")
    if key == "general.alignment" or key in SPLIT_KEYS:
        raise UsageError(f"{shown}: {key} follows from how the file is written, and cannot be set")
    return key, _value(kind, value, shown)


def _value(kind: str, text: str, shown: str) -> Typed:
    if kind == "int" and text.isascii() and text.isdigit() and int(text) <= _MAX_U32:
        return Typed(int(text), GGUFValueType.UINT32)
    if kind == "bool" and text in ("true", "false"):
        return Typed(text == "true", GGUFValueType.BOOL)
    if kind == "str" and len(text.encode("utf-8", "surrogateescape")) <= _MAX_TEXT_BYTES:
        return Typed(text, GGUFValueType.STRING)
    if kind == "float" and _is_f32(text):
        return Typed(float(text), GGUFValueType.FLOAT32)
    expected = {
        "int": f"a whole number from 0 to {_MAX_U32}, which is stored as u32",
        "float": "a finite float32",
        "bool": "true or false",
        "str": f"at most {_MAX_TEXT_BYTES} bytes",
    }
    if kind not in expected:
        raise UsageError(f"{shown}: unknown type '{escape_control(kind)}' (expected int, float, bool or str)")
    raise UsageError(f"{shown}: bad value (expected {expected[kind]})")


def _is_f32(text: str) -> bool:
    try:
        return abs(float(text)) <= float(np.finfo(np.float32).max)
    except ValueError:
        return False
