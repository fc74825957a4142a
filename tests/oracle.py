"""llama.cpp itself as the judge of tokenizers, encoders and logits: what the xllamacpp wheel carries, through ctypes."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# llama_model_params is passed by value, on the stack: more room than it needs does no harm. Where vocab_only stands
# in it (the first of the booleans at the end: vocab_only, check_tensors, use_extra_bufts) is checked against the
# defaults.
_PARAMS_BYTES, _VOCAB_ONLY, _BOOLEANS = 512, 72, [0, 0, 1]


# llama_context_params likewise: n_ctx, n_batch, n_ubatch, n_seq_max come first, both numbers of threads after three
# more.
_CONTEXT_DEFAULTS, _N_THREADS = [512, 2048, 512, 1], 7


class _Params(ctypes.Structure):
    _fields_ = (("data", ctypes.c_uint8 * _PARAMS_BYTES),)


class _ContextParams(ctypes.Structure):
    _fields_ = (("words", ctypes.c_uint32 * (_PARAMS_BYTES // 4)),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_QUIET = _LOG(lambda level, text, data: None)


@cache
def _shared_object() -> Any:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llama.cpp is not installed (pip install xllamacpp)")
    path = next(Path(next(iter(spec.submodule_search_locations))).glob("*.so"))
    return ctypes.CDLL(str(path))


@cache
def _library() -> Any:
    library = _shared_object()
    pointer, i32, flag = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
    ids, text = ctypes.POINTER(i32), ctypes.c_char_p
    for name, result, arguments in (
        ("llama_backend_init", None, []),
        ("llama_log_set", None, [_LOG, pointer]),
        ("llama_model_default_params", _Params, []),
        ("llama_model_load_from_file", pointer, [text, _Params]),
        ("llama_model_free", None, [pointer]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", i32, [pointer]),
        ("llama_vocab_is_eog", flag, [pointer, i32]),
        ("llama_vocab_get_attr", i32, [pointer, i32]),
        ("llama_vocab_get_add_bos", flag, [pointer]),
        ("llama_vocab_get_add_eos", flag, [pointer]),
        ("llama_vocab_bos", i32, [pointer]),
        ("llama_vocab_eos", i32, [pointer]),
        ("llama_tokenize", i32, [pointer, text, i32, ids, i32, flag, flag]),
        ("llama_token_to_piece", i32, [pointer, i32, text, i32, i32, flag]),
        ("llama_detokenize", i32, [pointer, ids, i32, text, i32, flag, flag]),
        ("llama_context_default_params", _ContextParams, []),
        ("llama_init_from_model", pointer, [pointer, _ContextParams]),
        ("llama_free", None, [pointer]),
        ("llama_decode", i32, [pointer, _Batch]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, i32]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_clear", None, [pointer, flag]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_QUIET, None)
    library.llama_backend_init()
    defaults = library.llama_model_default_params().data
    if defaults[_VOCAB_ONLY : _VOCAB_ONLY + 3] != _BOOLEANS:
        pytest.skip("this llama.cpp has another llama_model_params")
    return library


class LlamaVocab:
    """The vocabulary of a GGUF file as llama.cpp sees it."""

    def __init__(self, path: str | Path) -> None:
        self._lib = _library()
        params = self._lib.llama_model_default_params()
        params.data[_VOCAB_ONLY] = 1
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise ValueError(f"llama.cpp refuses {path}")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.n_vocab: int = self._lib.llama_vocab_n_tokens(self._vocab)
        self.bos_id, self.eos_id = (self._id(self._lib[f"llama_vocab_{name}"]) for name in ("bos", "eos"))
        self.add_bos: bool = self._lib.llama_vocab_get_add_bos(self._vocab)
        self.add_eos: bool = self._lib.llama_vocab_get_add_eos(self._vocab)

    def _id(self, function: Any) -> int | None:
        function.restype, function.argtypes = ctypes.c_int32, [ctypes.c_void_p]
        id = function(self._vocab)
        return None if id < 0 else id

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self._lib.llama_model_free(self._model)

    @property
    def pointer(self) -> int:
        """The llama_vocab itself, for a sampler that asks for one."""
        return self._vocab

    def tokenize(self, text: str | bytes, add_special: bool = True, parse_special: bool = True) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        room = len(data) + 16
        ids = (ctypes.c_int32 * room)()
        n = self._lib.llama_tokenize(self._vocab, data, len(data), ids, room, add_special, parse_special)
        assert n >= 0
        return ids[:n]

    def piece(self, id: int, special: bool = False) -> bytes:
        buffer = ctypes.create_string_buffer(4096)
        n = self._lib.llama_token_to_piece(self._vocab, id, buffer, len(buffer), 0, special)
        assert n >= 0
        return buffer.raw[:n]

    def detokenize(self, ids: list[int], special: bool = False) -> bytes:
        buffer = ctypes.create_string_buffer(64 * len(ids) + 4096)
        array = (ctypes.c_int32 * len(ids))(*ids)
        n = self._lib.llama_detokenize(self._vocab, array, len(ids), buffer, len(buffer), False, special)
        assert n >= 0
        return buffer.raw[:n]

    def is_eog(self, id: int) -> bool:
        return bool(self._lib.llama_vocab_is_eog(self._vocab, id))

    def attr(self, id: int) -> int:
        return int(self._lib.llama_vocab_get_attr(self._vocab, id))


def llama_vocab(path: str | Path) -> LlamaVocab:
    """The vocabulary of a GGUF file in llama.cpp; skips the test where xllamacpp is missing. Raises ValueError where
    llama.cpp refuses the file."""
    return LlamaVocab(path)


class LlamaLogits:
    """A model of up to n_ctx tokens in llama.cpp, on the CPU, with its defaults (keys and values in f16)."""

    def __init__(self, path: str | Path, *, n_ctx: int, threads: int) -> None:
        self._lib = _library()
        self._context = None
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), self._lib.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp refuses {path}")
        self._n_vocab: int = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))
        params = self._lib.llama_context_default_params()
        if params.words[:4] != _CONTEXT_DEFAULTS or params.words[_N_THREADS] != params.words[_N_THREADS + 1]:
            pytest.skip("this llama.cpp has another llama_context_params")
        params.words[0:3] = [n_ctx] * 3
        params.words[_N_THREADS : _N_THREADS + 2] = [threads] * 2
        self._context = self._lib.llama_init_from_model(self._model, params)
        assert self._context

    def __enter__(self) -> LlamaLogits:
        return self

    def __exit__(self, *_: object) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def at_once(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits (T, V) float32 after each of the tokens, which are one batch in an empty context."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        return self._decode(tokens, 0)

    def one_by_one(self, tokens: Sequence[int]) -> np.ndarray:
        """The same, each token in a batch of its own."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        return np.concatenate([self._decode([token], i) for i, token in enumerate(tokens)])

    def _decode(self, tokens: Sequence[int], n_past: int) -> np.ndarray:
        n = len(tokens)
        ids, places = (ctypes.c_int32 * n)(*tokens), (ctypes.c_int32 * n)(*range(n_past, n_past + n))
        batch = _Batch(n, ids, None, places, None, None, (ctypes.c_int8 * n)(*[1] * n))
        assert self._lib.llama_decode(self._context, batch) == 0
        rows = (self._lib.llama_get_logits_ith(self._context, i) for i in range(n))
        return np.stack([np.ctypeslib.as_array(row, (self._n_vocab,)).copy() for row in rows])


def ggml_quantize(rows: np.ndarray, ggml_type: int, n_bytes: int, imatrix: np.ndarray | None = None) -> np.ndarray:
    """Rows as ggml encodes them: float32 (n_rows, n_in) -> uint8 (n_rows, n_bytes); skips the test where xllamacpp is
    missing."""
    encode = _shared_object().ggml_quantize_chunk
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    encode.restype, encode.argtypes = ctypes.c_size_t, [ctypes.c_int, pointer, pointer, i64, i64, i64, pointer]
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    out = np.full((len(rows), n_bytes), 0xA5, dtype=np.uint8)
    importance = None if imatrix is None else np.ascontiguousarray(imatrix, dtype=np.float32)
    address = None if importance is None else importance.ctypes.data
    assert encode(int(ggml_type), rows.ctypes.data, out.ctypes.data, 0, *rows.shape, address) == out.size
    return out
