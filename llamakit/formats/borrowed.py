"""A model other than its file has it: with another vocabulary, with numbers that a user states, with vectors as GGUF
holds them.

llama2.c keeps vocabulary and model apart, some GGUF files hold a vocabulary alone, and Meta's checkpoints know no
context length.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np

from llamakit.errors import MismatchError, UsageError
from llamakit.formats.base import ModelFile, TensorInfo
from llamakit.formats.floats import to_float32
from llamakit.ggml import GGMLType

_PREFIX, _TOKENS = "tokenizer.", "tokenizer.ggml.tokens"
_HALVES = (GGMLType.F16, GGMLType.BF16)


def with_vocabulary(
    file: ModelFile, vocabulary: Mapping[str, Any], *, source: str | os.PathLike[str] | None = None
) -> ModelFile:
    """The same model with the `tokenizer.*` keys of other metadata in place of its own, after its other keys.

    source: the file that the vocabulary is from, named in errors. Closing the result closes `file`.
    Raises UsageError where there is no vocabulary, MismatchError for another number of tokens than embeddings.
    """
    borrowed = {key: value for key, value in vocabulary.items() if key.startswith(_PREFIX)}
    if _TOKENS not in borrowed:
        raise UsageError(f"holds no vocabulary ({_TOKENS})", path=source)
    if "token_embd.weight" not in file.tensors:
        raise UsageError("holds no model (token_embd.weight)", path=file.path)
    n_tokens, n_vocab = len(borrowed[_TOKENS]), file.tensors["token_embd.weight"].shape[0]
    if n_tokens != n_vocab:
        theirs = f" of {os.fspath(source)}" if source is not None else ""
        raise MismatchError(
            f"has {n_vocab} token embeddings, the vocabulary{theirs} {n_tokens} tokens",
            path=file.path,
            hint="give the vocabulary that the model was trained with",
        )
    return _Borrowed(file, {**without_vocabulary(file).metadata, **borrowed})


def stated_metadata(ctx: int | None, rope_freq_base: float | None) -> dict[str, Any]:
    """The keys of what a user states in place of a file."""
    stated = {"llama.context_length": ctx, "llama.rope.freq_base": rope_freq_base}
    return {key: value for key, value in stated.items() if value is not None}


def with_metadata(file: ModelFile, metadata: Mapping[str, Any]) -> ModelFile:
    """The same model with some values replaced, each in its place, or added at the end. Closing it closes `file`."""
    return _Borrowed(file, {**file.metadata, **metadata}) if metadata else file


def without_vocabulary(file: ModelFile) -> ModelFile:
    """The same model without its `tokenizer.*` keys. Closing it closes `file`."""
    return _Borrowed(file, {key: value for key, value in file.metadata.items() if not key.startswith(_PREFIX)})


def with_float_vectors(file: ModelFile) -> ModelFile:
    """The same model with its vectors in float32: llama.cpp computes with no others, checkpoints have them in 16 bits.
    Closing it closes `file`."""
    return _FloatVectors(file, file.metadata)


def bare(file: ModelFile) -> ModelFile:
    """The opened file itself, behind what was borrowed."""
    while isinstance(file, _Borrowed):
        file = file.file
    return file


class _Borrowed:
    """A `ModelFile` in front of another, with metadata of its own."""

    def __init__(self, file: ModelFile, metadata: Mapping[str, Any]) -> None:
        self.file, self._metadata = file, MappingProxyType(dict(metadata))
        self.path: Path = file.path
        types = getattr(file, "metadata_types", {})
        #: of the values that are still the file's own
        self.metadata_types = {key: t for key, t in types.items() if metadata.get(key) is file.metadata[key]}

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._metadata

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.file.tensors

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.file.read(name, start, stop)

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _FloatVectors(_Borrowed):
    def __init__(self, file: ModelFile, metadata: Mapping[str, Any]) -> None:
        super().__init__(file, metadata)
        self._halves = {n for n, info in file.tensors.items() if len(info.shape) < 2 and info.type in _HALVES}
        self._tensors = MappingProxyType(
            {n: replace(info, type=GGMLType.F32) if n in self._halves else info for n, info in file.tensors.items()}
        )

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        packed = self.file.read(name, start, stop)
        return to_float32(packed, self.file.tensors[name].type).view(np.uint8) if name in self._halves else packed
