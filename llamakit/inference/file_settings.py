"""The sampling that a model file recommends: `general.sampling.*`, as llama.cpp reads it (common/common.cpp)."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from llamakit.errors import FormatError, UsageError
from llamakit.formats.base import ModelFile
from llamakit.inference.config import GenerateConfig
from llamakit.inference.sampler_names import parse_names

#: key behind general.sampling. -> (field of GenerateConfig, its type)
_KEYS = {
    "sequence": ("samplers", str),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "xtc_probability": ("xtc_probability", float),
    "xtc_threshold": ("xtc_threshold", float),
    "temp": ("temperature", float),
    "penalty_last_n": ("repeat_last_n", int),
    "penalty_repeat": ("repeat_penalty", float),
    "mirostat": ("mirostat", int),
    "mirostat_tau": ("mirostat_ent", float),
    "mirostat_eta": ("mirostat_lr", float),
}


def with_file_settings(
    config: GenerateConfig, file: ModelFile, *, given: Collection[str] = ()
) -> tuple[GenerateConfig, dict[str, Any]]:
    """The configuration with the file's values for all fields that are not in `given`: (it, what the file set).

    llama2.c's sampler takes nothing from a file. Raises FormatError for a value that cannot be.
    """
    if config.rng == "llama2c":
        return config, {}
    found: dict[str, Any] = {}
    for name, (field, kind) in _KEYS.items():
        key = f"general.sampling.{name}"
        if key in file.metadata and field not in given:
            value = _value(file, key, kind)
            found[field] = max(0, value) if field == "repeat_last_n" else value
    try:
        return replace(config, **found), found
    except UsageError as error:
        reason = f"general.sampling.* cannot be used: {error}"
        raise FormatError(reason, path=file.path, hint="give the option yourself") from error


def _value(file: ModelFile, key: str, kind: type) -> Any:
    value = file.metadata[key]
    value = getattr(value, "value", value)  # a Typed
    if kind is str and isinstance(value, str):
        try:
            return ";".join(parse_names(value))
        except UsageError as error:
            reason = f"{key} cannot be used: {error.reason.removeprefix('--samplers ')}"
            raise FormatError(reason, path=file.path, hint="name the samplers with --samplers") from error
    if kind is not str and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise FormatError(f"{key} is {value} (expected a finite number)", path=file.path)
        return kind(value)
    raise FormatError(f"{key} is no {'text' if kind is str else 'number'}", path=file.path)
