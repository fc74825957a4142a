"""A model in smaller types: the file that llama-quantize writes, byte for byte on x86-64, and what it cost.

Memory holds a few slices of one tensor, whatever the model's size. What cannot be right is refused before anything is
written; llama-quantize stops halfway. Facts: llama.cpp of 2026, src/llama-quant.cpp.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamakit.conversion.convert import check_has_vocabulary, open_with_vocabulary
from llamakit.conversion.quantize_config import QuantizeConfig
from llamakit.conversion.quantize_plan import Job, PlannedTensor, QuantizePlan, Work, plan_work
from llamakit.conversion.recode import recoded
from llamakit.errors import UsageError
from llamakit.files import check_writable, escape_control, is_same_file, remove_stale_temporaries
from llamakit.formats.base import ModelFile, TensorData
from llamakit.formats.borrowed import stated_metadata, with_float_vectors, with_metadata
from llamakit.formats.gguf_split import split_keys, written_parts
from llamakit.formats.gguf_writer import written_tensors
from llamakit.formats.open import model_files, sniff
from llamakit.ggml import GGMLType


@dataclass(frozen=True)
class QuantizedTensor:
    """One tensor is in the file.

    index: in the order of the result, from 1. error: the root of sum (x - q)^2 / sum x^2 over its weights, x as they
    were, q as they were written; None where the tensor was copied. bytes_done: of the source's tensors so far, of
    QuantizePlan.source_bytes.
    """

    index: int
    tensor: PlannedTensor
    error: float | None
    bytes_done: int


@dataclass(frozen=True)
class Quantized:
    """The files are there. n_bytes: their size."""

    paths: tuple[Path, ...]
    n_bytes: int


Report = QuantizePlan | QuantizedTensor | Quantized


def open_source(config: QuantizeConfig) -> ModelFile:
    """The model to be quantized, as a GGUF file in its own types would hold it.

    Raises what `open_model` raises, and UsageError for a GGUF file that is no model and a model without a vocabulary.
    """
    stated = {"ctx": config.ctx, "rope_freq_base": config.rope_freq_base}
    file = open_with_vocabulary(config.source, vocab=config.vocab, **stated)
    is_gguf = sniff(config.source) == "gguf"
    try:
        found = file.metadata.get("general.type", "model")
        if found in ("adapter", "imatrix"):
            raise UsageError(f"is an {found}, not a model", path=config.source)
        if not is_gguf:
            check_has_vocabulary(file)
    except UsageError:
        file.close()
        raise
    file = with_metadata(file, stated_metadata(**stated))
    return file if is_gguf else with_float_vectors(file)


def plan_quantization(source: ModelFile, config: QuantizeConfig) -> QuantizePlan:
    """What quantizing an opened source would write; nothing is written.

    Raises UsageError, FormatError, UnsupportedError and MismatchError for options, models and importance matrices that
    cannot be used.
    """
    return plan_work(source, config).plan


def quantize(config: QuantizeConfig) -> Iterator[Report]:
    """Write a model in the wanted type: a QuantizePlan, a QuantizedTensor for each tensor, a Quantized.

    The files replace what stands at their paths only once they are whole.

    Raises UsageError, FormatError, UnsupportedError and MismatchError for a source or an importance matrix that cannot
    be read, is broken, or does not fit, for weights that are no finite numbers, for a source that is quantized already
    unless that is allowed, and for a target that is the source; SaveError when the disk refuses.
    """
    with open_source(config) as source:
        work = plan_work(source, config)
        plan = work.plan
        _check_quantizable(source, config, plan)
        _check_targets(config, plan.paths)
        yield plan
        done = 0
        jobs = [job for part in work.parts for job in part]
        for index, (job, _) in enumerate(zip(jobs, _written(source, config, work), strict=True), 1):
            done += job.source.n_bytes
            error = None if job.type is job.source.type else job.rounding.relative
            yield QuantizedTensor(index, job.planned, error, done)
    yield Quantized(plan.paths, sum(os.path.getsize(path) for path in plan.paths))


def _written(source: ModelFile, config: QuantizeConfig, work: Work) -> Iterator[TensorData]:
    """Each tensor once it is in its file; what an earlier run left when it was killed is removed first."""
    remove_stale_temporaries(config.target.parent, re.compile(re.escape(config.target.name)))
    parts = [[_tensor(source, job) for job in part] for part in work.parts]
    if not config.keep_split:
        return written_tensors(config.target, metadata=work.metadata, tensors=parts[0])
    n_parts, n_tensors = len(parts), sum(map(len, parts))
    keys = [split_keys(no, n_parts, n_tensors) if n_parts > 1 else {} for no in range(n_parts)]
    whole = [({**work.metadata, **keys[no]} if no == 0 else keys[no], part) for no, part in enumerate(parts)]
    return written_parts(config.target, whole)


def _tensor(source: ModelFile, job: Job) -> TensorData:
    tensor = recoded(source, job.source.name, job.type, importance=job.importance, rounding=job.rounding, finite=True)
    return tensor._replace(name=job.name, shape=job.shape)


def _check_quantizable(source: ModelFile, config: QuantizeConfig, plan: QuantizePlan) -> None:
    """Refuse what llama-quantize refuses."""
    if plan.without_imatrix:
        first = escape_control(plan.without_imatrix[0])
        raise UsageError(
            f"{plan.type} requires an importance matrix, and there is none for {first}",
            path=source.path,
            hint="make one with llamakit imatrix -m MODEL -f TEXT, and give it with --imatrix",
        )
    if plan.requantized and not config.allow_requantize:
        first = next(tensor for tensor in plan.tensors if tensor.name == plan.requantized[0])
        raise UsageError(
            f"requantizing from type {type_name(first.source_type)} is disabled ({escape_control(first.name)})",
            path=source.path,
            hint="take the model in f32, f16 or bf16; --allow-requantize does it all the same, and loses more",
        )


def _check_targets(config: QuantizeConfig, paths: Sequence[Path]) -> None:
    """The result may be no file that it is made of."""
    check_writable(paths[0])
    used = [config.vocab, None if config.imatrix is None else Path(config.imatrix)]
    inputs = [config.source, *model_files(config.source), *(path for path in used if path is not None)]
    for path in paths:
        if any(is_same_file(path, used) for used in inputs):
            raise UsageError("input and output files are the same", path=path, hint="name another output")


def type_name(ggml_type: GGMLType) -> str:
    """A type as llama.cpp spells it: q4_K, f16."""
    return re.sub(r"^(q\d)_k$", r"\1_K", ggml_type.name.lower())
