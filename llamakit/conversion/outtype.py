"""Which type each tensor of a converted model gets."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import torch

from llamakit.conversion.file_types import FileType, parse_file_type
from llamakit.conversion.quantize_policy import output_order, tensor_types
from llamakit.errors import UsageError
from llamakit.formats.base import ModelFile, TensorInfo
from llamakit.ggml import BLOCK_SIZES, FLOAT_TYPES, GGMLType
from llamakit.quant import dequantize

_TERNARY = (GGMLType.TQ1_0, GGMLType.TQ2_0)
#: outtypes whose rule is convert_hf_to_gguf.py's: every matrix in one type; the others are mixtures, llama-quantize's
_UNIFORM = ("F32", "F16", "BF16", "Q8_0", "TQ1_0", "TQ2_0")
_NUMPY = {GGMLType.F32: np.dtype("<f4"), GGMLType.F16: np.dtype("<f2")}
_TORCH = MappingProxyType({GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16})


def automatic_outtype(file: ModelFile) -> str:
    """bf16 or f16, whichever the first matrix in 16 bits has; f16 where there is none (convert_hf_to_gguf.py)."""
    for info in file.tensors.values():
        if len(info.shape) > 1 and info.type in (GGMLType.BF16, GGMLType.F16):
            return info.type.name.lower()
    return "f16"


def gguf_types(file: ModelFile, outtype: str) -> tuple[dict[str, GGMLType], FileType]:
    """(tensor name -> its type in a GGUF file of this outtype, what the file is then called).

    Raises UsageError or UnsupportedError for an outtype that cannot be written.
    """
    file_type = parse_file_type(outtype)
    if file_type.default is None:
        raise UsageError(f"--outtype {outtype} names no type", hint="--outtype auto keeps the types of a GGUF file")
    if file_type.name in _UNIFORM:
        return {name: uniform_type(info, file_type.default) for name, info in file.tensors.items()}, file_type
    infos = [file.tensors[name] for name in output_order(file.tensors)]
    types = tensor_types(file_type, file.metadata, infos).types
    # What a mixture leaves as it is are vectors, in a checkpoint in 16 bits: those are F32 in GGUF.
    plain = {name: uniform_type(info, GGMLType.F32) for name, info in file.tensors.items() if len(info.shape) < 2}
    return {name: plain.get(name, types[name]) for name in file.tensors}, file_type


def uniform_type(info: TensorInfo, wanted: GGMLType) -> GGMLType:
    """The type of a tensor in a GGUF file whose matrices are `wanted`: vectors and norms stay F32."""
    if len(info.shape) < 2 or info.name.endswith("_norm.weight") or not info.name.endswith(".weight"):
        return GGMLType.F32
    if wanted in _TERNARY and info.name in ("token_embd.weight", "output.weight"):
        return GGMLType.F16
    return GGMLType.F16 if info.shape[-1] % BLOCK_SIZES[wanted][0] else wanted


def huggingface_types(file: ModelFile, outtype: str) -> tuple[dict[str, GGMLType], str]:
    """(tensor name -> its type in a Hugging Face folder, the outtype): one for all matrices.

    auto: the type of the matrices where all have one, f16 for packed or mixed ones. A vector that GGUF holds in
    float32 gets the matrices' type, too, where that loses nothing: a model in bf16 comes back as it was.
    Raises UsageError for an outtype that safetensors do not have.
    """
    if outtype == "auto":
        found = {info.type for info in file.tensors.values() if len(info.shape) > 1}
        wanted = found.pop() if len(found) == 1 and found <= FLOAT_TYPES else GGMLType.F16
    else:
        wanted = GGMLType.__members__.get(outtype.upper(), GGMLType.Q8_0)
    if wanted not in FLOAT_TYPES:
        raise UsageError(f"--outtype {outtype} cannot be in a Hugging Face folder (expected f32, f16 or bf16)")
    types = {name: _vector_type(file, info, wanted) for name, info in file.tensors.items()}
    return types, wanted.name.lower()


def _vector_type(file: ModelFile, info: TensorInfo, wanted: GGMLType) -> GGMLType:
    if info.name == "rope_freqs.weight":
        return GGMLType.F32  # no tensor there, but numbers in config.json
    if len(info.shape) > 1 or wanted is GGMLType.F32 or info.type is wanted:
        return wanted
    values = dequantize(torch.from_numpy(file.read(info.name)), info.type)
    return wanted if torch.equal(values.to(_TORCH[wanted]).float(), values) else GGMLType.F32
