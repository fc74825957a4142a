"""Meta's own checkpoints: params.json, consolidated.00.pth to .07.pth, and tokenizer.model beside them or above.

Each shard holds a part of every matrix, cut for model parallelism: wo and w2 along their columns, the embedding along
its columns in Llama 1 and 2 and along its rows in Llama 3, all others along their rows; norms are in every shard. Rows
of q and k stand in GGUF's order. Layout: meta-llama/llama, llama/model.py; meta-llama/llama-models, models/llama3.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from llamakit.errors import FormatError, MismatchError, UnsupportedError, UsageError
from llamakit.files import escape_control
from llamakit.formats.base import TensorInfo
from llamakit.formats.fields import Fields
from llamakit.formats.folder import folder_name, member
from llamakit.formats.huggingface_config import LlamaShape, check_tensors
from llamakit.formats.huggingface_rope import Rope
from llamakit.formats.huggingface_vocab import sentencepiece_vocabulary
from llamakit.formats.names import name_of_meta
from llamakit.formats.sentencepiece_model import read_sentencepiece_model
from llamakit.formats.strict_json import read_object
from llamakit.formats.tiktoken_model import is_tiktoken, read_tiktoken_vocabulary
from llamakit.formats.torch_file import TorchFile
from llamakit.ggml import FLOAT_FILE_TYPES, FLOAT_TYPES, GGMLType

PARAMS = "params.json"
#: name of a shard
SHARD = re.compile(r"consolidated\.([0-9]{2})\.pth")
_MAX_SHARDS = 8
_ROPE_FREQS, _EMBEDDING = "rope_freqs.weight", "token_embd.weight"
_IGNORED = "rope.freqs"
#: cut along their columns
_ROW_PARALLEL = ("attn_output.weight", "ffn_down.weight")
_THETA = 10000.0
#: vocabularies of models whose theta is another one: Code Llama's with tokens for filling in, and Llama 3's
_OTHER_THETA = (32016, 128256)


@dataclass(frozen=True)
class _Parts:
    """A tensor's parts in the order of the shards: (file, name there), rows of each, and the axis that was cut."""

    files: Sequence[TorchFile]
    stored: str
    rows: Sequence[int]
    axis: int


class MetaModel:
    """A folder with a checkpoint in Meta's format.

    n_ctx, rope_theta: the context that the model was trained for and the base of the rotary embedding, where
    params.json does not state them; n_ctx is 0 where nobody needs it, and then not in the metadata. files: names of the
    shards, in order.
    Raises UsageError when the folder cannot be read or n_ctx or rope_theta have to be given; UnsupportedError for other
    models; MismatchError for a vocabulary of too many tokens; FormatError for everything else that does not fit.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, n_ctx: int | None = None, rope_theta: float | None = None
    ) -> None:
        self.path = Path(directory)
        self.files = shard_names(self.path)
        params_path = member(self.path, PARAMS)
        params = Fields(read_object(params_path), params_path)
        self._files = ExitStack()
        try:
            self._parts, infos = self._map(params.integer("dim"))
            self._shape = _shape(params, infos, n_ctx, rope_theta)
            check_tensors(self._shape, {name: info.shape for name, info in infos.items()}, self.path)
            self._freqs = self._shape.rope.freqs(self._shape.head_dim)
            self._tensors = MappingProxyType(self._table(infos))
            self._metadata = MappingProxyType(self._read_metadata(infos))
        except BaseException:
            self.close()
            raise

    def _map(self, n_embd: int) -> tuple[dict[str, _Parts], dict[str, TensorInfo]]:
        """GGUF name -> parts, and the whole tensor, in the order of the first shard."""
        files = [TorchFile(member(self.path, name)) for name in self.files]
        for file in files:
            self._files.callback(file.close)
        names = [{*file.tensors, *file.other_dtypes} for file in files]
        for file, there in zip(files, names, strict=True):
            odd = next(iter(there ^ names[0]), None)
            if odd is not None:
                shown = escape_control(odd[:100])
                raise FormatError(f"tensor {shown} is not in every shard", path=file.path)
        parts: dict[str, _Parts] = {}
        infos: dict[str, TensorInfo] = {}
        for stored in [*files[0].tensors, *files[0].other_dtypes]:
            if stored == _IGNORED:
                continue
            name = name_of_meta(stored)
            if name is None:
                raise FormatError(f"tensor {escape_control(stored[:100])} has no place in a Llama", path=files[0].path)
            parts[name], infos[name] = _joined(name, stored, files, n_embd)
        return parts, infos

    def _table(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        if self._freqs is None:
            return dict(infos)
        return {_ROPE_FREQS: TensorInfo(_ROPE_FREQS, self._freqs.shape, GGMLType.F32, 0), **infos}

    def _read_metadata(self, infos: Mapping[str, TensorInfo]) -> dict[str, Any]:
        types = [info.type for info in infos.values() if len(info.shape) == 2]
        keys = self._shape.metadata(name=folder_name(self.path), file_type=FLOAT_FILE_TYPES[types[0]], generation={})
        if not self._shape.n_ctx:
            del keys["llama.context_length"]
        return {**keys, **_vocabulary(self.path, self._shape)}

    @property
    def metadata(self) -> Mapping[str, Any]:
        """GGUF's keys, made from params.json, the shapes of the tensors and the vocabulary."""
        return self._metadata

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """`rope_freqs.weight` first where there is one, then in the order of the first shard."""
        return self._tensors

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop), put together from the shards, as a fresh, writable uint8 array (rows, row_bytes).

        Raises KeyError for an unknown name, ValueError for rows that are not there, FormatError when a file is shorter
        than it was when opened.
        """
        info = self._tensors[name]
        start, stop = info.row_range(start, stop)
        if name == _ROPE_FREQS and self._freqs is not None:
            return self._freqs.copy().view(np.uint8).reshape(1, -1)[start:stop]
        parts = self._parts[name]
        if parts.axis == 1:
            return np.concatenate([file.read(parts.stored, start, stop) for file in parts.files], axis=1)
        found, first = [], 0
        for file, n in zip(parts.files, parts.rows, strict=True):
            a, b = min(max(start - first, 0), n), min(max(stop - first, 0), n)
            if a < b:
                found.append(file.read(parts.stored, a, b))
            first += n
        return np.concatenate(found) if found else np.empty((0, info.row_bytes), np.uint8)

    def close(self) -> None:
        """Close all files; `read` fails afterwards."""
        self._files.close()

    def __enter__(self) -> MetaModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def shard_names(directory: Path) -> list[str]:
    """consolidated.00.pth and so on, none missing."""
    if not os.path.isdir(directory):
        raise UsageError("is no folder", path=directory)
    found = sorted(name for name in os.listdir(directory) if SHARD.fullmatch(name))
    if not found:
        raise FormatError("has no weights (expected consolidated.00.pth)", path=directory)
    expected = [f"consolidated.{i:02d}.pth" for i in range(len(found))]
    missing = next((name for name in expected if name not in found), None)
    if missing is not None:
        raise FormatError(f"has {found[-1]}, but no {missing}", path=directory, hint="get all shards")
    if len(found) > _MAX_SHARDS:
        raise UnsupportedError(f"has {len(found)} shards (expected 1 to {_MAX_SHARDS})", path=directory)
    return found


def _joined(name: str, stored: str, files: Sequence[TorchFile], n_embd: int) -> tuple[_Parts, TensorInfo]:
    """The parts of one tensor, and what they make together."""
    shown = escape_control(stored[:100])
    infos = [file.tensors.get(stored) for file in files]
    for file, info in zip(files, infos, strict=True):
        if info is None or info.type not in FLOAT_TYPES or info.type is not (infos[0] or info).type:
            dtype = file.other_dtypes.get(stored) or (info.type.name if info else "")
            raise UnsupportedError(f"tensor {shown} is {dtype} (expected F32, F16 or BF16 in all)", path=file.path)
    there = [info for info in infos if info is not None]
    shape = there[0].shape
    if len(shape) == 1:
        first = files[0].read(stored)
        for file, info in zip(files, there, strict=True):
            if info.shape != shape or not np.array_equal(file.read(stored), first):
                raise FormatError(f"tensor {shown} is not the same in every shard", path=file.path)
        return _Parts(files[:1], stored, [1], 0), TensorInfo(name, shape, there[0].type, there[0].offset)
    by_columns = name.endswith(_ROW_PARALLEL) or (name == _EMBEDDING and shape[1:] != (n_embd,))
    axis = int(by_columns)
    for file, info in zip(files, there, strict=True):
        if len(info.shape) != 2 or info.shape[1 - axis] != shape[1 - axis]:
            raise FormatError(f"tensor {shown} has shape {list(info.shape)[:8]}, which does not join the others'",
                              path=file.path)  # fmt: skip
    total = sum(info.shape[axis] for info in there)
    whole = (shape[0], total) if by_columns else (total, shape[1])
    rows = [info.shape[0] for info in there]
    return _Parts(files, stored, rows, axis), TensorInfo(name, whole, there[0].type, there[0].offset)


def _shape(params: Fields, infos: Mapping[str, TensorInfo], n_ctx: int | None, rope_theta: float | None) -> LlamaShape:
    """The hyper-parameters: params.json's, and from the tensors what it leaves to them."""
    for key in ("moe", "quantization_args", "vision_chunk_size"):
        if key in params:
            raise UnsupportedError(f"{key}: only plain Llama models are supported", path=params.path)
    n_embd, n_head = params.integer("dim"), params.integer("n_heads")
    if n_embd % n_head and "head_dim" not in params:
        raise params.wrong("dim", f"a multiple of n_heads, {n_head}")
    embedding, gate = infos.get(_EMBEDDING), infos.get("blk.0.ffn_gate.weight")
    if embedding is None or gate is None:
        raise FormatError("tok_embeddings or layers.0.feed_forward.w1 is missing", path=params.path)
    n_vocab = params.integer("vocab_size", -1, least=-1)
    head_dim, n_head_kv = params.integer("head_dim", n_embd // n_head), params.integer("n_kv_heads", n_head)
    if n_head % n_head_kv or head_dim % 2:
        raise FormatError(f"{n_head} heads of size {head_dim} and {n_head_kv} of keys and values do not fit together",
                          path=params.path)  # fmt: skip
    n_vocab = embedding.shape[0] if n_vocab <= 0 else n_vocab
    return LlamaShape(
        n_vocab=n_vocab,
        n_ctx=_context(params, n_ctx),
        n_embd=n_embd,
        n_ff=gate.shape[0],
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_layer=params.integer("n_layers", most=1024),
        rms_eps=params.positive("norm_eps"),
        rope=_rope(params, n_vocab, rope_theta),
        tied_output="output.weight" not in infos,
    )


def _context(params: Fields, n_ctx: int | None) -> int:
    if "max_seq_len" in params:
        return params.integer("max_seq_len")
    if n_ctx is None:
        raise UsageError(
            "does not state the context that the model was trained for",
            path=params.path,
            hint="give it with --ctx: 2048 for Llama 1, 4096 for Llama 2, 8192 for Llama 3, 131072 for Llama 3.1 and "
            "later",
        )
    return n_ctx


def _rope(params: Fields, n_vocab: int, rope_theta: float | None) -> Rope:
    """theta, and the scaling that came with Llama 3.1 (llama-models, apply_scaling)."""
    if rope_theta is None and "rope_theta" not in params and n_vocab in _OTHER_THETA:
        raise UsageError(
            f"does not state rope_theta, which is not {_THETA:g} in models of {n_vocab} tokens",
            path=params.path,
            hint="give it with --rope-freq-base: 1000000 for Code Llama, 500000 for Llama 3",
        )
    theta = params.positive("rope_theta", _THETA if rope_theta is None else rope_theta)
    if not params.flag("use_scaled_rope", False):
        return Rope(theta)
    values = {
        "factor": params.positive("rope_scaling_factor", _scaling_factor(params)),
        "low_freq_factor": params.positive("rope_low_freq_factor", 1.0),
        "high_freq_factor": params.positive("rope_high_freq_factor", 4.0),
    }
    if values["low_freq_factor"] >= values["high_freq_factor"]:
        raise params.wrong("rope_high_freq_factor", f"more than {values['low_freq_factor']:g}")
    return Rope(theta, "llama3", values, params.integer("rope_original_context", 8192))


def _scaling_factor(params: Fields) -> float:
    """Of a params.json that does not state it: 32 in Llama 3.2 (1B and 3B, its text models), 8 in Llama 3.1."""
    return 32.0 if params.integer("dim") in (2048, 3072) else 8.0


def _vocabulary(directory: Path, shape: LlamaShape) -> dict[str, Any]:
    """The tokenizer's keys; none where there is no tokenizer.model, beside the weights or in the folder above."""
    for folder in (directory, Path(os.path.realpath(directory)).parent):
        path = member(folder, "tokenizer.model")
        if os.path.exists(path):
            if is_tiktoken(path):
                return read_tiktoken_vocabulary(path, shape.n_vocab, tools=shape.rope.type == "llama3")
            n_pieces = len(read_sentencepiece_model(path).pieces)
            if n_pieces > shape.n_vocab:
                raise MismatchError(f"has {n_pieces} tokens (expected at most {shape.n_vocab}, the model's)", path=path)
            return sentencepiece_vocabulary(path, shape.n_vocab)
    return {}
