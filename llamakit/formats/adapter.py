"""LoRA adapters: read from GGUF, PEFT folders and old `ggla` files, written, checked against a base model.

Inside, one orientation for every tensor: A (r, n_in), B (n_out, r), delta W = B @ A in the base tensor's
shape (rows first; a norm is a matrix of one row). On disk, GGUF has token_embd the other way round, and
`ggla` all of A. Layouts: llama.cpp src/llama-adapter.cpp; finetune.cpp of 2024-02 for the old one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llamakit.errors import FormatError, MismatchError, UnsupportedError, UsageError
from llamakit.files import escape_control
from llamakit.formats.base import ModelFile, TensorData
from llamakit.formats.floats import to_float32
from llamakit.formats.ggla import read_ggla
from llamakit.formats.gguf_reader import GGUFFile
from llamakit.formats.gguf_writer import write_gguf
from llamakit.formats.open import sniff
from llamakit.formats.peft import CONFIG as PEFT_CONFIG
from llamakit.formats.peft import OLD_WEIGHTS, WEIGHTS, Pair, read_peft, write_peft
from llamakit.formats.stamps import BaseStamps, base_stamps
from llamakit.ggml import FLOAT_TYPES, GGMLType

MODEL_STAMP_KEY, FILE_STAMP_KEY = "llamakit.base.model", "llamakit.base.file"
_FLIPPED = "token_embd.weight"  # llama.cpp looks tokens up in lora_a, so it keeps its rows per token


@dataclass
class Adapter:
    """A low-rank change of some tensors of a base model.

    alpha: of the scale alpha / rank; 0 means that there is no such scale.
    tensors: base tensor name, with `.weight` -> (A (r, n_in), B (n_out, r)) float32; r may differ between
    tensors.
    metadata: of the file that it came from; architecture: of the base ("" where the file does not say: ggla).
    replaced: tensors that stand whole in the base's place (PEFT's modules_to_save), float32 (n_out, n_in), a norm as
    one row. They can be merged, and neither put on a running model nor written as an adapter.
    """

    alpha: float
    tensors: dict[str, Pair]
    metadata: dict[str, Any] = field(default_factory=dict)
    architecture: str = "llama"
    path: Path | None = None
    replaced: dict[str, np.ndarray] = field(default_factory=dict)

    def rank(self, name: str) -> int:
        """The rank of one tensor's pair. Raises KeyError."""
        return self.tensors[name][0].shape[0]

    def scale(self, name: str, user_scale: float = 1.0) -> float:
        """The factor of delta W: user_scale * alpha / rank, or user_scale alone where alpha is 0."""
        return user_scale * self.alpha / self.rank(name) if self.alpha else user_scale

    @property
    def n_parameters(self) -> int:
        """Numbers in all A and B."""
        return sum(a.size + b.size for a, b in self.tensors.values())

    @property
    def stamps(self) -> BaseStamps | None:
        """The stamps of the base that it was trained on, None where the file has none."""
        model, file = self.metadata.get(MODEL_STAMP_KEY), self.metadata.get(FILE_STAMP_KEY)
        return BaseStamps(model, file) if isinstance(model, str) and isinstance(file, str) else None


def read_adapter(path: str | os.PathLike[str], base: ModelFile | None = None) -> Adapter:
    """An adapter from a GGUF file, a PEFT folder (or the weights in it) or an old `ggla` file; whole, in memory.

    base: the model that it belongs to, needed for PEFT, whose rows of q and k stand in another order.
    Raises UsageError when the path cannot be read or a PEFT folder comes without its base, FormatError for broken
    files, UnsupportedError for other kinds and for what cannot be carried, MismatchError for a PEFT folder of another
    base.
    """
    kind, folder = sniff(path), Path(path)
    if kind in ("safetensors", "zip", "pickle") and folder.name in (WEIGHTS, OLD_WEIGHTS):
        folder = folder.parent
    if (folder / PEFT_CONFIG).is_file():
        return _read_peft(folder, base)
    if kind == "ggla":
        return _read_old(Path(path))
    if kind == "gguf":
        with GGUFFile(path) as file:
            return _read_gguf(file)
    if kind in ("safetensors", "zip", "pickle", "directory", "huggingface"):
        raise UnsupportedError(
            f"is no LoRA adapter that can be read (expected GGUF, ggla or a PEFT folder, got {kind})",
            path=path,
            hint=f"a PEFT folder has {PEFT_CONFIG} and {WEIGHTS}",
        )
    raise FormatError(f"is no LoRA adapter (expected GGUF, ggla or a PEFT folder, got {kind})", path=path, offset=0)


def _read_peft(folder: Path, base: ModelFile | None) -> Adapter:
    if base is None:
        raise UsageError("is a PEFT folder, which cannot be read without its base model", path=folder)
    weights = read_peft(folder, base)
    return Adapter(weights.alpha, weights.tensors, {}, "llama", folder, weights.replaced)


def transposed_pair(a: np.ndarray, b: np.ndarray) -> Pair:
    """(A, B) from what the old finetune wrote, adapters and checkpoints: a (n_in, r), b (n_out, r)."""
    return np.ascontiguousarray(a.T), np.ascontiguousarray(b)


def _read_old(path: Path) -> Adapter:
    """ggla scales every tensor with alpha / r of its header, even norms of rank 1: that goes into B here."""
    rank, alpha, stored = read_ggla(path)
    tensors: dict[str, Pair] = {}
    for name, (a, b) in _pairs(path, stored, ".loraA", ".loraB").items():
        if a.shape[1] != b.shape[1]:
            raise FormatError(
                f"LoRA tensors of '{escape_control(name)}' differ in rank ({a.shape[1]} and {b.shape[1]})",
                path=path,
            )
        tensors[name] = transposed_pair(a, b * np.float32(a.shape[1] / rank))
    return Adapter(alpha, tensors, {}, "", path)


def _read_gguf(file: GGUFFile) -> Adapter:
    metadata = dict(file.metadata)
    _check_kind(file.path, metadata)
    stored = {name: _matrix(file, name) for name in file.tensors}
    pairs = _pairs(file.path, stored, ".lora_a", ".lora_b")
    tensors = {name: _oriented(file.path, name, a, b) for name, (a, b) in pairs.items()}
    architecture = str(metadata.get("general.architecture", ""))
    return Adapter(_alpha(file.path, metadata), tensors, metadata, architecture, file.path)


def _check_kind(path: Path, metadata: Mapping[str, Any]) -> None:
    if "training.type" in metadata:
        kind = escape_control(str(metadata["training.type"]))
        raise UnsupportedError(
            f"is a training checkpoint ({kind}), not an adapter",
            path=path,
            hint="give it to finetune with --checkpoint-in, or take the adapter that was saved beside it",
        )
    for key, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
        got = metadata.get(key)
        if got != expected:
            shown = "nothing" if got is None else f"'{escape_control(str(got))}'"
            raise UnsupportedError(
                f"is no LoRA adapter: expected {key} to be '{expected}', got {shown}",
                path=path,
                hint="a model is given with -m" if key == "general.type" else None,
            )
    if "adapter.alora.invocation_tokens" in metadata:
        raise UnsupportedError("is an activated LoRA (aLoRA), which is not supported", path=path)


def _alpha(path: Path, metadata: Mapping[str, Any]) -> float:
    alpha = metadata.get("adapter.lora.alpha", 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise FormatError(f"adapter.lora.alpha is no finite number (got {escape_control(str(alpha))})", path=path)
    return float(alpha)


def _matrix(file: GGUFFile, name: str) -> np.ndarray:
    """A tensor as a float32 matrix; vectors become one row (writers in C drop outer axes of size 1)."""
    info = file.tensors[name]
    if not 1 <= len(info.shape) <= 2 or not info.n_elements:
        raise FormatError(
            f"LoRA tensor '{escape_control(name)}' is no matrix (shape {info.shape})",
            path=file.path,
            offset=info.offset,
        )
    if info.type not in FLOAT_TYPES:
        raise UnsupportedError(
            f"LoRA tensor '{escape_control(name)}' has the type {info.type.name} (expected F32, F16 or BF16)",
            path=file.path,
            hint="convert the adapter again with --outtype f32",
        )
    return to_float32(file.read(name), info.type).reshape(-1, info.shape[-1])


def _pairs(path: Path, stored: Mapping[str, np.ndarray], suffix_a: str, suffix_b: str) -> dict[str, Pair]:
    """Base tensor name -> (a, b) as stored, in the order in which the first of each pair appears."""
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name, matrix in stored.items():
        suffix = suffix_a if name.endswith(suffix_a) else suffix_b
        if not name.endswith(suffix):
            raise FormatError(
                f"LoRA tensor '{escape_control(name)}' has an unexpected suffix (expected {suffix_a} or {suffix_b})",
                path=path,
            )
        halves.setdefault(name.removesuffix(suffix), {})[suffix] = matrix
    for base, half in halves.items():
        if len(half) != 2:
            missing = suffix_b if suffix_a in half else suffix_a
            raise FormatError(f"the LoRA pair of '{escape_control(base)}' has no {missing} tensor", path=path)
    if not halves:
        raise FormatError("is an adapter without any LoRA tensor", path=path)
    return {base: (half[suffix_a], half[suffix_b]) for base, half in halves.items()}


def _oriented(path: Path, name: str, a: np.ndarray, b: np.ndarray) -> Pair:
    """From GGUF's orientation to ours."""
    shown = escape_control(name)
    if name.endswith(_FLIPPED):
        if a.shape[1] != b.shape[1]:
            raise FormatError(f"LoRA tensors of '{shown}' differ in rank ({a.shape[1]}, {b.shape[1]})", path=path)
        return np.ascontiguousarray(b.T), a
    if a.shape[0] == b.shape[1]:
        return a, b
    if a.shape[1] == b.shape[1]:
        raise UnsupportedError(
            f"the lora_a tensor of '{shown}' is not transposed (shapes {a.shape} and {b.shape})",
            path=path,
            hint="it comes from an old finetune tool; its .bin adapter (ggla) can be read",
        )
    raise FormatError(f"LoRA tensors of '{shown}' differ in rank ({a.shape[0]}, {b.shape[1]})", path=path)


def check_adapter(adapter: Adapter, base: ModelFile, *, force: bool = False) -> list[str]:
    """Whether an adapter belongs to a base model; gives notes for the user, none of them fatal.

    Raises MismatchError, naming both values: another architecture, a tensor that the base does not have or
    has in another shape, and, unless force, another base model by its stamp. An adapter without stamps is not
    refused.
    """
    architecture = str(base.metadata.get("general.architecture", ""))
    if adapter.architecture and adapter.architecture != architecture:
        raise MismatchError(
            f"the adapter is for the architecture '{escape_control(adapter.architecture)}', "
            f"the model is '{escape_control(architecture)}'",
            path=adapter.path,
        )
    for name in adapter.tensors:
        _check_tensor(adapter, base, name)
    return _check_stamps(adapter, base, force)


def refuse_replaced(adapter: Adapter) -> None:
    """Raises UnsupportedError, by name, for an adapter that replaces whole tensors: it can only be merged."""
    if adapter.replaced:
        names = [escape_control(name) for name in adapter.replaced]
        raise UnsupportedError(
            f"replaces whole tensors (modules_to_save): {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}",
            path=adapter.path,
            hint="no pair of matrices can hold that; put it into the model: llamakit merge",
        )


def _check_tensor(adapter: Adapter, base: ModelFile, name: str) -> None:
    shown, info = escape_control(name), base.tensors.get(name)
    if info is None:
        raise MismatchError(
            f"LoRA tensor '{shown}' does not exist in the base model {base.path}",
            path=adapter.path,
            hint="it was trained on another model",
        )
    a, b = adapter.tensors[name]
    n_out, n_in = info.n_rows, info.shape[-1] if info.shape else 1
    if (b.shape[0], a.shape[1]) != (n_out, n_in):
        raise MismatchError(
            f"LoRA tensor '{shown}' has the wrong shape for {base.path} "
            f"(expected {n_out} x {n_in}, got {b.shape[0]} x {a.shape[1]})",
            path=adapter.path,
            hint="it was trained on another model",
        )


def _check_stamps(adapter: Adapter, base: ModelFile, force: bool) -> list[str]:
    trained = adapter.stamps
    if trained is None:
        return []
    here = base_stamps(base)
    if trained.model != here.model:
        difference = f"trained on another model (stamp {_short(trained.model)}, {base.path} has {_short(here.model)})"
        if not force:
            raise MismatchError(f"the adapter was {difference}", path=adapter.path, hint="--force uses it all the same")
        return [f"the adapter was {difference}; used all the same"]
    if trained.file != here.file:
        return ["the adapter was trained on another quantization of this model"]
    return []


def _short(stamp: str) -> str:
    return escape_control(stamp[:16])


def write_adapter(path: str | os.PathLike[str], adapter: Adapter, base: ModelFile) -> None:
    """Write an adapter as GGUF, F32, as llama.cpp loads it, with the stamps of its base.

    The bytes depend on alpha, the tensors and the base alone; tensors stand in the base's order, a before b.
    Raises MismatchError when the adapter's tensors are not the base's, UnsupportedError where it replaces whole ones,
    SaveError when the disk refuses.
    """
    refuse_replaced(adapter)
    for name in adapter.tensors:
        _check_tensor(adapter, base, name)
    stamps = base_stamps(base)
    metadata: dict[str, Any] = {
        "general.architecture": str(base.metadata["general.architecture"]),
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(adapter.alpha),
        MODEL_STAMP_KEY: stamps.model,
        FILE_STAMP_KEY: stamps.file,
    }
    tensors: list[TensorData] = []
    for name in base.tensors:
        if name in adapter.tensors:
            a, b = adapter.tensors[name]
            stored = (b, a.T) if name.endswith(_FLIPPED) else (a, b)
            for suffix, matrix in zip((".lora_a", ".lora_b"), stored, strict=True):
                data = np.ascontiguousarray(matrix, "<f4")
                tensors.append(TensorData(name + suffix, data.shape, GGMLType.F32, data))
    write_gguf(path, metadata=metadata, tensors=tensors)


def write_adapter_folder(
    path: str | os.PathLike[str],
    adapter: Adapter,
    base: ModelFile,
    *,
    base_model: str | None = None,
    replace: bool = False,
) -> None:
    """Write an adapter as a PEFT folder, F32; base_model: what stands as base_model_name_or_path; replace: an older one
    may stand there.

    What `peft` computes with it is what the adapter computes here, and reading it back gives the same matrices.
    Raises as `write_peft`, and UnsupportedError where the adapter replaces whole tensors.
    """
    refuse_replaced(adapter)
    write_peft(path, alpha=adapter.alpha, tensors=adapter.tensors, base=base, base_model=base_model, replace=replace)
