"""What quantizing a model would write: names, types, order, metadata, and which importance each tensor gets.

Nothing is written here. Facts: llama.cpp of 2026, src/llama-quant.cpp.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llamakit.conversion.quantize_config import QuantizeConfig
from llamakit.conversion.quantize_metadata import kept_file_type, parse_override, quantized_metadata
from llamakit.conversion.quantize_policy import (
    TOKEN_EMBD,
    Mixture,
    needs_imatrix,
    output_order,
    parse_tensor_type,
    tensor_types,
)
from llamakit.conversion.recode import Rounding
from llamakit.errors import FormatError, MismatchError, UnsupportedError, UsageError
from llamakit.files import escape_control, read_text
from llamakit.formats.base import ModelFile, TensorInfo
from llamakit.formats.borrowed import bare
from llamakit.formats.gguf import SplitGGUF, Typed
from llamakit.formats.gguf_split import part_paths
from llamakit.formats.imatrix import Imatrix, read_imatrix
from llamakit.ggml import BLOCK_SIZES, FLOAT_TYPES, GGMLType, row_bytes
from llamakit.quant import can_decode

_LAYER = re.compile(r"blk\.(\d{1,9})\.")


class PlannedTensor(NamedTuple):
    """name: in the result; shape: rows first; type, source_type: packed in n_bytes, source_bytes."""

    name: str
    shape: tuple[int, ...]
    source_type: GGMLType
    type: GGMLType
    source_bytes: int
    n_bytes: int


@dataclass(frozen=True)
class QuantizePlan:
    """What is about to be written.

    paths: the files; type: the name of the file type; tensors: in the order of the result; n_weights: of the source.
    fallbacks: tensors whose rows did not fit the type that they should have. requantized: those that are quantized
    already and change their type. without_imatrix: those that would be garbage without an importance matrix, and have
    none. notes: for the user.
    """

    paths: tuple[Path, ...]
    type: str
    tensors: tuple[PlannedTensor, ...]
    n_weights: int
    fallbacks: tuple[str, ...]
    requantized: tuple[str, ...]
    without_imatrix: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def source_bytes(self) -> int:
        """Of all tensors of the source that are kept."""
        return sum(tensor.source_bytes for tensor in self.tensors)

    @property
    def n_bytes(self) -> int:
        """Of all tensors of the result."""
        return sum(tensor.n_bytes for tensor in self.tensors)


class Job(NamedTuple):
    """One tensor of the result: its name there, what it is made of, and the importance of its columns, float32
    (matrices, n_in), where there is one."""

    name: str
    source: TensorInfo
    type: GGMLType
    importance: Tensor | None
    rounding: Rounding

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the result: ggml drops outer axes of size 1."""
        shape = self.source.shape or (1,)
        first = next((axis for axis, size in enumerate(shape) if size != 1), len(shape) - 1)
        return shape[first:]

    @property
    def planned(self) -> PlannedTensor:
        """What is told of it."""
        n_bytes = self.source.n_rows * row_bytes(self.shape[-1], self.type)
        return PlannedTensor(self.name, self.shape, self.source.type, self.type, self.source.n_bytes, n_bytes)


class _Importance(NamedTuple):
    """An importance matrix as far as it is used: tensor name -> float32 (matrices, n_in)."""

    path: str
    content: Imatrix
    weights: Mapping[str, np.ndarray]


class Work(NamedTuple):
    """A plan, the metadata of the result (of its first part), and what is to be done for each part."""

    plan: QuantizePlan
    metadata: dict[str, Any]
    parts: list[list[Job]]


def plan_work(source: ModelFile, config: QuantizeConfig) -> Work:
    """Everything that quantizing an opened source needs to know beforehand; raises what `plan_quantization` raises."""
    overrides = [parse_override(text) for text in config.override_kv]
    importance = _importance(config)
    names = output_order(source.tensors)
    layers = _new_layers(names, config.pruned_layers)
    renamed = {name: new for name in names if (new := _renamed(name, layers)) is not None}
    order = [name for name in (source.tensors if config.keep_split else names) if name in renamed]
    mixture = _mixture(source, config, [(source.tensors[name], renamed[name]) for name in order], overrides, importance)
    jobs = [_job(source, name, renamed[name], mixture.types[renamed[name]], importance) for name in order]
    parts = _in_parts(source, jobs) if config.keep_split else [jobs]
    metadata = quantized_metadata(
        source,
        _file_type(source, config, names),
        overrides=overrides,
        imatrix=None if importance is None else (importance.path, importance.content, len(importance.weights)),
        n_layer=len({*layers.values()} - {None}) if config.pruned_layers else None,
    )
    paths = part_paths(config.target, len(parts)) if config.keep_split else [config.target]
    return Work(_plan(source, config, paths, jobs, mixture, importance), metadata, parts)


def _file_type(source: ModelFile, config: QuantizeConfig, names: Sequence[str]) -> int:
    number = config.file_type.number
    return kept_file_type(source, [source.tensors[name] for name in names]) if number is None else number


def _plan(
    source: ModelFile,
    config: QuantizeConfig,
    paths: Sequence[Path],
    jobs: Sequence[Job],
    mixture: Mixture,
    importance: _Importance | None,
) -> QuantizePlan:
    file_type = config.file_type
    changed = [job for job in jobs if job.type is not job.source.type]
    missing = [job for job in changed if job.importance is None]
    notes: list[str] = []
    if importance is not None and missing:
        named = ", ".join(escape_control(job.name) for job in missing[:4]) + (" ..." if len(missing) > 4 else "")
        notes.append(f"the importance matrix has nothing for {len(missing)} of {len(changed)} tensors: {named}")
    return QuantizePlan(
        paths=tuple(paths),
        type=file_type.name,
        tensors=tuple(job.planned for job in jobs),
        n_weights=sum(info.n_elements for info in source.tensors.values()),
        fallbacks=tuple(mixture.fallbacks),
        requantized=tuple(job.name for job in changed if job.source.type not in FLOAT_TYPES),
        without_imatrix=tuple(job.name for job in missing if needs_imatrix(job.name, job.type, file_type)),
        notes=tuple(notes),
    )


def _mixture(
    source: ModelFile,
    config: QuantizeConfig,
    tensors: Sequence[tuple[TensorInfo, str]],
    overrides: Sequence[tuple[str, Typed]],
    importance: _Importance | None,
) -> Mixture:
    """The types under the tensors' new names; tensors: (in the source, new name), in the order of the result."""
    infos = [TensorInfo(name, info.shape, info.type, info.offset) for info, name in tensors]
    output = _tensor_type(config.output_tensor_type, "--output-tensor-type")
    embedding = _tensor_type(config.token_embedding_type, "--token-embedding-type")
    rules = _rules(config)
    try:
        return tensor_types(
            config.file_type,
            {**source.metadata, **{key: typed.value for key, typed in overrides}},
            infos,
            has_imatrix=importance is not None,
            pure=config.pure,
            leave_output_tensor=config.leave_output_tensor,
            output_tensor_type=output,
            token_embedding_type=embedding,
            tensor_type_rules=rules,
        )
    except (FormatError, UnsupportedError) as error:
        raise type(error)(error.reason, path=source.path, hint=error.hint) from error


def _tensor_type(text: str | None, flag: str) -> GGMLType | None:
    if text is None:
        return None
    try:
        return parse_tensor_type(text)
    except (UsageError, UnsupportedError) as error:
        raise type(error)(f"{flag}: {error.reason}", hint=error.hint) from error


def _rules(config: QuantizeConfig) -> list[tuple[str, GGMLType]]:
    """(regular expression in lower case, type) of --tensor-type, then of the files."""
    words = [("--tensor-type", word) for word in config.tensor_type]
    words += [(os.fspath(path), word) for path in config.tensor_type_file for word in read_text(path).split()]
    rules: list[tuple[str, GGMLType]] = []
    for where, word in words:
        pattern, equals, name = word.partition("=")
        if not pattern or not equals or not name:
            raise UsageError(f"{where}: {escape_control(word)} is no rule (expected NAME=TYPE, such as attn_v=q8_0)")
        target = _tensor_type(name, f"{where} {escape_control(word)}")
        assert target is not None
        rules.append((pattern.lower(), target))
    return rules


def _new_layers(names: Sequence[str], pruned: frozenset[int]) -> dict[int, int | None]:
    """Layer -> its number in the result, None where it is left out. Before the first that goes, numbers stay."""
    layers: dict[int, int | None] = {}
    following = 0
    for name in names:
        found = _LAYER.search(name)
        layer = int(found[1]) if found else -1
        if layer < 0 or layer in layers:
            continue
        new = layer if not pruned or layer < min(pruned) else following
        layers[layer] = None if layer in pruned else new
        following = following if layer in pruned else new + 1
    missing = pruned - layers.keys()
    if missing:
        raise UsageError(f"--prune-layers names layer {min(missing)}, which the model does not have")
    return layers


def _renamed(name: str, layers: Mapping[int, int | None]) -> str | None:
    """A tensor's name in the result, None where its layer is left out."""
    found = _LAYER.search(name)
    if not found:
        return name
    layer = layers[int(found[1])]
    return None if layer is None else f"{name[: found.start(1)]}{layer}{name[found.end(1) :]}"


def _in_parts(source: ModelFile, jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs of each part of the source."""
    source = bare(source)
    if not isinstance(source, SplitGGUF):
        return [list(jobs)]
    parts: list[list[Job]] = [[] for _ in source.parts]
    for job in jobs:
        parts[source.part_of(job.source.name)].append(job)
    return parts


def _importance(config: QuantizeConfig) -> _Importance | None:
    """The importance matrix without what the user left out; None where nothing is left of it."""
    if config.imatrix is None:
        return None
    content = read_imatrix(config.imatrix)
    weights: dict[str, np.ndarray] = {}
    for name in content.entries:
        included = not config.include_weights or any(part in name for part in config.include_weights)
        if included and not any(part in name for part in config.exclude_weights):
            weights[name] = content.weights(name)
            if not np.isfinite(weights[name]).all():
                raise FormatError(f"has NaN or infinity in the entry of {escape_control(name)}", path=config.imatrix)
    return _Importance(config.imatrix, content, weights) if weights else None


def _job(source: ModelFile, name: str, new_name: str, wanted: GGMLType, importance: _Importance | None) -> Job:
    """Raises UnsupportedError where the tensor cannot be had in the type."""
    info = source.tensors[name]
    job = Job(new_name, info, wanted, None, Rounding())
    if wanted is info.type:
        return job
    shown, n_in = escape_control(name), job.shape[-1]
    if not can_decode(info.type):
        raise UnsupportedError(f"tensor {shown} is {info.type.name}, which nothing decodes", path=source.path)
    if n_in % BLOCK_SIZES[wanted][0]:
        raise UsageError(
            f"tensor {shown} has rows of {n_in} weights, which {wanted.name} cannot hold (blocks of "
            f"{BLOCK_SIZES[wanted][0]})",
            path=source.path,
        )
    return job if importance is None else job._replace(importance=_columns(info, importance))


def _columns(info: TensorInfo, importance: _Importance) -> Tensor | None:
    """float32 (matrices, n_in), None where there is nothing for the tensor. An embedding is looked up, not multiplied:
    what a file has for it may be anything, and is left out where it does not fit."""
    weights = importance.weights.get(info.name)
    if weights is None:
        return None
    n_in = info.shape[-1]
    n_matrices = info.n_rows // info.shape[-2] if len(info.shape) > 1 else 1
    if weights.size != n_matrices * n_in:
        if info.name in TOKEN_EMBD:
            return None
        raise MismatchError(
            f"has {weights.size} numbers for {escape_control(info.name)} (expected {n_matrices} x {n_in})",
            path=importance.path,
            hint="it is of another model",
        )
    return torch.from_numpy(np.ascontiguousarray(weights, np.float32).reshape(n_matrices, n_in))
