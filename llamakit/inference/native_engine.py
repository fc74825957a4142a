"""The engine in native code: packed weights in tiles, int8 activations, a whole forward pass per call.

A model in float32 is computed in float32 throughout; else keys and values are float16, as in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llamakit.formats.adapter import Adapter
from llamakit.formats.base import ModelFile
from llamakit.ggml import GGMLType
from llamakit.inference.engine import Context, Logits, Piece, in_chunks
from llamakit.kernels.llama import MAX_HEAD_DIM, Cache, PackedLlama, PackedRows, Shape, Worn, can_pack
from llamakit.model import ModelConfig
from llamakit.model.load import load_vector
from llamakit.model.lora import check_fits
from llamakit.model.rope import Rope, rotate
from llamakit.native import Library, library

#: tokens computed at once: enough for efficient products, few enough that their activations stay in the cache
_CHUNK = 256
#: below so many bytes of weights, waiting for one another costs the threads more than they save
_ONE_THREAD_BYTES = 3 << 20
_REMEMBERED_SETS = 6


def native_library(file: ModelFile, config: ModelConfig) -> Library | None:
    """The native code, where it is there and can run this model."""
    code = library()
    if code is None or config.head_dim > MAX_HEAD_DIM or config.head_dim % 2:
        return None
    names = ["token_embd.weight", *config.tensor_shapes()]
    types = {name: (file.tensors[name].type, file.tensors[name].shape) for name in names}
    return code if can_pack(code, types) else None


class NativeContext:
    """A sequence of `NativeEngine`."""

    def __init__(self, shape: Shape, n_ctx: int, rope: Rope, *, wide: bool) -> None:
        self._rope = rope
        self.cache, self.n_ctx, self.n_past = Cache(shape, n_ctx, wide=wide), n_ctx, 0

    def truncate(self, n_past: int) -> None:
        """Forget all tokens from position n_past on."""
        self.n_past = min(self.n_past, n_past)

    def shift(self, keep: int, discard: int) -> None:
        """Forget `discard` tokens behind the first `keep`; those after them move forward, with keys as if there."""
        start, end = keep + discard, self.n_past
        turn = self._rope.turn(-discard, torch.device("cpu"))
        self.cache.move(start, keep, end - start, lambda keys: rotate(keys, turn))
        self.n_past = end - discard

    def copy(self, other: Context, n_past: int) -> None:
        """Hold what another context of the same engine and size has seen first: n_past tokens, and no others."""
        assert isinstance(other, NativeContext) and other.n_ctx == self.n_ctx, "a context of this engine and size"
        self.cache.copy(other.cache, n_past)
        self.n_past = n_past


class NativeEngine:
    """A model file on the CPU. config: its hyper-parameters; code: see `native_library`."""

    def __init__(self, file: ModelFile, config: ModelConfig, code: Library, *, n_threads: int | None = None) -> None:
        self.config = config
        shape = Shape(
            n_layer=config.n_layer, n_embd=config.n_embd, n_head=config.n_head, n_head_kv=config.n_head_kv,
            head_dim=config.head_dim, n_ff=config.n_ff, n_vocab=config.n_vocab, rms_eps=config.rms_eps,
        )  # fmt: skip
        wanted = [name for name in config.tensor_shapes() if name.endswith("norm.weight")]
        vectors = {name: load_vector(file, name) for name in [*wanted, *config.bias_sizes()] if name in file.tensors}

        def read(name: str) -> PackedRows:
            info = file.tensors[name]
            return PackedRows(file.read(name), info.type, (info.shape[0], info.shape[1]))

        threads = n_threads or torch.get_num_threads()
        self._llama = PackedLlama(code, shape, read, vectors, tied_output=config.tied_output, n_threads=threads)
        if self._llama.n_bytes < _ONE_THREAD_BYTES:
            self._llama.n_threads = 1
        self._wide = file.tensors["blk.0.attn_q.weight"].type == GGMLType.F32
        # Sets of adapters that were on, laid out: a server changes between them many times a second.
        self._worn: dict[tuple[tuple[int, float], ...], tuple[list[tuple[Adapter, float]], Worn]] = {}
        freqs = load_vector(file, "rope_freqs.weight") if "rope_freqs.weight" in file.tensors else None
        self._rope, self._n_rotations = Rope(config, freqs), 0

    @property
    def kv_type(self) -> str:
        """Type of the numbers in a context: f32 or f16."""
        return "f32" if self._wide else "f16"

    def context(self, n_ctx: int) -> NativeContext:
        """An empty sequence."""
        if n_ctx > self._n_rotations:
            self._n_rotations = n_ctx
            rotations = self._rope.rotations(torch.arange(n_ctx))
            self._llama.set_rotations(torch.view_as_real(rotations).float().contiguous())
        return NativeContext(self._llama.shape, n_ctx, self._rope, wide=self._wide)

    def feed(self, context: Context, tokens: Sequence[int]) -> Logits:
        """Append tokens (at least one, within n_ctx): logits (V,) float32 after the last one."""
        return self.feed_batch([(context, tokens)])[0]

    def feed_batch(self, feeds: Sequence[tuple[Context, Sequence[int]]]) -> list[Logits]:
        """`feed` for several sequences at once, at least one, none of them twice: the logits of each, in order."""
        return [logits for chunk in in_chunks(feeds, _CHUNK) for logits in self._feed_chunk(chunk)]

    def _feed_chunk(self, chunk: Sequence[Piece]) -> Logits:
        """Compute a chunk: logits (n, V) of the sequences that end in it."""
        positions, caches, ends = [], [], []
        for context, tokens, is_last in chunk:
            assert isinstance(context, NativeContext), "a context of this engine"
            positions += range(context.n_past, context.n_past + len(tokens))
            caches += [context.cache.address] * len(tokens)
            ends += [len(positions) - 1] * is_last
            context.n_past += len(tokens)
            assert context.n_past <= context.n_ctx, "the caller keeps within n_ctx"
        ids = np.array([id for piece in chunk for id in piece.tokens], dtype=np.int32)
        where = np.array(positions, dtype=np.int32), np.array(caches, dtype=np.uint64)
        return self._llama.forward(ids, *where, np.array(ends, dtype=np.int32))

    def set_adapters(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        """Put these on, each times its scale, instead of those before. Raises as `check_fits`; nothing is then on."""
        key = tuple((id(adapter), scale) for adapter, scale in adapters)
        if key in self._worn:
            self._llama.wear(self._worn[key][1])
            return
        self._llama.set_loras({})
        loras: dict[str, tuple[Tensor, Tensor]] = {}
        for adapter, scale in adapters:
            check_fits(adapter, self.config)
            for name, (a, b) in adapter.tensors.items():
                path = name.removesuffix(".weight")
                pair = torch.from_numpy(a).float(), torch.from_numpy(b).float() * adapter.scale(name, scale)
                if path in loras:
                    pair = torch.cat([loras[path][0], pair[0]]), torch.cat([loras[path][1], pair[1]], dim=1)
                loras[path] = pair
        self._llama.set_loras(loras)
        if len(self._worn) == _REMEMBERED_SETS:
            del self._worn[next(iter(self._worn))]
        self._worn[key] = list(adapters), self._llama.worn()
