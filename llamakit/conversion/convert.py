"""Any Llama in, any Llama out: a reader of one format and a writer of another, tensor by tensor.

Memory is about one slice of a tensor (one tensor, where a format orders rows differently), whatever the model's size.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamakit.conversion.convert_config import ConvertConfig, Target
from llamakit.conversion.outtype import automatic_outtype, gguf_types, huggingface_types
from llamakit.conversion.recode import recoded
from llamakit.errors import FormatError, SaveError, UnsupportedError, UsageError
from llamakit.files import check_writable, is_same_file
from llamakit.formats.base import ModelFile, TensorData
from llamakit.formats.borrowed import stated_metadata, with_metadata, with_vocabulary, without_vocabulary
from llamakit.formats.gguf import GGUFValueType, Typed, typed_metadata, write_gguf
from llamakit.formats.gguf_split import PART_NAME, part_prefix, write_gguf_split
from llamakit.formats.huggingface import HuggingFaceModel
from llamakit.formats.huggingface_writer import write_huggingface
from llamakit.formats.llama2c import RMS_EPS, ROPE_FREQ_BASE
from llamakit.formats.llama2c_vocab import read_llama2c_vocabulary, write_llama2c_vocabulary
from llamakit.formats.llama2c_writer import llama2c_notes, write_llama2c
from llamakit.formats.open import check_is_model, model_files, open_model, sniff
from llamakit.formats.vocabulary import vocabulary_only
from llamakit.ggml import GGMLType

_THETA, _EPS = "llama.rope.freq_base", "llama.attention.layer_norm_rms_epsilon"
_VOCABULARY_HINT = "name one with --vocab: a GGUF file, a folder, tokenizer.model, tokenizer.json or tokenizer.bin"

_QUANTIZATION_VERSION = 2
_NORMAL = 1  # a token_type

Verify = Callable[[ModelFile, ModelFile], None]
Check = Callable[[ModelFile], None]


@dataclass(frozen=True)
class ConvertPlan:
    """What is about to be written.

    path: where, to: in which form; types: tensor name -> type; file_type: general.file_type, None where the source's
    stays; notes: for the user.
    """

    path: Path
    to: Target
    outtype: str
    file_type: int | None
    types: Mapping[str, GGMLType]
    n_bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class WrittenSlice:
    """Some rows of a tensor have been handed to the disk.

    index: the tensor's number in the order of writing, from 1; done: whether it was its last slice; bytes_done: of
    all tensors, of ConvertPlan.n_bytes.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    type: GGMLType
    bytes_done: int
    done: bool


@dataclass(frozen=True)
class Converted:
    """Everything is there. paths: what was written, the model first; notes: what came up while writing."""

    paths: tuple[Path, ...]
    n_bytes: int
    notes: tuple[str, ...] = ()


Report = ConvertPlan | WrittenSlice


def open_source(config: ConvertConfig) -> ModelFile:
    """The model to be converted, with the vocabulary and the numbers that the user named in place of its own.

    Raises what `open_model` raises, and UsageError or MismatchError for a vocabulary that is none, or another model's.
    """
    file = open_with_vocabulary(
        config.source,
        vocab=_vocabulary_path(config),
        pre=config.pre,
        ctx=0 if config.vocab_only and config.ctx is None else config.ctx,
        rope_freq_base=config.rope_freq_base,
    )
    name = {} if config.model_name is None else {"general.name": config.model_name}
    return with_metadata(file, stated_metadata(config.ctx, config.rope_freq_base) | name)


def open_with_vocabulary(
    source: Path, *, vocab: Path | None, pre: str | None = None, ctx: int | None, rope_freq_base: float | None
) -> ModelFile:
    """A model, with the vocabulary at `vocab` in place of its own where that is named; ctx, rope_freq_base: for sources
    that do not state them. Raises as `open_source`."""
    if vocab is None:
        return open_model(source, n_ctx=ctx, rope_theta=rope_freq_base)
    if sniff(source) == "huggingface":
        file: ModelFile = HuggingFaceModel(source, vocabulary=False)
    else:
        file = open_model(source, n_ctx=ctx, rope_theta=rope_freq_base)
    n_vocab = file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else None
    return with_vocabulary(file, vocabulary_only(vocab, n_vocab, pre=pre), source=vocab)


def check_has_vocabulary(source: ModelFile) -> None:
    """Raises UsageError for a model without a vocabulary, which a target with one needs."""
    if "tokenizer.ggml.tokens" not in source.metadata:
        raise UsageError("has no vocabulary, and the target needs one", path=source.path, hint=_VOCABULARY_HINT)


def _vocabulary_path(config: ConvertConfig) -> Path | None:
    """Where the user wants the vocabulary from; None: the source's own."""
    if config.vocab is not None or (config.vocab_type is None and config.pre is None):
        return config.vocab
    folder = config.source if config.source.is_dir() else config.source.parent
    names = {"spm": "tokenizer.model", "bpe": "tokenizer.json", "hfft": "tokenizer.json"}
    return folder / names[config.vocab_type] if config.vocab_type else folder


def plan_conversion(source: ModelFile, config: ConvertConfig) -> ConvertPlan:
    """What converting an opened source would write, and what is worth knowing beforehand; nothing is written.

    Raises UsageError where the target is missing or is the source itself, UnsupportedError for what the target cannot
    hold.
    """
    notes: list[str] = []
    file_type: int | None = None
    if not config.vocab_only:
        check_is_model(source)
    if config.target == "llama2c":
        if config.outtype not in ("auto", "f32"):
            raise UsageError(
                f"--outtype {config.outtype} cannot be in a llama2.c file (expected auto or f32)",
                hint="--version 2 writes int8",
            )
        types, outtype = dict.fromkeys(source.tensors, GGMLType.F32), "f32"
        notes += llama2c_notes(source.metadata, config.version)
    elif config.target == "hf":
        types, outtype = huggingface_types(source, config.outtype)
    else:
        types, outtype, file_type = _gguf_outtype(source, config)
    path = config.path(outtype)
    _check_target(config, path)
    if config.target != "llama2c":
        check_has_vocabulary(source)
    n_bytes = sum(source.tensors[name].n_bytes_as(kind) for name, kind in types.items())
    return ConvertPlan(path, config.target, outtype, file_type, types, n_bytes, tuple(notes))


def _gguf_outtype(source: ModelFile, config: ConvertConfig) -> tuple[dict[str, GGMLType], str, int | None]:
    """(types, outtype, general.file_type or None)."""
    if config.vocab_only:
        return {}, "vocab", None
    if config.outtype == "auto" and not _is_checkpoint(config.source):
        types = {name: info.type for name, info in source.tensors.items()}
        most = Counter(types.values()).most_common(1)
        return types, most[0][0].name.lower() if most else "f32", None
    outtype = automatic_outtype(source) if config.outtype == "auto" else config.outtype
    types, file_type = gguf_types(source, outtype)
    return types, file_type.name.lower(), file_type.number


def _is_checkpoint(path: Path) -> bool:
    """Whether a model comes from where models are trained in 16 bits; others state their types for good."""
    kind = sniff(path)
    in_folder = kind == "zip" and path.name.startswith(("consolidated.", "pytorch_model"))
    return kind in ("huggingface", "safetensors", "meta") or in_folder


def _check_target(config: ConvertConfig, path: Path) -> None:
    """Nothing that the result is made of may be overwritten by it: its rows are read until the end."""
    used = [config.source, *model_files(config.source), *([config.vocab] if config.vocab is not None else [])]
    for file in used:
        if is_same_file(path, file) or (config.is_split and _is_part(file, path)):
            raise UsageError("is the source itself", path=file, hint="name another target with -o")
    if config.target == "hf":
        if not path.parent.is_dir():
            raise UsageError("the folder that it should go into does not exist", path=path)
    else:
        check_writable(path)


def _is_part(file: Path, target: Path) -> bool:
    """Whether a file lies where a part of `target` may go."""
    name = PART_NAME.fullmatch(file.name)
    return name is not None and name[1] == part_prefix(target).name and is_same_file(file.parent, target.parent)


def convert(
    config: ConvertConfig,
    *,
    verify: Verify | None = None,
    on_report: Callable[[Report], None] | None = None,
) -> Converted:
    """Read a model in any format and write it in another; the target appears only once it is whole.

    on_report: called with the plan, then with every slice that was written. verify: called with the source, as far as
    the target's format can hold it, and the written model, opened, before it gets its name; what it raises leaves
    nothing behind.

    Raises UsageError, FormatError, UnsupportedError and MismatchError for sources that cannot be read, are broken, or
    hold what the target cannot; SaveError when the disk refuses.
    """
    with open_source(config) as source:
        plan = plan_conversion(source, config)
        if on_report is not None:
            on_report(plan)
        tensors = _counted(source, plan, on_report)
        expected = _as_the_target_holds_it(source, config)

        def check(written: ModelFile) -> None:
            if verify is not None and not config.vocab_only:
                verify(expected, written)

        with _blamed_on(source, plan.path):
            if plan.to == "llama2c":
                return _write_llama2c(source, plan, config, tensors, check)
            if plan.to == "hf":
                write_huggingface(plan.path, metadata=typed_metadata(source), tensors=tensors, verify=check)
                return converted([plan.path])
            return _write_gguf(source, plan, config, tensors, check)


@contextlib.contextmanager
def _blamed_on(source: ModelFile, target: Path) -> Iterator[None]:
    """A writer that refuses what it was given names its target, or nothing: it is the source's doing."""
    try:
        yield
    except (FormatError, UnsupportedError) as error:
        if error.path is None or Path(error.path) == target:
            error.path = source.path
        raise


def _counted(source: ModelFile, plan: ConvertPlan, on_report: Callable[[Report], None] | None) -> list[TensorData]:
    """The tensors in their new types; each slice that a writer takes is reported."""
    left = {name: source.tensors[name].n_bytes_as(kind) for name, kind in plan.types.items()}
    order: dict[str, int] = {}
    done = 0

    def count(name: str, n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        left[name] -= n_bytes
        index = order.setdefault(name, len(order) + 1)
        if on_report is not None:
            info = source.tensors[name]
            on_report(WrittenSlice(index, name, info.shape, plan.types[name], done, left[name] == 0))

    return [recoded(source, name, kind, count) for name, kind in plan.types.items()]


def _as_the_target_holds_it(source: ModelFile, config: ConvertConfig) -> ModelFile:
    """llama2.c fixes two numbers, of which version 0 shows one (`llama2c_notes` has told it), and keeps the vocabulary
    in a file of its own."""
    if config.target != "llama2c":
        return source
    fixed = {_EPS: RMS_EPS} if config.version == 0 else {_EPS: RMS_EPS, _THETA: ROPE_FREQ_BASE}
    return with_metadata(without_vocabulary(source), fixed)


def _write_gguf(
    source: ModelFile, plan: ConvertPlan, config: ConvertConfig, tensors: Sequence[TensorData], check: Check
) -> Converted:
    metadata = typed_metadata(source)
    if plan.file_type is not None:
        metadata["general.file_type"] = Typed(plan.file_type, GGUFValueType.UINT32)
        metadata.setdefault("general.quantization_version", _QUANTIZATION_VERSION)
    if not config.is_split:
        write_gguf(plan.path, metadata=metadata, tensors=tensors, verify=check)
        return converted([plan.path])
    paths = write_gguf_split(
        plan.path,
        metadata=metadata,
        tensors=tensors,
        max_bytes=config.split_max_bytes,
        max_tensors=config.split_max_tensors,
        no_tensor_first_split=config.no_tensor_first_split,
        verify=check,
    )
    return converted(paths)


def _write_llama2c(
    source: ModelFile, plan: ConvertPlan, config: ConvertConfig, tensors: Sequence[TensorData], check: Check
) -> Converted:
    """The model, and beside it the vocabulary as run.c's -z takes it, where run.c can know it."""
    write_llama2c(plan.path, metadata=source.metadata, tensors=tensors, version=config.version, verify=check)
    if "tokenizer.ggml.tokens" not in source.metadata:
        return converted([plan.path], "the source has no vocabulary, so there is no tokenizer.bin")
    path = plan.path.with_name("tokenizer.bin")
    fresh = path.with_name(f"{plan.path.stem}-tokenizer.bin")
    try:
        write_llama2c_vocabulary(fresh, source.metadata)
    except UnsupportedError as error:
        return converted([plan.path], f"there is no tokenizer.bin: {error.reason}")
    _compare_vocabulary(fresh, source)
    if path.exists() and path.read_bytes() != fresh.read_bytes():
        return converted([plan.path, fresh], f"{path} is another vocabulary, and stays")
    os.replace(fresh, path)
    return converted([plan.path, path])


def _compare_vocabulary(path: Path, source: ModelFile) -> None:
    """What run.c looks up: the spellings of the normal tokens, and the scores."""
    tokens = source.metadata["tokenizer.ggml.tokens"]
    written = read_llama2c_vocabulary(path, len(tokens))
    pairs = zip(written["tokenizer.ggml.tokens"], tokens, written["tokenizer.ggml.token_type"].tolist(), strict=True)
    if any(ours != theirs for ours, theirs, kind in pairs if kind == _NORMAL):
        path.unlink()
        raise SaveError("reads back with other tokens than were written", path=path)


def converted(paths: Sequence[Path], *notes: str) -> Converted:
    """What stands at these paths now, files and folders, as the result of a conversion."""
    files = [file for path in paths for file in (path.iterdir() if path.is_dir() else (path,))]
    return Converted(tuple(paths), sum(file.stat().st_size for file in files), notes)
