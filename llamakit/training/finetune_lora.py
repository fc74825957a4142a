"""Fine-tuning an adapter: which pairs are trained on the frozen base, how they are written, proven and merged."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamakit.conversion.merge import MergePlan, merge
from llamakit.conversion.merge_config import MergeConfig
from llamakit.errors import MismatchError, UsageError
from llamakit.formats.adapter import write_adapter, write_adapter_folder
from llamakit.formats.base import ModelFile
from llamakit.formats.peft import FILES as PEFT_FILES
from llamakit.model import Llama, ModelConfig, load_model
from llamakit.model.device import dtype_name
from llamakit.model.layers import Dropout
from llamakit.training.checkpoint import OldCheckpoint, Product
from llamakit.training.config import Cache, FinetuneConfig
from llamakit.training.distributed import Dist
from llamakit.training.lora import as_adapter, attach_trainable, named_pairs, rank_field
from llamakit.training.lora_plan import plan_lora
from llamakit.training.proof import prove
from llamakit.training.report import Remark, Report, Saving
from llamakit.training.sharding import load_sharded
from llamakit.training.state import TrainState
from llamakit.training.subject import Built

_NOT_IN_ADAPTER_USE = ("attn_norm", "ffn_norm", "output_norm")


class LoraSubject:
    """A `Subject`: LoRA pairs on the packed weights of a base, which stay as they are."""

    def __init__(
        self, config: FinetuneConfig, base: ModelFile, shape: ModelConfig, saved: TrainState | OldCheckpoint | None
    ) -> None:
        """shape: of the base, with what the command line changes. saved: the checkpoint to go on from.

        Raises UsageError and MismatchError for ranks and patterns that cannot be, and what reading --lora-init raises.
        """
        self._config, self._base, self._shape, self._saved = config, base, shape, saved
        self._plan = plan_lora(config, shape, base, _ranks(config, shape, saved))
        self.ranks, self.alpha = self._plan.kinds, self._plan.alpha
        files = PEFT_FILES if config.lora_format == "peft" else ()
        self.product = Product("adapter", config.lora_out, self._write, files)
        norms = [kind for kind in _NOT_IN_ADAPTER_USE if self.ranks[kind]]
        if norms and config.lora_format == "peft":
            raise UsageError(f"--lora-format peft has no pairs for norms: {', '.join(norms)} cannot be trained")
        self._dtype = torch.float32

    @property
    def identity(self) -> dict[str, Any]:
        """Ranks and scale."""
        ranks = {f"rank of {kind}": rank for kind, rank in self.ranks.items()}
        return ranks | {"--lora-alpha": self.alpha, "--rslora": self._config.rslora}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Both halves of every pair."""
        start = {name: (w.a, w.b) for name, w in self._plan.initial(self._shape, 0).items()}
        return {name: x.shape for name, x in named_pairs(start).items()}

    def remarks(self) -> Iterator[Remark]:
        """What llama.cpp makes of such an adapter, and what is taken from the old tool's checkpoint."""
        yield from (Remark("warning", text) for text in self._plan.remarks)
        if isinstance(self._saved, OldCheckpoint):
            path = self._config.checkpoint_in
            yield Remark("note", f"{path} is a checkpoint of llama.cpp's finetune: its LoRA tensors and counters are"
                         " taken, its shuffle state and optimizer moments are not")  # fmt: skip
            if any(rank and self.alpha != rank for rank in self.ranks.values()):
                yield Remark("warning", "the old tool trained without the factor alpha / rank that was applied when"
                             f" its adapters were used; --lora-alpha {self.alpha:g} is part of it here")  # fmt: skip
        norms = [kind for kind in _NOT_IN_ADAPTER_USE if self.ranks[kind]]
        if norms:
            yield Remark("warning", f"llama.cpp ignores the trained changes of {', '.join(norms)}: an adapter without"
                         " them is what it runs; llamakit applies them")  # fmt: skip
        if self.ranks["token_embd"] and self._shape.tied_output:
            yield Remark("warning", "this model uses token_embd as its output matrix too: llama.cpp of 2026 ends with a"
                         " failed assertion on adapters that change it")  # fmt: skip

    def build(
        self, seed: int, device: torch.device, dtype: torch.dtype, *, dropout: Dropout, weight_cache: Cache, dist: Dist
    ) -> Built:
        """The base, packed, with a pair on every tensor that is trained."""
        self._dtype = dtype
        model = self._load(device, weight_cache, dist, for_training=True)
        start = self._plan.initial(self._shape, seed)
        pairs = attach_trainable(model, start, self.alpha, dropout, rslora=self._config.rslora)
        return model, named_pairs(pairs)

    def _load(self, device: torch.device, weight_cache: Cache, dist: Dist, *, for_training: bool = False) -> Llama:
        """The base, or this rank's share of it."""
        where: dict[str, Any] = {"device": device, "dtype": self._dtype, "config": self._shape}
        if dist.sharded:
            return load_sharded(self._base, dist=dist, **where)
        more: dict[str, Any] = {"for_training": for_training, "n_sharing": dist.local_world}
        return load_model(self._base, weight_cache=weight_cache, **where, **more)

    def _write(self, path: Path, arrays: Mapping[str, np.ndarray]) -> None:
        adapter = as_adapter(arrays, self.alpha, rslora=self._config.rslora)
        if self._config.lora_format == "gguf":
            write_adapter(path, adapter, self._base)
            return
        folder = self._config.model_base if os.path.isdir(self._config.model_base) else None
        write_adapter_folder(path, adapter, self._base, base_model=folder, replace=True)

    def prove(
        self, path: Path, tokens: Tensor, logits: Tensor, named: Mapping[str, Tensor], dist: Dist
    ) -> Iterator[Report]:
        """The adapter that was written, on a fresh base."""
        device = next(iter(named.values())).device
        load = partial(self._load, device, "none", dist)
        verified = prove(path, self._base, load, tokens, logits, self._dtype, dist)
        yield verified
        if not verified.change:
            yield Remark("warning", f"the adapter is so small that no logit changes in {dtype_name(self._dtype)}")

    def finish(self, path: Path) -> Iterator[Report]:
        """--merge-out: the adapter merged into the base."""
        config = self._config
        if not config.merge_out:
            return
        yield Saving("model", config.merge_out)
        for report in merge(MergeConfig(model=Path(config.model_base), lora=(path,), out=Path(config.merge_out))):
            if isinstance(report, MergePlan):
                yield from (Remark("warning", text) for text in report.warnings)


def _ranks(config: FinetuneConfig, shape: ModelConfig, saved: TrainState | OldCheckpoint | None) -> dict[str, int]:
    """Rank by kind; those of the old tool's checkpoint where the command line says nothing else."""
    ranks = config.rank_of()
    if isinstance(saved, OldCheckpoint):
        given = {k for k, v in vars(config).items() if k.startswith("rank_") and v is not None}
        ranks |= {k: r for k, r in saved.ranks.items() if k in ranks and rank_field(k) not in given}
        for kind, rank in saved.ranks.items():
            if ranks.get(kind) != rank:
                raise MismatchError(
                    f"rank of {kind} is {rank} in the checkpoint, and {ranks.get(kind)} in this run",
                    path=config.checkpoint_in,
                )
    if shape.tied_output:
        if config.rank_out:
            raise UsageError("--rank-out: this model has no output matrix of its own (it uses token_embd)")
        ranks["output"] = 0
    if not any(ranks.values()):
        raise UsageError("every rank is 0: there is nothing to train")
    return ranks
