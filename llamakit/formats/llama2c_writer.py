"""Writes llama2.c's `.bin` models, export versions 0, 1 and 2: the bytes that its export.py writes.

The file stacks every kind of weight over the layers, so the tensors are asked for in that order, whatever the order
in which they are given. Layouts: see llama2c.py.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llamakit.errors import FormatError, MismatchError, UnsupportedError
from llamakit.files import atomic_path, escape_control
from llamakit.formats.base import TensorData, read_back
from llamakit.formats.gguf_writer import Typed
from llamakit.formats.llama2c import (
    HEADER_BYTES,
    MAGIC,
    RMS_EPS,
    ROPE_FREQ_BASE,
    Config,
    Llama2cFile,
    walk,
)
from llamakit.ggml import GGMLType

_GROUP = 64
_CHUNK = 1 << 20  # weights quantized, and rotary angles computed, at a time
_TO_GGUF = "convert it to GGUF instead, which holds all of a Llama"


def write_llama2c(
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any],
    tensors: Iterable[TensorData],
    version: int = 0,
    verify: Callable[[Llama2cFile], None] | None = None,
) -> None:
    """Write a llama2.c model: to a temporary name, flushed, read back by the strict reader, then renamed over `path`.

    metadata: under GGUF's keys; of the tokenizer's only the number of tokens is looked at, llama2.c keeps them in a
    file of their own. tensors: all of a Llama's, F32, in any order; without output.weight the embedding is the output
    too. version: 0 and 1 float32, 2 int8 with a float32 scale for each group of (at most) 64.
    verify: called with the opened result before the rename; what it raises leaves `path` as it was.

    Raises UnsupportedError, by name, for what the format cannot hold, MismatchError for another number of tokens than
    embeddings, FormatError for metadata that is missing or impossible, SaveError when the disk refuses, and ValueError
    for tensors that are not F32, not as long as their shape says, or given twice.
    """
    tensors = list(tensors)
    given = {tensor.name: tensor for tensor in tensors}
    if len(given) != len(tensors):
        raise ValueError("two tensors have the same name")
    config = _config(metadata, given, version)
    theta = _number(metadata, "llama.rope.freq_base", ROPE_FREQ_BASE)
    _check_tensors(config, given)

    def check(temporary: Path) -> None:
        with read_back(Llama2cFile, temporary) as file:
            if verify is not None:
                verify(file)

    with atomic_path(path, check) as temporary, open(temporary, "wb") as out:
        out.write(_header(config))
        for name, shape, _ in walk(config):
            if not name:
                _write_rope_tables(out, config, theta)
            elif config.group and len(shape) == 2:
                _write_quantized(out, given[name], config.group)
            else:
                _write_floats(out, given[name])


def llama2c_notes(metadata: Mapping[str, Any], version: int = 0) -> list[str]:
    """What llama2.c itself will compute otherwise than the model does, one line each; metadata under GGUF's keys.

    run.c and runq.c know one base of the rotary embedding and one epsilon, and runq.c only groups that end with a row:
    a file with others can be written and read back, and gives another text there.
    """
    notes = []
    theta = _number(metadata, "llama.rope.freq_base", ROPE_FREQ_BASE)
    if theta != ROPE_FREQ_BASE:
        kept = f"version {version} does not keep it" if version else "llamakit finds it in the file's tables"
        notes.append(
            f"llama.rope.freq_base is {theta:g}, llama2.c always takes {ROPE_FREQ_BASE:g}: its text will be wrong "
            f"({kept})"
        )
    eps = _number(metadata, "llama.attention.layer_norm_rms_epsilon", RMS_EPS)
    if np.float32(eps) != np.float32(RMS_EPS):
        notes.append(
            f"llama.attention.layer_norm_rms_epsilon is {eps:g}, llama2.c always takes {RMS_EPS:g}: its text will "
            "differ (no version keeps it)"
        )
    group = _group(_count(metadata, "llama.embedding_length"), version)
    n_ff = _count(metadata, "llama.feed_forward_length")
    if group and n_ff % group:
        notes.append(
            f"llama.feed_forward_length is {n_ff}, no multiple of the group of {group}: llama2.c's runq.c will give "
            "wrong text (versions 0 and 1 have no groups)"
        )
    return notes


def _value(metadata: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """A value without its GGUF type; of an array that says the same for every layer, that."""
    value = metadata.get(key, default)
    value = value.value if isinstance(value, Typed) else value
    if isinstance(value, np.ndarray) and value.size:
        if (value != value[0]).any():
            raise _unsupported(f"{key} differs from layer to layer")
        value = value[0]
    return value


def _count(metadata: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = _value(metadata, key, default)
    if value is None:
        raise FormatError(f"{key} is missing, and a llama2.c model needs it")
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise FormatError(f"{key} is no whole number")
    return int(value)


def _number(metadata: Mapping[str, Any], key: str, default: float) -> float:
    value = _value(metadata, key, default)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.number)):
        raise FormatError(f"{key} is no number")
    if not 0 <= value < np.inf:
        raise FormatError(f"{key} is {value:g} (expected a positive number)")
    return float(value)


def _unsupported(reason: str) -> UnsupportedError:
    return UnsupportedError(f"{reason}: a llama2.c model cannot hold that", hint=_TO_GGUF)


def _config(metadata: Mapping[str, Any], given: Mapping[str, TensorData], version: int) -> Config:
    """The header of the file. Raises what `write_llama2c` says for metadata that does not fit into it."""
    if version not in (0, 1, 2):
        raise ValueError(f"there is no llama2.c version {version}")
    architecture = _value(metadata, "general.architecture")
    if architecture != "llama":
        raise UnsupportedError(f"the architecture {escape_control(str(architecture))} is none that llama2.c runs")
    if "token_embd.weight" not in given:
        raise FormatError("the tensor token_embd.weight is missing")
    n_embd = _count(metadata, "llama.embedding_length")
    n_head = _count(metadata, "llama.attention.head_count")
    config = Config(
        version=version,
        n_embd=n_embd,
        n_ff=_count(metadata, "llama.feed_forward_length"),
        n_layer=_count(metadata, "llama.block_count"),
        n_head=n_head,
        n_head_kv=_count(metadata, "llama.attention.head_count_kv", n_head),
        n_vocab=given["token_embd.weight"].shape[0],
        n_ctx=_count(metadata, "llama.context_length"),
        tied="output.weight" not in given,
        group=_group(n_embd, version),
    )
    fault = config.fault()
    if fault:
        raise UnsupportedError(f"the model does not fit into a llama2.c header: {fault}", hint=_TO_GGUF)
    _check_metadata(metadata, config)
    return config


def _group(n_embd: int, version: int) -> int:
    """Weights that share a scale in version 2: 64, halved until it divides n_embd; 0 in the others."""
    group = _GROUP if version == 2 else 0
    while group and n_embd % group:
        group //= 2
    return group


def _check_metadata(metadata: Mapping[str, Any], c: Config) -> None:
    """Everything that changes what the model computes, and has no place in the file."""
    for key in ("llama.attention.key_length", "llama.attention.value_length", "llama.rope.dimension_count"):
        if _count(metadata, key, c.head_dim) != c.head_dim:
            reason = f"{key} is {_count(metadata, key)} (expected n_embd / n_head, {c.n_embd} / {c.n_head})"
            raise _unsupported(reason)
    # llama.cpp's defaults: type linear, factor from the old scale_linear, and no factor is no scaling.
    factor = _number(metadata, "llama.rope.scaling.factor", _number(metadata, "llama.rope.scale_linear", 0.0))
    scaling = _value(metadata, "llama.rope.scaling.type", "linear")
    if scaling != "none" and factor not in (0, 1):
        raise _unsupported(f"llama.rope.scaling is {escape_control(str(scaling))}, factor {factor:g}")
    for key in ("llama.attention.sliding_window", "llama.expert_count"):
        if _count(metadata, key, 0):
            raise _unsupported(f"{key} is {_count(metadata, key)}")
    tokens = _value(metadata, "tokenizer.ggml.tokens")
    if tokens is not None and len(tokens) != c.n_vocab:
        raise MismatchError(
            f"the vocabulary has {len(tokens)} tokens, the model {c.n_vocab} embeddings: run.c needs as many",
            hint="make the embedding as long as the vocabulary before converting",
        )


def _check_tensors(config: Config, given: Mapping[str, TensorData]) -> None:
    """Exactly the tensors of the format, each F32 and of its shape."""
    wanted = {name: shape for name, shape, _ in walk(config) if name}
    for name in given:
        if name not in wanted:
            kind = "a bias" if name.endswith(".bias") else "a tensor"
            raise _unsupported(f"the model has {kind}, {escape_control(name)}")
    for name, shape in wanted.items():
        if name not in given:
            raise FormatError(f"the tensor {name} is missing")
        if tuple(given[name].shape) != shape:
            raise FormatError(f"the tensor {name} has the shape {tuple(given[name].shape)} (expected {shape})")
        if given[name].type != GGMLType.F32:
            raise ValueError(f"tensor '{name}' is {given[name].type.name}, not F32")


def _header(c: Config) -> bytes:
    # Version 0 has no place for a flag: a negative vocabulary says that the output is a matrix of its own.
    n_vocab = -c.n_vocab if c.version == 0 and not c.tied else c.n_vocab
    numbers = struct.pack("<7i", c.n_embd, c.n_ff, c.n_layer, c.n_head, c.n_head_kv, n_vocab, c.n_ctx)
    if c.version == 0:
        return numbers
    head = MAGIC + struct.pack("<i", c.version) + numbers + bytes([c.tied])
    head += struct.pack("<i", c.group) if c.version == 2 else b""
    return head.ljust(HEADER_BYTES, b"\0")


def _values(tensor: TensorData) -> Iterator[np.ndarray]:
    """A tensor's float32 values, flat, in pieces of at most `_CHUNK`. Raises ValueError unless all are there."""
    data = tensor.data() if callable(tensor.data) else tensor.data
    n = 0
    for part in [data] if isinstance(data, np.ndarray) else data:
        flat = np.ascontiguousarray(part).reshape(-1).view(np.uint8).view("<f4")
        n += flat.size
        for start in range(0, flat.size, _CHUNK):
            yield flat[start : start + _CHUNK]
    if n != np.prod(tensor.shape):
        raise ValueError(f"tensor '{tensor.name}' of shape {tensor.shape} has {n} values")


def _write_floats(out: BinaryIO, tensor: TensorData) -> None:
    for values in _values(tensor):
        out.write(values.data)


def _write_quantized(out: BinaryIO, tensor: TensorData, group: int) -> None:
    """All codes of a tensor, then all scales; a group may go on in the next row, or in the next piece."""
    scales, rest = [], np.empty(0, "<f4")
    for piece in _values(tensor):
        values = np.concatenate([rest, piece]) if rest.size else piece
        whole = values.size - values.size % group
        rest = values[whole:]
        codes, scale = _quantize(values[:whole].reshape(-1, group), tensor.name)
        out.write(codes.data)
        scales.append(scale)
    for scale in scales:
        out.write(scale.data)


def _quantize(groups: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Groups (n, group) float32 -> int8 codes of the same shape, float32 scales (n,): code * scale is the weight.

    scale = max|w| / 127, the code rounded half to even (llama2.c export.py, quantize_q80); where the scale is 0 the
    codes are 0, which export.py leaves to chance (0/0).
    """
    scale = np.abs(groups).max(axis=1) / np.float32(127)
    if not np.isfinite(scale).all():
        raise UnsupportedError(f"the tensor {name} has weights that are not finite: int8 cannot hold them")
    divisor = np.where(scale > 0, scale, np.float32(1))[:, None]
    codes = np.where(scale[:, None] > 0, np.rint(groups / divisor), np.float32(0))
    # A scale among the smallest floats is rounded so coarsely that a code could leave its byte.
    return np.clip(codes, -127, 127).astype(np.int8), scale.astype("<f4")


def _write_rope_tables(out: BinaryIO, c: Config, theta: float) -> None:
    """cos, then sin, (n_ctx, head_dim/2) each, of position * theta^(-2i/head_dim) (llama2.c model.py).

    run.c skips them. They are computed by torch, as export.py does, since numpy's sine differs in the last bit.
    """
    import torch

    frequencies = 1.0 / (theta ** (torch.arange(0, c.head_dim, 2).float() / c.head_dim))
    rows = max(1, _CHUNK // len(frequencies))
    for function in (torch.cos, torch.sin):
        for start in range(0, c.n_ctx, rows):
            angles = torch.outer(torch.arange(start, min(start + rows, c.n_ctx)), frequencies)
            out.write(function(angles).numpy().astype("<f4").data)
