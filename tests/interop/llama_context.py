"""llama.cpp's own context through the low-level functions in the xllamacpp wheel, with the context shift of its
completion tool (tools/completion/completion.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import oracle

# Where the fields stand in llama_context_params (include/llama.h); checked against the defaults.
_N_CTX, _N_THREADS, _FLASH, _TYPE_K = 0, 28, 52, 104
_DEFAULTS = {_N_CTX: 512, _FLASH: -1, _TYPE_K: 1, _TYPE_K + 4: 1}


class _Params(ctypes.Structure):
    _fields_ = (("data", ctypes.c_uint8 * 512),)

    def read(self, at: int) -> int:
        return int.from_bytes(bytes(self.data[at : at + 4]), "little", signed=True)

    def write(self, at: int, value: int) -> None:
        self.data[at : at + 4] = list(value.to_bytes(4, "little", signed=True))


class _Batch(ctypes.Structure):
    _fields_ = (("n_tokens", ctypes.c_int32), ("pointers", ctypes.c_void_p * 6))


def _library() -> Any:
    lib = oracle._library()
    pointer, i32 = ctypes.c_void_p, ctypes.c_int32
    for name, result, arguments in (
        ("llama_context_default_params", _Params, []),
        ("llama_init_from_model", pointer, [pointer, _Params]),
        ("llama_free", None, [pointer]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_seq_rm", ctypes.c_bool, [pointer, i32, i32, i32]),
        ("llama_memory_seq_add", None, [pointer, i32, i32, i32, i32]),
        ("llama_batch_get_one", _Batch, [ctypes.POINTER(i32), i32]),
        ("llama_decode", i32, [pointer, _Batch]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, i32]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


class LlamaContext:
    """One sequence in a context of n_ctx tokens, its cache in float32, flash attention off, one thread."""

    def __init__(self, path: Path, n_ctx: int) -> None:
        self._lib = lib = _library()
        self._model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        if any(params.read(at) != value for at, value in _DEFAULTS.items()):
            pytest.skip("this llama.cpp has another llama_context_params")
        for at, value in (
            (_N_CTX, n_ctx),
            (_N_THREADS, 1),
            (_N_THREADS + 4, 1),
            (_FLASH, 0),
            (_TYPE_K, 0),
            (_TYPE_K + 4, 0),
        ):
            params.write(at, value)
        self._context = lib.llama_init_from_model(self._model, params)
        assert self._context, "llama.cpp refuses these parameters"
        self.n_past = 0

    def __enter__(self) -> LlamaContext:
        return self

    def __exit__(self, *_: object) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def feed(self, tokens: Sequence[int], n_vocab: int) -> np.ndarray:
        """Append tokens: logits (V,) after the last."""
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        assert self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(array, len(tokens))) == 0
        self.n_past += len(tokens)
        return np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, -1), (n_vocab,)).copy()

    def shift(self, keep: int, discard: int) -> None:
        memory = self._lib.llama_get_memory(self._context)
        assert self._lib.llama_memory_seq_rm(memory, 0, keep, keep + discard)
        self._lib.llama_memory_seq_add(memory, 0, keep + discard, self.n_past, -discard)
        self.n_past -= discard
