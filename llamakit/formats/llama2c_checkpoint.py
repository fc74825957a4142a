"""llama2.c's training checkpoints (`ckpt.pt`, written by its train.py), seen as GGUF.

A dict: `model` (Meta's names, rows in GGUF's order; `_orig_mod.` before them where the model was compiled),
`model_args`, and the state of the training: `iter_num`, and `optimizer`, torch's AdamW. The output matrix is the
embedding's.
model.py fixes theta to 10000 and, as train.py never says another, epsilon to 1e-5; the vocabulary is in another file.
Layout: llama2.c train.py and model.py at 350e04f.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from llamakit.errors import FormatError, UnsupportedError
from llamakit.files import escape_control
from llamakit.formats.base import TensorInfo
from llamakit.formats.fields import Fields
from llamakit.formats.huggingface_config import LlamaShape, check_tensors
from llamakit.formats.huggingface_rope import Rope
from llamakit.formats.llama2c import RMS_EPS, ROPE_FREQ_BASE, Config, config_metadata
from llamakit.formats.names import name_of_meta
from llamakit.formats.torch_file import TorchFile
from llamakit.ggml import FLOAT_FILE_TYPES, FLOAT_TYPES, GGMLType

_MODEL, _COMPILED, _IGNORED = "model/", "_orig_mod.", ("freqs_cos", "freqs_sin")
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class AdamState:
    """What torch's AdamW knows. updates: steps so far; moments: GGUF name -> both of a tensor, float32 in its shape."""

    updates: int
    moments: Mapping[str, tuple[np.ndarray, np.ndarray]]


class Llama2cCheckpoint:
    """A ckpt.pt as a `ModelFile`. iteration: how many steps it was trained; None where it does not say.

    Raises UsageError when the path is no readable file, UnsupportedError for a PyTorch file of another kind,
    FormatError for one that is broken, that would run code, or whose tensors do not fit its model_args.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = TorchFile(path)
        self.path: Path = self._file.path
        try:
            self._stored = self._names()
            infos = {name: self._file.tensors[stored] for name, stored in self._stored.items()}
            self._tensors = MappingProxyType(
                {name: TensorInfo(name, info.shape, info.type, info.offset) for name, info in infos.items()}
            )
            self._metadata = MappingProxyType(self._read_metadata())
        except BaseException:
            self._file.close()
            raise
        step = self._file.values.get("iter_num")
        self.iteration: int | None = step if type(step) is int else None

    def _names(self) -> dict[str, str]:
        """GGUF name -> name in the file."""
        values = self._file.values
        if not is_llama2c_checkpoint(self._file):
            raise UnsupportedError(
                "is no checkpoint of llama2.c (expected the entries model and model_args)",
                path=self.path,
                hint="of other PyTorch checkpoints, give the folder, with config.json or params.json in it",
            )
        if not isinstance(values["model_args"], Mapping):
            raise FormatError("model_args is no dict", path=self.path)
        found: dict[str, str] = {}
        for stored in [*self._file.tensors, *self._file.other_dtypes]:
            if not stored.startswith(_MODEL):
                continue
            theirs = stored.removeprefix(_MODEL).removeprefix(_COMPILED)
            if theirs in _IGNORED:
                continue
            ours, info = name_of_meta(theirs), self._file.tensors.get(stored)
            if ours is None or ours in found or info is None or info.type not in FLOAT_TYPES:
                raise FormatError(
                    f"tensor {escape_control(theirs[:100])} has no place in a Llama, or no float type", path=self.path
                )
            found[ours] = stored
        return found

    def _read_metadata(self) -> dict[str, Any]:
        fields = Fields(self._file.values["model_args"], self.path)
        n_head, gate = fields.integer("n_heads"), self._tensors.get("blk.0.ffn_gate.weight")
        config = Config(
            version=0,
            n_embd=fields.integer("dim"),
            n_ff=gate.shape[0] if gate else 1,
            n_layer=fields.integer("n_layers"),
            n_head=n_head,
            n_head_kv=fields.integer("n_kv_heads", n_head),
            n_vocab=fields.integer("vocab_size"),
            n_ctx=fields.integer("max_seq_len"),
            tied=self._is_tied(),
        )
        fault = config.fault()
        if fault:
            raise FormatError(f"model_args: {fault}", path=self.path)
        shapes = {name: info.shape for name, info in self._tensors.items()}
        check_tensors(_shape(config), shapes, self.path)
        types = [info.type for info in self._tensors.values() if len(info.shape) == 2]
        return config_metadata(config, ROPE_FREQ_BASE) | {"general.file_type": FLOAT_FILE_TYPES[types[0]]}

    def _is_tied(self) -> bool:
        """Whether the output is the embedding; where both are stored and the same bytes, it is left out."""
        embedding, output = (self._stored.get(name) for name in (_EMBEDDING, _OUTPUT))
        if embedding is None or output is None:
            return output is None
        places = [self._file.tensors[stored] for stored in (embedding, output)]
        if places[0].offset != places[1].offset or places[0].shape != places[1].shape:
            return False
        self._tensors = MappingProxyType({name: info for name, info in self._tensors.items() if name != _OUTPUT})
        return True

    def adam_state(self) -> AdamState | None:
        """The optimizer's moments, whole, in memory; None unless they are certainly those of these tensors.

        The state has numbers in the place of names: train.py's two groups are the matrices, and then the vectors, each
        in the order of the model (model.py, configure_optimizers). Their shapes and one step for all are checked.
        """
        optimizer = self._file.values.get("optimizer")
        state = optimizer.get("state") if isinstance(optimizer, Mapping) else None
        groups = optimizer.get("param_groups") if isinstance(optimizer, Mapping) else None
        infos = sorted(self._tensors.values(), key=lambda info: len(info.shape) < 2)  # a sort keeps equal ones in order
        if not isinstance(state, Mapping) or len(state) != len(infos) or not isinstance(groups, list):
            return None
        matrices = sum(len(info.shape) > 1 for info in infos)
        numbers = [group.get("params") if isinstance(group, Mapping) else None for group in groups]
        if numbers != [list(range(matrices)), list(range(matrices, len(infos)))]:
            return None
        steps = {entry.get("step") if isinstance(entry, Mapping) else None for entry in state.values()}
        step = steps.pop() if len(steps) == 1 else None
        if isinstance(step, bool) or not isinstance(step, (int, float)) or step != step // 1 or step < 1:
            return None
        moments = {}
        for i, info in enumerate(infos):
            pair = [self._file.tensors.get(f"optimizer/state/{i}/{name}") for name in ("exp_avg", "exp_avg_sq")]
            if any(found is None or found.shape != info.shape or found.type is not GGMLType.F32 for found in pair):
                return None
            first, second = (self._file.read(found.name).view("<f4").reshape(info.shape) for found in pair if found)
            moments[info.name] = (first, second)
        return AdamState(int(step), moments)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """GGUF's keys, made from model_args and from what llama2.c fixes."""
        return self._metadata

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """In the order of the file."""
        return self._tensors

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) as a fresh, writable uint8 array (rows, row_bytes). Raises as `TorchFile.read`."""
        info = self._tensors[name]
        return self._file.read(self._stored[info.name], start, stop)

    def close(self) -> None:
        """Close the file; `read` fails afterwards."""
        self._file.close()

    def __enter__(self) -> Llama2cCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_llama2c_checkpoint(file: TorchFile) -> bool:
    """Whether a PyTorch file is a checkpoint of llama2.c, by its entries."""
    return isinstance(file.values, Mapping) and {"model", "model_args"} <= file.values.keys()


def _shape(c: Config) -> LlamaShape:
    return LlamaShape(
        n_vocab=c.n_vocab, n_ctx=c.n_ctx, n_embd=c.n_embd, n_ff=c.n_ff, n_head=c.n_head, n_head_kv=c.n_head_kv,
        head_dim=c.head_dim, n_layer=c.n_layer, rms_eps=RMS_EPS, rope=Rope(), tied_output=c.tied,
    )  # fmt: skip
