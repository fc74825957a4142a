"""The C library of native/: found, checked, bound; which instruction set is in use, or why there is none.

Everything that it does has a twin in torch that gives the same bytes. It is built with the package; where that was not
possible `library()` is None and `status()` says why. LLAMAKIT_NATIVE, read once: 0 turns it off, the name of an
instruction set (baseline, avx2, avx512) forces that one.

Threads are torch's own: OpenMP's entry is looked up in the library that torch has loaded, so that there is one pool.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llamakit.errors import UsageError

_ABI = 6
_VARIABLE = "LLAMAKIT_NATIVE"
_PACKAGE = Path(__file__).resolve().parent
#: sources beside the package: this is a checkout, and the library must be made of them
_SOURCES = _PACKAGE.parent / "native"
_BUILD_HINT = "make native builds it"
_INSTALL_HINT = "install a C compiler (gcc or clang), then in a checkout: pip install --force-reinstall --no-deps ."

_pointer, _int, _i64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_SIGNATURES = {
    "llamakit_sources": (ctypes.c_char_p, []),
    "llamakit_isa_name": (ctypes.c_char_p, [_int]),
    "llamakit_isa_supported": (_int, [_int]),
    "llamakit_has_encoder": (_int, [_int, _int]),
    "llamakit_has_decoder": (_int, [_int, _int, _int]),
    "llamakit_encode": (None, [_int, _int, _pointer, _pointer, _pointer, _i64, _i64, _i64, _pointer, _int]),
    "llamakit_decode": (None, [_int, _int, _int, _pointer, _pointer, _i64, _i64, _i64, _pointer, _int]),
    "llamakit_set_grid": (None, [_int, _pointer]),
    "llamakit_first_non_finite": (_i64, [_pointer, _i64]),
    "llamakit_tile_bytes": (_i64, [_int, _i64]),
    "llamakit_pack": (None, [_int, _pointer, _i64, _i64, _i64, _pointer, _pointer, _int]),
    "llamakit_decoder": (_pointer, [_int, _int]),
    "llamakit_scratch_bytes": (_i64, [_int, _pointer, _pointer, _int]),
    "llamakit_train": (None, [_int, _int, _int, _pointer, _i64, _pointer, _int]),
    "llamakit_forward": (None, [_int, _pointer, _pointer, _pointer, _pointer, _pointer, _int]),
}


@dataclass(frozen=True)
class Status:
    """path: the library's file; isas: what this processor can run of it, the plainest first; isa: what is in use, or
    None, and then reason says why and hint what to do."""

    path: Path | None = None
    isas: tuple[str, ...] = ()
    isa: str | None = None
    reason: str | None = None
    hint: str | None = None

    @property
    def broken(self) -> bool:
        """Whether there is a library that cannot be used."""
        return self.path is not None and self.isa is None


class Library:
    """The C functions with one instruction set. Addresses are those of contiguous memory; sizes are not checked."""

    def __init__(self, functions: ctypes.CDLL, number: int, isa: str) -> None:
        self._functions, self._number, self.isa = functions, number, isa

    def can_encode(self, ggml_type: int) -> bool:
        """Whether there is an encoder of the type."""
        return bool(self._functions.llamakit_has_encoder(self._number, ggml_type))

    def can_decode(self, ggml_type: int, *, bf16: bool) -> bool:
        """Whether there is a decoder of the type, to bfloat16 or to float32."""
        return bool(self._functions.llamakit_has_decoder(self._number, ggml_type, bf16))

    def encode(
        self,
        ggml_type: int,
        x: int,
        importance: int | None,
        out: int,
        shape: tuple[int, int],
        row_bytes: int,
        n_threads: int,
    ) -> None:
        """Float32 rows at x, `shape`, -> packed rows at out, row_bytes each; importance: n_in floats or None."""
        parallel = _gomp_parallel() if n_threads > 1 else None
        self._functions.llamakit_encode(
            self._number, ggml_type, x, importance, out, *shape, row_bytes, parallel, n_threads
        )

    def decode(
        self,
        ggml_type: int,
        packed: int,
        out: int,
        n_blocks: int,
        block: tuple[int, int],
        n_threads: int,
        *,
        bf16: bool,
    ) -> None:
        """Blocks at packed -> weights at out; block: weights and bytes of one."""
        parallel = _gomp_parallel() if n_threads > 1 else None
        out_bytes = block[0] * (2 if bf16 else 4)
        self._functions.llamakit_decode(
            self._number, ggml_type, bf16, packed, out, n_blocks, block[1], out_bytes, parallel, n_threads
        )

    def set_grid(self, which: int, rows: int) -> None:
        """Where the int8 rows of a grid of the IQ types are, from now on; numbers as in native/codec.h."""
        self._functions.llamakit_set_grid(which, rows)

    def tile_bytes(self, ggml_type: int, n_in: int) -> int:
        """Bytes of 16 rows of n_in weights in the engine's layout; 0 for a type that it does not have."""
        return self._functions.llamakit_tile_bytes(ggml_type, n_in)

    def pack(
        self, ggml_type: int, rows: int, row_bytes: int, shape: tuple[int, int], tiles: int, n_threads: int
    ) -> None:
        """Packed rows at `rows`, shape (n_rows, n_in), -> tiles."""
        parallel = _gomp_parallel() if n_threads > 1 else None
        self._functions.llamakit_pack(ggml_type, rows, row_bytes, *shape, tiles, parallel, n_threads)

    def train(self, kernel: int, job: ctypes.Structure, n_rows: int, n_threads: int, *, bf16: bool) -> None:
        """A kernel of native/train.h over n_rows rows."""
        parallel = _gomp_parallel() if n_threads > 1 else None
        self._functions.llamakit_train(self._number, kernel, bf16, ctypes.addressof(job), n_rows, parallel, n_threads)

    def decoder(self, ggml_type: int) -> int | None:
        """The address of the decoder of a type to float32."""
        return self._functions.llamakit_decoder(self._number, ggml_type)

    def scratch_bytes(self, model: int, batch: int, n_threads: int) -> int:
        """Bytes that `forward` needs for this batch; addresses of the structures of native/engine.h."""
        return self._functions.llamakit_scratch_bytes(self._number, model, batch, n_threads)

    def forward(self, model: int, batch: int, scratch: int, n_threads: int) -> None:
        """A batch of tokens through a model: caches and logits are written."""
        parallel, thread_count = (_gomp_parallel(), _thread_count()) if n_threads > 1 else (None, None)
        self._functions.llamakit_forward(
            self._number, model, batch, scratch, parallel if thread_count else None, thread_count, n_threads
        )

    def first_non_finite(self, x: int, n: int) -> int:
        """The index of the first NaN or infinity of n float32 at x, or n."""
        return self._functions.llamakit_first_non_finite(x, n)


def library() -> Library | None:
    """The library with the instruction set in use, or None where torch does the work.

    Raises UsageError for a LLAMAKIT_NATIVE that this machine cannot follow.
    """
    return _switched[-1] if _switched else _load()[0]


def status() -> Status:
    """What `library()` gives and why. Raises UsageError as it does."""
    return _load()[1]


@contextmanager
def using(isa: str | None) -> Iterator[Library | None]:
    """For tests and benchmarks: within the block every thread uses this instruction set, or none.

    Raises UsageError where it cannot be had.
    """
    functions, state = _open()
    _switched.append(_pick(functions, state, isa) if isa else None)
    try:
        yield _switched[-1]
    finally:
        _switched.pop()


_switched: list[Library | None] = []


@cache
def _load() -> tuple[Library | None, Status]:
    wanted = os.environ.get(_VARIABLE, "")
    if wanted == "0":
        return None, Status(reason=f"{_VARIABLE}=0 turns it off")
    functions, state = _open()
    if functions is None and not wanted:
        return None, state
    chosen = _pick(functions, state, wanted or state.isas[-1])
    return chosen, Status(state.path, state.isas, chosen.isa)


def _pick(functions: ctypes.CDLL | None, state: Status, isa: str) -> Library:
    if functions is None:
        raise UsageError(f"no native code to use as {isa}: {state.reason}", hint=state.hint)
    if isa not in state.isas:
        raise UsageError(
            f"instruction set {isa!r} is not there (expected 0 or one of {', '.join(state.isas)})",
            hint=f"{_VARIABLE} is the environment variable; without it the best one is used",
        )
    return Library(functions, _names(functions).index(isa), isa)


@cache
def _open() -> tuple[ctypes.CDLL | None, Status]:
    """The library of this package, whatever LLAMAKIT_NATIVE says; None where it is missing, stale or broken."""
    hint = _BUILD_HINT if (_SOURCES / "CMakeLists.txt").exists() else _INSTALL_HINT
    path = next(iter(sorted((_PACKAGE / "_native").glob("llamakit_native.*"))), None)
    if path is None:
        return None, Status(reason="it was not built when llamakit was installed", hint=hint)
    try:
        functions = ctypes.CDLL(str(path))
        abi = functions.llamakit_abi()
        for name, (result, arguments) in _SIGNATURES.items() if abi == _ABI else ():
            function = getattr(functions, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return None, Status(path, reason=f"{path} cannot be loaded: {error}", hint=hint)
    if abi != _ABI:
        return None, Status(path, reason=f"{path} is of another version (expected ABI {_ABI}, got {abi})", hint=hint)
    if _is_stale(functions.llamakit_sources().decode()):
        return None, Status(path, reason=f"{path} is older than its sources in {_SOURCES}", hint=hint)
    names = _names(functions)
    isas = tuple(name for number, name in enumerate(names) if functions.llamakit_isa_supported(number))
    return functions, Status(path, isas)


def _names(functions: ctypes.CDLL) -> list[str]:
    names = []
    while name := functions.llamakit_isa_name(len(names)):
        names.append(name.decode())
    return names


def _is_stale(digest: str) -> bool:
    """Whether a checkout's sources are others than those the library was made of; CMakeLists.txt computes the same."""
    import hashlib

    if not (_SOURCES / "CMakeLists.txt").exists():
        return False
    files = [*_SOURCES.glob("*.c"), *_SOURCES.glob("*.h"), _SOURCES / "CMakeLists.txt"]
    digests = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files))
    return hashlib.sha256(digests.encode()).hexdigest() != digest


def shares_threads() -> bool:
    """Whether the library can run on torch's threads; else it runs on one. Imports torch."""
    return _gomp_parallel() is not None


def _gomp_parallel() -> int | None:
    """The address of GOMP_parallel among the libraries that torch has loaded: libgomp's, or that of LLVM's libomp."""
    return _loaded_function("GOMP_parallel")


def _thread_count() -> int | None:
    """The address of omp_get_num_threads."""
    return _loaded_function("omp_get_num_threads")


@cache
def _loaded_function(name: str) -> int | None:
    import torch

    for library_name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / library_name
        if path.exists():
            loaded = ctypes.CDLL(str(path))  # a handle finds the symbols of what its library depends on
            function = getattr(loaded, name, None)
            return ctypes.cast(function, ctypes.c_void_p).value if function else None
    return None
