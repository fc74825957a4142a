"""The keys and values of one context."""

from __future__ import annotations

import torch
from torch import Tensor

from llamakit.model.config import ModelConfig


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

    def advance(self, n_tokens: int) -> None:
        """Count n_tokens as seen, once every layer has stored them."""
        self.n_past += n_tokens

    def truncate(self, n_past: int) -> None:
        """Forget all tokens from position n_past on."""
        self.n_past = min(self.n_past, n_past)
