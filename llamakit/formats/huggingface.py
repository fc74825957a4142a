"""A Hugging Face folder as a `ModelFile`: config.json, weights in one file or in shards, the vocabulary beside them.

Names, row order and keys are GGUF's; the tensors stand in the order in which convert_hf_to_gguf.py writes them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from llamakit.errors import FormatError, UnsupportedError, UsageError
from llamakit.files import escape_control
from llamakit.formats.base import TensorInfo
from llamakit.formats.folder import folder_name, member
from llamakit.formats.huggingface_config import check_tensors, sampling_metadata, shape_of_config
from llamakit.formats.names import gguf_name, huggingface_name, rope_rows, rotary_heads
from llamakit.formats.safetensors import SafetensorsFile
from llamakit.formats.strict_json import read_object
from llamakit.ggml import FLOAT_FILE_TYPES, FLOAT_TYPES, GGMLType

_ROPE_FREQS, _OUTPUT, _EMBEDDING = "rope_freqs.weight", "output.weight", "token_embd.weight"
_COMPARED_BYTES = 1 << 22
#: tensors that old checkpoints carry and nobody needs
_IGNORED = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias")
#: what belongs to a model beside its weights
COMPANIONS = frozenset({
    "config.json", "generation_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
})  # fmt: skip
#: any of these is a vocabulary
_VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


class _Weights(Protocol):
    """One file of weights under its own names."""

    @property
    def path(self) -> Path: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    @property
    def other_dtypes(self) -> Mapping[str, str]: ...
    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class _Source:
    """Where a tensor comes from: its file, its name there, its rotated heads (None: its rows stay as they are)."""

    file: _Weights
    info: TensorInfo
    n_heads: int | None


class HuggingFaceModel:
    """A folder with a LlamaForCausalLM or MistralForCausalLM as transformers saves it.

    files: the weight files' names, in order. vocabulary=False leaves the tokenizer's keys out of the metadata, as they
    are where the folder has no vocabulary.
    Raises UsageError when the folder cannot be read; UnsupportedError for other models, quantized ones included;
    FormatError for everything that does not fit together: a field, a shard, a tensor.
    """

    def __init__(self, directory: str | os.PathLike[str], *, vocabulary: bool = True) -> None:
        self.path = Path(directory)
        if not os.path.isdir(directory):
            raise UsageError("is no folder", path=directory)
        config_path = member(self.path, "config.json")
        self._shape = shape_of_config(read_object(config_path), config_path)
        self.files, index = weight_files(self.path)
        self._files = ExitStack()
        try:
            self._sources = self._map(index)
            self._metadata = MappingProxyType(self._read_metadata(vocabulary))
        except BaseException:
            self.close()
            raise
        self._freqs = self._shape.rope.freqs(self._shape.head_dim)
        self._tensors = MappingProxyType(self._table())

    def _map(self, index: Mapping[str, Any] | None) -> dict[str, _Source]:
        """GGUF name -> source, in the order of the files and, in a safetensors file, of the names."""
        found: dict[str, _Source] = {}
        places: dict[str, str] = {}
        for file_name in self.files:
            file = _open_weights(member(self.path, file_name))
            self._files.callback(file.close)
            for name, info in _entries(file):
                if name in places:
                    raise FormatError(f"tensor {_shown(name)} is in {places[name]} already", path=file.path)
                places[name] = file_name
                if info is not None:
                    ours = gguf_name(name) or ""
                    heads = rotary_heads(ours, self._shape.n_head, self._shape.n_head_kv)
                    found[ours] = _Source(file, info, heads)
        if index is not None:
            _compare_with_index(index, places, self.path)
        if self._shape.tied_output and _OUTPUT in found:
            _check_output(found, self.path)
            self._shape = replace(self._shape, tied_output=False)
        shapes = {name: source.info.shape for name, source in found.items()}
        check_tensors(self._shape, shapes, self.path, huggingface_name)
        return found

    def _table(self) -> dict[str, TensorInfo]:
        table = (
            {} if self._freqs is None else {_ROPE_FREQS: TensorInfo(_ROPE_FREQS, self._freqs.shape, GGMLType.F32, 0)}
        )
        for name, source in self._sources.items():
            table[name] = TensorInfo(name, source.info.shape, source.info.type, source.info.offset)
        return table

    def _read_metadata(self, vocabulary: bool) -> dict[str, Any]:
        generation: dict[str, Any] = {}
        path = member(self.path, "generation_config.json")
        if os.path.exists(path):
            generation = sampling_metadata(read_object(path), path)
        types = [s.info.type for s in self._sources.values() if len(s.info.shape) == 2]
        halves = [t for t in types if t is not GGMLType.F32]
        return {
            **self._shape.metadata(
                name=folder_name(self.path),
                file_type=FLOAT_FILE_TYPES[halves[0] if halves else GGMLType.F32],
                generation=generation,
            ),
            **(_vocabulary(self.path, self._shape.n_vocab) if vocabulary else {}),
        }

    @property
    def metadata(self) -> Mapping[str, Any]:
        """GGUF's keys in the order of convert_hf_to_gguf.py, made from the JSON files and the vocabulary."""
        return self._metadata

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """`rope_freqs.weight` first where there is one, then file by file; offsets are those in each file."""
        return self._tensors

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Packed rows [start, stop) in GGUF's order as a fresh, writable uint8 array (rows, row_bytes).

        Raises KeyError for an unknown name, ValueError for rows that are not there, FormatError when a file is
        shorter than it was when opened.
        """
        info = self._tensors[name]
        start, stop = info.row_range(start, stop)
        if name == _ROPE_FREQS and self._freqs is not None:
            return self._freqs.copy().view(np.uint8).reshape(1, -1)[start:stop]
        source = self._sources[name]
        if source.n_heads is None or start == stop:
            return source.file.read(source.info.name, start, stop)
        return _unrotated(source, start, stop)

    def close(self) -> None:
        """Close all files; `read` fails afterwards."""
        self._files.close()

    def __enter__(self) -> HuggingFaceModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_output(found: Mapping[str, _Source], directory: Path) -> None:
    """Some save the output matrix of a tied model as well: it must be the embedding, and is then written as it is.

    transformers goes by config.json and ignores it, llama.cpp goes by the tensor. Raises FormatError where these would
    be two models.
    """
    output, embedding = found[_OUTPUT], found.get(_EMBEDDING)
    if embedding is None or not _same_rows(output, embedding):
        raise FormatError(
            "lm_head.weight is another matrix than the embedding, and config.json says that they are one",
            path=directory,
            hint="set tie_word_embeddings to false in config.json where the model has an output matrix of its own",
        )


def _same_rows(a: _Source, b: _Source) -> bool:
    if (a.info.shape, a.info.type) != (b.info.shape, b.info.type):
        return False
    step = max(1, _COMPARED_BYTES // max(1, a.info.row_bytes))
    for start in range(0, a.info.n_rows, step):
        stop = min(start + step, a.info.n_rows)
        if not np.array_equal(a.file.read(a.info.name, start, stop), b.file.read(b.info.name, start, stop)):
            return False
    return True


def _unrotated(source: _Source, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of q or k, the halves of each head side by side; reads the heads that they belong to."""
    info, n_heads = source.info, source.n_heads or 1
    if len(info.shape) == 1:
        values = source.file.read(info.name).view(f"V{info.n_bytes // info.shape[0]}").reshape(-1)
        return values[rope_rows(len(values), n_heads)].view(np.uint8).reshape(1, -1)
    rows = info.n_rows // n_heads
    first, last = start // rows, -(-stop // rows)
    there = source.file.read(info.name, first * rows, last * rows)
    return there[rope_rows(len(there), last - first)[start - first * rows : stop - first * rows]]


def _entries(file: _Weights) -> Iterator[tuple[str, TensorInfo | None]]:
    """(name, where it lies) of every tensor, None for one that nobody needs; what no Llama has is refused."""
    others = file.other_dtypes
    names = [*file.tensors, *others]
    if isinstance(file, SafetensorsFile):
        names.sort()
    for name in names:
        if name.endswith(_IGNORED):
            yield name, None
            continue
        if gguf_name(name) is None:
            raise FormatError(f"tensor {_shown(name)} has no place in a Llama", path=file.path)
        dtype = others.get(name) or file.tensors[name].type.name
        if name in others or file.tensors[name].type not in FLOAT_TYPES:
            raise UnsupportedError(f"tensor {_shown(name)} is {dtype} (expected F32, F16 or BF16)", path=file.path)
        yield name, file.tensors[name]


def _open_weights(path: Path) -> _Weights:
    if path.name.endswith(".safetensors"):
        return SafetensorsFile(path)
    from llamakit.formats.torch_file import TorchFile

    return TorchFile(path)


def _vocabulary(directory: Path, n_vocab: int) -> dict[str, Any]:
    """The tokenizer's keys; none where the folder has no vocabulary at all."""
    if not any(os.path.exists(directory / name) for name in _VOCABULARY):
        return {}
    from llamakit.formats.huggingface_vocab import read_vocabulary

    return read_vocabulary(directory, n_vocab)


def weight_files(directory: Path) -> tuple[list[str], Mapping[str, Any] | None]:
    """The names of the weight files, sorted, and the index (tensor -> file) where there is one; safetensors first.

    Raises FormatError where one file and an index of others lie side by side: they may be two models.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        index_path = member(directory, f"{single}.index.json")
        one = os.path.exists(directory / single)
        if os.path.exists(index_path):
            index = _weight_map(index_path, os.path.splitext(single)[1])
            names = sorted(set(index.values()))
            if one and names != [single]:
                reason = f"lies beside {single}, which it does not name: they may be two models"
                raise FormatError(reason, path=index_path, hint="remove one of both")
            return names, index
        if one:
            return [single], None
    hint = None
    if any("-of-0" in name for name in os.listdir(directory)):
        hint = "there are shards, but no model.safetensors.index.json; get it too"
    elif os.path.exists(directory / "consolidated.safetensors"):
        hint = "consolidated.safetensors is Mistral's own format; get the files of transformers"
    raise FormatError("has no weights (expected model.safetensors or its index)", path=directory, hint=hint)


def _weight_map(path: Path, suffix: str) -> Mapping[str, Any]:
    """An index: name of a tensor -> bare name of its file, which must be of the index's own kind."""
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("has no weight_map (expected names of tensors and files)", path=path)
    for name in weight_map.values():
        if member(path.parent, name).suffix != suffix:
            raise FormatError(f"'{_shown(name)}' is no weight file (expected a name in {suffix})", path=path)
    return weight_map


def _compare_with_index(index: Mapping[str, Any], places: Mapping[str, str], directory: Path) -> None:
    for name, file_name in index.items():
        if places.get(name) != file_name:
            raise FormatError(
                f"tensor {_shown(name)} is not in it, as the index says it were", path=directory / file_name
            )
    extra = next((name for name in places if name not in index), None)
    if extra is not None:
        raise FormatError(f"tensor {_shown(extra)} is in it, and not in the index", path=directory / places[extra])


def _shown(name: str) -> str:
    return escape_control(name[:100])
