"""The leaves that a Llama is made of: frozen packed matrices, LoRA beside them, norms.

Shapes: N tokens (any leading axes), I = n_in, O = n_out, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamakit.ggml import BLOCK_SIZES, GGMLType
from llamakit.model.elementwise import Function, Lazy, as_rows, identity, rms_norm
from llamakit.model.narrow import products_for
from llamakit.model.trained import TrainedLinear, project_trained
from llamakit.quant import QTensor, dequantize

_VIEWS = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}
# Weights that are decoded at a time for a product: else a vocabulary's matrix would be the largest thing in memory.
SLAB_WEIGHTS = 4 << 20


class Scratch:
    """Memory that all matrices of a model are decoded into, one after another: fresh pages cost half of a decode."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def take(self, shape: tuple[int, int], like: Tensor, dtype: torch.dtype) -> Tensor:
        """A (rows, columns) tensor on like's device; it is the same memory at the next call."""
        size = shape[0] * shape[1]
        if self._buffer.numel() < size or self._buffer.dtype != dtype or self._buffer.device != like.device:
            self._buffer = torch.empty(size, dtype=dtype, device=like.device)
        return self._buffer[:size].view(shape)


class PackedWeight(nn.Module):
    """A frozen matrix in the file's own blocks; decoded when asked for, or once if `keep_dense` was called.

    scratch: where to decode into; what `dense` gives is then valid until the next matrix is decoded.
    """

    def __init__(self, weight: QTensor, scratch: Scratch | None = None) -> None:
        super().__init__()
        self._scratch = scratch
        self.weight = nn.Parameter(weight.data, requires_grad=False)
        self.ggml_type, self.shape = weight.type, weight.shape
        self._dense: Tensor | None = None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix (O, I) in dtype; a view where the file's type is that dtype already."""
        if self._dense is not None and self._dense.dtype == dtype:
            return self._dense
        if _VIEWS.get(self.ggml_type) == dtype:
            return self.weight.view(dtype)
        return self._decoded(self.weight, dtype)

    def _decoded(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows, or some columns of all, decoded into the scratch."""
        if self._scratch is None:
            return dequantize(packed, self.ggml_type, dtype)
        block, block_bytes = BLOCK_SIZES[self.ggml_type]
        with torch.inference_mode(False):  # the memory outlives the call
            out = self._scratch.take((len(packed), packed.shape[1] // block_bytes * block), self.weight, dtype)
        return dequantize(packed, self.ggml_type, dtype, out)

    def keep_dense(self, dtype: torch.dtype) -> None:
        """Decode now and keep the result: 2 bytes per weight in bf16 buy every later decode."""
        if self.is_packed(dtype):
            self._dense = dequantize(self.weight, self.ggml_type, dtype)

    def is_packed(self, dtype: torch.dtype) -> bool:
        """Whether `dense` has to decode."""
        return _VIEWS.get(self.ggml_type) != dtype and (self._dense is None or self._dense.dtype != dtype)

    def dense_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that `keep_dense` takes beyond the packed ones."""
        if _VIEWS.get(self.ggml_type) == dtype:
            return 0
        return self.shape[0] * self.shape[-1] * dtype.itemsize


class Embedding(PackedWeight):
    """Rows of a packed matrix, decoded after the look-up: only what a batch uses."""

    def __init__(self, weight: QTensor, dtype: torch.dtype) -> None:
        super().__init__(weight)
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 (B, T) -> (B, T, I)."""
        rows = self.weight[tokens.reshape(-1)]
        return dequantize(rows, self.ggml_type, self.dtype).view(*tokens.shape, self.shape[-1])


class _Prepacked:
    """A matrix in oneDNN's own layout: the same product, 5 to 20 % faster, and for a single row twice as fast."""

    def __init__(self, dense: Tensor) -> None:
        self.dtype = dense.dtype
        self._weight = torch.ops.mkldnn._reorder_linear_weight(dense, None)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, bias, "none", [], "")


class _FrozenLinear(torch.autograd.Function):
    """x W^T + bias with a frozen W: nothing is saved, the backward pass decodes W again."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.layer.product_back(grad), None


class QuantizedLinear(PackedWeight):
    """y = x W^T + bias, W frozen and packed."""

    def __init__(self, weight: QTensor, bias: Tensor | None = None, scratch: Scratch | None = None) -> None:
        super().__init__(weight, scratch)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._forward: _Prepacked | None = None
        self._backward: _Prepacked | None = None

    def prepack(self, dtype: torch.dtype) -> None:
        """Decode now, into the layout that `product` is fastest with: the bytes of the decoded matrix."""
        self._forward = _Prepacked(self.dense(dtype))

    def prepack_back(self, dtype: torch.dtype, scratch: Scratch) -> None:
        """The same for `product_back`.

        scratch: for the transposed copy that is on the way; fresh memory for each would leave holes of its size.
        """
        dense = self.dense(dtype)
        self._backward = _Prepacked(scratch.take((self.shape[-1], self.shape[0]), dense, dtype).copy_(dense.t()))

    def is_packed(self, dtype: torch.dtype) -> bool:
        """Whether a product has to decode first."""
        return (self._forward is None or self._forward.dtype != dtype) and super().is_packed(dtype)

    def product(self, x: Tensor) -> Tensor:
        """x W^T + bias, (N, I) -> (N, O), without a gradient."""
        bias = self.bias_in(x.dtype)
        if self._forward is not None and self._forward.dtype == x.dtype:
            return self._forward.product(x, bias)
        if not self._in_slabs(x.dtype):
            return F.linear(x, self.dense(x.dtype), bias)
        y = x.new_empty(*x.shape[:-1], self.shape[0])
        for rows in self._slabs(0, 64):
            slab = self._decoded(self.weight[rows], x.dtype)
            y[..., rows] = F.linear(x, slab, None if bias is None else bias[rows])
        return y

    def product_back(self, grad: Tensor) -> Tensor:
        """grad W, (N, O) -> (N, I): the gradient of x."""
        if self._backward is not None and self._backward.dtype == grad.dtype:
            return self._backward.product(grad, None)
        if not self._in_slabs(grad.dtype):
            return grad @ self.dense(grad.dtype)
        dx, (block, block_bytes) = grad.new_empty(*grad.shape[:-1], self.shape[1]), BLOCK_SIZES[self.ggml_type]
        for columns in self._slabs(1, max(64, block)):
            packed = slice(columns.start // block * block_bytes, columns.stop // block * block_bytes)
            dx[..., columns] = grad @ self._decoded(self.weight[:, packed], grad.dtype)
        return dx

    def _in_slabs(self, dtype: torch.dtype) -> bool:
        return self.is_packed(dtype) and self.shape[0] * self.shape[1] > SLAB_WEIGHTS

    def _slabs(self, axis: int, multiple: int) -> Iterator[slice]:
        """Even pieces of rows (for a product) or columns (for one backward): no sum of a product goes over pieces, so
        the result is that of the whole matrix, to the last bit."""
        size = self.shape[axis]
        n_slabs = -(-self.shape[0] * self.shape[1] // SLAB_WEIGHTS)
        step = -(-size // (n_slabs * multiple)) * multiple
        return (slice(start, min(start + step, size)) for start in range(0, size, step))

    def bias_in(self, dtype: torch.dtype) -> Tensor | None:
        """The bias in dtype."""
        return None if self.bias is None else self.bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), in x's dtype."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _FrozenLinear.apply(x, self)
        return self.product(x)


class Dropout:
    """Dropout whose masks are a function of a key and a row's number, so that a resumed or recomputed pass draws the
    same ones, and so do several processes that share a batch.

    rows: numbers of the rows within the batch of all processes; one row for everything where nobody says.
    """

    def __init__(self, rate: float) -> None:
        self.rate, self.key, self.rows = rate, 0, range(1)

    def mask(self, like: Tensor, layer: int) -> Tensor:
        """0 or 1/(1 - rate) in like's shape and dtype, drawn for (key, layer, row).

        Four of them are drawn with each random word, a fifth of the time that `bernoulli_` takes on a CPU; so the rate
        is a whole number of 65,536ths.
        """
        generator, mask = torch.Generator(like.device), torch.empty(like.shape, dtype=like.dtype, device=like.device)
        dropped = round(self.rate * 65_536) - 32_768
        # An adapter of the output matrix gets the trained tokens of all rows, which cannot be told apart here.
        rows = self.rows if mask.numel() // mask.shape[-1] % len(self.rows) == 0 else self.rows[:1]
        for number, row in zip(rows, mask.view(len(rows), -1), strict=True):
            seed = ((self.key * 1_000_003 + layer) * 1_000_003 + number) & (2**63 - 1)
            words = torch.empty(-(-len(row) // 4), dtype=torch.int64, device=like.device)
            words.random_(-(2**63), None, generator=generator.manual_seed(seed))
            row.copy_(words.view(torch.int16)[: len(row)] >= dropped)
        return mask.div_(1 - self.rate)


class LoraLinear(nn.Module):
    """base(x) + scale * B(A(x)) with A (R, I) and B (O, R) in float32 (Hu et al. 2021, arXiv 2106.09685).

    number: which layer this is in its model, for the dropout masks.
    """

    def __init__(
        self,
        base: QuantizedLinear,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float,
        *,
        dropout: Dropout | None = None,
        number: int = 0,
    ) -> None:
        super().__init__()
        self.base, self.scale, self.dropout, self.number = base, scale, dropout, number
        self.lora_a, self.lora_b = nn.Parameter(lora_a), nn.Parameter(lora_b)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), in x's dtype."""
        return project(x, self)[0]


class _LoraProject(torch.autograd.Function):
    """Several LoRA linears of one input h: y_i = h W_i^T + s_i (h A_i^T) B_i^T.

    dh = sum_i dy_i W_i + s_i (dy_i B_i) A_i;  dA_i = s_i (dy_i B_i)^T h;  dB_i = s_i dy_i^T (h A_i^T).
    W + BA is never formed; the small products of all layers on the A side are one. Kept are A and B as they were
    multiplied, the few h A^T, and instead of h the tensors that it is computed from.
    """

    @staticmethod
    def forward(ctx, layers: tuple[LoraLinear, ...], function: Function, n_tensors: int, *tensors: Tensor):
        tensors, ab = tensors[:n_tensors], tensors[n_tensors:]
        h = as_rows(function(*tensors)[0])
        n = len(layers)
        scaled = [a if layer.scale == 1 else a * layer.scale for layer, a in zip(layers, ab, strict=False)]
        ranks = [len(a) for a in scaled]
        products = products_for(h, max(ranks))
        a = products.kept(torch.cat(scaled) if n > 1 else scaled[0])
        b = [products.kept(part.t()) for part in ab[n:]]
        mask = _dropout_mask(h, layers)
        low = products.narrow((h if mask is None else h * mask,), (a,))
        parts = zip(layers, b, low.split(ranks, dim=1), strict=True)
        ys = tuple(products.widen_(layer.base.product(h), ha, part) for layer, part, ha in parts)
        ctx.layers, ctx.function, ctx.products = layers, function, products
        ctx.save_for_backward(low, a, *b, *tensors)
        return ys

    @staticmethod
    def backward(ctx, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        layers: tuple[LoraLinear, ...] = ctx.layers
        n, products = len(layers), ctx.products
        low, a, *rest = ctx.saved_tensors
        b, tensors = rest[:n], rest[n:]
        ranks = [len(part) for part in b]
        result, pullback = ctx.function(*tensors)
        h = as_rows(result)
        mask = _dropout_mask(h, layers)
        low_grad = products.narrow(grads, b)
        d_a = products.outer(low_grad, h if mask is None else h * mask).split(ranks)
        d_a = [d if layer.scale == 1 else d * layer.scale for layer, d in zip(layers, d_a, strict=True)]
        d_b = [products.outer(ha, grad).t() for ha, grad in zip(low.split(ranks, dim=1), grads, strict=True)]
        wanted, d_tensors = ctx.needs_input_grad[3 : 3 + len(tensors)], [None] * len(tensors)
        if any(wanted):  # the first block reads the frozen embedding: nobody asks
            dh = layers[0].base.product_back(grads[0])
            for layer, grad in zip(layers[1:], grads[1:], strict=True):
                dh.add_(layer.base.product_back(grad))
            if mask is None:
                products.widen_(dh, low_grad, a)
            else:
                dh.add_(products.widen_(torch.zeros_like(dh), low_grad, a).mul_(mask))
            d_tensors = pullback(dh.view(result.shape), wanted)
        return None, None, None, *d_tensors, *d_a, *d_b


def _dropout_mask(x: Tensor, layers: tuple[LoraLinear, ...]) -> Tensor | None:
    dropout = layers[0].dropout
    if dropout is None or dropout.rate == 0 or not layers[0].training:
        return None
    return dropout.mask(x, layers[0].number)


def project(x: Lazy | Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Every layer applied to the same x (..., I); LoRA layers share their small products, and keep what a lazy x is
    computed from instead of x."""
    trained = tuple(layer for layer in layers if isinstance(layer, TrainedLinear))
    if len(trained) == len(layers):
        return project_trained(x, *trained)
    lora = tuple(layer for layer in layers if isinstance(layer, LoraLinear))
    if len(lora) < len(layers):
        h = x.compute() if isinstance(x, Lazy) else x
        return tuple(layer(h) for layer in layers)
    function, tensors = x if isinstance(x, Lazy) else Lazy(identity, (x,))
    ab = (*(layer.lora_a for layer in lora), *(layer.lora_b for layer in lora))
    ys = _LoraProject.apply(lora, function, len(tensors), *tensors, *ab)
    return tuple(y.view(*tensors[0].shape[:-1], -1) for y in ys)


class LoraEmbedding(nn.Module):
    """base[token] + scale * B[token] A: for `token_embd`, with A (R, I) and B (n_vocab, R)."""

    def __init__(self, base: Embedding, lora_a: Tensor, lora_b: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.lora_a, self.lora_b = nn.Parameter(lora_a), nn.Parameter(lora_b)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 (B, T) -> (B, T, I)."""
        x = self.base(tokens)
        return x + (F.embedding(tokens, self.lora_b) @ self.lora_a).mul(self.scale).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a float32 weight (I,)."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight, requires_grad=False), eps

    def effective_weight(self) -> Tensor:
        """The weight that is applied, (I,) float32."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., I), in x's dtype, computed in float32."""
        return self.lazily(x).compute()

    def lazily(self, x: Tensor) -> Lazy:
        """What `forward` gives, not computed yet."""
        return Lazy(partial(rms_norm, eps=self.eps), (x, self.effective_weight()))


class LoraNorm(RMSNorm):
    """A norm with weight + scale * (B A)[0], A (R, I) and B (1, R). llama.cpp ignores such deltas."""

    def __init__(self, base: RMSNorm, lora_a: Tensor, lora_b: Tensor, scale: float) -> None:
        super().__init__(base.weight.data, base.eps)
        self.base, self.scale = base, scale
        self.lora_a, self.lora_b = nn.Parameter(lora_a), nn.Parameter(lora_b)

    def effective_weight(self) -> Tensor:
        """The weight with its delta, (I,) float32."""
        return self.weight + self.scale * (self.lora_b @ self.lora_a)[0]
