"""What the ranks of a run must have in common, and the state that they begin with, which rank 0 reads for all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llamakit.training.checkpoint import OldCheckpoint, TrainingType, file_name, read_checkpoint
from llamakit.training.config import LoopOptions
from llamakit.training.distributed import Dist
from llamakit.training.sharding import may_shard
from llamakit.training.state import TrainState, flag, shown

#: files may lie elsewhere on another machine: what they hold is compared by hash; threads are a machine's own matter
_OWN = (
    "checkpoint_in", "checkpoint_out", "lora_out", "model_out", "merge_out", "log_file", "out_dir", "model_base",
    "train_data", "val_data", "vocab_model", "init_from", "lora_init", "chat_template", "threads",
)  # fmt: skip


def check_commands(dist: Dist, config: LoopOptions) -> None:
    """Raises MismatchError, naming rank and option, where a rank was given another command."""
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    dist.check_same({flag(name): value for name, value in options.items() if name not in _OWN}, shown)


def check_content(dist: Dist, identity: Mapping[str, Any]) -> None:
    """Raises MismatchError, naming the rank, where its base, text or vocabulary is another one."""
    words = {"text": "the training text (sha256)", "base file": "the base model's file (fingerprint)",
             "base model": "the base model", "vocabulary": "the vocabulary (sha256)",
             "held-out data": "the held-out data (sha256)", "chat template": "the chat template (sha256)"}  # fmt: skip
    dist.check_same({words.get(key, key): value for key, value in identity.items()}, shown)


@dataclass(frozen=True)
class Start:
    """What a run goes on from. state: None for a fresh start; of ranks but 0 without arrays. own: this very run wrote
    it, before torch's launcher started the ranks anew."""

    state: TrainState | OldCheckpoint | None
    own: bool = False


def find_start(
    dist: Dist, config: LoopOptions, kind: TrainingType, read: Callable[[], TrainState | OldCheckpoint | None]
) -> Start:
    """The run's own newest checkpoint where its ranks were started anew, else what `read` gives; rank 0 reads.

    Raises what `read` and `read_checkpoint` raise, on rank 0.
    """

    def look() -> Start:
        own = _own_checkpoint(dist, config, kind)
        return Start(read()) if own is None else Start(own, own=True)

    return dist.from_main(look, _light)


def _light(start: Start) -> Start:
    return Start(None if start.state is None else dataclasses.replace(start.state, arrays={}), start.own)


def own_name(config: LoopOptions) -> str:
    """Under which name the newest of a run's own checkpoints is found."""
    return str(file_name(config.checkpoint_out, config, None))


def _own_checkpoint(dist: Dist, config: LoopOptions, kind: TrainingType) -> TrainState | None:
    if not (dist.restarts and dist.job and config.checkpoint_out):
        return None
    path = file_name(config.checkpoint_out, config, None)
    state = read_checkpoint(path, kind, light=may_shard(dist, config)) if path.exists() else None
    return state if isinstance(state, TrainState) and state.job.get("name") == dist.job else None


def origin(dist: Dist, start: Start) -> dict[str, Any]:
    """What a run's checkpoints say about it: the launcher's name for it, and the iterations and epochs that it began
    with, which stay when its ranks are started anew."""
    state = start.state
    if start.own and isinstance(state, TrainState):
        return state.job
    begun = (state.progress.iterations, state.progress.epochs) if state else (0, 0)
    return {"name": dist.job, "first": begun[0], "epochs": begun[1]}
