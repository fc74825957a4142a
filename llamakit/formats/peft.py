"""PEFT's adapter folders: adapter_config.json and adapter_model.safetensors (or .bin), read and written.

A folder has Hugging Face's names and its order of the rows of q and k; both become GGUF's here, for which the base
model is asked how many heads it has. PEFT: lora_A (r, n_in), lora_B (n_out, r), delta W = scale B A; of an embedding,
lora_embedding_A (r, n_vocab), lora_embedding_B (n_embd, r), delta W = scale (B A)^T.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llamakit.errors import FormatError, MismatchError, UnsupportedError
from llamakit.files import atomic_directory, escape_control
from llamakit.formats.base import ModelFile, TensorData, TensorInfo
from llamakit.formats.floats import from_float32, to_float32
from llamakit.formats.names import gguf_name, huggingface_name, rope_rows, rope_rows_back, rotary_heads
from llamakit.formats.peft_config import PeftConfig, parse_config
from llamakit.formats.safetensors import SafetensorsFile, write_safetensors
from llamakit.formats.strict_json import read_object
from llamakit.ggml import FLOAT_TYPES, GGMLType

if TYPE_CHECKING:
    from llamakit.formats.torch_file import TorchFile

CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
#: what `write_peft` writes
FILES = (CONFIG, WEIGHTS)
_PREFIX = "base_model.model."
_EMBEDDING = "token_embd.weight"
_COMPARED_ELEMENTS = 1 << 22
# The name under which PEFT holds an adapter in memory ("default") is left out of its files, by most versions.
_LORA = re.compile(r"(.+)\.(?:lora_([AB])(?:\.default)?\.weight|lora_embedding_([AB])(?:\.default)?)")

Pair = tuple[np.ndarray, np.ndarray]


@dataclass
class PeftWeights:
    """A folder's content in GGUF's words.

    alpha: the scale of every pair is alpha / rank. tensors: name -> (A (r, n_in), B (n_out, r)), float32.
    replaced: name -> the whole tensor that stands in the base's place, float32 (n_out, n_in); a norm has one row.
    """

    alpha: float
    tensors: dict[str, Pair] = field(default_factory=dict)
    replaced: dict[str, np.ndarray] = field(default_factory=dict)


def read_peft(folder: str | os.PathLike[str], base: ModelFile) -> PeftWeights:
    """A PEFT folder for this base; whole, in memory.

    The scale that PEFT gives each module (lora_alpha, use_rslora, rank_pattern, alpha_pattern) becomes one alpha; where
    a module's differs, B takes up the ratio: exactly, where that is a power of two. A module that was saved whole
    (modules_to_save) and equals the base's is left out.

    Raises UsageError when a file cannot be read, FormatError for broken ones, UnsupportedError, by name, for what is
    more than pairs and whole tensors, MismatchError for what the base does not have.
    """
    folder = Path(folder)
    config = parse_config(folder / CONFIG, read_object(folder / CONFIG))
    with closing(_open_weights(folder)) as file:
        halves, whole = _sorted_out(file)
        weights = PeftWeights(config.alpha)
        for module, half in halves.items():
            name = _base_name(file.path, module)
            weights.tensors[name] = _pair(file, config, base, module, half)
        for module, stored in whole.items():
            name = _base_name(file.path, module)
            values = _whole(file, base, name, stored)
            if not _equals_base(values, base, name):
                weights.replaced[name] = values
    if not weights.tensors and not weights.replaced:
        raise FormatError("is an adapter without any LoRA tensor", path=folder)
    return weights


def _open_weights(folder: Path) -> SafetensorsFile | TorchFile:
    if (folder / WEIGHTS).exists() or not (folder / OLD_WEIGHTS).exists():
        return SafetensorsFile(folder / WEIGHTS)
    from llamakit.formats.torch_file import TorchFile

    return TorchFile(folder / OLD_WEIGHTS)


def _sorted_out(file: SafetensorsFile | TorchFile) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """(module -> A or B, or embedding_A or embedding_B -> stored name, module -> stored name of its whole weight)."""
    halves: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for stored in (*file.tensors, *file.other_dtypes):
        name = stored.removeprefix(_PREFIX)
        match = _LORA.fullmatch(name)
        if match:
            kind = match[2] or f"embedding_{match[3]}"
            if halves.setdefault(match[1], {}).setdefault(kind, stored) != stored:
                raise FormatError(f"two tensors are lora_{kind} of '{escape_control(match[1])}'", path=file.path)
        elif name.endswith(".base_layer.weight"):
            continue  # PEFT may save the base's own embedding beside the adapter of it
        elif name.endswith(".weight"):
            if whole.setdefault(name.removesuffix(".weight"), stored) != stored:
                raise FormatError(f"two tensors are '{escape_control(name)}'", path=file.path)
        else:
            raise _unexpected(file.path, stored)
    return halves, whole


def _unexpected(path: Path, stored: str) -> UnsupportedError:
    for part, what in (("lora_magnitude_vector", "DoRA"), (".bias", "biases"), ("trainable_tokens", "single tokens")):
        if part in stored:
            return UnsupportedError(f"trains {what} ('{escape_control(stored)}'), which is not supported", path=path)
    return UnsupportedError(f"has the tensor '{escape_control(stored)}', which is no part of a LoRA", path=path)


def _base_name(path: Path, module: str) -> str:
    name = gguf_name(f"{module}.weight")
    if name is None:
        raise UnsupportedError(f"adapts '{escape_control(module)}', which a Llama does not have", path=path)
    return name


def _matrix(file: SafetensorsFile | TorchFile, stored: str) -> np.ndarray:
    """A tensor as a float32 matrix; a vector becomes one row."""
    shown = escape_control(stored)
    if stored in file.other_dtypes or file.tensors[stored].type not in FLOAT_TYPES:
        kind = file.other_dtypes.get(stored) or file.tensors[stored].type.name
        raise UnsupportedError(f"'{shown}' has the type {kind} (expected F32, F16 or BF16)", path=file.path)
    info = file.tensors[stored]
    if not 1 <= len(info.shape) <= 2 or not info.n_elements:
        raise FormatError(f"'{shown}' is no matrix (shape {info.shape})", path=file.path)
    return np.ascontiguousarray(to_float32(file.read(stored), info.type))


def _pair(
    file: SafetensorsFile | TorchFile, config: PeftConfig, base: ModelFile, module: str, half: Mapping[str, str]
) -> Pair:
    """(A, B) of a module in GGUF's orientation and order of rows, scaled so that config.alpha / rank is its scale."""
    name, shown = _base_name(file.path, module), escape_control(module)
    embedding = any(kind.startswith("embedding") for kind in half)
    wanted = {"embedding_A", "embedding_B"} if embedding else {"A", "B"}
    if half.keys() != wanted:
        raise FormatError(f"the LoRA pair of '{shown}' is not whole (it has {', '.join(sorted(half))})", path=file.path)
    if embedding != (name == _EMBEDDING):
        raise FormatError(f"the LoRA pair of '{shown}' is {'' if embedding else 'not '}of an embedding", path=file.path)
    a, b = (_matrix(file, half[kind]) for kind in sorted(half))
    if a.shape[0] != b.shape[1]:
        raise FormatError(f"LoRA tensors of '{shown}' differ in rank ({a.shape[0]}, {b.shape[1]})", path=file.path)
    if a.shape[0] != config.rank_of(module):
        raise FormatError(
            f"the LoRA pair of '{shown}' has rank {a.shape[0]} (expected {config.rank_of(module)})", path=config.path
        )
    if embedding:
        a, b = np.ascontiguousarray(b.T), np.ascontiguousarray(a.T)
    _check_shape(file.path, base, name, (b.shape[0], a.shape[1]))
    ratio = config.alpha_of(module) / config.alpha
    b = b if ratio == 1 else b * np.float32(ratio)
    return a, _rotated(base, name, b)


def _whole(file: SafetensorsFile | TorchFile, base: ModelFile, name: str, stored: str) -> np.ndarray:
    values = _matrix(file, stored)
    _check_shape(file.path, base, name, values.shape)
    return _rotated(base, name, values)


def _check_shape(path: Path, base: ModelFile, name: str, shape: tuple[int, ...]) -> None:
    info = base.tensors.get(name)
    if info is None:
        tied = " (its output is its embedding)" if name == "output.weight" else ""
        raise MismatchError(f"adapts {name}, which the base model {base.path} does not have{tied}", path=path)
    expected = _as_matrix(info)
    if shape != expected:
        raise MismatchError(
            f"{name} has the wrong shape for {base.path} "
            f"(expected {expected[0]} x {expected[1]}, got {shape[0]} x {shape[1]})",
            path=path,
            hint="tokens were added in training" if shape[1:] == expected[1:] and shape[0] > expected[0] else None,
        )


def _as_matrix(info: TensorInfo) -> tuple[int, int]:
    return info.n_rows, info.shape[-1] if info.shape else 1


def _rotated(base: ModelFile, name: str, rows: np.ndarray, *, back: bool = False) -> np.ndarray:
    """The rows of q and k in the order that GGUF has, or (back) in Hugging Face's; other tensors as they are."""
    heads = rotary_heads(name, *_heads(base))
    if heads is None:
        return rows
    if len(rows) % (2 * heads):
        raise MismatchError(f"{name} has {len(rows)} rows (expected a multiple of {2 * heads})", path=base.path)
    return rows[(rope_rows_back if back else rope_rows)(len(rows), heads)]


def _heads(base: ModelFile) -> tuple[int, int]:
    """(n_head, n_head_kv) of a Llama."""
    if base.metadata.get("general.architecture") != "llama":
        found = escape_control(str(base.metadata.get("general.architecture")))
        raise UnsupportedError(f"is a '{found}' model: PEFT adapters are known for 'llama' only", path=base.path)
    n_head = base.metadata.get("llama.attention.head_count")
    n_head_kv = base.metadata.get("llama.attention.head_count_kv", n_head)
    for value in (n_head, n_head_kv):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 16:
            raise UnsupportedError(f"has no single number of heads (got {escape_control(str(value))})", path=base.path)
    return int(n_head), int(n_head_kv)  # pyright: ignore[reportArgumentType]


def _equals_base(values: np.ndarray, base: ModelFile, name: str) -> bool:
    """Whether a whole tensor is what the base has already; what the base holds packed is never said to be equal."""
    info = base.tensors[name]
    if info.type not in FLOAT_TYPES:
        return False
    step = max(1, _COMPARED_ELEMENTS // values.shape[1])
    return all(
        np.array_equal(from_float32(values[start : start + step], info.type), base.read(name, start, stop))
        for start, stop in ((s, min(s + step, len(values))) for s in range(0, len(values), step))
    )


def write_peft(
    path: str | os.PathLike[str],
    *,
    alpha: float,
    tensors: Mapping[str, Pair],
    base: ModelFile,
    base_model: str | None = None,
    replace: bool = False,
) -> None:
    """Write a PEFT folder, F32, that `peft` loads on the same model in Hugging Face's form; whole or not at all.

    alpha, tensors: as in `Adapter`: GGUF's names, A (r, n_in), B (n_out, r), scale alpha / r, or 1 where alpha is 0.
    base_model: what stands as base_model_name_or_path. replace: an older one may stand there, and nothing else. The
    bytes depend on the arguments alone.

    Raises UnsupportedError for a tensor that PEFT has no pair for (norms, biases), MismatchError for one that the base
    does not have, UsageError where `path` is taken, SaveError when the disk refuses.
    """
    modules = {name: _module(Path(path), base, name, pair) for name, pair in tensors.items()}
    ordered = [name for name in base.tensors if name in tensors]
    config = _config(alpha, {modules[name]: len(tensors[name][0]) for name in ordered}, base_model)
    stored = [data for name in ordered for data in _stored(base, name, modules[name], tensors[name])]
    with atomic_directory(path, replacing=FILES if replace else ()) as folder:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_safetensors(folder / WEIGHTS, tensors=stored, metadata={"format": "pt"})


def _module(path: Path, base: ModelFile, name: str, pair: Pair) -> str:
    """Hugging Face's module of a tensor."""
    a, b = pair
    _check_shape(path, base, name, (b.shape[0], a.shape[1]))
    full = huggingface_name(name)
    if full is None or not name.endswith(".weight") or name.endswith("_norm.weight"):
        raise UnsupportedError(
            f"PEFT has no LoRA pair for '{escape_control(name)}', which this adapter changes",
            path=path,
            hint="merge it: llamakit merge",
        )
    return full.removesuffix(".weight")


def _config(alpha: float, ranks: Mapping[str, int], base_model: str | None) -> dict[str, Any]:
    """module -> rank, as PEFT's LoraConfig: the commonest rank stands for all, a pattern for each of the others."""
    r = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != r}
    number = alpha or float(r)
    return {
        "alpha_pattern": {} if alpha else others,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(number) if number.is_integer() else number,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": others,
        "target_modules": list(ranks),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _stored(base: ModelFile, name: str, module: str, pair: Pair) -> list[TensorData]:
    """A pair under PEFT's names, in its orientation and order of rows."""
    a, b = pair
    if name == _EMBEDDING:
        halves = {"lora_embedding_A": b.T, "lora_embedding_B": a.T}
    else:
        halves = {"lora_A.weight": a, "lora_B.weight": _rotated(base, name, b, back=True)}
    return [
        TensorData(f"{_PREFIX}{module}.{half}", values.shape, GGMLType.F32, np.ascontiguousarray(values, "<f4"))
        for half, values in halves.items()
    ]
