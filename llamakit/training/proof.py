"""The proof at the end of a fine-tuning run: what was written, put on the base again, is what was trained."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from llamakit.errors import LlamakitError
from llamakit.formats.adapter import Adapter, read_adapter
from llamakit.formats.base import ModelFile
from llamakit.model import Llama
from llamakit.model.lora import attach
from llamakit.training.distributed import Dist
from llamakit.training.loss import gathered
from llamakit.training.report import Verified

#: tokens that are compared
N_TOKENS = 64
# A product of the same numbers may be added up in another order, where a matrix is kept in another layout.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def tolerance(dtype: torch.dtype) -> float:
    """Largest difference of two logits, as a share of the largest of them, that the rounding of a dtype explains."""
    return _TOLERANCE[dtype]


def logits_of(model: Llama, tokens: Tensor) -> Tensor:
    """Logits (T, n_vocab) float32 of int64 tokens (T,), dropout off; the model's mode stays as it is."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            hidden = model(tokens[None])
            with gathered(model.output):
                return model.logits(hidden)[0]
    finally:
        model.train(training)


def prove(
    path: str | os.PathLike[str],
    base: ModelFile,
    load: Callable[[], Llama],
    tokens: Tensor,
    trained: Tensor,
    dtype: torch.dtype,
    dist: Dist,
) -> Verified:
    """Read the adapter at path, put it on a fresh base, and compare its logits of tokens (T,) with the trained ones.

    load: gives the base, without an adapter. trained: (T, n_vocab) float32. dist: the ranks that do this together, of
    which the first reads the file. Raises LlamakitError where the adapter changes nothing, or is not what was trained,
    and what `read_adapter` raises.
    """
    adapter = dist.from_main(lambda: read_adapter(path, base))
    if not _changes(adapter):
        hint = "no step had an effect: see --adam-alpha, and the steps that were skipped"
        raise LlamakitError("the adapter changes nothing: all of its products are 0", path=path, hint=hint)
    model = load()
    plain = logits_of(model, tokens)
    attach(model, adapter)
    found = logits_of(model, tokens)
    difference, most = float((found - trained).abs().max()), float(trained.abs().max())
    if not difference <= tolerance(dtype) * max(1.0, most):
        raise LlamakitError(
            f"what was written is not what was trained: max |dlogit| = {difference:g}, of logits up to {most:g}",
            path=path,
            hint="the checkpoint has the trained weights: --only-write-lora writes the adapter again",
        )
    return Verified(os.fspath(path), len(tokens), difference, float((found - plain).abs().max()))


def _changes(adapter: Adapter) -> bool:
    return any(a.any() and b.any() for a, b in adapter.tensors.values())
