"""The one torch Llama: configuration, layers, LoRA, key-value cache, loading."""

from llamakit.model.cache import KVCache
from llamakit.model.config import ModelConfig, RopeScaling
from llamakit.model.llama import Llama
from llamakit.model.load import WeightCache, load_config, load_model
from llamakit.model.lora import attach, detach

__all__ = [
    "KVCache",
    "Llama",
    "ModelConfig",
    "RopeScaling",
    "WeightCache",
    "attach",
    "detach",
    "load_config",
    "load_model",
]
