"""What a file is, what is in it, and which command it is for; no tensor of a model is read.

The metadata and type lines have the form in which llama.cpp's loader dumps them (src/llama-model-loader.cpp).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llamakit.errors import FormatError, LlamakitError
from llamakit.files import as_argument
from llamakit.formats import llama2c
from llamakit.formats.base import ModelFile, TensorInfo
from llamakit.formats.ggla import read_ggla
from llamakit.formats.gguf import GGUFFile, SplitGGUF, Typed, open_gguf
from llamakit.formats.imatrix import SUMS, read_imatrix
from llamakit.formats.open import CHECKPOINT_INDEX, open_model, size_on_disk, sniff
from llamakit.formats.strict_json import read_object
from llamakit.ggml import FILE_TYPES, GGMLType

#: llama.cpp cuts values off after this many bytes
_MAX_VALUE_BYTES = 40
#: an array longer than this is given by its first elements
_MAX_ELEMENTS = 32
_TYPE_NAMES = {
    "UINT8": "u8", "INT8": "i8", "UINT16": "u16", "INT16": "i16", "UINT32": "u32", "INT32": "i32",
    "UINT64": "u64", "INT64": "i64", "FLOAT32": "f32", "FLOAT64": "f64", "BOOL": "bool", "STRING": "str",
}  # fmt: skip
_TOKENIZERS = {"llama": "SPM", "gpt2": "BPE", "bert": "WPM", "t5": "UGM", "rwkv": "RWKV", "none": "none"}

#: kind of a file that is not GGUF -> what it is in words
_OTHERS = {
    "llama2c-tokenizer": "llama2.c vocabulary",
    "sentencepiece": "SentencePiece vocabulary",
    "safetensors": "safetensors weights",
    "huggingface": "folder with a Hugging Face model",
    "peft": "folder with a LoRA adapter (PEFT)",
    "zip": "zip archive, perhaps a PyTorch checkpoint",
    "meta": "folder with a model in Meta's format",
    "pickle": "Python pickle, perhaps an old PyTorch checkpoint; never loaded, it could run any code",
    "ggml": "GGML model from before GGUF",
    "imatrix": "importance matrix",
    "gzip": "gzip archive",
    "text": "text",
    "directory": "folder",
    "tokens": "folder of tokens to train on",
    "checkpoint": "folder with a llamakit training checkpoint, the shares of several ranks",
}

#: kinds that hold a model which is read in GGUF's words
_SOURCES = ("huggingface", "safetensors", "meta", "zip")


@dataclass(frozen=True)
class KeyValue:
    """One metadata entry: its key, its type in llama.cpp's notation (`u32`, `arr[str,512]`), its value.

    value: int, float, bool, str, or a list, of which the first 32 elements are kept; n: elements of an array.
    """

    key: str
    type: str
    value: Any
    n: int | None = None

    @property
    def text(self) -> str:
        """The value as llama.cpp dumps it: at most 40 bytes, newlines as \\n."""
        raw = _text(self.value).encode("utf-8", "surrogateescape")
        if len(raw) > _MAX_VALUE_BYTES:
            raw = raw[: _MAX_VALUE_BYTES - 3] + b"..."
        return raw.decode("utf-8", "replace").replace("\n", "\\n")


@dataclass(frozen=True)
class TensorRow:
    """One tensor: shape rows first (numpy's order), the type's name, packed bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    n_bytes: int


@dataclass(frozen=True, kw_only=True)
class FileReport:
    """What `inspect` found out about a file.

    kind: model, adapter, checkpoint, old-checkpoint, imatrix, vocabulary, ggla, llama2c, or what formats.open.sniff
    calls a file that is none of these; what: the same in words; format: the container ("GGUF V3"), "" where unknown.
    facts: label -> value, in the order to be shown; n_bytes: of the file, or of the model's files in a folder;
    bits_per_weight: of all tensors together. next_commands: command lines, as lists of arguments.
    """

    path: Path
    kind: str
    what: str
    format: str = ""
    n_bytes: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    metadata: tuple[KeyValue, ...] = ()
    tensors: tuple[TensorRow, ...] = ()
    n_parameters: int = 0
    bits_per_weight: float = 0.0
    next_commands: tuple[tuple[str, ...], ...] = ()

    def metadata_lines(self) -> list[str]:
        """llama.cpp's `- kv N:` lines."""
        return [f"- kv {i:3d}: {kv.key:>42} {kv.type:<16} = {kv.text}" for i, kv in enumerate(self.metadata)]

    def type_lines(self) -> list[str]:
        """llama.cpp's `- type` lines, in the order of its types."""
        counts = Counter(GGMLType[tensor.type] for tensor in self.tensors)
        return [f"- type {_ggml_name(t):>4}: {n:4d} tensors" for t, n in sorted(counts.items())]


def inspect(path: str | os.PathLike[str]) -> FileReport:
    """Find out what a file or folder is, by its content.

    One part of a split GGUF file stands for all of them. Raises UsageError when it cannot be read or a part is missing,
    FormatError when it is broken or empty, UnsupportedError for a GGUF file of an unknown version or byte order.
    """
    path = Path(path)
    kind = sniff(path)
    if kind == "empty":
        raise FormatError("is empty (0 bytes)", path=path, offset=0)
    if kind == "gguf":
        with open_gguf(path) as file:
            return _inspect_gguf(path, file)
    if kind == "llama2c":
        with llama2c.Llama2cFile(path) as file:
            return _inspect_llama2c(file)
    if kind == "ggla":
        return _inspect_ggla(path)
    if kind == "imatrix":
        return _inspect_dat(path)
    if kind == "checkpoint":
        return _inspect_shares(path)
    return _inspect_source(path, kind) if kind in _SOURCES else _inspect_other(path, kind)


def _inspect_gguf(path: Path, file: GGUFFile | SplitGGUF) -> FileReport:
    kind, what = _gguf_kind(file)
    facts = _general_facts(file.metadata)
    if kind in ("adapter", "checkpoint", "old-checkpoint"):
        facts |= _adapter_facts(file)
    if kind in ("model", "vocabulary"):
        facts |= _model_facts(file.metadata)
    if kind == "imatrix":
        facts["entries"] = sum(name.endswith(SUMS) for name in file.tensors)
    if isinstance(file, SplitGGUF):
        facts["split"] = f"part {file.part} of {len(file.parts)}, all {len(file.parts)} parts counted"
    metadata = tuple(_key_value(key, value, *file.metadata_types[key]) for key, value in file.metadata.items())
    return FileReport(
        path=path,
        kind=kind,
        what=what,
        format=f"GGUF V{file.version}",
        n_bytes=file.n_bytes,
        facts=facts,
        metadata=metadata,
        next_commands=_next_commands(kind, file),
        **_tensor_fields(file.tensors),
    )


def _gguf_kind(file: GGUFFile | SplitGGUF) -> tuple[str, str]:
    """The kind of a GGUF file, and the same in words."""
    metadata = file.metadata
    general, training = metadata.get("general.type"), metadata.get("training.type")
    if "llamakit.checkpoint.version" in metadata:
        return "checkpoint", "llamakit training checkpoint"
    if training == "finetune_lora":
        return "old-checkpoint", "training checkpoint of the old llama.cpp finetune"
    if training is not None:
        return "old-checkpoint", f"training checkpoint of llama.cpp ({training})"
    if general == "adapter":
        return "adapter", "LoRA adapter" if metadata.get("adapter.type") == "lora" else "adapter"
    if general == "imatrix":
        return "imatrix", "importance matrix"
    if not file.tensors:
        if _n_tokens(metadata):
            return "vocabulary", "vocabulary without a model"
        return "unknown", "GGUF without tensors"
    return "model", "model"


def _general_facts(metadata: Mapping[str, Any]) -> dict[str, Any]:
    facts = {"name": metadata.get("general.name"), "architecture": metadata.get("general.architecture")}
    return {label: value for label, value in facts.items() if isinstance(value, str)}


def _model_facts(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters as far as the file states them; a value of the wrong type is left out, not guessed."""
    architecture = metadata.get("general.architecture")
    keys = {
        "context": "context_length", "layers": "block_count", "embedding": "embedding_length",
        "feed forward": "feed_forward_length", "heads": "attention.head_count", "kv heads": "attention.head_count_kv",
    }  # fmt: skip
    facts: dict[str, Any] = {label: _integer(metadata, f"{architecture}.{key}") for label, key in keys.items()}
    file_type = _integer(metadata, "general.file_type")
    facts["file type"] = None if file_type is None else FILE_TYPES.get(file_type, str(file_type))
    facts["vocabulary"] = _n_tokens(metadata) or _integer(metadata, f"{architecture}.vocab_size")
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if isinstance(model, str):
        kind = _TOKENIZERS.get(model, model)
        facts["tokenizer"] = f"{kind} ({pre})" if isinstance(pre, str) and pre else kind
        facts["chat template"] = isinstance(metadata.get("tokenizer.chat_template"), str)
    return {label: value for label, value in facts.items() if value is not None}


def _adapter_facts(file: GGUFFile | SplitGGUF) -> dict[str, Any]:
    metadata = file.metadata
    facts: dict[str, Any] = {}
    alpha = metadata.get("adapter.lora.alpha")
    if isinstance(alpha, (int, float)):
        facts["alpha"] = alpha
    ranks = Counter(t.shape[-1] for name, t in file.tensors.items() if name.endswith(".lora_b") and t.shape)
    if ranks:
        facts["rank"] = ", ".join(str(rank) for rank in sorted(ranks))
        facts["adapted tensors"] = sum(ranks.values())
    iterations = _integer(metadata, "training.iteration_count")
    if iterations is not None:
        facts["iterations"] = iterations
    stamp = metadata.get("llamakit.base.model")
    if isinstance(stamp, str):
        facts["base stamp"] = stamp[:16]
    return facts


def _inspect_llama2c(file: llama2c.Llama2cFile) -> FileReport:
    return FileReport(
        path=file.path,
        kind="llama2c",
        what="llama2.c model",
        format=f"llama2.c version {file.version}",
        n_bytes=file.path.stat().st_size,
        facts=_general_facts(file.metadata) | _model_facts(file.metadata),
        metadata=tuple(_key_value(key, value) for key, value in file.metadata.items()),
        next_commands=_next_commands("llama2c", file),
        **_tensor_fields(file.tensors),
    )


def _inspect_ggla(path: Path) -> FileReport:
    # An adapter of a few MB whose headers stand between its tensors: its reader checks them all.
    rank, alpha, matrices = read_ggla(path)
    tensors = tuple(TensorRow(name, m.shape, "F32", m.nbytes) for name, m in matrices.items())
    return FileReport(
        path=path,
        kind="ggla",
        what="LoRA adapter of the old llama.cpp finetune",
        format="ggla version 1",
        n_bytes=path.stat().st_size,
        facts={"alpha": alpha, "rank": rank, "adapted tensors": len(matrices) // 2},
        tensors=tensors,
        n_parameters=sum(m.size for m in matrices.values()),
        bits_per_weight=32.0,
        next_commands=_next_commands("ggla", None, path),
    )


def _inspect_dat(path: Path) -> FileReport:
    """An importance matrix in the form that came before GGUF's: a few MB without a header, read and checked whole."""
    found = read_imatrix(path)
    facts = {"entries": len(found.entries), "chunks": found.chunk_count, "datasets": ", ".join(found.datasets)}
    report = replace(_inspect_other(path, "imatrix"), format="dat", facts={k: v for k, v in facts.items() if v})
    rows = [TensorRow(name, entry.sums.shape[1:], "F32", entry.sums.nbytes) for name, entry in found.entries.items()]
    return replace(report, tensors=tuple(rows))


def _inspect_shares(path: Path) -> FileReport:
    """A checkpoint folder by its index. Raises FormatError for a broken one."""
    index = read_object(path / CHECKPOINT_INDEX)
    try:
        facts = {"iterations": index["state"]["progress"]["iterations"], "files": len(index["files"])}
        rows = [
            TensorRow(name, tuple(t["shape"]), "F32", 4 * math.prod(t["shape"])) for name, t in index["tensors"].items()
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"the checkpoint is damaged: its index says {error!r}", path=path) from error
    return replace(
        _inspect_other(path, "checkpoint"), format="torch.distributed.checkpoint", facts=facts, tensors=tuple(rows),
        next_commands=(),
    )  # fmt: skip


def _inspect_source(path: Path, kind: str) -> FileReport:
    """A folder or checkpoint as the model that is in it, or with the reason why none can be read."""
    report = _inspect_other(path, kind)
    try:
        with open_model(path, n_ctx=0) as file:
            values = {key: _plain(value) for key, value in file.metadata.items()}
            return replace(
                report,
                facts=_general_facts(values) | _model_facts(values) | _unknown_context(values),
                metadata=tuple(_key_value(key, value) for key, value in values.items()),
                next_commands=_next_for_source(values, as_argument(path)),
                **_tensor_fields(file.tensors),
            )  # fmt: skip
    except LlamakitError as error:
        hint = {} if error.hint is None else {"hint": error.hint}
        return replace(report, facts={"no model": error.reason, **hint})


def _unknown_context(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {} if "llama.context_length" in metadata else {"context": "not stated: the commands take it with --ctx"}


def _next_for_source(metadata: Mapping[str, Any], name: str) -> tuple[tuple[str, ...], ...]:
    """The model's commands; where its context has to be named, generate and convert need it, finetune has one."""
    commands = (("llamakit", "convert", name, "-o", "model.gguf"), *_next_for_model(metadata, name))
    if "llama.context_length" in metadata:
        return commands
    return tuple(c if c[1] == "finetune" else (*c, "--ctx", "N") for c in commands)


def _plain(value: Any) -> Any:
    """A metadata value without the type under which GGUF would store it."""
    return value.value if isinstance(value, Typed) else value


def _inspect_other(path: Path, kind: str) -> FileReport:
    n_bytes = size_on_disk(path)
    what = _OTHERS.get(kind, "file of an unknown kind")
    return FileReport(path=path, kind=kind, what=what, n_bytes=n_bytes, next_commands=_next_commands(kind, None, path))


def _tensor_fields(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    n_parameters = sum(t.n_elements for t in tensors.values())
    n_bytes = sum(t.n_bytes for t in tensors.values())
    return {
        "tensors": tuple(TensorRow(t.name, t.shape, t.type.name, t.n_bytes) for t in tensors.values()),
        "n_parameters": n_parameters,
        "bits_per_weight": 8 * n_bytes / n_parameters if n_parameters else 0.0,
    }


def _next_commands(kind: str, file: ModelFile | None, path: Path | None = None) -> tuple[tuple[str, ...], ...]:
    """What a user most likely wants to do with such a file."""
    name = as_argument(file.path if file is not None else path or Path())
    finetune = ("llamakit", "finetune", "--model-base")
    lora = (
        ("llamakit", "generate", "-m", "BASE.gguf", "--lora", name, "-p", "Once upon a time"),
        ("llamakit", "merge", "-m", "BASE.gguf", "--lora", name, "-o", "merged.gguf"),
    )
    if kind == "model" and file is not None:
        return _next_for_model(file.metadata, name)
    if file is not None and file.metadata.get("training.type") == "train_model":
        return ()
    return {
        "vocabulary": (("llamakit", "tokenize", "-m", name, "-p", "Hello world"),),
        "adapter": lora,
        "ggla": lora,
        "checkpoint": ((*finetune, "BASE.gguf", "--checkpoint-in", name, "--train-data", "TEXT.txt"),),
        "old-checkpoint": ((*finetune, "BASE.gguf", "--checkpoint-in", name, "--train-data", "TEXT.txt"),),
        "llama2c": (("llamakit", "generate", "-m", name, "-z", "tokenizer.bin"),),
        "llama2c-tokenizer": (("llamakit", "generate", "-m", "MODEL.bin", "-z", name),),
        "text": ((*finetune, "BASE.gguf", "--train-data", name),),
        "peft": lora,
        "tokens": (("llamakit", "data", "show", name),),
        "imatrix": (("llamakit", "quantize", "--imatrix", name, "MODEL.gguf", "Q4_K_M"),),
    }.get(kind, ())


def _next_for_model(metadata: Mapping[str, Any], name: str) -> tuple[tuple[str, ...], ...]:
    commands: list[tuple[str, ...]] = []
    can_tokenize = metadata.get("tokenizer.ggml.model") in ("llama", "gpt2")
    if metadata.get("general.architecture") == "llama" and can_tokenize:
        commands.append(("llamakit", "generate", "-m", name, "-p", "Once upon a time"))
        commands.append(("llamakit", "finetune", "--model-base", name, "--train-data", "TEXT.txt"))
    elif can_tokenize:
        commands.append(("llamakit", "tokenize", "-m", name, "-p", "Hello world"))
    return tuple(commands)


def _key_value(key: str, value: Any, value_type: Any = None, element_type: Any = None) -> KeyValue:
    """A metadata entry; types are the reader's, or follow from the Python value where a format has none."""
    if hasattr(value, "__len__") and not isinstance(value, str):
        n = len(value)
        first = value[:_MAX_ELEMENTS]
        kept = first.tolist() if hasattr(first, "tolist") else list(first)
        element = _TYPE_NAMES.get(getattr(element_type, "name", ""), "?")
        return KeyValue(key, f"arr[{element},{n}]", kept, n)
    if value_type is not None:
        return KeyValue(key, _TYPE_NAMES[value_type.name], value)
    guessed = {bool: "bool", int: "u32", float: "f32"}.get(type(value), "str")
    return KeyValue(key, guessed, value)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:f}"
    if isinstance(value, list):
        return "[" + ", ".join(_quoted(v) if isinstance(v, str) else _text(v) for v in value) + "]"
    return str(value)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _ggml_name(ggml_type: GGMLType) -> str:
    """ggml's own spelling of a type: q4_0, but q4_K."""
    name = ggml_type.name.lower()
    return name[:-2] + "_K" if name.endswith("_k") else name


def _integer(metadata: Mapping[str, Any], key: str) -> int | None:
    value = metadata.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _n_tokens(metadata: Mapping[str, Any]) -> int | None:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return None if tokens is None or isinstance(tokens, (str, int, float)) else len(tokens)
