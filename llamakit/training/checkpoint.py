"""Checkpoints on disk under the old tool's contract: numbered files, and -LATEST, each complete or absent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from llamakit.errors import FormatError, UsageError
from llamakit.files import (
    RunLock,
    check_writable,
    is_same_file,
    remove_directory,
    remove_stale_temporaries,
    replace_with_link,
)
from llamakit.formats.adapter import transposed_pair
from llamakit.formats.gguf import GGUFFile, TensorData, write_gguf
from llamakit.ggml import GGMLType
from llamakit.training.checkpoint_folder import FolderArrays, folder_files, is_checkpoint_folder, read_folder
from llamakit.training.config import LoopOptions
from llamakit.training.optim import own_rows, row_range
from llamakit.training.report import Saving
from llamakit.training.state import Progress, StoredArrays, TrainState

VERSION_KEY = "llamakit.checkpoint.version"
_VERSION = 1
_STATE_KEY, _HASH_KEY = "llamakit.checkpoint.state", "llamakit.checkpoint.sha256"


TrainingType = Literal["finetune_lora", "finetune_full", "train_model"]
"""What is trained: the words of llama.cpp's two tools, and one for all weights of a base."""


def file_name(template: str, config: LoopOptions, iteration: int | None) -> Path:
    """The template with the first occurrence of the pattern replaced by the iteration, or by LATEST (None)."""
    value = config.fn_latest if iteration is None else str(iteration)
    return Path(template.replace(config.pattern_fn_it, value, 1) if config.pattern_fn_it else template)


def claim_outputs(
    outputs: Sequence[Path], sources: Iterable[str | Path], kinds: str, folders: Mapping[Path, Collection[str]] = {}
) -> RunLock:
    """A lock on what a run will write, once it is known that it can be. kinds: what the outputs are, in words. folders:
    those that are folders, with the files in them.

    Raises UsageError for a name that stands for two of them, that cannot be written, or that is one of the sources.
    """
    twice = next((path for i, path in enumerate(outputs) if path in outputs[:i]), None)
    if twice is not None:
        raise UsageError(f"is named for two of {kinds}: one would replace the other", path=twice)
    named = [source for source in sources if source]
    for output in outputs:
        older = folder_files(output) or None  # a checkpoint of sharded training may go
        check_writable(output, folder=folders.get(output, older))
        if any(is_same_file(output, source) for source in named):
            raise UsageError("is an input of this run: it would be overwritten", path=output)
    return RunLock(outputs)


def write_checkpoint(path: Path, state: TrainState, training_type: TrainingType) -> None:
    """Write a state as GGUF: counters as JSON, arrays as F32 tensors, and a hash of both. Raises SaveError."""
    description = json.dumps(state.description(), sort_keys=True)
    arrays = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in state.arrays.items()}
    write_gguf(
        path,
        metadata={
            "general.architecture": "llama",
            "general.type": "checkpoint",
            "training.type": training_type,
            VERSION_KEY: _VERSION,
            _STATE_KEY: description,
            _HASH_KEY: _digest(description, arrays.items()),
        },
        tensors=[TensorData(name, array.shape, GGMLType.F32, array) for name, array in arrays.items()],
        verify=lambda file: _check(file, description),
    )


def _digest(description: str, arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    digest = hashlib.sha256(description.encode())
    for name, array in arrays:
        digest.update(f"{name}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _arrays(file: GGUFFile) -> Iterator[tuple[str, np.ndarray]]:
    """One after the other: a checkpoint may be larger than the memory that is left."""
    for name, info in file.tensors.items():
        if info.type != GGMLType.F32:
            raise FormatError(f"tensor {name} is {info.type.name} (expected F32)")
        yield name, file.read(name).view(np.float32).reshape(info.shape)


def _check_hash(file: GGUFFile, description: str, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    if file.metadata.get(_HASH_KEY) != _digest(description, arrays):
        raise FormatError("the checkpoint is damaged: its content does not match its checksum", path=file.path)


def _check(file: GGUFFile, description: str) -> None:
    _check_hash(file, description, _arrays(file))


@dataclass(frozen=True)
class OldCheckpoint:
    """What is taken from a checkpoint of llama.cpp's finetune: LoRA tensors, ranks by kind, and counters."""

    arrays: dict[str, np.ndarray]
    ranks: dict[str, int]
    progress: Progress


def read_checkpoint(
    path: Path, training_type: TrainingType = "finetune_lora", *, light: bool = False
) -> TrainState | OldCheckpoint:
    """Read our own checkpoint, checksums verified, or one of llama.cpp's `finetune`. light: arrays stay on the disk
    until they are asked for, as those of a folder always do. Raises FormatError."""
    if is_checkpoint_folder(path):
        return read_folder(path, training_type)
    with GGUFFile(path) as file:
        found = file.metadata.get("training.type")
        if found == training_type and VERSION_KEY in file.metadata:
            return _read_own(file, light=light)
        if found == training_type == "finetune_lora":
            return _read_old(file)
    raise FormatError(
        f"is no checkpoint of this kind of training (expected training.type {training_type!r}, got {found!r})",
        path=path,
        hint=f"see what it is with: llamakit inspect {path}",
    )


def checkpoint_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of a checkpoint on the disk."""
    return sum(os.path.getsize(Path(path, name)) for name in folder_files(path)) or os.path.getsize(path)


def open_arrays(path: Path) -> StoredArrays:
    """The arrays of a checkpoint of our own, which `read_checkpoint` has verified. Raises FormatError."""
    return FolderArrays(path) if is_checkpoint_folder(path) else FileArrays(path)


class FileArrays(StoredArrays):
    """The tensors of a checkpoint file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with GGUFFile(path) as file:
            self.shapes = {name: info.shape for name, info in file.tensors.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        with GGUFFile(self._path) as file:
            return file.read(name).view(np.float32).reshape(self.shapes[name])

    def fill(self, tensors: Mapping[str, Tensor], *, together: bool) -> None:
        """Read tensors in place, of DTensors the rows that this rank has. Raises FormatError."""
        with GGUFFile(self._path) as file:
            for name, tensor in tensors.items():
                own = own_rows(tensor)
                rows = file.read(name, *row_range(tensor))
                own.copy_(torch.from_numpy(rows.view(np.float32)).view_as(own))


def _read_own(file: GGUFFile, *, light: bool) -> TrainState:
    if file.metadata[VERSION_KEY] != _VERSION:
        raise FormatError(f"checkpoint version {file.metadata[VERSION_KEY]} (expected {_VERSION})", path=file.path)
    description = file.metadata.get(_STATE_KEY)
    if not isinstance(description, str):
        raise FormatError(f"{_STATE_KEY} is missing", path=file.path)
    arrays = FileArrays(file.path) if light else dict(_arrays(file))
    _check_hash(file, description, _arrays(file) if light else arrays.items())
    state = json.loads(description)
    progress = Progress(**state["progress"])
    return TrainState(state["identity"], state["settings"], state["place"], progress, arrays, state.get("job", {}))


def _read_old(file: GGUFFile) -> OldCheckpoint:
    """Layout: compat notes in docs/formats.md. Old A is (I, R), the transpose of today's; old B is (O, R)."""
    try:
        arrays = _arrays_of_old(file)
        for name in [n.removesuffix(".lora_a") for n in arrays if n.endswith(".lora_a")]:
            pair = transposed_pair(arrays[f"{name}.lora_a"], arrays[f"{name}.lora_b"])
            arrays[f"{name}.lora_a"], arrays[f"{name}.lora_b"] = pair
        metadata = file.metadata
        progress = Progress(
            iterations=int(metadata.get("training.iteration_count", 0)),
            samples=int(metadata.get("training.sample_count", 0)),
            tokens=int(metadata.get("training.token_count", 0)),
            epochs=int(metadata.get("training.epoch_count", 0)),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise FormatError(f"is a broken llama.cpp checkpoint: {error} is missing or wrong", path=file.path) from error
    prefix = "training.lora.rank."
    ranks = {key.removeprefix(prefix): int(metadata[key]) for key in metadata if key.startswith(prefix)}
    return OldCheckpoint(arrays, ranks, progress)


def _arrays_of_old(file: GGUFFile) -> dict[str, np.ndarray]:
    arrays = {}
    for name, info in file.tensors.items():
        if not name.endswith((".lora_a", ".lora_b")):
            continue
        if info.type != GGMLType.F32:
            raise FormatError(f"tensor {name} is {info.type.name} (expected F32)", path=file.path)
        # ggml drops trailing axes of one: a (1, R) matrix may be stored as (R,).
        array = file.read(name).view(np.float32)
        arrays[name] = array.reshape(info.shape if len(info.shape) == 2 else (1, -1))
    return arrays


@dataclass(frozen=True)
class Product:
    """What is saved beside the checkpoints. template: its name, with the pattern; write: puts it at a path. files: of a
    product that is a folder."""

    kind: Literal["adapter", "model"]
    template: str
    write: Callable[[Path, Mapping[str, np.ndarray]], None]
    files: tuple[str, ...] = ()


class CheckpointManager:
    """Writes checkpoint and product of an iteration, points -LATEST at them, and clears away old ones.

    clear: whether this process writes at all, and may clear away what a killed run has left.
    """

    def __init__(
        self, config: LoopOptions, training_type: TrainingType, product: Product, *, clear: bool = True
    ) -> None:
        self._config, self._product = config, product
        self._type: TrainingType = training_type
        self._templates = [t for t in (config.checkpoint_out, product.template) if t]
        for template in self._templates if clear else ():
            name = Path(template).name
            before, pattern, after = name.partition(config.pattern_fn_it) if config.pattern_fn_it else (name, "", "")
            numbered = rf"(\d+|{re.escape(config.fn_latest)})" if pattern else ""
            names = re.compile(re.escape(before) + numbered + re.escape(after))
            remove_stale_temporaries(Path(template).parent, names)

    def latest(self) -> tuple[str, ...]:
        """The names under which the newest files are found."""
        return tuple(str(file_name(t, self._config, None)) for t in self._templates)

    def save(self, state: TrainState, write: Callable[[Path], None] | None = None) -> Iterator[Saving]:
        """Write the files of state's iteration, each reported before it is written. write: puts the checkpoint at a
        path, where it is no single file. Raises SaveError."""
        state.progress.saved = sorted({*state.progress.saved, state.progress.iterations})
        template, progress = self._config.checkpoint_out, state.progress
        as_file = lambda path: write_checkpoint(path, state, self._type)  # noqa: E731
        yield from self._write("checkpoint", template, progress, write or as_file)
        yield from self.save_product(state)
        self._clear_away(state.progress)

    def save_product(self, state: TrainState) -> Iterator[Saving]:
        """Write the adapter or model alone."""
        kind, template = self._product.kind, self._product.template
        yield from self._write(kind, template, state.progress, lambda path: self._product.write(path, state.arrays))

    def mark(self, progress: Progress, word: str) -> Iterator[Saving]:
        """Give the newest product another name, with `word` in place of the number: BEST."""
        template, pattern = self._product.template, self._config.pattern_fn_it
        if not template or not pattern or pattern not in Path(template).name:
            return
        numbered = file_name(template, self._config, progress.iterations)
        marked = Path(template.replace(pattern, word, 1))
        yield Saving(self._product.kind, str(marked))
        replace_with_link(numbered, marked)
        self._clear_away(progress)  # a folder that had this name may go now

    def _write(
        self,
        kind: Literal["checkpoint", "adapter", "model"],
        template: str,
        progress: Progress,
        write: Callable[[Path], None],
    ) -> Iterator[Saving]:
        if not template:
            return
        numbered = file_name(template, self._config, progress.iterations)
        latest = file_name(template, self._config, None)
        yield Saving(kind, str(numbered))
        write(numbered)
        if latest != numbered:
            yield Saving(kind, str(latest))
            replace_with_link(numbered, latest)

    def _clear_away(self, progress: Progress) -> None:
        """Keep the newest files of those that this run, or the runs that it goes on from, have written."""
        keep = self._config.keep_last
        if keep <= 0:
            return
        linked = []
        for iteration in progress.saved[:-keep]:
            for template in self._templates:
                path = file_name(template, self._config, iteration)
                if path in (
                    file_name(template, self._config, None),
                    file_name(template, self._config, progress.iterations),
                ):
                    continue
                with contextlib.suppress(OSError):
                    if not path.is_dir():
                        path.unlink(missing_ok=True)
                    elif _is_linked(path):
                        linked.append(iteration)
                    else:
                        remove_directory(path, folder_files(path) or self._product.files)
        progress.saved = linked + progress.saved[-keep:]


def _is_linked(folder: Path) -> bool:
    """Whether another name in the same directory leads to a folder: LATEST, BEST, or one of the user's."""
    return any(path.is_symlink() and is_same_file(path, folder) for path in folder.parent.iterdir())
