"""Checkpoints of sharded training: a folder of torch.distributed.checkpoint, into which each rank writes what it holds.

Beside torch's files lies an index in JSON: the state of the run, where in the files every piece of a tensor is, and the
hash of each file. It is read instead of torch's own `.metadata`, which is a pickle. Any number of ranks reads any
folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llamakit.errors import FormatError, LlamakitError, SaveError
from llamakit.files import atomic_directory
from llamakit.formats.open import CHECKPOINT_INDEX
from llamakit.training.distributed import Dist
from llamakit.training.state import Progress, StoredArrays, TrainState

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import WriteItem

_INDEX, _VERSION = CHECKPOINT_INDEX, 1
_DATA = re.compile(r"__\d+_\d+\.distcp")
_KEYS = {"version", "type", "state", "tensors", "files", "sha256"}
_PIECE = {"offsets": list, "sizes": list, "file": str, "at": int, "bytes": int}


def is_checkpoint_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path leads to a folder that is a checkpoint."""
    return Path(path, _INDEX).is_file()


def folder_files(path: str | os.PathLike[str]) -> set[str]:
    """The files of a checkpoint folder that are there; nothing else in one may be replaced or removed."""
    if not is_checkpoint_folder(path):
        return set()
    return {name for name in os.listdir(path) if name in (_INDEX, ".metadata") or _DATA.fullmatch(name)}


# ---- writing ---------------------------------------------------------------------------------------------------------


def save_shares(folder: Path, tensors: Mapping[str, Tensor], dist: Dist) -> dict[str, Any]:
    """Write what this rank holds of tensors by name into a folder that all ranks see, together with them.

    tensors: DTensors of which each rank has rows, or whole ones, which one of them writes. Returns what the index says
    of tensors and files. Raises SaveError for what the disk refuses any rank.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter  # who has no shares does not wait for these
    from torch.distributed.checkpoint.state_dict_saver import save

    class Planner(DefaultSavePlanner):
        """Gives every tensor a storage of its own over the same memory: the writer would copy the others, and keep all
        copies until it ends."""

        def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
            data = super().resolve_data(write_item)
            return torch.from_numpy(data.numpy()) if isinstance(data, Tensor) and data.device.type == "cpu" else data

    with _failing_as(partial(_not_saved, folder)):
        how: dict[str, Any] = {"planner": Planner(), "no_dist": not dist.joined}
        metadata = save(dict(tensors), storage_writer=FileSystemWriter(folder), **how)
    # Each rank looks at what others have written: a disk that not all of them see is found here.
    names = sorted({stored.relative_path for stored in metadata.storage_data.values()})
    mine = names[(dist.rank + 1) % dist.world :: dist.world]
    seen = dist.gather({name: _hash(folder / name) if (folder / name).is_file() else None for name in mine})
    for rank, hashes in enumerate(seen):
        if None in hashes.values():
            raise _not_saved(folder, rank, "it does not see the files of other ranks")
    files = {name: value for hashes in seen for name, value in hashes.items()}
    return {"tensors": _described(metadata, tensors), "files": files}


def _described(metadata: Metadata, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The shape of each tensor, and where its pieces are, as torch has put them."""
    pieces: dict[str, list[dict[str, Any]]] = {name: [] for name in tensors}
    for index, stored in metadata.storage_data.items():
        chunks: Any = metadata.state_dict_metadata[index.fqn]
        size = next(chunk.sizes for chunk in chunks.chunks if index.offset in (None, chunk.offsets))
        piece = (list(index.offset or [0] * len(size)), list(size), stored.relative_path, stored.offset, stored.length)
        pieces[index.fqn].append(dict(zip(_PIECE, piece, strict=True)))
    return {name: {"shape": list(tensors[name].shape), "pieces": pieces[name]} for name in tensors}


@contextlib.contextmanager
def _failing_as(told: Callable[[int, str], LlamakitError]) -> Iterator[None]:
    """torch's exception for what failed on any rank, as one of ours. told: of a rank and a reason."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*single process", UserWarning)  # that is meant
            yield
    except CheckpointException as failed:
        rank, (error, _) = next(iter(failed.failures.items()))
        said = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())[:120]
        raise told(rank, said) from error


def _not_saved(folder: Path, rank: int, said: str) -> SaveError:
    hint = "every rank writes into it: it must be on a disk that all machines see, with room for the checkpoint"
    return SaveError(f"rank {rank} cannot save: {said}; what was there before is intact", path=folder.parent, hint=hint)


def _not_read(folder: Path, rank: int, said: str) -> FormatError:
    return FormatError(f"rank {rank} cannot read the checkpoint: {said}", path=folder)


def _hash(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def write_folder(path: Path, state: TrainState, kind: str, save: Callable[[Path], dict[str, Any]]) -> None:
    """Write a checkpoint folder, complete or not at all. save: has all ranks write into a folder, as `save_shares`
    does.

    Raises SaveError, and UsageError where something else has its name.
    """
    with atomic_directory(path, _verify, replacing=folder_files(path)) as temporary:
        index = {"version": _VERSION, "type": kind, "state": state.description()} | save(temporary)
        (temporary / _INDEX).write_text(json.dumps(index | {"sha256": _digest(index)}), encoding="utf-8")


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_folder(path: Path, kind: str) -> TrainState:
    """The state in a checkpoint folder, its files verified, its arrays read when they are asked for.

    Raises FormatError for one that is damaged, or of another kind of training.
    """
    index = _check_index(path)
    if index["type"] != kind:
        raise FormatError(
            f"is no checkpoint of this kind of training (expected {kind!r}, got {index['type']!r})", path=path
        )
    for name, expected in index["files"].items():
        if _hash(path / name) != expected:
            raise FormatError(f"the checkpoint is damaged: {name} does not match its checksum", path=path)
    state = index["state"]
    try:
        found = state["identity"], state["settings"], state["place"], Progress(**state["progress"])
    except (KeyError, TypeError) as error:
        raise FormatError(f"the checkpoint's state is broken: {error!r}", path=path) from error
    return TrainState(*found, FolderArrays(path), state.get("job", {}))


def _digest(index: Mapping[str, Any]) -> str:
    """Of all that an index says."""
    rest = {key: value for key, value in index.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _verify(path: Path) -> None:
    _check_index(path)


def _check_index(path: Path) -> dict[str, Any]:
    """The index of a folder, whose files are there. Raises FormatError."""
    try:
        index = json.loads((path / _INDEX).read_text(encoding="utf-8"))
        if index["version"] != _VERSION:
            raise FormatError(f"checkpoint version {index['version']} (expected {_VERSION})", path=path)
        files = {name: size for name, (size, _) in index["files"].items()}
        sound = index.keys() == _KEYS and index["sha256"] == _digest(index) and all(map(_DATA.fullmatch, files))
        sound = sound and all(_is_covered(tensor, files) for tensor in index["tensors"].values())
        whole = sound and all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"the checkpoint is damaged: its index says {error!r}", path=path) from error
    if not whole:
        raise FormatError("the checkpoint is damaged: its files are not those of its index", path=path)
    return index


def _is_covered(tensor: Mapping[str, Any], files: Mapping[str, int]) -> bool:
    """Whether the pieces of a tensor lie in the files, and make up all of it."""
    shape, n_numbers = tensor["shape"], 0
    for piece in tensor["pieces"]:
        if piece.keys() != _PIECE.keys() or not all(isinstance(piece[key], kind) for key, kind in _PIECE.items()):
            return False
        places = list(zip(piece["offsets"], piece["sizes"], shape, strict=True))
        inside = all(0 <= offset <= offset + size <= whole for offset, size, whole in places)
        if not inside or not 0 <= piece["at"] <= piece["at"] + piece["bytes"] <= files[piece["file"]]:
            return False
        n_numbers += math.prod(piece["sizes"])
    return n_numbers == math.prod(shape)


class FolderArrays(StoredArrays):
    """The tensors of a checkpoint folder."""

    def __init__(self, path: Path) -> None:
        self._path, self._tensors = path, _check_index(path)["tensors"]
        self.shapes = {name: tuple(tensor["shape"]) for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = torch.empty(self.shapes[name])
        self.fill({name: tensor}, together=False)
        return tensor.numpy()

    def fill(self, tensors: Mapping[str, Tensor], *, together: bool) -> None:
        """Read tensors in place, of DTensors this rank's rows. together: all ranks do this. Raises FormatError."""
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        described = _metadata(self._tensors)

        class Reader(FileSystemReader):
            """Knows from the index what torch would unpickle."""

            def read_metadata(self, *_: Any, **__: Any) -> Metadata:
                return described

        with _failing_as(partial(_not_read, self._path)):
            load(dict(tensors), storage_reader=Reader(self._path), no_dist=not together)


def _metadata(tensors: Mapping[str, Any]) -> Metadata:
    from torch.distributed.checkpoint import metadata as m
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    described, stored = {}, {}
    for name, tensor in tensors.items():
        chunks = [m.ChunkStorageMetadata(torch.Size(p["offsets"]), torch.Size(p["sizes"])) for p in tensor["pieces"]]
        properties = m.TensorProperties(dtype=torch.float32)
        described[name] = m.TensorStorageMetadata(properties, torch.Size(tensor["shape"]), chunks)
        for chunk, piece in zip(chunks, tensor["pieces"], strict=True):
            stored[m.MetadataIndex(name, chunk.offsets)] = _StorageInfo(piece["file"], piece["at"], piece["bytes"])
    return m.Metadata(described, storage_data=stored, storage_meta=m.StorageMeta())
