"""What runs a model forward: tokens of one or more sequences in, the logits that follow them out.

An engine owns weights, a context one sequence's keys and values. Whoever generates sees only these two, so that the
torch model and native code stand behind the same loop.

Shapes: V n_vocab, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamakit.errors import LlamakitError
from llamakit.formats.adapter import Adapter
from llamakit.model import KVCache, Llama, ModelConfig, attach
from llamakit.model.cache import JoinedCache
from llamakit.model.layers import Embedding, LoraEmbedding
from llamakit.model.lora import detach
from llamakit.model.rope import Rope
from llamakit.model.trained import TrainedEmbedding

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

    def shift(self, keep: int, discard: int) -> None:
        """Forget `discard` tokens behind the first `keep`; those after them move forward, with keys as if there."""
        ...

    def copy(self, other: Context, n_past: int) -> None:
        """Hold what another context of the same engine and size has seen first: n_past tokens, and no others."""
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

    def feed_batch(self, feeds: Sequence[tuple[Context, Sequence[int]]]) -> list[Logits]:
        """`feed` for several sequences at once, at least one, none of them twice: the logits of each, in order."""
        ...

    def set_adapters(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        """Put these on, each times its scale, instead of those before. Raises as `attach` does; nothing is then on."""
        ...


class TorchContext:
    """A sequence of `TorchEngine`: a key-value cache of one row, and the rotations of its keys."""

    def __init__(self, cache: KVCache, rope: Rope) -> None:
        self.cache = cache
        self._rope = rope

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

    @torch.inference_mode()
    def shift(self, keep: int, discard: int) -> None:
        """Forget `discard` tokens behind the first `keep`; those after them move forward, with keys as if there."""
        self.cache.shift(keep, discard, self._rope)

    @torch.inference_mode()
    def copy(self, other: Context, n_past: int) -> None:
        """Hold what another context of the same engine and size has seen first: n_past tokens, and no others."""
        self.cache.copy(_cache(other), n_past)


class TorchEngine:
    """The torch model, on any device. prefill_chunk: tokens computed at once, which bounds the memory."""

    def __init__(self, model: Llama, *, prefill_chunk: int = 512) -> None:
        self.model, self.config = model, model.config
        self._chunk = prefill_chunk
        self._device = next(model.parameters()).device

    def context(self, n_ctx: int) -> TorchContext:
        """An empty sequence."""
        cache = KVCache(self.config, n_ctx=n_ctx, dtype=_dtype(self.model), device=self._device)
        return TorchContext(cache, self.model.rope)

    def feed(self, context: Context, tokens: Sequence[int]) -> Logits:
        """Append tokens (at least one, within n_ctx): logits (V,) float32 after the last one."""
        return self.feed_batch([(context, tokens)])[0]

    @torch.inference_mode()
    def feed_batch(self, feeds: Sequence[tuple[Context, Sequence[int]]]) -> list[Logits]:
        """`feed` for several sequences at once, at least one, none of them twice: the logits of each, in order.

        All matrices see all tokens in one row; only the attention goes from sequence to sequence.
        """
        last = [hidden for chunk in in_chunks(feeds, self._chunk) for hidden in self._last_hidden(chunk)]
        # The output matrix is the largest of all: it is for the last tokens alone.
        logits: Logits = self.model.logits(last[0] if len(last) == 1 else torch.stack(last)).cpu().numpy()
        return [logits] if len(last) == 1 else list(logits)

    def _last_hidden(self, chunk: Sequence[Piece]) -> list[Tensor]:
        """Compute a chunk: the hidden state (C,) of the last token of each sequence that ends in it."""
        ids = torch.tensor([[id for piece in chunk for id in piece.tokens]], dtype=torch.int64, device=self._device)
        parts = [(_cache(piece.context), len(piece.tokens)) for piece in chunk]
        hidden = self.model(ids, cache=parts[0][0] if len(parts) == 1 else JoinedCache(parts))
        ends = accumulate(n for _, n in parts)
        return [hidden[0, end - 1] for piece, end in zip(chunk, ends, strict=True) if piece.is_last]

    def set_adapters(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        """Put these on, each times its scale, instead of those before. Raises as `attach` does; nothing is then on."""
        detach(self.model)
        try:
            for adapter, scale in adapters:
                attach(self.model, adapter, scale)
        except LlamakitError:
            detach(self.model)
            raise


def _cache(context: Context) -> KVCache:
    assert isinstance(context, TorchContext), "a context of this engine"
    return context.cache


class Piece(NamedTuple):
    """Tokens of one sequence that fit into a chunk; is_last: none of its tokens are left for the next."""

    context: Context
    tokens: Sequence[int]
    is_last: bool


def in_chunks(feeds: Sequence[tuple[Context, Sequence[int]]], size: int) -> Iterator[list[Piece]]:
    """The tokens of all sequences, in order, in chunks of at most `size` tokens."""
    chunk, room = [], size
    for context, tokens in feeds:
        at = 0
        while at < len(tokens):
            stop = min(at + room, len(tokens))
            chunk.append(Piece(context, tokens[at:stop], stop == len(tokens)))
            at, room = stop, room - (stop - at)
            if not room:
                yield chunk
                chunk, room = [], size
    if chunk:
        yield chunk


def _dtype(model: Llama) -> torch.dtype:
    """What the model computes in."""
    embedding = model.token_embd.base if isinstance(model.token_embd, LoraEmbedding) else model.token_embd
    assert isinstance(embedding, (Embedding, TrainedEmbedding)), "load_model or training puts it in"
    return embedding.dtype
