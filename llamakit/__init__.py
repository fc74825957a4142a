"""llamakit: fine-tune, run and inspect quantized GGUF Llama models with PyTorch.

from llamakit import GenerateConfig, generate, load_model, load_tokenizer, open_model

Every name below is imported when it is first used (PEP 562), so that `import llamakit` and `llamakit --help` load
neither torch nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llamakit.errors import (
    DataError,
    DivergedError,
    FormatError,
    LlamakitError,
    MemoryError_,
    MismatchError,
    SaveError,
    UnsupportedError,
    UsageError,
)

if TYPE_CHECKING:
    from llamakit.conversion.inspect import FileReport, inspect
    from llamakit.formats.adapter import Adapter, read_adapter, write_adapter
    from llamakit.formats.base import ModelFile, TensorInfo
    from llamakit.formats.open import open_model
    from llamakit.inference.completion import generate
    from llamakit.inference.config import GenerateConfig
    from llamakit.model import KVCache, Llama, ModelConfig, attach, detach, load_model
    from llamakit.quant import QTensor, dequantize
    from llamakit.tokenizer import Tokenizer, load_tokenizer
    from llamakit.training.config import FinetuneConfig
    from llamakit.training.finetune import finetune

#: as in pyproject.toml; reading it from the installed metadata would cost `--help` 30 ms
__version__ = "0.1.0"

#: exported name -> the module that defines it
_EXPORTS = {
    "Adapter": "llamakit.formats.adapter",
    "FileReport": "llamakit.conversion.inspect",
    "FinetuneConfig": "llamakit.training.config",
    "GenerateConfig": "llamakit.inference.config",
    "KVCache": "llamakit.model",
    "Llama": "llamakit.model",
    "ModelConfig": "llamakit.model",
    "ModelFile": "llamakit.formats.base",
    "QTensor": "llamakit.quant",
    "TensorInfo": "llamakit.formats.base",
    "Tokenizer": "llamakit.tokenizer",
    "attach": "llamakit.model",
    "dequantize": "llamakit.quant",
    "detach": "llamakit.model",
    "finetune": "llamakit.training.finetune",
    "generate": "llamakit.inference.completion",
    "inspect": "llamakit.conversion.inspect",
    "load_model": "llamakit.model",
    "load_tokenizer": "llamakit.tokenizer",
    "open_model": "llamakit.formats.open",
    "read_adapter": "llamakit.formats.adapter",
    "write_adapter": "llamakit.formats.adapter",
}

__all__ = [
    "Adapter",
    "DataError",
    "DivergedError",
    "FileReport",
    "FinetuneConfig",
    "FormatError",
    "GenerateConfig",
    "KVCache",
    "Llama",
    "LlamakitError",
    "MemoryError_",
    "MismatchError",
    "ModelConfig",
    "ModelFile",
    "QTensor",
    "SaveError",
    "TensorInfo",
    "Tokenizer",
    "UnsupportedError",
    "UsageError",
    "attach",
    "dequantize",
    "detach",
    "finetune",
    "generate",
    "inspect",
    "load_model",
    "load_tokenizer",
    "open_model",
    "read_adapter",
    "write_adapter",
]


def __getattr__(name: str) -> Any:
    """Import an exported name when it is first asked for."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
