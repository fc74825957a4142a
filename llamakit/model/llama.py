"""The one Llama. Its attributes are named after GGUF's tensors, so loading needs no name map.

Shapes: B batch, T tokens, C n_embd, H n_head, K n_head_kv, D head_dim, F n_ff, V n_vocab.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llamakit.model.attention import cached_attention, causal_attention, segment_starts
from llamakit.model.cache import JoinedCache, KVCache
from llamakit.model.config import ModelConfig
from llamakit.model.elementwise import Lazy, gated_silu
from llamakit.model.layers import Dropout, RMSNorm, project
from llamakit.model.recompute import recomputed
from llamakit.model.rope import Rope, apply_rope


class Block(nn.Module):
    """One layer: attention and a gated feed-forward unit, each behind a norm, each added to its input.

    Its norms and matrices, named as in the file, are leaves that `load_model` puts in.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        self.dropout: Dropout | None = None
        self.attn_norm, self.ffn_norm = (RMSNorm(torch.empty(0), config.rms_eps) for _ in range(2))
        self.attn_q, self.attn_k, self.attn_v, self.attn_output = (nn.Identity() for _ in range(4))
        self.ffn_gate, self.ffn_up, self.ffn_down = (nn.Identity() for _ in range(3))

    def attention(
        self, x: Tensor, rotations: Tensor, cache: KVCache | JoinedCache | None, starts: Tensor | None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C), the norm included."""
        b, t, _ = x.shape
        q, k, v = project(self.attn_norm.lazily(x), self.attn_q, self.attn_k, self.attn_v)
        q = apply_rope(q.view(b, t, -1, self.config.head_dim), rotations)
        k = apply_rope(k.view(b, t, -1, self.config.head_dim), rotations)
        v = v.view(b, t, -1, self.config.head_dim)
        if cache is not None:
            return self.attn_output(cached_attention(q, k, v, cache, self.index))
        mask = self._attention_mask if self.dropout is not None and self.training else None
        return self.attn_output(causal_attention(q, k, v, starts, mask))

    def feed_forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C), the norm included."""
        gate, up = project(self.ffn_norm.lazily(x), self.ffn_gate, self.ffn_up)
        return project(Lazy(gated_silu, (gate, up)), self.ffn_down)[0]

    def forward(
        self,
        x: Tensor,
        rotations: Tensor,
        cache: KVCache | JoinedCache | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C). starts: (B, T) int64, the first token that each one sees, without a cache."""
        x = x + self._dropped(self.attention(x, rotations, cache, starts), 1)
        return x + self._dropped(self.feed_forward(x), 2)

    def _attention_mask(self, weights: Tensor, tile: int) -> Tensor:
        """Of a tile of attention weights, (B*K, G*tile, T); numbered behind the masks of all blocks' places."""
        assert self.dropout is not None, "it is asked for where there is dropout"
        return self.dropout.mask(weights, 2 * self.config.n_layer + 1 + self.index + tile * self.config.n_layer)

    def _dropped(self, x: Tensor, place: int) -> Tensor:
        """In training, with some of it dropped at random: place 1 is the attention's result, 2 the feed-forward's."""
        if self.dropout is None or not self.training:
            return x
        return x * self.dropout.mask(x, 2 * self.index + place)


class Llama(nn.Module):
    """Tokens to hidden states, hidden states to logits. Built empty; `load_model` puts leaves in.

    use_checkpointing: recompute each block in the backward pass instead of keeping its activations; recompute: how.
    """

    def __init__(self, config: ModelConfig, rope_freqs: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.rope = Rope(config, rope_freqs)
        self.token_embd: nn.Module = nn.Identity()
        self.blk = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.output_norm: nn.Module = nn.Identity()
        self.output: nn.Module = nn.Identity()
        self.use_checkpointing = False
        self.recompute: Callable[..., Tensor] = recomputed
        self.dropout: Dropout | None = None

    def drop(self, dropout: Dropout) -> None:
        """In training drop some of the embeddings, of the attention weights and of what each unit adds, at random."""
        self.dropout = dropout
        for block in self.blk:
            assert isinstance(block, Block)
            block.dropout = dropout

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: KVCache | JoinedCache | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after output_norm, (B, T, C), of int64 tokens (B, T).

        positions: (T,) or (B, T) int64; by default they continue the cache, or start at 0. With a cache the tokens
        attend to all that it holds and join it. With a joined cache each context's tokens do so, B is 1.
        segments: (B, T) int, without a cache: a token sees those of its own segment alone; each lies in one piece.
        """
        assert segments is None or cache is None, "a cache has no segments"
        t = tokens.shape[1]
        starts = None if segments is None else segment_starts(segments)
        if positions is None:
            positions = torch.arange(t, device=tokens.device) if cache is None else cache.positions(t)
        rotations = self.rope.rotations(positions)
        x = self.token_embd(tokens)
        if self.dropout is not None and self.training:
            x = x * self.dropout.mask(x, 0)
        for block in self.blk:
            if self.use_checkpointing and torch.is_grad_enabled() and cache is None:
                x = self.recompute(block, x, rotations, None, starts)
            else:
                x = block(x, rotations, cache, starts)
        if cache is not None:
            cache.advance(t)
        return self.output_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V) float32."""
        return self.output(hidden).float()
