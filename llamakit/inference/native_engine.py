"""The engine in native code: packed weights in tiles, int8 activations, a whole forward pass per call.

A model in float32 is computed in float32 throughout; else keys and values are float16, as in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llamakit.errors import MismatchError
from llamakit.formats.adapter import Adapter, refuse_replaced
from llamakit.formats.base import ModelFile
from llamakit.ggml import GGMLType
from llamakit.inference.engine import Context, Logits
from llamakit.kernels.llama import MAX_HEAD_DIM, Cache, PackedLlama, PackedRows, Shape, can_pack
from llamakit.model import ModelConfig
from llamakit.model.load import load_vector
from llamakit.model.rope import Rope
from llamakit.native import Library, library

#: tokens computed at once: enough for efficient products, few enough that their activations stay in the cache
_CHUNK = 256
#: below so many bytes of weights, waiting for one another costs the threads more than they save
_ONE_THREAD_BYTES = 3 << 20


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

    def __init__(self, shape: Shape, n_ctx: int, *, wide: bool) -> None:
        self.cache, self.n_ctx, self.n_past = Cache(shape, n_ctx, wide=wide), n_ctx, 0

    def truncate(self, n_past: int) -> None:
        """Forget all tokens from position n_past on."""
        self.n_past = min(self.n_past, n_past)


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
        freqs = load_vector(file, "rope_freqs.weight") if "rope_freqs.weight" in file.tensors else None
        self._rope, self._n_rotations = Rope(config, freqs), 0

    def context(self, n_ctx: int) -> NativeContext:
        """An empty sequence."""
        if n_ctx > self._n_rotations:
            self._n_rotations = n_ctx
            rotations = self._rope.rotations(torch.arange(n_ctx))
            self._llama.set_rotations(torch.view_as_real(rotations).float().contiguous())
        return NativeContext(self._llama.shape, n_ctx, wide=self._wide)

    def feed(self, context: Context, tokens: Sequence[int]) -> Logits:
        """Append tokens (at least one, within n_ctx): logits (V,) float32 after the last one."""
        assert isinstance(context, NativeContext), "a context of this engine"
        assert context.n_past + len(tokens) <= context.n_ctx, "the caller keeps within n_ctx"
        ids = np.array(tokens, dtype=np.int32)
        logits = None
        for start in range(0, len(ids), _CHUNK):
            part = ids[start : start + _CHUNK]
            positions = np.arange(context.n_past, context.n_past + len(part), dtype=np.int32)
            caches = np.full(len(part), context.cache.address, dtype=np.uint64)
            last = start + len(part) == len(ids)
            outputs = np.array([len(part) - 1] if last else [], dtype=np.int32)
            logits = self._llama.forward(part, positions, caches, outputs)
            context.n_past += len(part)
        assert logits is not None
        return logits[0]

    def set_adapters(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        """Put these on, each times its scale, instead of those before. Raises MismatchError for a tensor that the model
        lacks or that has another shape, UnsupportedError for an adapter that replaces whole tensors; nothing is then
        on."""
        self._llama.set_loras({})
        loras: dict[str, tuple[Tensor, Tensor]] = {}
        for adapter, scale in adapters:
            refuse_replaced(adapter)
            for name, (a, b) in adapter.tensors.items():
                path = name.removesuffix(".weight")
                self._check(name, (b.shape[0], a.shape[1]))
                pair = torch.from_numpy(a).float(), torch.from_numpy(b).float() * adapter.scale(name, scale)
                if path in loras:
                    pair = torch.cat([loras[path][0], pair[0]]), torch.cat([loras[path][1], pair[1]], dim=1)
                loras[path] = pair
        self._llama.set_loras(loras)

    def _check(self, name: str, shape: tuple[int, int]) -> None:
        expected = self.config.tensor_shapes().get(name)
        if expected is None:
            raise MismatchError(f"the adapter changes {name}, which this model does not have")
        expected = expected if len(expected) == 2 else (1, *expected)
        if shape != expected:
            raise MismatchError(f"the adapter's {name} is for {list(shape)} (the model has {list(expected)})")
