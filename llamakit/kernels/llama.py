"""A Llama whose matrices lie in tiles, and its forward pass in native code: the structures of native/engine.h.

Shapes: V n_vocab, C n_embd, R rank.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from llamakit.ggml import BLOCK_SIZES, FLOAT_TYPES, GGMLType
from llamakit.native import Library
from llamakit.quant import quantize

_i32, _i64, _float, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_TILE, _PAD = 16, 64
#: what the C code keeps on its stack for one head
MAX_HEAD_DIM = 512


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("tiles", _pointer), ("bias", _pointer), ("lora_b", _pointer),
        ("tile_bytes", _i64), ("type", _i32), ("n_out", _i32), ("n_in", _i32), ("rank", _i32),
    ]  # fmt: skip


_NORMS = ("attn_norm", "ffn_norm")
_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
#: where A of the matrices that have the same input stands
_LOWS = {
    "low_qkv": ("attn_q", "attn_k", "attn_v"), "low_output": ("attn_output",), "low_hidden": ("ffn_gate", "ffn_up"),
    "low_down": ("ffn_down",),
}  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = [(name, _pointer) for name in _NORMS] + [(name, _Matrix) for name in (*_MATRICES, *_LOWS)]


class _Llama(ctypes.Structure):
    _fields_ = [
        *((name, _i32) for name in ("n_layer", "n_embd", "n_head", "n_head_kv", "head_dim", "n_ff", "n_vocab")),
        ("embedding_rank", _i32), ("rms_eps", _float), ("attention_scale", _float), ("embedding", _pointer),
        ("embedding_row_bytes", _i64), ("embedding_row_blocks", _i64), ("embedding_decode", _pointer),
        ("embedding_lora_a", _pointer), ("embedding_lora_b", _pointer), ("output_norm", _pointer),
        ("rotations", _pointer), ("layers", _pointer), ("output", _Matrix), ("low", _Matrix),
    ]  # fmt: skip


class _Cache(ctypes.Structure):
    _fields_ = [("keys", _pointer), ("values", _pointer), ("n_ctx", _i64), ("wide", _i32)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", _i32), ("n_outputs", _i32), ("tokens", _pointer), ("positions", _pointer),
        ("outputs", _pointer), ("caches", _pointer), ("logits", _pointer),
    ]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The hyper-parameters that the forward pass needs, under the field's names."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int
    rms_eps: float


@dataclass(frozen=True)
class PackedRows:
    """A tensor as a file holds it: data (n_rows, row_bytes) uint8."""

    data: np.ndarray
    type: GGMLType
    shape: tuple[int, int]


class Cache:
    """Keys and values of one sequence, float16 or (wide) float32; n_ctx is rounded up to 16."""

    def __init__(self, shape: Shape, n_ctx: int, *, wide: bool) -> None:
        n_ctx, stride = _rounded(n_ctx, _TILE), _rounded(shape.head_dim, _TILE)
        size = shape.n_layer * shape.n_head_kv * n_ctx
        dtype = torch.float32 if wide else torch.float16
        self.keys, self.values = (
            torch.zeros(size * shape.head_dim, dtype=dtype),
            torch.zeros(size * stride, dtype=dtype),
        )
        self._structure = _Cache(self.keys.data_ptr(), self.values.data_ptr(), n_ctx, wide)
        self.address = ctypes.addressof(self._structure)
        # As C has them (engine.h): the keys of a head in tiles of as many positions, its values one by one.
        self._tiles = self.keys.view(-1, n_ctx // _TILE, shape.head_dim, _TILE)
        self._rows = self.values.view(-1, n_ctx, stride)

    def move(self, start: int, to: int, n: int, turned: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Copy n positions from `start` on to where `to` begins, the keys (heads, n, head_dim) through `turned`."""
        keys = self._tiles.transpose(2, 3).flatten(1, 2)  # a copy, by position
        keys[:, to : to + n] = turned(keys[:, start : start + n])
        self._tiles.copy_(keys.unflatten(1, (-1, _TILE)).transpose(2, 3))
        self._rows[:, to : to + n] = self._rows[:, start : start + n].clone()

    def copy(self, other: Cache, n: int) -> None:
        """Hold the first n positions of another cache of the same size, keys by whole tiles."""
        n_tiles = _rounded(n, _TILE) // _TILE
        self._tiles[:, :n_tiles] = other._tiles[:, :n_tiles]
        self._rows[:, :n] = other._rows[:, :n]


class _Arena:
    """Memory for matrices in large pages, where the system has them: reading it costs few address translations.

    It comes in large pieces, filled one after the other; n_bytes: taken from it.
    """

    _PIECE, _PAGE = 64 << 20, 2 << 20

    def __init__(self) -> None:
        self._pieces: list[mmap.mmap] = []
        self._at = self._end = self.n_bytes = 0

    def take(self, n_bytes: int) -> int:
        """The address of n_bytes more, a multiple of 64."""
        n_bytes = _rounded(n_bytes, 64)
        if self._at + n_bytes > self._end:
            size = max(self._PIECE, _rounded(n_bytes, self._PAGE)) + self._PAGE
            piece = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                piece.madvise(mmap.MADV_HUGEPAGE)
            self._pieces.append(piece)
            start = ctypes.addressof(ctypes.c_char.from_buffer(piece))
            self._at, self._end = _rounded(start, self._PAGE), start + size
        self._at += n_bytes
        self.n_bytes += n_bytes
        return self._at - n_bytes


@dataclass(frozen=True)
class Worn:
    """Low-rank matrices as they were put on: the structures that point to them, and what keeps them in memory."""

    layers: bytes
    model: bytes
    tensors: list[Tensor]


class PackedLlama:
    """Weights in tiles, and what C sees of them. read: a tensor of the file by its name, with `.weight`.

    vectors: norms and biases by name, float32. Memory stays alive with this object.
    """

    def __init__(
        self,
        library: Library,
        shape: Shape,
        read: Callable[[str], PackedRows],
        vectors: Mapping[str, Tensor],
        *,
        tied_output: bool,
        n_threads: int,
    ) -> None:
        self._library, self.shape, self.n_threads = library, shape, n_threads
        self._vectors, self._biases, self._loras = dict(vectors), list[Tensor](), list[Tensor]()
        self._tiles = _Arena()
        self._layers = (_Layer * shape.n_layer)()
        self._embedding = read("token_embd.weight")
        embedding = self._embedding
        self._model = _Llama(
            **{name: getattr(shape, name) for name in _SHARED}, rms_eps=shape.rms_eps,
            attention_scale=shape.head_dim**-0.5, embedding=embedding.data.ctypes.data,
            embedding_row_bytes=embedding.data.strides[0],
            embedding_row_blocks=shape.n_embd // BLOCK_SIZES[embedding.type][0],
            embedding_decode=library.decoder(embedding.type), layers=ctypes.addressof(self._layers),
            output=self._pack("output", embedding if tied_output else read("output.weight")),
        )  # fmt: skip
        for i, layer in enumerate(self._layers):
            for name in _MATRICES:
                setattr(layer, name, self._pack(f"blk.{i}.{name}", read(f"blk.{i}.{name}.weight")))
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self.set_loras({})

    def _pack(self, name: str, rows: PackedRows) -> _Matrix:
        matrix = self._in_tiles(rows, self._tiles.take)
        bias = self._vectors.get(f"{name}.bias")
        if bias is not None:
            self._biases.append(bias := _padded(bias, _TILE))
            matrix.bias = bias.data_ptr()
        return matrix

    def _in_tiles(self, rows: PackedRows, take: Callable[[int], int]) -> _Matrix:
        """The matrix alone. take: gives the address of so many bytes."""
        n_out, n_in = rows.shape
        tile_bytes = self._library.tile_bytes(rows.type, n_in)
        tiles = take(_rounded(n_out, _TILE) // _TILE * tile_bytes)
        data = np.ascontiguousarray(rows.data)
        self._library.pack(rows.type, data.ctypes.data, data.strides[0], rows.shape, tiles, self.n_threads)
        return _Matrix(tiles, None, None, tile_bytes, rows.type, n_out, n_in, 0)

    @property
    def n_bytes(self) -> int:
        """Bytes of all matrices, which a token reads once."""
        return self._tiles.n_bytes

    def set_loras(self, loras: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Put on A (R, n_in) and B (n_out, R), scales multiplied in, by tensor name without `.weight`, instead of what
        there was; a norm's delta is a matrix of one row."""
        self._loras = []
        self._model.low = self._set_pairs([self._model.output], [loras.get("output")])
        for i, layer in enumerate(self._layers):
            for low, names in _LOWS.items():
                pairs = [loras.get(f"blk.{i}.{name}") for name in names]
                setattr(layer, low, self._set_pairs([getattr(layer, name) for name in names], pairs))
            for name in _NORMS:
                setattr(layer, name, self._norm(f"blk.{i}.{name}", loras))
        self._model.output_norm = self._norm("output_norm", loras)
        a, b = loras.get("token_embd", (torch.empty(0, self.shape.n_embd), torch.empty(self.shape.n_vocab, 0)))
        a, b = _padded(a.float(), _PAD), b.float().contiguous()
        self._loras += [a, b]
        self._model.embedding_rank = len(a)
        self._model.embedding_lora_a, self._model.embedding_lora_b = a.data_ptr(), b.data_ptr()

    def worn(self) -> Worn:
        """What `set_loras` put on, for `wear`."""
        return Worn(bytes(self._layers), bytes(self._model), self._loras)

    def wear(self, loras: Worn) -> None:
        """Put on what was on once: pointers to what is laid out already."""
        rotations = self._model.rotations  # no part of it, and perhaps new
        ctypes.memmove(self._layers, loras.layers, len(loras.layers))
        ctypes.memmove(ctypes.addressof(self._model), loras.model, len(loras.model))
        self._loras, self._model.rotations = loras.tensors, rotations

    def _set_pairs(self, matrices: Sequence[_Matrix], pairs: Sequence[tuple[Tensor, Tensor] | None]) -> _Matrix:
        """Put B on matrices that have the same input; A of all of them, one below the other.

        A is rounded as its input is where that goes to quantized matrices alone: to eight bits in blocks of 32.
        """
        rows = []
        for matrix, pair in zip(matrices, pairs, strict=True):
            matrix.rank = 0 if pair is None else len(pair[0])
            if not matrix.rank or pair is None:
                continue
            a, b = pair[0].float(), pair[1].float().T
            size = a.abs().amax(1, keepdim=True).clamp_min(1e-30).log2().round().exp2()  # exact, and A has a scale of 1
            rows.append(a / size)
            b = _padded(b * size, _TILE).unflatten(1, (-1, _TILE)).transpose(0, 1)
            b = b.to(torch.float32 if matrix.type in FLOAT_TYPES else torch.bfloat16).contiguous()
            self._loras.append(b)
            matrix.lora_b = b.data_ptr()
        if not rows:
            return _Matrix()
        a, n_in = torch.cat(rows), matrices[0].n_in
        is_float = n_in % BLOCK_SIZES[GGMLType.Q8_0][0] or any(matrix.type in FLOAT_TYPES for matrix in matrices)
        data = a.view(torch.uint8) if is_float else quantize(a, GGMLType.Q8_0)
        packed = PackedRows(data.numpy(), GGMLType.F32 if is_float else GGMLType.Q8_0, (len(a), n_in))
        return self._in_tiles(packed, self._take_for_loras)

    def _take_for_loras(self, n_bytes: int) -> int:
        self._loras.append(room := torch.empty(n_bytes, dtype=torch.uint8))
        return room.data_ptr()

    def _norm(self, name: str, loras: Mapping[str, tuple[Tensor, Tensor]]) -> int:
        weight = self._vectors[f"{name}.weight"].float()
        if name in loras:
            a, b = loras[name]
            weight = weight + (b.float() @ a.float())[0]
        self._loras.append(weight := weight.contiguous())
        return weight.data_ptr()

    def set_rotations(self, rotations: Tensor) -> None:
        """Cosine and sine of every position that will be asked for, (n_ctx, head_dim / 2, 2) float32, contiguous."""
        self._rotations = rotations
        self._model.rotations = rotations.data_ptr()

    def forward(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        caches: np.ndarray,
        outputs: np.ndarray,
        n_threads: int | None = None,
    ) -> np.ndarray:
        """Logits (n_outputs, V) float32 after the tokens that `outputs` names.

        tokens, positions (M,) int32; caches (M,) uint64 addresses, tokens of one cache together and in their order;
        outputs (n_outputs,) int32 indices. The memory of the result is the caller's own.
        """
        n_vocab = _rounded(self.shape.n_vocab, _TILE)
        logits = np.empty((len(outputs), n_vocab), dtype=np.float32)
        batch = _Batch(
            len(tokens), len(outputs), tokens.ctypes.data, positions.ctypes.data, outputs.ctypes.data,
            caches.ctypes.data, logits.ctypes.data,
        )  # fmt: skip
        n_threads = n_threads or self.n_threads
        model, address = ctypes.addressof(self._model), ctypes.addressof(batch)
        n_bytes = self._library.scratch_bytes(model, address, n_threads)
        if n_bytes > self._scratch.numel():
            self._scratch = torch.empty(n_bytes + n_bytes // 8, dtype=torch.uint8)
        self._library.forward(model, address, self._scratch.data_ptr(), n_threads)
        return logits[:, : self.shape.n_vocab]


_SHARED = ("n_layer", "n_embd", "n_head", "n_head_kv", "head_dim", "n_ff", "n_vocab")


def can_pack(library: Library, types: Mapping[str, tuple[GGMLType, Sequence[int]]]) -> bool:
    """Whether native code has tiles for every matrix (name -> type, shape) and a decoder for the embedding."""
    for name, (ggml_type, shape) in types.items():
        if name == "token_embd.weight" and library.decoder(ggml_type) is None:
            return False
        if len(shape) == 2 and not library.tile_bytes(ggml_type, shape[1]):
            return False
    return True


def _rounded(n: int, to: int) -> int:
    return -(-n // to) * to


def _padded(x: Tensor, to: int) -> Tensor:
    """With zeros at the end of the last axis, up to a multiple."""
    return functional.pad(x.float(), (0, -x.shape[-1] % to)).contiguous()
