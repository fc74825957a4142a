"""The keys and values of one context, and of several whose tokens are computed together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llamakit.model.config import ModelConfig
from llamakit.model.rope import Rope, rotate


class KVCache:
    """Keys and values of the tokens that a model has seen, per layer (B, K, n_ctx, D); passed to `Llama.forward`."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch: int = 1,
        n_ctx: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch, config.n_head_kv, n_ctx, config.head_dim)
        self.n_ctx, self.n_past = n_ctx, 0
        self._k = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self._v = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, T, K, D) of the T newest tokens; returns all keys and values so far, (B, K, n_past + T, D)."""
        end = self.n_past + k.shape[1]
        assert end <= self.n_ctx, "the caller keeps within n_ctx"
        self._k[layer][:, :, self.n_past : end] = k.transpose(1, 2)
        self._v[layer][:, :, self.n_past : end] = v.transpose(1, 2)
        return self._k[layer][:, :, :end], self._v[layer][:, :, :end]

    def positions(self, n_tokens: int) -> Tensor:
        """Of the next n_tokens, (T,) int64."""
        return torch.arange(self.n_past, self.n_past + n_tokens, device=self._k[0].device)

    def advance(self, n_tokens: int) -> None:
        """Count n_tokens as seen, once every layer has stored them."""
        self.n_past += n_tokens

    def truncate(self, n_past: int) -> None:
        """Forget all tokens from position n_past on."""
        self.n_past = min(self.n_past, n_past)

    def shift(self, keep: int, discard: int, rope: Rope) -> None:
        """Forget `discard` tokens behind the first `keep`, and move those after them forward.

        Their keys are turned back by as many positions, in float32; YaRN's magnitude is in them already.
        """
        start, end = keep + discard, self.n_past
        assert 0 <= keep <= start <= end, "only what is there can be forgotten"
        turn = rope.turn(-discard, self._k[0].device)
        for k, v in zip(self._k, self._v, strict=True):
            k[:, :, keep : end - discard] = rotate(k[:, :, start:end], turn)
            v[:, :, keep : end - discard] = v[:, :, start:end].clone()
        self.n_past = end - discard

    def copy(self, other: KVCache, n_past: int) -> None:
        """Hold the first n_past tokens of another cache of the same shape, and no others."""
        assert n_past <= other.n_past, "only what is there can be copied"
        for target, source in zip(self._k + self._v, other._k + other._v, strict=True):
            target[:, :, :n_past] = source[:, :, :n_past]
        self.n_past = n_past


class JoinedCache:
    """Several contexts of one row whose newest tokens stand behind each other in one row (1, T) of `Llama.forward`.

    parts: each context with its share of the T tokens, in order.
    """

    def __init__(self, parts: Sequence[tuple[KVCache, int]]) -> None:
        self.parts = parts

    def positions(self, n_tokens: int) -> Tensor:
        """Of each one's next tokens, n_tokens in all, (T,) int64."""
        return torch.cat([cache.positions(n) for cache, n in self.parts])

    def advance(self, n_tokens: int) -> None:
        """Count the tokens as seen, n_tokens in all, each one in its own context."""
        for cache, n in self.parts:
            cache.advance(n)
