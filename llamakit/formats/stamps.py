"""Two fingerprints of a model file, by which an adapter knows the model that it was trained on; and one of a
vocabulary, by which tokens on a disk know theirs.

The first says which model it is, whatever its quantization, name or file type; the second, which quantization
of it. Both read the header and a few KiB of each tensor, never the whole file.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llamakit.formats.base import ModelFile, TensorInfo
from llamakit.formats.gguf_values import StringArray

_SAMPLE_BYTES = 4096
_SEED = b"llamakit.base.file"
_FREQ_BASE = 10000.0  # of a GGUF file that names none
#: the embedding's shape says it; nothing is computed with it, and Meta's checkpoints leave it to the user
_NOT_THE_MODEL = ("vocab_size", "context_length")


@dataclass(frozen=True)
class BaseStamps:
    """model: sha256 (hex) of architecture, hyper-parameters but the context, tensor names and shapes, vocabulary.

    file: sha256 (hex) of tensor types and of 4 KiB of each tensor, at places drawn from its name and shape.
    """

    model: str
    file: str


def base_stamps(file: ModelFile) -> BaseStamps:
    """The stamps of an opened model. Raises FormatError when its data cannot be read."""
    return BaseStamps(_model_stamp(file), _file_stamp(file))


def vocabulary_stamp(metadata: Mapping[str, Any]) -> str:
    """sha256 (hex) of everything in `tokenizer.*` keys that decides which ids a text gets: kind, tokens, their types,
    the order of merging, BOS and EOS, a space before the text. The same for a vocabulary in any of its formats.
    """
    digest = hashlib.sha256()
    metadata = {k: getattr(v, "value", v) for k, v in metadata.items() if k.startswith("tokenizer.")}  # of `Typed`
    kind = str(metadata.get("tokenizer.ggml.model", ""))
    n = len(metadata.get("tokenizer.ggml.tokens", ()))
    types = np.asarray(metadata.get("tokenizer.ggml.token_type", np.ones(n))).astype("<i4")
    _add(digest, kind, _packed_tokens(metadata), types.tobytes())
    if kind == "gpt2":
        _add(digest, str(metadata.get("tokenizer.ggml.pre") or "default"))
        _add(digest, *map(str, metadata.get("tokenizer.ggml.merges", ())))
    else:
        scores = np.asarray(metadata.get("tokenizer.ggml.scores", np.zeros(n)), np.float64)
        # The order counts, not the numbers, and of normal tokens alone: formats differ in the others' scores.
        normal = -scores[types[: len(scores)] == 1] if len(types) >= len(scores) else -scores
        _add(digest, np.unique(normal, return_inverse=True)[1].astype("<i4").tobytes())
        _add(digest, str(bool(metadata.get("tokenizer.ggml.add_space_prefix", True))))
    for name, default in (("bos", 1), ("eos", 2)) if kind == "llama" else (("bos", 11), ("eos", 11)):
        _add(digest, str(int(metadata.get(f"tokenizer.ggml.{name}_token_id", default))))
    return digest.hexdigest()


def _add(digest: Any, *fields: bytes | str) -> None:
    """Each field with its length before it: no two different lists of fields look alike."""
    for field in fields:
        raw = field.encode("utf-8", "surrogateescape") if isinstance(field, str) else field
        digest.update(struct.pack("<Q", len(raw)))
        digest.update(raw)


def _model_stamp(file: ModelFile) -> str:
    digest = hashlib.sha256()
    metadata = file.metadata
    architecture = str(metadata.get("general.architecture", ""))
    _add(digest, architecture)
    for key in sorted(k for k in metadata if k.startswith(f"{architecture}.")):
        if not _is_implied(key.removeprefix(f"{architecture}."), metadata[key], architecture, metadata):
            _add(digest, key, _canonical(metadata[key]))
    for name, info in sorted(file.tensors.items()):
        _add(digest, name, str(_trimmed(info.shape)))
    _add(digest, _packed_tokens(metadata))
    return digest.hexdigest()


def _is_implied(key: str, value: Any, architecture: str, metadata: Mapping[str, Any]) -> bool:
    """Whether a key says what is so without it: one format spells it out, another does not, the model is the same."""
    if not isinstance(value, (int, float)):
        return False
    if key in _NOT_THE_MODEL:
        return True
    n_head, n_embd = (metadata.get(f"{architecture}.{k}") for k in ("attention.head_count", "embedding_length"))
    if not isinstance(n_head, int) or not isinstance(n_embd, int) or n_head < 1:
        return False
    head_dim = n_embd // n_head
    usual = {"attention.head_count_kv": n_head, "rope.freq_base": _FREQ_BASE, "attention.key_length": head_dim,
             "attention.value_length": head_dim, "rope.dimension_count": head_dim}  # fmt: skip
    return usual.get(key) == value


def _canonical(value: Any) -> str:
    """A value without the type under which its file stores it: u32 or u64, f32 or f64."""
    if isinstance(value, float):
        return repr(float(np.float32(value)))
    if isinstance(value, np.ndarray):
        return str([_canonical(v) for v in value.tolist()])
    if isinstance(value, (bool, int, str)):
        return repr(value)
    return str([_canonical(v) for v in value])


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without outer axes of size 1, which some writers drop and some keep."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _packed_tokens(metadata: Mapping[str, Any]) -> bytes:
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    if isinstance(tokens, StringArray):
        return tokens.packed  # as they stand in the file: nothing to decode
    raws = [str(t).encode("utf-8", "surrogateescape") for t in tokens]
    return b"".join(struct.pack("<Q", len(raw)) + raw for raw in raws)


def _file_stamp(file: ModelFile) -> str:
    digest = hashlib.sha256()
    for name, info in sorted(file.tensors.items()):
        _add(digest, name, info.type.name, str(_trimmed(info.shape)), _sample(file, info))
    return digest.hexdigest()


def _sample(file: ModelFile, info: TensorInfo) -> bytes:
    """The first 4 KiB of a run of rows that starts at a place drawn from the tensor's name and size."""
    if not info.n_bytes:
        return b""
    rows = min(info.n_rows, -(-_SAMPLE_BYTES // info.row_bytes))
    draw = hashlib.sha256(_SEED + info.name.encode("utf-8") + struct.pack("<Q", info.n_bytes)).digest()
    start = int.from_bytes(draw[:8], "little") % (info.n_rows - rows + 1)
    return file.read(info.name, start, start + rows).reshape(-1)[:_SAMPLE_BYTES].tobytes()
