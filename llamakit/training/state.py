"""Everything that a resume needs, and whether a resume is allowed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamakit.errors import MismatchError
from llamakit.training.config import FinetuneConfig, LoopOptions
from llamakit.training.optim import above_floor
from llamakit.training.report import Remark


@dataclass
class Progress:
    """Counters and positions. updates: optimizer steps that had an effect; next_sample, order_epoch: data cursor."""

    iterations: int = 0
    updates: int = 0
    samples: int = 0
    tokens: int = 0
    epochs: int = 0
    order_epoch: int = 0
    next_sample: int = 0
    previous_loss: float | None = None
    best_loss: float | None = None
    no_improvement: int = 0
    past_losses: list[float] = field(default_factory=list)
    best_evaluation: float | None = None
    evaluations_without_best: int = 0
    saved: list[int] = field(default_factory=list)


class StoredArrays(Mapping[str, np.ndarray]):
    """Arrays on the disk, float32, by name; each is read anew when it is asked for. shapes: of all of them, of which
    none is read for it."""

    shapes: Mapping[str, tuple[int, ...]]

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    @abstractmethod
    def fill(self, tensors: Mapping[str, Tensor], *, together: bool) -> None:
        """Read tensors in place, of DTensors this rank's rows. together: all ranks do this."""
        ...


@dataclass
class TrainState:
    """identity: what must be the same; settings: what the command line may change; place: where it was computed.

    arrays: every trained tensor, float32, by name; behind `.m` and `.v` Adam's two moments of it, where they are known.
    job: of a run that torch's launcher may start anew: its name (empty: there is no launcher), and where it began.
    """

    identity: dict[str, Any]
    settings: dict[str, Any]
    place: dict[str, Any]
    progress: Progress
    arrays: Mapping[str, np.ndarray]
    job: dict[str, Any] = field(default_factory=dict)

    def description(self) -> dict[str, Any]:
        """All but the arrays, as plain JSON values."""
        return {
            "identity": self.identity,
            "settings": self.settings,
            "place": self.place,
            "progress": asdict(self.progress),
        } | ({"job": self.job} if self.job.get("name") else {})


MOMENT_SUFFIXES = (".m", ".v")

SAMPLE_FLAGS = (
    "sample_start",
    "include_sample_start",
    "escape",
    "overlapping_samples",
    "fill_with_next_samples",
    "separate_with_eos",
    "separate_with_bos",
    "sample_random_offsets",
)
_SETTINGS = (
    "adam_alpha",
    "adam_min_alpha",
    "adam_beta1",
    "adam_beta2",
    "adam_decay",
    "adam_decay_min_ndim",
    "adam_gclip",
    "warmup",
    "cos_decay_steps",
    "cos_decay_restart",
    "cos_decay_min",
    "enable_restart",
    "batch",
    "grad_acc",
    "lora_dropout",
    "anchor_weight",
    "anchor_batch",
)
_MODEL_FLAGS = ("norm_rms_eps", "rope_freq_base", "rope_freq_scale")


#: fields of a model's shape -> what decides about them
_SHAPE_FLAGS = {
    "n_vocab": "the size of the vocabulary",
    "n_embd": "--embd",
    "n_layer": "--layer",
    "n_head": "--head",
    "n_head_kv": "--head-kv",
    "n_ff": "--ff",
    "rms_eps": "--norm-rms-eps",
    "rope_base": "--rope-freq-base",
    "tied_output": "--tie",
}


def check_shapes(
    saved: Mapping[str, np.ndarray] | StoredArrays, expected: Mapping[str, tuple[int, ...]], path: str
) -> None:
    """Raises MismatchError, naming the tensor and both shapes, unless a checkpoint's tensors are those of this run."""
    shapes = saved.shapes if isinstance(saved, StoredArrays) else {name: x.shape for name, x in saved.items()}
    names = [name for name in shapes if not name.endswith(MOMENT_SUFFIXES)]
    if set(names) != expected.keys():
        different = sorted(set(names) ^ expected.keys())
        raise MismatchError(f"checkpoint and run train different tensors: {', '.join(different[:3])}", path=path)
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise MismatchError(
                f"{name} has shape {list(shapes[name])} in the checkpoint, and {list(shape)} in this run",
                path=path,
            )


def flag(name: str) -> str:
    """The option of a config field."""
    return "--" + name.replace("_", "-")


def make_identity(config: FinetuneConfig, *, seed: int, base_model: str, base_file: str, text: str) -> dict[str, Any]:
    """What a checkpoint and a run must agree on: base, text, and how the text is cut and ordered."""
    identity: dict[str, Any] = {
        "base model": base_model,
        "base file": base_file,
        "text": text,
        "--seed": seed,
        "--ctx": config.ctx,
        "--val-split": config.val_split,
    }
    return identity | {flag(name): getattr(config, name) for name in (*SAMPLE_FLAGS, *_MODEL_FLAGS)}


def make_settings(config: FinetuneConfig, dtype: str) -> dict[str, Any]:
    """What a resume takes from the command line, and says so."""
    return {flag(name): getattr(config, name) for name in _SETTINGS} | {"--dtype": dtype}


_RESTART_HINT = "give --restart-data to go on with the new text from its beginning"


def check_identity(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    path: str,
    restart_data: bool = False,
    text_hint: str = _RESTART_HINT,
) -> None:
    """Refuse to go on from a checkpoint of another run. Raises MismatchError naming both values.

    A value that is a dict is compared key by key. text_hint: what to do about another text.
    """
    saved, now = _flat(saved), _flat(now)
    for key, value in now.items():
        if key not in saved or saved[key] == value or (key == "text" and restart_data):
            continue
        hints = {
            "text": text_hint,
            "base file": "use the very file that the checkpoint was trained on",
        }
        what = {
            "text": "the training text (sha256)",
            "vocabulary": "the vocabulary (sha256)",
            "chat template": "the chat template (sha256)",
            "held-out data": "the held-out data (sha256)",
            "base file": "the base model's file (fingerprint)",
        }
        raise MismatchError(
            f"{what.get(key, key)} is {shown(saved[key])} in the checkpoint, and {shown(value)} in this run",
            path=path,
            hint=hints.get(key, "give the checkpoint's value, or another --checkpoint-in to start afresh"),
        )


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in identity.items():
        parts: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {}
        flat |= {_SHAPE_FLAGS.get(name, name): part for name, part in parts.items()} if parts else {key: value}
    return flat


def changed_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`--flag NEW (was OLD)` for every setting that the command line changes."""
    return [
        f"{key} {shown(value)} (was {shown(saved[key])})"
        for key, value in now.items()
        if key in saved and saved[key] != value
    ]


def place(device: torch.device, n_ranks: int = 1) -> dict[str, Any]:
    """Where a run computes, on which its last bits depend."""
    here = {"device": device.type, "threads": torch.get_num_threads(), "torch": torch.__version__}
    return here | ({"ranks": n_ranks} if n_ranks > 1 else {})


def resume_remarks(saved: TrainState, settings: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[Remark]:
    """What a resume changes: the settings of the command line, and the place where it computes."""
    changed = changed_settings(saved.settings, settings)
    if changed:
        yield Remark("warning", f"the command line changes the checkpoint's settings: {', '.join(changed)}")
    before, now = {"ranks": 1, **saved.place}, {"ranks": 1, **here}
    moved = [f"{k} {v} (was {before.get(k, 'unknown')})" for k, v in now.items() if before.get(k) != v]
    if moved:
        yield Remark("note", f"{', '.join(moved)}: results are no longer exact to the last bit")


def warmup_remarks(config: LoopOptions, last: int) -> Iterator[Remark]:
    """A warning where a run ends, at iteration `last`, before its learning rate has risen."""
    if last < config.warmup:
        peak = above_floor(last / config.warmup, config) * config.adam_alpha if last else 0.0
        yield Remark("warning", f"--warmup {config.warmup} is longer than the run, which ends at iteration {last}: the"
                     f" learning rate will reach {peak:.3g}, not {config.adam_alpha:g}")  # fmt: skip


def shown(value: Any) -> str:
    """A fact's value in words; hashes are cut."""
    if isinstance(value, str) and len(value) == 64:
        return value[:16]
    if value is None:
        return "not given"
    return repr(value) if isinstance(value, str) else str(value)
