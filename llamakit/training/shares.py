"""What ranks hold of the trained tensors: saved together, and read back by each, on any number of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llamakit.training.checkpoint import CheckpointManager, OldCheckpoint, TrainingType, open_arrays
from llamakit.training.checkpoint_folder import save_shares, write_folder
from llamakit.training.distributed import Dist
from llamakit.training.loop import Parameters
from llamakit.training.optim import is_sharded
from llamakit.training.report import Saving
from llamakit.training.state import TrainState, check_shapes


class Shares(Mapping[str, np.ndarray]):
    """The trained tensors, float32, whole, for rank 0 to write: it asks for one after the other, of which the others
    give their rows in `follow`. None of them is kept."""

    def __init__(self, parameters: Parameters, dist: Dist) -> None:
        self._parameters, self._dist = parameters, dist

    def __getitem__(self, name: str) -> np.ndarray:
        self._ask("gather", name)
        return self._gather(name)

    def __contains__(self, name: object) -> bool:
        return name in self._parameters.named

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters.named)

    def __len__(self) -> int:
        return len(self._parameters.named)

    def save(self, folder: Path) -> dict[str, Any]:
        """Have all ranks write what they hold, moments included, into a folder; see `save_shares`."""
        self._ask("save", str(folder))
        return save_shares(folder, self._parameters.tensors(), self._dist)

    def done(self) -> None:
        """Nothing more is asked for."""
        self._ask("done", "")

    def follow(self) -> None:
        """What the ranks but 0 do meanwhile."""
        while True:
            what, name = self._dist.from_main(lambda: ("", ""))
            if what == "done":
                return
            if what == "save":
                save_shares(Path(name), self._parameters.tensors(), self._dist)
            else:
                self._gather(name)

    def _ask(self, what: str, name: str) -> None:
        self._dist.from_main(lambda: (what, name))

    @torch.no_grad()
    def _gather(self, name: str) -> np.ndarray:
        tensor: Any = self._parameters.named[name]
        return (tensor.full_tensor() if is_sharded(tensor) else tensor.detach()).cpu().numpy()


def save(
    manager: CheckpointManager, state: TrainState, kind: TrainingType, parameters: Parameters, dist: Dist
) -> Iterator[Saving]:
    """Save the parameters as part of a state that has no arrays yet: a file where each rank has all of them, else a
    folder; and the product, which is a single file in both cases. Rank 0 tells of it. Raises SaveError."""
    if not parameters.sharded:
        if dist.is_main:
            state.arrays = parameters.snapshot()
            yield from manager.save(state)
        return
    shares = Shares(parameters, dist)
    if not dist.is_main:
        shares.follow()
        return
    state.arrays = shares
    yield from manager.save(state, lambda path: write_folder(path, state, kind, shares.save))
    shares.done()


def restore(parameters: Parameters, saved: TrainState | OldCheckpoint | None, path: str, dist: Dist) -> None:
    """Go on from a state, which rank 0 has read from path: on each rank what it holds, from a file or a folder.

    Raises MismatchError for a checkpoint of other tensors, and what reading raises.
    """
    if saved is not None and parameters.sharded:
        arrays = open_arrays(Path(path))
        check_shapes(arrays, parameters.shapes, path)
        parameters.fill(arrays, saved.progress.updates)
    elif saved is not None and dist.is_main:
        check_shapes(saved.arrays, parameters.shapes, path)
        parameters.restore(saved.arrays, saved.progress.updates)
    if saved is not None and isinstance(saved.arrays, dict):
        saved.arrays.clear()
    parameters.send(dist)
