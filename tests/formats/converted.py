"""What convert_hf_to_gguf.py of llama.cpp (0c1e5709, with transformers 5) made of each model of `tests.hf.CONVERTED`.

Written down from runs of the script, with --outtype f32, f16 or bf16 as the model's dtype: sha256 of the metadata (each
key with its type and value; neither provenance nor vocabulary) and of all tensors (name, shape, type, data, in order).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from llamakit.formats.base import ModelFile
from llamakit.formats.gguf_values import GGUFValueType
from llamakit.ggml import GGMLType

#: of general.*, what does not say where a model comes from
_KEPT = ("general.architecture", "general.type", "general.file_type", "general.quantization_version")


def metadata_digest(entries: Iterable[tuple[str, GGUFValueType, Any]]) -> str:
    kept = [
        [key, kind.name, float(np.float32(value)) if kind is GGUFValueType.FLOAT32 else value]
        for key, kind, value in entries
        if key in _KEPT or key.startswith(("llama.", "general.sampling."))
    ]
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


def tensors_digest(file: ModelFile) -> str:
    """Vectors as float32, which is how the script writes them."""
    digest = hashlib.sha256()
    for name, info in file.tensors.items():
        data = file.read(name)
        kind = info.type
        if len(info.shape) == 1 and kind is not GGMLType.F32:
            kind = GGMLType.F32
            data = widened(data, info.type)
        digest.update(json.dumps([name, info.shape, kind.name]).encode())
        digest.update(data.tobytes())
    return digest.hexdigest()


def widened(data: np.ndarray, kind: GGMLType) -> np.ndarray:
    """Packed float16 or bfloat16 as float32."""
    if kind is GGMLType.F16:
        return data.view("<f2").astype("<f4")
    return (data.view("<u2").astype("<u4") << 16).view("<f4")


#: name -> (digest of the metadata, digest of the tensors)
EXPECTED: Mapping[str, tuple[str, str]] = {
    "plain, generation 4": (
        "6bf9337e2b46bd62bbedabb01b51283b30974f9fd40b87eebb2264fccc80142e",
        "a29226fc0404122ca0ffda1e25867f365be92785dac46d0cd1ae70426ff2a2fb",
    ),
    "plain, generation 5": (
        "6bf9337e2b46bd62bbedabb01b51283b30974f9fd40b87eebb2264fccc80142e",
        "a29226fc0404122ca0ffda1e25867f365be92785dac46d0cd1ae70426ff2a2fb",
    ),
    "mistral, generation 4": (
        "6bf9337e2b46bd62bbedabb01b51283b30974f9fd40b87eebb2264fccc80142e",
        "a29226fc0404122ca0ffda1e25867f365be92785dac46d0cd1ae70426ff2a2fb",
    ),
    "mistral, generation 5": (
        "6bf9337e2b46bd62bbedabb01b51283b30974f9fd40b87eebb2264fccc80142e",
        "a29226fc0404122ca0ffda1e25867f365be92785dac46d0cd1ae70426ff2a2fb",
    ),
    "mha, generation 4": (
        "f98d1ef0fe1dceefdda6a887d56381ec12794c26f4900f305052370ecd603a30",
        "fc722307aecdca66705eb5890f6b33ee9aa89522b52e6738ffa1c88a801740b3",
    ),
    "mha, generation 5": (
        "f98d1ef0fe1dceefdda6a887d56381ec12794c26f4900f305052370ecd603a30",
        "fc722307aecdca66705eb5890f6b33ee9aa89522b52e6738ffa1c88a801740b3",
    ),
    "tied, generation 4": (
        "6bf9337e2b46bd62bbedabb01b51283b30974f9fd40b87eebb2264fccc80142e",
        "89081abf38a437dbb7289e3b6b06abf182811d46d089b1febb69cdec91e263a5",
    ),
    "tied, generation 5": (
        "6bf9337e2b46bd62bbedabb01b51283b30974f9fd40b87eebb2264fccc80142e",
        "89081abf38a437dbb7289e3b6b06abf182811d46d089b1febb69cdec91e263a5",
    ),
    "biases, generation 4": (
        "6bf9337e2b46bd62bbedabb01b51283b30974f9fd40b87eebb2264fccc80142e",
        "64a756922026146e416184a0bb8dd15c316d593a36ede955bdd9e9b5b7e5d414",
    ),
    "biases, generation 5": (
        "6bf9337e2b46bd62bbedabb01b51283b30974f9fd40b87eebb2264fccc80142e",
        "64a756922026146e416184a0bb8dd15c316d593a36ede955bdd9e9b5b7e5d414",
    ),
    "head_dim, generation 4": (
        "9eab9d2d2de49a42983efc6612fed61b868ede549920f5255274aae863459874",
        "1270bfb327a1b7147cc1b4c24c67b85e14dbeddbb0a50259bb191f74bfa1686d",
    ),
    "head_dim, generation 5": (
        "9eab9d2d2de49a42983efc6612fed61b868ede549920f5255274aae863459874",
        "1270bfb327a1b7147cc1b4c24c67b85e14dbeddbb0a50259bb191f74bfa1686d",
    ),
    "theta, generation 4": (
        "05824cf29b4169091445057ad3fa1af819ec470cbc0626e5698b2c41be08e610",
        "a29226fc0404122ca0ffda1e25867f365be92785dac46d0cd1ae70426ff2a2fb",
    ),
    "theta, generation 5": (
        "05824cf29b4169091445057ad3fa1af819ec470cbc0626e5698b2c41be08e610",
        "a29226fc0404122ca0ffda1e25867f365be92785dac46d0cd1ae70426ff2a2fb",
    ),
    "no theta, generation 4": (
        "6bf9337e2b46bd62bbedabb01b51283b30974f9fd40b87eebb2264fccc80142e",
        "a29226fc0404122ca0ffda1e25867f365be92785dac46d0cd1ae70426ff2a2fb",
    ),
    "linear, generation 4": (
        "81361965d2bb32ae3aba61a887bd608a3fff3d6537058088cea318f08ce6ffde",
        "a29226fc0404122ca0ffda1e25867f365be92785dac46d0cd1ae70426ff2a2fb",
    ),
    "linear, generation 5": (
        "81361965d2bb32ae3aba61a887bd608a3fff3d6537058088cea318f08ce6ffde",
        "a29226fc0404122ca0ffda1e25867f365be92785dac46d0cd1ae70426ff2a2fb",
    ),
    "yarn, generation 4": (
        "eeea2570b7e00aa537e451b5a6a78ea2d8c2ef69ae0cea8953520a438f962aad",
        "a29226fc0404122ca0ffda1e25867f365be92785dac46d0cd1ae70426ff2a2fb",
    ),
    "yarn, generation 5": (
        "eeea2570b7e00aa537e451b5a6a78ea2d8c2ef69ae0cea8953520a438f962aad",
        "a29226fc0404122ca0ffda1e25867f365be92785dac46d0cd1ae70426ff2a2fb",
    ),
    "yarn-all, generation 4": (
        "d676bebea28bccfb2e262ec7fd65459a766f7cac1da47acbe7f4df37106bcae0",
        "a29226fc0404122ca0ffda1e25867f365be92785dac46d0cd1ae70426ff2a2fb",
    ),
    "yarn-all, generation 5": (
        "d676bebea28bccfb2e262ec7fd65459a766f7cac1da47acbe7f4df37106bcae0",
        "a29226fc0404122ca0ffda1e25867f365be92785dac46d0cd1ae70426ff2a2fb",
    ),
    "llama3, generation 4": (
        "513195c383746b8223b86c14fd1fd290f77babecc5296c9acb2b2d20840147a5",
        "2a41b17f1276a990861502e10d160099c426840efaf8da0b2b912da2593dcd6f",
    ),
    "llama3, generation 5": (
        "513195c383746b8223b86c14fd1fd290f77babecc5296c9acb2b2d20840147a5",
        "2a41b17f1276a990861502e10d160099c426840efaf8da0b2b912da2593dcd6f",
    ),
    "sharded, generation 4": (
        "6bf9337e2b46bd62bbedabb01b51283b30974f9fd40b87eebb2264fccc80142e",
        "567190701d037d343a60df4fd48fb9109dca6fa45a6d4ec18a401f5ad24e4126",
    ),
    "sharded, generation 5": (
        "6bf9337e2b46bd62bbedabb01b51283b30974f9fd40b87eebb2264fccc80142e",
        "567190701d037d343a60df4fd48fb9109dca6fa45a6d4ec18a401f5ad24e4126",
    ),
    "sampling, generation 4": (
        "efce1f0e60fc49af01cd828ed04422bf28db88433faf04937f8a93bdefc2dfea",
        "a29226fc0404122ca0ffda1e25867f365be92785dac46d0cd1ae70426ff2a2fb",
    ),
    "sampling, generation 5": (
        "efce1f0e60fc49af01cd828ed04422bf28db88433faf04937f8a93bdefc2dfea",
        "a29226fc0404122ca0ffda1e25867f365be92785dac46d0cd1ae70426ff2a2fb",
    ),
    "float16": (
        "f214bfd058cedc460f0be194eeff5701a5efa2d7571d9b651000634402b5662a",
        "40929c4eb91877bc7c8b74661b2aa727779dfe64448c2d81abbafd3aeec6152c",
    ),
    "bfloat16": (
        "925e12db2df42428c03d4147786dce190d756dcb75dbcedc2bb7995661bb7afb",
        "13ca039463d1d4134be2cc44dbbbdcea0a715d53502a6c65d1068d1194e39e87",
    ),
}
