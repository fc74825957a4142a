"""Which tensors of a run get a LoRA pair, of which rank, with which scale and from which start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llamakit.formats.adapter import check_adapter, read_adapter, refuse_replaced
from llamakit.formats.base import ModelFile
from llamakit.model import ModelConfig
from llamakit.training.config import FinetuneConfig
from llamakit.training.lora import Weights, continued, initial_weights, kind_of, targeted, trained_tensors


@dataclass(frozen=True)
class LoraPlan:
    """kinds: rank by kind of tensor, the largest one of a kind, 0: not trained. names: by name, where kinds do not say
    it. alpha: of the scale. start: the pairs to begin with, None for LoRA's own. remarks: warnings about it."""

    kinds: Mapping[str, int]
    alpha: float
    names: Mapping[str, int]
    start: Mapping[str, Weights] | None = None
    remarks: tuple[str, ...] = ()

    def initial(self, shape: ModelConfig, seed: int) -> dict[str, Weights]:
        """The pairs before the first step, by tensor name."""
        return dict(self.start) if self.start is not None else initial_weights(shape, self.ranks, seed)

    @property
    def ranks(self) -> dict[str, int]:
        """Kinds and names together, for `trained_tensors`."""
        return {**self.kinds, **self.names}


def plan_lora(config: FinetuneConfig, shape: ModelConfig, base: ModelFile, kinds: dict[str, int]) -> LoraPlan:
    """What --rank-*, in kinds, --lora-targets and --lora-init make of a model.

    Raises UsageError for ranks and patterns that cannot be, and what reading and checking an adapter raises.
    """
    if config.lora_init:
        plan = _continued(config, shape, base, kinds)
    elif config.lora_targets:
        names = targeted(shape, kinds, config.targets(), config.lora_r)
        plan = LoraPlan(_largest(kinds, names), config.alpha, names)
    else:
        plan = LoraPlan(kinds, config.alpha, {})
    trained_tensors(shape, plan.ranks)
    return plan


def _continued(config: FinetuneConfig, shape: ModelConfig, base: ModelFile, kinds: dict[str, int]) -> LoraPlan:
    adapter = read_adapter(config.lora_init, base)
    refuse_replaced(adapter)
    remarks = check_adapter(adapter, base)
    alpha = float(config.lora_alpha or adapter.alpha or max(map(adapter.rank, adapter.tensors)))
    names = {name: adapter.rank(name) if name in adapter.tensors else 0 for name in shape.tensor_shapes()}
    start = {name: pair for name, pair in continued(adapter, alpha, rslora=config.rslora).items() if name in names}
    ordered = {name: start[name] for name in names if name in start}
    return LoraPlan(_largest(kinds, names), alpha, names, ordered, tuple(remarks))


def _largest(kinds: Mapping[str, int], names: Mapping[str, int]) -> dict[str, int]:
    found = dict.fromkeys(kinds, 0)
    for name, rank in names.items():
        found[kind_of(name)] = max(rank, found[kind_of(name)])
    return found
