"""How much memory a training run takes, from the shape of the model and the options alone.

The counts of numbers follow from what the code keeps; how much room the heap needs for them is measured (see the
constants). Shapes: C n_embd, F n_ff, H n_head, K n_head_kv, D head_dim, T ctx, V n_vocab, N tokens at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Literal

from llamakit.formats.base import TensorInfo
from llamakit.ggml import GGMLType
from llamakit.model import ModelConfig
from llamakit.model.layers import SLAB_WEIGHTS
from llamakit.model.load import CACHE_SHARE
from llamakit.training.loss import CHUNK_LOGITS_TRAINED, CHUNK_TOKENS

#: how decoded weights are kept: in two layouts, in one, or not at all
Kept = Literal["twice", "once", "none"]

#: a weight, its gradient and two moments, float32 each
BYTES_PER_TRAINED = 16
# The vectors of the optimizer are made while the tensors that they replace are there, whose room is too scattered to be
# used again.
_BYTES_BEFORE_TRAINED = 4
# The heap, measured on SmolLM2-135M at 4 x 64, 4 x 512 (with checkpointing and without) and 1 x 2,048 tokens: what the
# backward pass needs takes 1.19 times its size, holes between tensors of many sizes; what comes and goes within a block
# takes 16 (F + C) numbers a token in training, and 8 without gradients.
_KEPT_SHARE = 1.19
_PASSING, _PASSING_FORWARD = 16, 8
# A chunk's logits find the place of those before them taken by something small: so many places are used in the end.
_LOGITS_PLACES = 2
# Buffers of the matrix products and stacks of threads, from the first product on.
_LIBRARIES = 16 << 20
_EVALUATED_TOKENS = 2048

_DENSE_TYPES = {2: (GGMLType.BF16,), 4: (GGMLType.F32,)}


@dataclass(frozen=True)
class Memory:
    """Bytes of a process, or of a device, at its peak, by what they are for.

    interpreter: Python, torch and the data; base: the packed weights; cache: decoded weights, or the buffer that they
    are decoded into; trained: trained weights, gradients, moments; activations; logits: of the chunks of the loss.
    """

    interpreter: int
    base: int
    cache: int
    trained: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Bytes by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What of a run decides over its memory.

    tensors: of the base, by name; trained: numbers that are trained; full: these are all of the weights. rows: that are
    computed at a time, of ctx tokens each. item: bytes of a number that is computed with. held_out: tokens that are
    evaluated. native: attention keeps its softmax up to 1,024 tokens, as it does on a CPU. n_shares: ranks that hold
    their rows of the weights each, and gather a block at a time. anchored: the base's logits are computed, too.
    """

    shape: ModelConfig
    tensors: Mapping[str, TensorInfo]
    trained: int
    full: bool
    rows: int
    ctx: int
    checkpointing: bool
    kept: Kept
    item: int
    held_out: int = 0
    native: bool = True
    n_shares: int = 1
    anchored: bool = False


def kept_numbers(config: ModelConfig, ctx: int, *, native: bool = True) -> int:
    """Numbers that the backward pass needs of the forward pass, per token and block.

    The inputs of two norms (2C), queries and the mixed values (2HD), keys and values (2KD), gate and up (2F), the
    softmax up to 1,024 tokens (HT, of which tiles leave out half).
    """
    heads, kv = config.n_head * config.head_dim, config.n_head_kv * config.head_dim
    softmax = config.n_head * min(ctx, (ctx + 128) // 2) if native and ctx <= 1024 else 0
    return 2 * config.n_embd + 2 * heads + 2 * kv + 2 * config.n_ff + softmax


def activation_bytes(run: Footprint) -> int:
    """Most bytes that activations take at a time; with checkpointing every block's input and one block."""
    shape, block = run.shape, kept_numbers(run.shape, run.ctx, native=run.native)
    kept = shape.n_embd * shape.n_layer + block if run.checkpointing else block * shape.n_layer
    width = shape.n_ff + shape.n_embd
    training = (_KEPT_SHARE * kept + _PASSING * width) * run.rows * run.ctx
    per_evaluation = min(max(1, _EVALUATED_TOKENS // run.ctx) * run.ctx, run.held_out)
    evaluation = _PASSING_FORWARD * width * per_evaluation
    return int(max(training, evaluation) * run.item)


def logits_bytes(run: Footprint) -> int:
    """Bytes of the logits of a chunk, wherever they lie."""
    n_vocab = run.shape.n_vocab
    most = max(CHUNK_TOKENS, CHUNK_LOGITS_TRAINED // n_vocab) if run.full else CHUNK_TOKENS
    return min(most, max(run.rows * run.ctx, run.held_out)) * n_vocab * run.item * (_LOGITS_PLACES + run.anchored)


def matrices(shape: ModelConfig, tensors: Mapping[str, TensorInfo]) -> Iterator[TensorInfo]:
    """The matrices that take part in products; token_embd does where the output matrix is tied to it."""
    for name, sizes in shape.tensor_shapes().items():
        if len(sizes) == 2 and (name != "token_embd.weight" or shape.tied_output):
            yield tensors[name]


def kept_by(weight_cache: str, sizes: Mapping[Kept, int], free: int | None, *, twice: bool) -> Kept:
    """What --weight-cache makes of a model, as `load_model` does.

    sizes: bytes of each way of keeping it; free: bytes of memory, None where unknown; twice: whether this machine keeps
    two layouts.
    """
    room = float("inf") if free is None else CACHE_SHARE * free
    if weight_cache == "none":
        return "none"
    if weight_cache == "auto" and twice and sizes["twice"] <= room:
        return "twice"
    return "once" if weight_cache == "bf16" or sizes["once"] <= room else "none"


def cache_sizes(shape: ModelConfig, tensors: Mapping[str, TensorInfo], item: int) -> dict[Kept, int]:
    """Bytes that decoded weights take beside the packed ones, by how they are kept; "none": of the buffer for one."""
    found = list(matrices(shape, tensors))
    packed = [m.n_elements * item for m in found if m.type not in _DENSE_TYPES[item]]
    buffer = min(max(packed, default=0), SLAB_WEIGHTS * item)
    return {"twice": 2 * item * sum(m.n_elements for m in found), "once": sum(packed), "none": buffer}


def base_bytes(run: Footprint) -> int:
    """Packed weights: all of them, or a rank's rows and the largest group that is gathered, a block or a table."""
    whole = sum(info.n_bytes for info in run.tensors.values())
    if run.n_shares == 1:
        return whole
    return whole // run.n_shares + _largest_group({name: info.n_bytes for name, info in run.tensors.items()})


def _largest_group(sizes: Mapping[str, int]) -> int:
    """Of a block, or of a table of the vocabulary."""
    groups = Counter[str]()
    for name, size in sizes.items():
        groups[name.rsplit(".", 2)[0] if name.startswith("blk.") else name] += size
    return max(groups.values())


def gradient_bytes(item: int) -> int:
    """Bytes of a number of a gathered matrix that are there before its gradient is scattered: of the gradient in the
    dtype of the computation, its sum in float32, and the copy in the order of the ranks."""
    return (item if item < 4 else 0) + 4 + 4


def trained_bytes(run: Footprint) -> int:
    """Weights that are trained, their gradients and moments: all of them, or a rank's rows and the largest group, which
    is gathered, with its gradient."""
    if run.full and run.n_shares > 1:
        group = _largest_group({name: info.n_elements for name, info in run.tensors.items()})
        gathered = group * (run.item + gradient_bytes(run.item))
        return run.trained // run.n_shares * BYTES_PER_TRAINED + gathered
    rounded = run.item if run.full and run.item < 4 else 0
    return run.trained * (BYTES_PER_TRAINED + _BYTES_BEFORE_TRAINED + rounded)


def memory_of(run: Footprint, interpreter: int) -> Memory:
    """The peak of a process that holds `interpreter` bytes before it loads the model."""
    cache = 0 if run.full else cache_sizes(run.shape, run.tensors, run.item)[run.kept]
    return Memory(
        interpreter=interpreter + _LIBRARIES,
        base=0 if run.full else base_bytes(run),
        cache=cache,
        trained=trained_bytes(run),
        activations=activation_bytes(run),
        logits=logits_bytes(run),
    )
