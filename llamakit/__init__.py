"""llamakit: train, fine-tune, run, convert, quantize, merge and compare Llama models, GGUF first, with PyTorch.

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
    from llamakit.conversion.convert import convert
    from llamakit.conversion.convert_config import ConvertConfig
    from llamakit.conversion.inspect import FileReport, inspect
    from llamakit.conversion.merge import merge
    from llamakit.conversion.merge_config import MergeConfig
    from llamakit.conversion.quantize import quantize
    from llamakit.conversion.quantize_config import QuantizeConfig
    from llamakit.dataset.new_tokenizer import train_tokenizer
    from llamakit.dataset.prepare import prepare
    from llamakit.dataset.prepare_config import PrepareConfig, TrainTokenizerConfig
    from llamakit.dataset.tokens import TokenData, open_tokens
    from llamakit.formats.adapter import Adapter, read_adapter, write_adapter, write_adapter_folder
    from llamakit.formats.base import ModelFile, TensorInfo
    from llamakit.formats.open import open_model
    from llamakit.inference.completion import generate
    from llamakit.inference.config import GenerateConfig
    from llamakit.inference.imatrix import imatrix
    from llamakit.inference.imatrix_config import ImatrixConfig
    from llamakit.inference.verify import VerifyReport, verify
    from llamakit.model import KVCache, Llama, ModelConfig, attach, detach, load_model
    from llamakit.quant import QTensor, dequantize
    from llamakit.tokenizer import Tokenizer, load_tokenizer
    from llamakit.training.config import FinetuneConfig
    from llamakit.training.finetune import finetune
    from llamakit.training.train import train
    from llamakit.training.train_config import TrainConfig

#: as in pyproject.toml; reading it from the installed metadata would cost `--help` 30 ms
__version__ = "0.1.0"

#: exported name -> the module that defines it
_EXPORTS = {
    "Adapter": "llamakit.formats.adapter",
    "ConvertConfig": "llamakit.conversion.convert_config",
    "FileReport": "llamakit.conversion.inspect",
    "FinetuneConfig": "llamakit.training.config",
    "GenerateConfig": "llamakit.inference.config",
    "ImatrixConfig": "llamakit.inference.imatrix_config",
    "KVCache": "llamakit.model",
    "Llama": "llamakit.model",
    "MergeConfig": "llamakit.conversion.merge_config",
    "ModelConfig": "llamakit.model",
    "ModelFile": "llamakit.formats.base",
    "PrepareConfig": "llamakit.dataset.prepare_config",
    "QTensor": "llamakit.quant",
    "QuantizeConfig": "llamakit.conversion.quantize_config",
    "TensorInfo": "llamakit.formats.base",
    "TokenData": "llamakit.dataset.tokens",
    "Tokenizer": "llamakit.tokenizer",
    "TrainConfig": "llamakit.training.train_config",
    "TrainTokenizerConfig": "llamakit.dataset.prepare_config",
    "VerifyReport": "llamakit.inference.verify",
    "attach": "llamakit.model",
    "convert": "llamakit.conversion.convert",
    "dequantize": "llamakit.quant",
    "detach": "llamakit.model",
    "finetune": "llamakit.training.finetune",
    "generate": "llamakit.inference.completion",
    "imatrix": "llamakit.inference.imatrix",
    "inspect": "llamakit.conversion.inspect",
    "load_model": "llamakit.model",
    "load_tokenizer": "llamakit.tokenizer",
    "merge": "llamakit.conversion.merge",
    "open_model": "llamakit.formats.open",
    "open_tokens": "llamakit.dataset.tokens",
    "prepare": "llamakit.dataset.prepare",
    "quantize": "llamakit.conversion.quantize",
    "read_adapter": "llamakit.formats.adapter",
    "train": "llamakit.training.train",
    "train_tokenizer": "llamakit.dataset.new_tokenizer",
    "verify": "llamakit.inference.verify",
    "write_adapter": "llamakit.formats.adapter",
    "write_adapter_folder": "llamakit.formats.adapter",
}

__all__ = [
    "Adapter",
    "ConvertConfig",
    "DataError",
    "DivergedError",
    "FileReport",
    "FinetuneConfig",
    "FormatError",
    "GenerateConfig",
    "ImatrixConfig",
    "KVCache",
    "Llama",
    "LlamakitError",
    "MemoryError_",
    "MergeConfig",
    "MismatchError",
    "ModelConfig",
    "ModelFile",
    "PrepareConfig",
    "QTensor",
    "QuantizeConfig",
    "SaveError",
    "TensorInfo",
    "TokenData",
    "Tokenizer",
    "TrainConfig",
    "TrainTokenizerConfig",
    "UnsupportedError",
    "UsageError",
    "VerifyReport",
    "attach",
    "convert",
    "dequantize",
    "detach",
    "finetune",
    "generate",
    "imatrix",
    "inspect",
    "load_model",
    "load_tokenizer",
    "merge",
    "open_model",
    "open_tokens",
    "prepare",
    "quantize",
    "read_adapter",
    "train",
    "train_tokenizer",
    "verify",
    "write_adapter",
    "write_adapter_folder",
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
