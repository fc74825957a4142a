"""Fine-tuning all weights of a base: what the model is, how it is written, and the proof of it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamakit.conversion.outtype import uniform_type
from llamakit.errors import LlamakitError
from llamakit.formats.base import ModelFile
from llamakit.formats.borrowed import with_metadata
from llamakit.formats.open import open_model
from llamakit.ggml import GGMLType
from llamakit.model import ModelConfig, load_config, load_model
from llamakit.model.layers import Dropout
from llamakit.quant import dequantize
from llamakit.training.blueprint import ROPE_FREQS, build, from_file, rounded, write_model
from llamakit.training.checkpoint import Product
from llamakit.training.config import Cache, FinetuneConfig
from llamakit.training.distributed import Dist
from llamakit.training.optim import is_sharded, own_rows, row_range
from llamakit.training.plan import disk_bytes
from llamakit.training.proof import logits_of, tolerance
from llamakit.training.report import Remark, Report, Verified
from llamakit.training.sharded_model import build_sharded
from llamakit.training.sharding import load_sharded
from llamakit.training.subject import Built

# Full fine-tunings use 1e-6 to 1e-4; finetune's default is one for LoRA, whose weights begin at 0.
_MUCH_ALPHA = 3e-4


class FullSubject:
    """A `Subject`: every weight of the base, decoded to float32."""

    def __init__(self, config: FinetuneConfig, base: ModelFile, shape: ModelConfig) -> None:
        """shape: of the base, with what the command line changes, which is written into the model."""
        self._config, self._base = config, base
        self._blueprint = from_file(with_metadata(base, _restated(config, shape)), {})
        self.ranks: Mapping[str, int] = {}
        self.alpha = 0.0
        self.identity: dict[str, Any] = {}
        self.product = Product("model", config.model_out, self._write)
        self._dtype = torch.float32

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """All tensors of the base but the table of rotary factors."""
        return {name: tuple(shape) for name, shape in self._blueprint.names.items() if name != ROPE_FREQS}

    def remarks(self) -> Iterator[Remark]:
        """What often goes wrong where all weights are trained: steps that are too large, and a disk that is full."""
        config = self._config
        if config.only_write:
            return
        if config.adam_alpha > _MUCH_ALPHA:
            yield Remark("warning", f"--adam-alpha {config.adam_alpha:g} is much for all weights of a trained model:"
                         " --adam-alpha 2e-5 is usual")  # fmt: skip
        n_weights = sum(math.prod(shape) for shape in self.shapes().values())
        needed = sum(disk_bytes(config, n_weights, config.adam_iter).values())
        free = shutil.disk_usage(Path(config.checkpoint_out or config.model_out).parent).free
        if needed > free:
            yield Remark("warning", f"the saves of this run take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are"
                         " free: a larger --save-every or --keep-last 2 needs less")  # fmt: skip

    def build(
        self, seed: int, device: torch.device, dtype: torch.dtype, *, dropout: Dropout, weight_cache: Cache, dist: Dist
    ) -> Built:
        """The base with a trained leaf in the place of each packed one; nothing in it is dropped or drawn."""
        self._dtype = dtype
        if dist.sharded:
            return build_sharded(self._blueprint, device, dtype, dist)
        return build(self._blueprint, device, dtype)

    def _write(self, path: Path, arrays: Mapping[str, np.ndarray]) -> None:
        write_model(path, arrays, self._blueprint, self._config.outtype)

    def prove(
        self, path: Path, tokens: Tensor, logits: Tensor, named: Mapping[str, Tensor], dist: Dist
    ) -> Iterator[Report]:
        """Every tensor of the file is the trained one, rounded to its type; and so are the logits of the whole."""
        device = next(iter(named.values())).device
        where: dict[str, Any] = {"device": device, "dtype": self._dtype}
        load = (
            partial(load_sharded, dist=dist, **where)
            if dist.sharded
            else partial(load_model, weight_cache="none", **where)
        )
        with open_model(path) as written:
            change = self._compare(written, named, dist)
            found = logits_of(load(written, config=load_config(written)), tokens)
        plain = logits_of(load(self._base, config=self._blueprint.shape), tokens)
        difference, most = float((found - logits).abs().max()), float(logits.abs().max())
        stored = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[self._config.outtype]
        if not difference <= max(tolerance(self._dtype), tolerance(stored)) * max(1.0, most):
            raise LlamakitError(
                f"what was written is not what was trained: max |dlogit| = {difference:g}, of logits up to {most:g}",
                path=path,
                hint="the checkpoint has the trained weights: --only-write-model writes the model again",
            )
        yield Verified(str(path), len(tokens), difference, float((found - plain).abs().max()), change)

    def _compare(self, written: ModelFile, named: Mapping[str, Tensor], dist: Dist) -> float:
        """|W - W0| / |W0| over all weights of the file, of which each rank looks at its rows. Raises LlamakitError for
        a tensor that is not the trained one, and where nothing was changed."""
        changed, moved, power = False, 0.0, 0.0
        wanted = GGMLType[self._config.outtype.upper()]
        for name, weights in named.items():
            info = written.tensors[name]
            kind = uniform_type(info, wanted)
            rows, live = row_range(weights), own_rows(weights).cpu()
            if not (dist.is_main or is_sharded(weights)) or not live.numel():
                continue  # another rank looks at it
            packed = torch.from_numpy(written.read(name, *rows))
            expected = live if kind is GGMLType.F32 else rounded(live, kind, name)
            if not torch.equal(packed.flatten(), expected.contiguous().view(torch.uint8).flatten()):
                raise LlamakitError(f"tensor {name} reads back with other weights than were trained", path=written.path)
            first = self._blueprint.first(name, *rows)
            changed = changed or not torch.equal(first, live)
            moved += float((dequantize(packed, kind).view(first.shape) - first).square().sum(dtype=torch.float64))
            power += float(first.square().sum(dtype=torch.float64))
        changed, moved, power = dist.sum([changed, moved, power])
        if not changed:
            hint = "no step had an effect: see --adam-alpha, and the steps that were skipped"
            raise LlamakitError("the model is its base: no weight was changed", path=written.path, hint=hint)
        if not moved:
            hint = "--outtype f32 keeps them; a larger --adam-alpha makes larger ones"
            reason = f"the model is its base: the changes are too small for {self._config.outtype}"
            raise LlamakitError(reason, path=written.path, hint=hint)
        return math.sqrt(moved / power) if power else math.inf

    def finish(self, path: Path) -> Iterator[Report]:
        """The model is what was asked for."""
        yield from ()


def _restated(config: FinetuneConfig, shape: ModelConfig) -> dict[str, Any]:
    """The keys of what the command line changes: the model is trained, and will be used, with them."""
    keys: dict[str, Any] = {}
    if config.norm_rms_eps is not None:
        keys["llama.attention.layer_norm_rms_epsilon"] = shape.rms_eps
    if config.rope_freq_base is not None:
        keys["llama.rope.freq_base"] = shape.rope_base
    if config.rope_freq_scale is not None:
        keys |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": shape.rope_scaling.factor}
        keys["llama.context_length"] = max(config.ctx, shape.n_ctx)
    return keys
