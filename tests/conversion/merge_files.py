"""A base and two adapters whose bytes follow from formulas alone, for results that are compared by their hash."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np

from llamakit.formats.adapter import Adapter, write_adapter
from llamakit.formats.floats import from_float32
from llamakit.formats.gguf import TensorData, write_gguf
from llamakit.formats.open import open_model
from llamakit.ggml import GGMLType

#: not in the order of their names, and with a layer 10 that comes before layer 2 there
SHAPES = {
    "token_embd.weight": (40, 64),
    "blk.0.attn_norm.weight": (64,),
    "blk.0.attn_q.weight": (64, 64),
    "blk.2.attn_k.weight": (32, 64),
    "blk.10.ffn_down.weight": (64, 96),
    "output_norm.weight": (64,),
    "output.weight": (40, 64),
}
UNTOUCHED = {"output_norm.weight", "output.weight"}


def numbers(*shape: int, seed: int) -> np.ndarray:
    """float32 in [-1, 1), well mixed: the same on every machine and with every version of numpy."""
    x = np.arange(prod(shape), dtype=np.uint64) + np.uint64(seed << 32)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x >> np.uint64(40)).astype(np.float32) / 2**23 - 1).reshape(shape)


def write_base(path: Path, kind: GGMLType = GGMLType.F32) -> Path:
    """Matrices in F32, F16 or BF16, vectors in F32."""
    tensors = []
    for seed, (name, shape) in enumerate(SHAPES.items()):
        stored = kind if len(shape) > 1 else GGMLType.F32
        rows = from_float32(numbers(*shape, seed=seed).reshape(-1, shape[-1]), stored)
        tensors.append(TensorData(name, shape, stored, rows))
    metadata = {
        "general.architecture": "llama",
        "general.file_type": 0,
        "llama.block_count": 11,
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(40)],
    }
    write_gguf(path, metadata=metadata, tensors=tensors)
    return path


def write_lora(path: Path, base: Path, rank: int, *, alpha: float = 7.0, seed: int = 100, size: float = 0.125) -> Path:
    """A pair of this rank (1 for the norm) for every tensor that is not in UNTOUCHED."""
    pairs = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        if name not in UNTOUCHED:
            n_out, r = (shape[0], rank) if len(shape) > 1 else (1, 1)
            a, b = numbers(r, shape[-1], seed=seed + 2 * i), numbers(n_out, r, seed=seed + 2 * i + 1)
            pairs[name] = (a * np.float32(size), b)
    with open_model(base) as file:
        write_adapter(path, Adapter(alpha, pairs), file)
    return path
