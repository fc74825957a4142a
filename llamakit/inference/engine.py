"""What runs a model forward: tokens of one or more sequences in, the logits that follow them out.

An engine owns weights, a context one sequence's keys and values. Whoever generates sees only these two, so that the
torch model and native code stand behind the same loop.

Shapes: V n_vocab, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from llamakit.errors import LlamakitError
from llamakit.formats.adapter import Adapter
from llamakit.model import KVCache, Llama, ModelConfig, attach
from llamakit.model.layers import Embedding, LoraEmbedding
from llamakit.model.lora import detach

Logits = NDArray[np.float32]


class Context(Protocol):
    """One sequence: room for n_ctx tokens, of which n_past are there."""

    @property
    def n_ctx(self) -> int:
        """Tokens that it holds at most."""
        ...

    @property
    def n_past(self) -> int:
        """Tokens that it has seen."""
        ...

    def truncate(self, n_past: int) -> None:
        """Forget all tokens from position n_past on."""
        ...


class Engine(Protocol):
    """A model that computes. config: its hyper-parameters."""

    config: ModelConfig

    def context(self, n_ctx: int) -> Context:
        """An empty sequence."""
        ...

    def feed(self, context: Context, tokens: Sequence[int]) -> Logits:
        """Append tokens (at least one, within n_ctx): logits (V,) float32 after the last one."""
        ...

    def set_adapters(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        """Put these on, each times its scale, instead of those before. Raises as `attach` does; nothing is then on."""
        ...


class TorchContext:
    """A sequence of `TorchEngine`: a key-value cache of one row."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    @property
    def n_ctx(self) -> int:
        """Tokens that it holds at most."""
        return self.cache.n_ctx

    @property
    def n_past(self) -> int:
        """Tokens that it has seen."""
        return self.cache.n_past

    def truncate(self, n_past: int) -> None:
        """Forget all tokens from position n_past on."""
        self.cache.truncate(n_past)


class TorchEngine:
    """The torch model, on any device. prefill_chunk: tokens computed at once, which bounds the memory."""

    def __init__(self, model: Llama, *, prefill_chunk: int = 512) -> None:
        self.model, self.config = model, model.config
        self._chunk = prefill_chunk
        self._device = next(model.parameters()).device

    def context(self, n_ctx: int) -> TorchContext:
        """An empty sequence."""
        return TorchContext(KVCache(self.config, n_ctx=n_ctx, dtype=_dtype(self.model), device=self._device))

    @torch.inference_mode()
    def feed(self, context: Context, tokens: Sequence[int]) -> Logits:
        """Append tokens (at least one, within n_ctx): logits (V,) float32 after the last one."""
        assert isinstance(context, TorchContext), "a context of this engine"
        ids = torch.tensor([tokens], dtype=torch.int64, device=self._device)
        hidden = ids
        for part in ids.split(self._chunk, dim=1):
            hidden = self.model(part, cache=context.cache)
        logits: Logits = self.model.logits(hidden[0, -1]).cpu().numpy()  # the output matrix is the largest of all
        return logits

    def set_adapters(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        """Put these on, each times its scale, instead of those before. Raises as `attach` does; nothing is then on."""
        detach(self.model)
        try:
            for adapter, scale in adapters:
                attach(self.model, adapter, scale)
        except LlamakitError:
            detach(self.model)
            raise


def _dtype(model: Llama) -> torch.dtype:
    """What the model computes in."""
    embedding = model.token_embd.base if isinstance(model.token_embd, LoraEmbedding) else model.token_embd
    assert isinstance(embedding, Embedding), "load_model puts it in"
    return embedding.dtype
