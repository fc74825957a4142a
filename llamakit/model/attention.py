"""Causal self-attention over whole sequences, written out for the CPU, and attention over a cache.

Shapes: B batch, T tokens, K key/value heads, G query heads per key/value head (H = G * K), D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from llamakit.kernels import train
from llamakit.model.cache import JoinedCache, KVCache

# Queries per tile: large enough for efficient products, small enough that the tile's scores stay in the L2 cache.
_TILE = 128
# Up to this context the softmax is kept for the backward pass; beyond, recomputing it costs less than its memory.
_KEEP_SOFTMAX_CTX = 1024


Mask = Callable[[Tensor, int], Tensor]
"""(attention weights of a tile, number of the tile) -> 0 or 1 / (1 - rate) in their shape, the same in every call."""


@cache
def _future(n: int, device: torch.device) -> Tensor:
    """True where a key stands after its query, (n, n)."""
    with torch.inference_mode(False):
        return torch.ones(n, n, dtype=torch.bool, device=device).triu_(1)


def segment_starts(segments: Tensor) -> Tensor:
    """The place where the segment of each token begins, (B, T) int64, of segments (B, T) that lie in one piece each."""
    places = torch.arange(segments.shape[1], device=segments.device).expand(segments.shape)
    begins = torch.ones(segments.shape, dtype=torch.bool, device=segments.device)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return torch.where(begins, places, 0).cummax(dim=1).values


def _before(starts: Tensor, start: int, stop: int) -> Tensor:
    """True where a key [0, stop) stands before the segment of its query [start, stop): (B, 1, stop-start, stop)."""
    keys = torch.arange(stop, device=starts.device)
    return (keys < starts[:, start:stop, None])[:, None]


def _tile_softmax(q: Tensor, k: Tensor, start: int, stop: int, scale: float, starts: Tensor | None) -> Tensor:
    """Attention weights of the queries [start, stop) over keys [0, stop), those before starts (B, T) left out.

    q (B*K, G, T, D), k (B*K, T, D) -> (B*K, G*(stop-start), stop), in q's dtype; the softmax itself runs in float32.
    """
    n, g, _, d = q.shape
    tile = q[:, :, start:stop].reshape(n, g * (stop - start), d)
    scores = torch.bmm(tile, k[:, :stop].transpose(1, 2))
    if train.usable(scores):
        return train.causal_softmax_(scores, start, stop - start, scale, starts)
    scores.mul_(scale)
    scores.view(n, g, stop - start, stop)[..., start:].masked_fill_(_future(stop - start, q.device), -math.inf)
    if starts is not None:
        scores.view(len(starts), -1, stop - start, stop).masked_fill_(_before(starts, start, stop), -math.inf)
    return torch.softmax(scores, dim=-1)


class _CausalAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D)) v in query tiles; only keys that a tile may see are multiplied.

    torch's flash kernel spends on CPU, at (4, 9, 3, 512, 64) bf16, three times as long (docs/benchmarks.md). A mask is
    drawn again for the backward pass, not kept.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, mask: Mask | None) -> Tensor:
        n, g, t, d = q.shape
        scale = 1 / math.sqrt(d)
        out = torch.empty_like(q)
        keep = [] if t <= _KEEP_SOFTMAX_CTX else None
        for start in range(0, t, _TILE):
            stop = min(start + _TILE, t)
            weights = _tile_softmax(q, k, start, stop, scale, starts)
            seen = weights if mask is None else weights * mask(weights, start // _TILE)
            out[:, :, start:stop] = torch.bmm(seen, v[:, :stop]).view(n, g, stop - start, d)
            if keep is not None:
                keep.append(weights)
        ctx.starts, ctx.mask = starts, mask
        ctx.save_for_backward(q, k, v, *(keep or ()))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, *kept = ctx.saved_tensors
        n, g, t, d = q.shape
        scale = 1 / math.sqrt(d)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i, start in enumerate(range(0, t, _TILE)):
            stop = min(start + _TILE, t)
            weights = kept[i] if kept else _tile_softmax(q, k, start, stop, scale, ctx.starts)
            grad_tile = grad[:, :, start:stop].reshape(n, g * (stop - start), d)
            q_tile = q[:, :, start:stop].reshape(n, g * (stop - start), d)
            drawn = None if ctx.mask is None else ctx.mask(weights, i)
            seen = weights if drawn is None else weights * drawn
            dv[:, :stop].baddbmm_(seen.transpose(1, 2), grad_tile)
            d_weights = torch.bmm(grad_tile, v[:, :stop].transpose(1, 2))
            if drawn is not None:
                d_weights *= drawn
            # The tiles' mask needs no care here: a masked weight is 0, and so is its gradient.
            if train.usable(weights, d_weights):
                d_scores = train.softmax_back_(weights, d_weights, start, stop - start, scale, ctx.starts)
            else:
                d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype).mul_(scale)
            dq[:, :, start:stop] = torch.bmm(d_scores, k[:, :stop]).view(n, g, stop - start, d)
            dk[:, :stop].baddbmm_(d_scores.transpose(1, 2), q_tile)
        return dq, dk, dv, None, None


def causal_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None = None, mask: Mask | None = None) -> Tensor:
    """q (B, T, H, D), k and v (B, T, K, D) -> (B, T, H*D); query head h reads key/value head h // G.

    starts: (B, T) int64, the first token that each one sees; by default the row's first. mask: drops some of the
    attention weights, (B*K, G*tile, T) at a time.
    """
    b, t, h, d = q.shape
    n_kv = k.shape[2]
    if q.device.type == "cpu" or mask is not None:  # torch's kernels draw masks of their own
        grouped = q.transpose(1, 2).reshape(b * n_kv, h // n_kv, t, d)
        flat_k, flat_v = (x.transpose(1, 2).reshape(b * n_kv, t, d) for x in (k, v))
        out = _CausalAttention.apply(grouped, flat_k, flat_v, starts, mask)
        return out.view(b, h, t, d).transpose(1, 2).reshape(b, t, h * d)
    return masked_attention(q, k, v, starts)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None = None) -> Tensor:
    """`causal_attention` by torch's own kernels, which other devices have."""
    b, t, h, d = q.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if starts is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        seen = torch.ones(t, t, dtype=torch.bool, device=q.device).tril_() & ~_before(starts, 0, t)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    return out.transpose(1, 2).reshape(b, t, h * d)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: KVCache | JoinedCache, layer: int) -> Tensor:
    """Attention of the T newest tokens over everything in the cache, which k and v (B, T, K, D) join; (B, T, H*D).

    In a joined cache the tokens of each context see that one alone.
    """
    if isinstance(cache, JoinedCache):
        shares = (x.split([n for _, n in cache.parts], dim=1) for x in (q, k, v))
        each = zip(*shares, cache.parts, strict=True)
        return torch.cat([cached_attention(q, k, v, part, layer) for q, k, v, (part, _) in each], dim=1)
    b, t, h, d = q.shape
    keys, values = cache.extend(layer, k, v)
    mask, is_first = None, cache.n_past == 0  # then nothing is multiplied that a mask would take away
    if t > 1 and not is_first:
        positions = torch.arange(cache.n_past, cache.n_past + t, device=q.device)
        mask = torch.arange(cache.n_past + t, device=q.device) <= positions[:, None]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=mask, is_causal=is_first, enable_gqa=True
    )
    return out.transpose(1, 2).reshape(b, t, h * d)
