"""Which file is this? By its content, never by its name."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

from llamakit.errors import FormatError, LlamakitError, UnsupportedError, UsageError
from llamakit.files import escape_control
from llamakit.formats import llama2c
from llamakit.formats.base import ModelFile
from llamakit.formats.borrowed import stated_metadata, with_metadata
from llamakit.formats.ggla import MAGIC as GGLA_MAGIC
from llamakit.formats.gguf_reader import MAGIC as GGUF_MAGIC
from llamakit.formats.gguf_split import PART_NAME, open_gguf
from llamakit.formats.huggingface import COMPANIONS, HuggingFaceModel, weight_files
from llamakit.formats.imatrix import is_dat
from llamakit.formats.llama2c_checkpoint import Llama2cCheckpoint
from llamakit.formats.meta import PARAMS, SHARD, MetaModel, shard_names
from llamakit.formats.source import FileSource

_HEAD_BYTES = 4096
_OLD_GGML = {b"lmgg": "ggml", b"fmgg": "ggmf", b"tjgg": "ggjt"}
_MODEL_WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
#: what a folder with a checkpoint of sharded training has at its root
CHECKPOINT_INDEX = "llamakit.json"
_TEXT_CONTROLS = frozenset(range(32)) - {*b"\t\n\r\f\x1b"}

#: kind -> (what it is, what to do); the kinds that no model can be opened from
_UNSUPPORTED: dict[str, tuple[str, str | None]] = {
    "ggla": ("is an old LoRA adapter (ggla), not a model", "give it with --lora, and the model with -m"),
    "ggml": (
        "is a GGML file from before GGUF, which is no longer supported",
        "convert the original model again, or get a GGUF file",
    ),
    "pickle": (
        "is a Python pickle (an old PyTorch checkpoint?), which is never loaded: it could run any code",
        "where you trust it, load it with PyTorch and save it again: torch.save writes zip archives since 1.6",
    ),
    "safetensors": (
        "is a safetensors file of weights alone, which do not say what model they are",
        "give its folder, with config.json and the tokenizer beside the weights",
    ),
    "peft": ("is a folder with a LoRA adapter (PEFT), not a model", "give it with --lora, and the model with -m"),
    "checkpoint": (
        "is a folder with a training checkpoint, not a model",
        "--checkpoint-in goes on with it; the model is in the file that --model-out names",
    ),
    "sentencepiece": ("is a SentencePiece vocabulary, not a model", None),
    "llama2c-tokenizer": ("is a llama2.c vocabulary, not a model", "give it with -z, and the model with -m"),
    "imatrix": ("is an importance matrix, not a model", "llamakit quantize takes it with --imatrix"),
    "gzip": ("is compressed", "unpack it first: gunzip"),
    "tokens": ("is a folder of tokens to train on, not a model", "llamakit data show prints samples of it"),
}


def sniff(path: str | os.PathLike[str]) -> str:
    """The kind of a file or directory, from its first bytes.

    One of: gguf, llama2c, llama2c-tokenizer, ggla, ggml, zip (PyTorch's), pickle, safetensors, sentencepiece, gzip,
    imatrix (the .dat form), empty, text, unknown; of folders huggingface, meta, peft, tokens, checkpoint, directory.
    Nothing is promised about the rest of the file, but for a .dat, which has no magic.

    Raises UsageError when it cannot be read.
    """
    if os.path.isdir(path):
        return _folder_kind(Path(path))
    with FileSource(path) as source:
        head = source.read(0, min(_HEAD_BYTES, source.size)).tobytes()
        kind = _kind(head, source.size) if head else "empty"
        return "imatrix" if kind == "unknown" and is_dat(source) else kind


def _folder_kind(folder: Path) -> str:
    """Some trainers leave the model's config.json beside an adapter: the model is there only if its weights are."""
    adapter, weights = (folder / "adapter_config.json").is_file(), any((folder / n).exists() for n in _MODEL_WEIGHTS)
    if adapter and not weights:
        return "peft"
    if (folder / CHECKPOINT_INDEX).is_file():
        return "checkpoint"
    if not weights and (folder / PARAMS).is_file() and any(SHARD.fullmatch(name) for name in os.listdir(folder)):
        return "meta"
    if (folder / "config.json").is_file():
        return "huggingface"
    return "tokens" if _is_tokens(folder / "index.json") else "directory"


def _is_tokens(index: Path) -> bool:
    """Whether it begins as the index of a folder that `data prepare` wrote."""
    if not index.is_file():
        return False
    with FileSource(index) as source:
        return b'"llamakit.tokens"' in source.read(0, min(_HEAD_BYTES, source.size)).tobytes()


def _kind(head: bytes, size: int) -> str:
    magics = {GGUF_MAGIC: "gguf", GGLA_MAGIC: "ggla", llama2c.MAGIC: "llama2c", b"PK\x03\x04": "zip"}
    if head[:4] in magics:
        return magics[head[:4]]
    if head[:4] in _OLD_GGML:
        return "ggml"
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    if head[8:9] == b"{" and 2 <= struct.unpack_from("<Q", head)[0] <= size - 8:
        return "safetensors"
    if llama2c.parse_header(head) is not None:
        return "llama2c"
    if head[:1] == b"\n" and b"<unk>" in head[:64] and b"\0" in head:
        return "sentencepiece"
    if head[12:17] == b"<unk>":  # u32 longest token, f32 score, u32 length, token 0
        return "llama2c-tokenizer"
    return "text" if _is_text(head) else "unknown"


def _is_text(head: bytes) -> bool:
    if _TEXT_CONTROLS.intersection(head):
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4 and len(head) == _HEAD_BYTES  # a character cut by the end of the head
    return True


def model_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files that the model (or adapter) at a path consists of: the file itself, all parts of a split GGUF, or those
    of the folder that it is or that it opens; no README there, no optimizer's state.

    Where a folder's weights cannot be told, all of its files. Raises OSError or UsageError when it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        own = _own_names(path)
        return [path / entry.name for entry in os.scandir(path) if entry.is_file() and entry.name in own]
    part = PART_NAME.fullmatch(path.name)
    if part is not None:
        names = ((entry, PART_NAME.fullmatch(entry.name)) for entry in path.parent.iterdir())
        return [entry for entry, name in names if name is not None and name.groups() == part.groups()]
    if SHARD.fullmatch(path.name) or path.name.startswith(("model", "pytorch_model")):
        own = _own_names(path.parent) if _folder_kind(path.parent) in ("huggingface", "meta") else set()
        if path.name in own:
            return model_files(path.parent)
    return [path]


def _own_names(folder: Path) -> set[str]:
    kind = _folder_kind(folder)
    try:
        if kind == "huggingface":
            return {*weight_files(folder)[0], *COMPANIONS}
        if kind == "meta":
            return {*shard_names(folder), PARAMS, "tokenizer.model"}
    except FormatError:
        pass
    names = set(os.listdir(folder))
    return {name for name in names if name.startswith("adapter_")} if kind == "peft" else names


def size_on_disk(path: str | os.PathLike[str]) -> int:
    """Bytes of `model_files`. Raises OSError or UsageError when they cannot be read."""
    return sum(os.path.getsize(file) for file in model_files(path))


def open_model(path: str | os.PathLike[str], *, n_ctx: int | None = None, rope_theta: float | None = None) -> ModelFile:
    """Open a model file or folder of any known format; weights in a Hugging Face or Meta folder open that folder.

    A part of a split GGUF file opens all of them. n_ctx, rope_theta: for Meta's checkpoints, where params.json does not
    state the context (0: nobody needs it) or the base of the rotary embedding; others ignore both. A GGUF file may as
    well be an adapter, a vocabulary, a checkpoint or an importance matrix: what its metadata says is for the caller to
    check. Raises UsageError when the path cannot be read, a part is missing or one of both has to be given,
    UnsupportedError for what is known but no model here, FormatError for the rest and for broken files.
    """
    kind, path = sniff(path), Path(path)
    if kind in _OPENERS:
        return _OPENERS[kind](path)
    if kind == "zip" and SHARD.fullmatch(path.name) and (path.parent / PARAMS).exists():
        kind, path = "meta", path.parent
    if kind == "meta":
        return MetaModel(path, n_ctx=n_ctx, rope_theta=rope_theta)
    if kind == "safetensors" and os.path.exists(path.parent / "config.json"):
        return _folder_of(path)
    if kind == "zip":
        in_folder = path.name.startswith("pytorch_model") and os.path.exists(path.parent / "config.json")
        return _folder_of(path) if in_folder else Llama2cCheckpoint(path)
    raise _refusal(path, kind)


def open_stated(path: str | os.PathLike[str], *, n_ctx: int | None, rope_theta: float | None) -> ModelFile:
    """`open_model`, and a rope_theta that is given counts for every format. Raises as `open_model`."""
    file = open_model(path, n_ctx=n_ctx, rope_theta=rope_theta)
    return with_metadata(file, stated_metadata(None, rope_theta))


def check_is_model(file: ModelFile) -> None:
    """Raises UnsupportedError that says what a GGUF file is instead of a model, and where it belongs."""
    metadata = file.metadata
    kind = metadata.get("general.type")
    if "training.type" in metadata:
        reason, hint = "is a training checkpoint, not a model", "take the adapter that was saved beside it: --lora"
    elif kind == "adapter":
        reason, hint = "is an adapter, not a model", "give it with --lora, and the model with -m"
    elif isinstance(kind, str) and kind != "model":
        reason, hint = f"is not a model (general.type is {escape_control(kind)!r})", None
    elif not file.tensors:
        reason, hint = "is a vocabulary without a model: it holds no tensors", None
    else:
        return
    raise UnsupportedError(reason, path=file.path, hint=hint)


def _folder_of(path: Path) -> ModelFile:
    """The Hugging Face folder that these weights belong to."""
    model = HuggingFaceModel(path.parent)
    if path.name not in model.files:
        model.close()
        raise UnsupportedError(
            "is none of the weights that its folder's model consists of", path=path, hint="give its folder"
        )
    return model


#: kind -> what opens it as a model
_OPENERS: dict[str, Callable[[str | os.PathLike[str]], ModelFile]] = {
    "gguf": open_gguf,
    "llama2c": llama2c.Llama2cFile,
    "huggingface": HuggingFaceModel,
}


def _refusal(path: str | os.PathLike[str], kind: str) -> LlamakitError:
    if kind in _UNSUPPORTED:
        what, hint = _UNSUPPORTED[kind]
        return UnsupportedError(what, path=path, hint=hint)
    if kind == "directory":
        return UsageError("is a directory, a model file is needed", path=path)
    if kind == "empty":
        return FormatError("is empty (expected a model file, got 0 bytes)", path=path, offset=0)
    if kind == "text":
        return FormatError("is a text, not a model (expected GGUF or a llama2.c model)", path=path, offset=0)
    return FormatError("is of an unknown format (expected GGUF or a llama2.c model)", path=path, offset=0)
