"""Rotary position embeddings in GGUF's `norm` layout: the pair (2i, 2i+1) turns by position * frequency i.

Shapes: B batch, T tokens, H heads, D head dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llamakit.kernels import train
from llamakit.model.config import ModelConfig


def rope_frequencies(config: ModelConfig, rope_freqs: Tensor | None) -> tuple[Tensor, float]:
    """Angle per position of every pair, (D/2,) float64, and the factor on cos and sin.

    rope_freqs: the file's `rope_freqs.weight` (D/2,), by which Llama 3 divides the frequencies. Linear scaling
    divides by the factor; YaRN (Peng et al. 2023, arXiv 2309.00071) blends both and scales the attention.
    """
    d = config.head_dim
    frequencies = config.rope_base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    if rope_freqs is not None:
        frequencies = frequencies / rope_freqs.double()
    scaling = config.rope_scaling
    if scaling.type == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.type == "yarn":
        keep = _yarn_extrapolated_share(config) * scaling.ext_factor
        blended = frequencies / scaling.factor * (1 - keep) + frequencies * keep
        magnitude = 1 + 0.1 * math.log(scaling.factor) if scaling.ext_factor and scaling.factor > 1 else 1.0
        return blended, scaling.attn_factor * magnitude
    return frequencies, 1.0


def _yarn_extrapolated_share(config: ModelConfig) -> Tensor:
    """Share of the unscaled frequency per pair: 1 for fast pairs, 0 for slow ones, a ramp between (YaRN, eq. 22)."""
    scaling, d = config.rope_scaling, config.head_dim

    def pair_of(rotations: float) -> float:
        return d * math.log(scaling.original_ctx / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_base))

    low = max(0, math.floor(pair_of(scaling.beta_fast)))
    high = min(d - 1, math.ceil(pair_of(scaling.beta_slow)))
    ramp = (torch.arange(d // 2, dtype=torch.float64) - low) / max(0.001, high - low)
    return 1 - ramp.clamp(0, 1)


class Rope:
    """The table of rotations, grown as positions are asked for."""

    def __init__(self, config: ModelConfig, rope_freqs: Tensor | None) -> None:
        self._frequencies, self._magnitude = rope_frequencies(config, rope_freqs)
        self._table = torch.empty(0)

    def rotations(self, positions: Tensor) -> Tensor:
        """(..., D/2) complex64 rotations of int64 positions."""
        longest = int(positions.max()) + 1 if positions.numel() else 0
        if self._table.shape[0] < longest or self._table.device != positions.device:
            size = max(256, 1 << (longest - 1).bit_length())
            with torch.inference_mode(False):  # the table outlives the call, and may serve training later
                angles = torch.arange(size, dtype=torch.float64)[:, None] * self._frequencies
                table = torch.polar(torch.full_like(angles, self._magnitude), angles)
                self._table = table.to(torch.complex64).to(positions.device)
        return self._table[positions]

    def turn(self, n: int, device: torch.device) -> Tensor:
        """(D/2,) complex64: by n positions forwards, or back (n below 0), without the factor that YaRN has on all."""
        angles = n * self._frequencies
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64).to(device)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """x (..., D) with its pairs turned by rotations (..., D/2) complex64, without a gradient; computed in float32."""
    if train.usable(x) and rotations.dtype == torch.complex64 and x.dim() == 4 and rotations.dim() > 2:
        return train.rotate(_in_rows(x), rotations, _by_head(x), back=False)
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotations).view(x.shape).to(x.dtype)


def _in_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _by_head(x: Tensor) -> Tensor:
    """Room for (B, T, H, D) that lies in memory as (B, H, T, D), as attention takes it."""
    b, t, h, d = x.shape
    return torch.empty(b, h, t, d, dtype=x.dtype).transpose(1, 2)


class _ApplyRope(torch.autograd.Function):
    """Rotation; its gradient is the rotation back (times the same magnitude)."""

    @staticmethod
    def forward(ctx, x: Tensor, rotations: Tensor) -> Tensor:
        ctx.save_for_backward(rotations)
        return rotate(x, rotations)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (rotations,) = ctx.saved_tensors
        if train.usable(grad):
            return train.rotate(_in_rows(grad), rotations, torch.empty(grad.shape, dtype=grad.dtype), back=True), None
        return rotate(grad.contiguous(), rotations.conj()), None


def apply_rope(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn the pairs of x (B, T, H, D) by rotations (T, D/2) or (B, T, D/2) complex64; computed in float32."""
    rotations = rotations.unsqueeze(-2)
    return _ApplyRope.apply(x, rotations) if torch.is_grad_enabled() else rotate(x, rotations)
