"""An adapter put into its base for good: W + scale * alpha / r * B @ A, computed in float32, written as GGUF.

By default the file is the one that llama-export-lora writes, to the byte where the base is F32: tensors in the order of
their names, a changed tensor F32 where the base's is F32, else F16, the others as they are, general.file_type 1 at the
end of the metadata (llama.cpp, tools/export-lora). delta.py says what "to the byte" rests on.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamakit.conversion.convert import open_with_vocabulary
from llamakit.conversion.delta import low_rank_product, vector_lanes
from llamakit.conversion.merge_config import MergeConfig
from llamakit.errors import LlamakitError, MismatchError, UnsupportedError, UsageError
from llamakit.files import check_writable, escape_control, is_same_file
from llamakit.formats.adapter import Adapter, check_adapter, read_adapter
from llamakit.formats.base import ModelFile, TensorData, TensorInfo
from llamakit.formats.borrowed import stated_metadata, with_metadata
from llamakit.formats.gguf_writer import copied_tensor, typed_metadata, written_tensors
from llamakit.formats.open import check_is_model, model_files
from llamakit.ggml import BLOCK_SIZES, FILE_TYPES, FLOAT_TYPES, GGMLType
from llamakit.quant import can_decode, dequantize
from llamakit.quant.encode import quantize

_CHUNK = 1 << 19
_MOSTLY_F16, _QUANTIZATION_VERSION = 1, 2
#: what is left of an adapter's change, below which the user is told
LITTLE = 0.5

Adapters = Sequence[tuple[Adapter, float]]


@dataclass(frozen=True)
class MergePlan:
    """What is about to be written. n_changed: tensors that adapters change; notes, warnings: for the user, none of them
    fatal."""

    n_tensors: int
    n_changed: int
    n_bytes: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class MergedTensor:
    """One tensor is in the file.

    changed: whether an adapter changes it; bytes_done: bytes of tensors written so far, of MergePlan.n_bytes.
    rmse: root mean square of what rounding to the type changed; None where the type is F32 or nothing was computed.
    kept: the share of the adapter's change that is left after that rounding: <written - base, change> / <change,
    change>, base being what the base file's numbers stand for; 1 is all. None where rmse is, or nothing was changed.
    """

    name: str
    shape: tuple[int, ...]
    base_type: GGMLType
    type: GGMLType
    changed: bool
    bytes_done: int
    rmse: float | None = None
    kept: float | None = None


@dataclass(frozen=True)
class Merged:
    """The file is there. n_bytes: its size; kept: of all changes together, weighted by their squares; None: all F32."""

    path: Path
    n_bytes: int
    n_changed: int
    kept: float | None


Report = MergePlan | MergedTensor | Merged


@dataclass
class _Rounding:
    """Sums over one tensor."""

    n: int = 0
    error: float = 0.0
    change: float = 0.0
    left: float = 0.0

    def add(self, base: Tensor, merged: Tensor, written: Tensor) -> None:
        """Take in some rows, float32: of the base, of the exact result, of what the packed result stands for."""
        change, error = (merged - base).view(-1), (written - merged).view(-1)
        self.n += merged.numel()
        self.error += float(error.dot(error))
        self.change += float(change.dot(change))
        self.left += float((written - base).view(-1).dot(change))

    @property
    def rmse(self) -> float | None:
        return math.sqrt(self.error / self.n) if self.n else None

    @property
    def kept(self) -> float | None:
        return self.left / self.change if self.change else None


@dataclass(frozen=True)
class _Job:
    """One tensor of the result: what it is made of, and what rounding did to it."""

    info: TensorInfo
    type: GGMLType
    pairs: tuple[tuple[Tensor, Tensor, float], ...] = ()
    replacement: np.ndarray | None = None
    rounding: _Rounding = field(default_factory=_Rounding)

    @property
    def n_in(self) -> int:
        return self.info.shape[-1] if self.info.shape else 1

    @property
    def changed(self) -> bool:
        return bool(self.pairs) or self.replacement is not None


def merge(config: MergeConfig) -> Iterator[Report]:
    """Write base and adapters as one GGUF file: a MergePlan, a MergedTensor for each tensor, a Merged.

    Several adapters are added one after the other, each tensor by those that have it. Memory holds the adapters and a
    few slices of one tensor. The file replaces config.out only once it is whole.

    Raises UsageError, FormatError, UnsupportedError and MismatchError for files that cannot be read, are broken, of an
    unknown kind, or do not belong together; UnsupportedError for an outtype that nothing can be written in; SaveError
    when the disk refuses.
    """
    with _open_base(config) as base:
        check_is_model(base)
        _check_out(config)
        adapters = [(read_adapter(path, base), scale) for path, scale in config.adapters]
        notes = _check_adapters(base, adapters, config.force)
        jobs = _jobs(base, adapters, config)
        n_changed = sum(job.changed for job in jobs)
        n_bytes = sum(_n_bytes(job) for job in jobs)
        yield MergePlan(
            len(jobs), n_changed, n_bytes, tuple(notes + _file_notes(base, jobs, config.type)), _warnings(base)
        )
        done = 0
        tensors = [_tensor(base, job) for job in jobs]
        for job, _ in zip(
            jobs, written_tensors(config.out, metadata=_metadata(base, config), tensors=tensors), strict=True
        ):
            done += _n_bytes(job)
            yield _report(job, done)
    rounded = [job.rounding for job in jobs if job.rounding.change]
    total = sum(r.change for r in rounded)
    kept = sum(r.left for r in rounded) / total if total else None
    yield Merged(config.out, os.path.getsize(config.out), n_changed, kept)


def _open_base(config: MergeConfig) -> ModelFile:
    return open_with_vocabulary(config.model, vocab=config.vocab, ctx=config.ctx, rope_freq_base=config.rope_freq_base)


def _warnings(base: ModelFile) -> tuple[str, ...]:
    if "tokenizer.ggml.tokens" in base.metadata:
        return ()
    return ("the base has no vocabulary, and the merged model none either: --vocab tokenizer.bin, say, adds one",)


def _check_out(config: MergeConfig) -> None:
    """The result may be no file that it is made of: who reads a base twice expects to find it."""
    check_writable(config.out)
    vocab = [] if config.vocab is None else [config.vocab]
    adapters = (file for path, _ in config.adapters for file in model_files(path))
    for path in (*model_files(config.model), *adapters, *vocab):
        if is_same_file(config.out, path):
            raise UsageError("would be overwritten by the merged model", path=path, hint="name another file with -o")


def _check_adapters(base: ModelFile, adapters: Adapters, force: bool) -> list[str]:
    notes: list[str] = []
    replaced: set[str] = set()
    for adapter, scale in adapters:
        notes += [f"{adapter.path}: {note}" for note in check_adapter(adapter, base, force=force)]
        for name in adapter.replaced:
            if scale != 1 or name in replaced:
                reason = "for the second time" if name in replaced else f"and cannot be scaled by {scale:g}"
                raise MismatchError(f"replaces {escape_control(name)} whole, {reason}", path=adapter.path)
        replaced |= adapter.replaced.keys()
    return notes


def _file_notes(base: ModelFile, jobs: Sequence[_Job], wanted: GGMLType | None) -> list[str]:
    notes = []
    matrices = [job for job in jobs if job.info.n_rows > 1]
    narrow = sum(job.type is GGMLType.F16 for job in matrices)
    if wanted is not None and wanted is not GGMLType.F16 and narrow:
        block = BLOCK_SIZES[wanted][0]
        why = f"their rows are no multiple of {block} long, which {wanted.name} needs"
        notes.append(f"{narrow} of {len(matrices)} matrices become F16: {why}")
    embedding = any(job.changed and job.info.name == "token_embd.weight" for job in jobs)
    if embedding and "output.weight" not in base.tensors:
        notes.append(
            "token_embd.weight is this model's output too: merging changes both, an adapter on the base the input alone"
        )
    return notes


def _jobs(base: ModelFile, adapters: Adapters, config: MergeConfig) -> list[_Job]:
    """Every tensor in the order of the file; what cannot be computed is refused before anything is written."""
    names = sorted(base.tensors, key=lambda name: name.encode("utf-8")) if config.outtype is None else base.tensors
    jobs = []
    for name in names:
        info = base.tensors[name]
        pairs = tuple(_scaled_pair(adapter, name, scale) for adapter, scale in adapters if name in adapter.tensors)
        whole = next((adapter.replaced[name] for adapter, _ in adapters if name in adapter.replaced), None)
        changed = bool(pairs) or whole is not None
        jobs.append(_Job(info, _out_type(info, changed, config), pairs, whole))
    for job in {(j.info.type, j.type): j for j in jobs if j.changed or j.type is not j.info.type}.values():
        _check_types(base, job)
    return jobs


def _scaled_pair(adapter: Adapter, name: str, scale: float) -> tuple[Tensor, Tensor, float]:
    """(A, B, factor of B @ A); the factor in float32, step by step, as llama-export-lora computes it."""
    a, b = (torch.from_numpy(np.ascontiguousarray(matrix, np.float32)) for matrix in adapter.tensors[name])
    with np.errstate(over="ignore"):  # an infinite factor shows in what it gives
        factor = np.float32(scale)
        if adapter.alpha:
            factor = factor * np.float32(adapter.alpha) / np.float32(len(a))
    return a, b, float(factor)


def _out_type(info: TensorInfo, changed: bool, config: MergeConfig) -> GGMLType:
    if len(info.shape) == 1 and info.type in FLOAT_TYPES:
        return GGMLType.F32  # checkpoints have norms in 16 bits, which llama.cpp does not compute with
    if config.outtype == "same":
        return info.type
    if config.outtype is None:
        return info.type if not changed or info.type is GGMLType.F32 else GGMLType.F16
    wanted = config.type
    assert wanted is not None
    if info.n_rows == 1 or not info.name.endswith(".weight") or info.name.endswith("_norm.weight"):
        return GGMLType.F32  # vectors, as convert_hf_to_gguf.py has them
    return wanted if info.shape[-1] % BLOCK_SIZES[wanted][0] == 0 else GGMLType.F16


def _check_types(base: ModelFile, job: _Job) -> None:
    if not can_decode(job.info.type):
        raise UnsupportedError(
            f"'{job.info.name}' has the type {job.info.type.name}, which nothing decodes", path=base.path
        )
    try:
        quantize(torch.zeros(1, job.n_in), job.type)
    except LlamakitError as error:
        raise UnsupportedError(
            f"'{escape_control(job.info.name)}' cannot be written as {job.type.name}: {error.reason}",
            path=base.path,
            hint="choose another --outtype, such as f16 or q8_0",
        ) from error


def _n_bytes(job: _Job) -> int:
    return job.info.n_bytes_as(job.type)


def _tensor(base: ModelFile, job: _Job) -> TensorData:
    if not job.changed and job.type is job.info.type:
        return copied_tensor(base, job.info.name)
    return TensorData(job.info.name, job.info.shape, job.type, _slices(base, job))


def _slices(base: ModelFile, job: _Job) -> Callable[[], Iterator[np.ndarray]]:
    """The packed rows of a tensor that is computed, some at a time."""
    step = max(1, _CHUNK // max(1, job.n_in))

    def slices() -> Iterator[np.ndarray]:
        for start in range(0, job.info.n_rows, step):
            stop = min(start + step, job.info.n_rows)
            yield _packed_rows(base, job, start, stop)

    return slices


def _packed_rows(base: ModelFile, job: _Job, start: int, stop: int) -> np.ndarray:
    rows = dequantize(torch.from_numpy(base.read(job.info.name, start, stop)), job.info.type)
    merged = rows if job.replacement is None else torch.from_numpy(job.replacement[start:stop])
    for a, b, factor in job.pairs:
        merged = merged + low_rank_product(b[start:stop], a, n_out=len(b), lanes=vector_lanes()).mul_(factor)
    packed = quantize(merged, job.type)
    written = merged if job.type is GGMLType.F32 else dequantize(packed, job.type)
    if not bool(written.isfinite().all()):
        raise UnsupportedError(
            f"merging gives '{escape_control(job.info.name)}' values that {job.type.name} cannot hold",
            path=base.path,
            hint="take a smaller scale, or --outtype f32 where the adapter is sound",
        )
    if job.changed and job.type is not GGMLType.F32:
        job.rounding.add(rows, merged, written)
    return packed.numpy()


def _report(job: _Job, done: int) -> MergedTensor:
    info, rounding = job.info, job.rounding
    return MergedTensor(info.name, info.shape, info.type, job.type, job.changed, done, rounding.rmse, rounding.kept)


def _metadata(base: ModelFile, config: MergeConfig) -> Mapping[str, Any]:
    """The base's, in its order; general.file_type says what is in the file, at the end where llama.cpp puts it."""
    metadata = typed_metadata(with_metadata(base, stated_metadata(config.ctx, config.rope_freq_base)))
    if config.outtype == "same":
        return metadata
    if config.outtype is None:
        metadata.pop("general.file_type", None)
        return metadata | {"general.file_type": _MOSTLY_F16}
    wanted = config.type
    assert wanted is not None
    if wanted not in FLOAT_TYPES:
        metadata.setdefault("general.quantization_version", _QUANTIZATION_VERSION)
    return metadata | {"general.file_type": _file_type(wanted)}


def _file_type(ggml_type: GGMLType) -> int:
    """The number of a file whose matrices are all of this type; of the K types' mixtures, the smallest."""
    numbers = {name: number for number, name in FILE_TYPES.items()}
    name = ggml_type.name
    return numbers.get(name, numbers.get(f"{name}_S", numbers.get(f"{name}_MOE", _MOSTLY_F16)))
