"""llama.cpp's own samplers, called through ctypes in the xllamacpp wheel."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest


class _TokenData(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int32), ("logit", ctypes.c_float), ("p", ctypes.c_float)]


class _TokenDataArray(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.POINTER(_TokenData)),
        ("size", ctypes.c_size_t),
        ("selected", ctypes.c_int64),
        ("sorted", ctypes.c_bool),
    ]


_DTYPE = [("id", "<i4"), ("logit", "<f4"), ("p", "<f4")]
_ARGUMENTS = {
    "penalties": (ctypes.c_int32, ctypes.c_int32, ctypes.c_float, ctypes.c_float, ctypes.c_float),
    "top_k": (ctypes.c_int32,),
    "top_p": (ctypes.c_float, ctypes.c_size_t),
    "min_p": (ctypes.c_float, ctypes.c_size_t),
    "temp": (ctypes.c_float,),
    "temp_ext": (ctypes.c_float, ctypes.c_float, ctypes.c_float),
    "typical": (ctypes.c_float, ctypes.c_size_t),
    "top_n_sigma": (ctypes.c_float,),
    "xtc": (ctypes.c_float, ctypes.c_float, ctypes.c_size_t, ctypes.c_uint32),
    "dry": (ctypes.c_void_p, ctypes.c_float, ctypes.c_float, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_size_t),
    "logit_bias": (ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p),
    "mirostat": (ctypes.c_int32, ctypes.c_uint32, ctypes.c_float, ctypes.c_float, ctypes.c_int32),
    "mirostat_v2": (ctypes.c_uint32, ctypes.c_float, ctypes.c_float),
    "adaptive_p": (ctypes.c_float, ctypes.c_float, ctypes.c_uint32),
    "dist": (ctypes.c_uint32,),
    "greedy": (),
}  # fmt: skip


@cache
def library() -> ctypes.CDLL:
    """The shared library inside the wheel; skips the test where there is none."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        pytest.skip("xllamacpp is not installed (extra [interop])")
    lib = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    for name, types in _ARGUMENTS.items():
        init = getattr(lib, f"llama_sampler_init_{name}")
        init.argtypes, init.restype = types, ctypes.c_void_p
    lib.llama_sampler_apply.argtypes = [ctypes.c_void_p, ctypes.POINTER(_TokenDataArray)]
    lib.llama_sampler_apply.restype = None
    lib.llama_sampler_accept.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    lib.llama_sampler_accept.restype = None
    lib.llama_sampler_free.argtypes = [ctypes.c_void_p]
    lib.llama_sampler_free.restype = None
    return lib


class Candidates:
    """A llama_token_data_array that the caller owns."""

    def __init__(self, ids: np.ndarray, logits: np.ndarray, *, is_sorted: bool = False) -> None:
        self._data = (_TokenData * len(ids))()
        view = np.frombuffer(self._data, dtype=_DTYPE)
        view["id"], view["logit"] = ids, logits
        self._array = _TokenDataArray(self._data, len(ids), -1, is_sorted)

    @property
    def pointer(self):
        return ctypes.byref(self._array)

    @property
    def is_sorted(self) -> bool:
        return bool(self._array.sorted)

    @property
    def selected(self) -> int:
        """Id of the token that greedy or dist chose."""
        return self._array.data[self._array.selected].id

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        n = self._array.size
        at = ctypes.cast(self._array.data, ctypes.POINTER(_TokenData * n)).contents
        view = np.frombuffer(at, dtype=_DTYPE)
        return view["id"].astype(np.int64), view["logit"].copy()


def _new(lib: ctypes.CDLL, name: str, arguments: list) -> int:
    if name == "logit_bias":
        n_vocab, bias = arguments
        array = np.array(bias, dtype=[("token", "<i4"), ("bias", "<f4")])
        arguments = [n_vocab, len(bias), array.ctypes.data]
    if name == "dry" and len(arguments) == 6:  # the last: texts of sequence breakers
        *arguments, texts = arguments
        array = (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))
        arguments = [*arguments, ctypes.cast(array, ctypes.c_void_p), len(texts)]
    return getattr(lib, f"llama_sampler_init_{name}")(*arguments)


class LlamaSampler:
    """One llama.cpp sampler, or several in a row."""

    def __init__(self, *chain: tuple) -> None:
        lib = library()
        self._samplers = [_new(lib, name, arguments) for name, *arguments in chain]

    def __enter__(self) -> LlamaSampler:
        return self

    def __exit__(self, *_: object) -> None:
        for sampler in self._samplers:
            library().llama_sampler_free(sampler)

    def accept(self, tokens: Sequence[int]) -> None:
        for sampler in self._samplers:
            for token in tokens:
                library().llama_sampler_accept(sampler, int(token))

    def apply(self, candidates: Candidates) -> Candidates:
        for sampler in self._samplers:
            library().llama_sampler_apply(sampler, candidates.pointer)
        return candidates
