"""Tokens on a disk: a folder of shards in llama2.c's layout, ours with an index beside them, or one bare .bin file.

A shard is nothing but ids, little-endian uint16 (uint32 for more than 65,536 tokens): each document is BOS and its
tokens, one after the other. The first shard is held out for validation, the others are trained on. What is opened
here is mapped, never read whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llamakit.errors import DataError, FormatError, MismatchError, UnsupportedError, UsageError
from llamakit.files import escape_control
from llamakit.formats.folder import member
from llamakit.formats.gguf import open_gguf
from llamakit.formats.stamps import vocabulary_stamp
from llamakit.formats.strict_json import read_object

INDEX, VOCABULARY, FORMAT, VERSION = "index.json", "vocab.gguf", "llamakit.tokens", 1
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, ...] = ("train", "validation")

_MAX_SHARDS = 100_000
_BLOCK = 1 << 24
#: share of a bare file that is held out
_BARE_VALIDATION = 0.05


@dataclass(frozen=True, eq=False)
class Split:
    """One part of the data: what is trained on, or what is held out.

    shards: mapped ids, (n,) uint16 or uint32 each. bounds: for each shard where its documents start, (m,) int64, the
    first at 0. n_bytes: UTF-8 bytes of the documents' text, for bits per byte; None where nobody counted them. sha256:
    of the bytes of all tokens in a row, as it was written; None where no index says it (`hash_tokens` computes it).
    """

    shards: tuple[np.ndarray, ...]
    bounds: tuple[np.ndarray, ...]
    n_tokens: int
    n_documents: int
    n_bytes: int | None
    sha256: str | None


@dataclass(frozen=True, eq=False)
class TokenData:
    """Tokens ready to be trained on.

    n_vocab, bos: None where nothing says them. vocabulary: its stamp (`vocabulary_stamp`), "" where unknown.
    vocabulary_file: a GGUF without tensors, None for data that others wrote. The validation has no shard where nothing
    was held out.
    """

    path: Path
    n_vocab: int | None
    bos: int | None
    vocabulary: str
    train: Split
    validation: Split
    vocabulary_file: Path | None


def open_tokens(path: str | os.PathLike[str]) -> TokenData:
    """Open a folder that `prepare` wrote, one of llama2.c's (*.bin in the order of their names, the first for
    validation, BOS the first token), nanoGPT's (train.bin, val.bin), or one bare .bin file; its last 5 % are held out.

    Raises UsageError for a path that cannot be read, DataError where there are no tokens, FormatError for a broken
    index or a shard that is not as long as it says, UnsupportedError for an index of a later version.
    """
    path = Path(path)
    if path.is_dir():
        if (path / INDEX).exists() or (path / INDEX).is_symlink():
            return _open_indexed(path)
        return _open_bare_folder(path)
    return _open_bare_file(path)


def holds_tokens(path: str | os.PathLike[str]) -> bool:
    """Whether `open_tokens` is the one to open this: a folder with an index or *.bin files, or a file named *.bin."""
    path = Path(path)
    if path.is_dir():
        return (path / INDEX).is_file() or any(path.glob("*.bin"))
    return path.suffix == ".bin"


def check_vocabulary(data: TokenData, metadata: Mapping[str, Any], source: str | os.PathLike[str]) -> None:
    """Raise MismatchError unless the tokens are of the vocabulary in these `tokenizer.*` keys, which are `source`'s.

    Where no index names a vocabulary, all that can be seen is whether every id is in it; all tokens are read for that.
    """
    hint = f"prepare the text again with --vocab-model {os.fspath(source)}, or train with the vocabulary of the tokens"
    if data.vocabulary:
        ours = vocabulary_stamp(metadata)
        if ours != data.vocabulary:
            n_tokens = len(metadata.get("tokenizer.ggml.tokens", ()))
            raise MismatchError(
                f"was written with another tokenizer: {data.n_vocab} tokens, sha256 {data.vocabulary[:12]}...; "
                f"{os.fspath(source)} has {n_tokens}, sha256 {ours[:12]}...",
                path=data.path,
                hint=hint,
            )
        return
    check_ids(data, len(metadata.get("tokenizer.ggml.tokens", ())), hint=hint)


def check_ids(data: TokenData, n_vocab: int, *, hint: str | None = None) -> None:
    """Read all tokens and raise MismatchError for the first id that a model with n_vocab embeddings does not have."""
    for split in (data.train, data.validation):
        for shard in split.shards:
            for start, block in _blocks(shard):
                if block.size and int(block.max()) >= n_vocab:
                    at = start + int((block >= n_vocab).argmax())
                    raise MismatchError(
                        f"token {at} is {int(shard[at])}, the vocabulary has {n_vocab} tokens",
                        path=shard_path(shard, data.path),
                        hint=hint,
                    )


def hash_tokens(split: Split) -> str:
    """sha256 (hex) of the bytes of all tokens of a split in a row; reads all of them."""
    digest = hashlib.sha256()
    for shard in split.shards:
        for _, block in _blocks(shard):
            digest.update(block.tobytes())
    return digest.hexdigest()


def verify_tokens(data: TokenData) -> None:
    """Read everything and compare it with the index: hashes, ids, a BOS at each start of a document.

    Raises FormatError naming the file; nothing can be wrong where there is no index.
    """
    for split in (data.train, data.validation):
        if split.sha256 is None:
            continue
        for shard, bounds in zip(split.shards, split.bounds, strict=True):
            path = shard_path(shard, data.path)
            wrong = np.flatnonzero(shard[bounds] != data.bos)
            if wrong.size:
                at = int(bounds[wrong[0]])
                reason = f"document {int(wrong[0])} starts with token {int(shard[at])} (expected BOS, {data.bos})"
                raise FormatError(reason, path=path, offset=at * shard.itemsize)
        if hash_tokens(split) != split.sha256:
            name = "training" if split is data.train else "validation"
            raise FormatError(
                f"the {name} tokens are not those that were written (their sha256 differs from the index)",
                path=data.path,
                hint="prepare the text again",
            )
    if data.n_vocab is not None:
        check_ids(data, data.n_vocab)


def shard_path(shard: np.ndarray, folder: Path) -> Path:
    """The file that a shard, or a part of one, is mapped from; `folder` where it is not mapped."""
    base: Any = shard
    while base is not None and not isinstance(base, np.memmap):
        base = base.base
    return Path(str(base.filename)) if base is not None and base.filename else folder


def _blocks(shard: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(shard), _BLOCK):
        yield start, shard[start : start + _BLOCK]


def _mapped(path: Path, dtype: np.dtype[Any], n_tokens: int | None = None) -> np.ndarray:
    """A shard, its size held against what the index says, or against whole tokens."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise FormatError("is no regular file, a shard of tokens is needed", path=path)
        if n_tokens is not None and size != n_tokens * dtype.itemsize:
            expected = n_tokens * dtype.itemsize
            kind = "was cut off" if size < expected else "has grown"
            raise FormatError(
                f"{kind}: it has {size} bytes (expected {expected}: {n_tokens} tokens of {dtype.name})",
                path=path,
                hint="prepare the text again",
            )
        if size % dtype.itemsize:
            raise FormatError(f"has {size} bytes, no whole number of {dtype.name} tokens", path=path)
        if not size:
            raise DataError("holds no tokens", path=path)
        return np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror or error}", path=path) from error


def _open_indexed(folder: Path) -> TokenData:
    path = folder / INDEX
    index = _Index(read_object(member(folder, INDEX)), path)
    if index.value("format", str) != FORMAT:
        raise FormatError(f"'format' is {_shown(index.values['format'])} (expected '{FORMAT}')", path=path)
    version = index.integer("version", 1, 1 << 31)
    if version > VERSION:
        raise UnsupportedError(f"is of version {version}, this llamakit knows {VERSION}", path=path)
    dtype_name = index.value("dtype", str)
    if dtype_name not in DTYPES:
        raise FormatError(f"'dtype' is {_shown(dtype_name)} (expected uint16 or uint32)", path=path)
    n_vocab = index.integer("n_vocab", 1, 1 << (16 if dtype_name == "uint16" else 32))
    bos = index.integer("bos", 0, n_vocab - 1)
    stamp = index.sha256("vocabulary")
    listed = index.value("shards", list)
    if not 0 < len(listed) <= _MAX_SHARDS:
        raise FormatError(f"'shards' names {len(listed)} files (expected 1 to {_MAX_SHARDS})", path=path)
    shards = [_Index(entry, path, f"shards[{i}]") for i, entry in enumerate(listed)]
    names = [shard.value("file", str) for shard in shards]
    if len(set(names)) != len(names):
        raise FormatError("'shards' names a file twice", path=path)
    hashes = _Index(index.value("sha256", dict), path, "sha256")
    train, validation = (_indexed_split(folder, shards, name, DTYPES[dtype_name], hashes) for name in SPLITS)
    if not train.shards:
        raise FormatError("'shards' names nothing to train on", path=path)
    return TokenData(folder, n_vocab, bos, stamp, train, validation, _checked_vocabulary(folder, stamp))


def _indexed_split(folder: Path, shards: list[_Index], name: SplitName, dtype: np.dtype[Any], hashes: _Index) -> Split:
    mapped: list[np.ndarray] = []
    bounds: list[np.ndarray] = []
    n_bytes = 0
    for shard in shards:
        split = shard.value("split", str)
        if split not in SPLITS:
            raise shard.error("split", f"is {_shown(split)} (expected train or validation)")
        if split != name:
            continue
        n_tokens = shard.integer("n_tokens", 1, 1 << 48)
        n_documents = shard.integer("n_documents", 1, n_tokens)
        n_bytes += shard.integer("n_bytes", 0, 1 << 56)
        shard.sha256("sha256")
        mapped.append(_mapped(member(folder, shard.value("file", str)), dtype, n_tokens))
        bounds.append(_read_bounds(member(folder, shard.value("bounds", str)), n_documents, n_tokens))
    n_tokens, n_documents = sum(map(len, mapped)), sum(map(len, bounds))
    return Split(tuple(mapped), tuple(bounds), n_tokens, n_documents, n_bytes, hashes.sha256(name))


def _read_bounds(path: Path, n_documents: int, n_tokens: int) -> np.ndarray:
    """Where the documents of a shard start, (n_documents,) int64: 0 first, then rising, inside of the shard."""
    try:
        size = path.stat().st_size
        if not path.is_file() or size != n_documents * 8:
            raise FormatError(f"has {size} bytes (expected {n_documents * 8}: {n_documents} bounds)", path=path)
        bounds = np.fromfile(path, "<i8").astype(np.int64, copy=False)
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror or error}", path=path) from error
    wrong = np.flatnonzero(np.diff(bounds) <= 0) if len(bounds) == n_documents else np.zeros(1)
    if wrong.size or bounds[0] != 0 or bounds[-1] >= n_tokens:
        at = int(wrong[0]) + 1 if wrong.size else 0 if bounds[0] else n_documents - 1
        raise FormatError(
            f"document {at} starts at {int(bounds[at])}: the starts must rise from 0 to below {n_tokens}",
            path=path,
            offset=at * 8,
        )
    return bounds


def _checked_vocabulary(folder: Path, stamp: str) -> Path:
    path = member(folder, VOCABULARY)
    with open_gguf(path) as file:
        try:
            found = vocabulary_stamp(file.metadata)
        except (ValueError, TypeError) as error:  # of values that are no numbers, say
            raise FormatError(f"is no sound vocabulary: {escape_control(str(error))[:100]}", path=path) from error
    if found != stamp:
        raise FormatError(
            f"is not the vocabulary of these tokens: its sha256 is {found[:12]}..., the index has {stamp[:12]}...",
            path=path,
            hint="prepare the text again",
        )
    return path


class _Index:
    """An object of the index whose values are asked for one by one; an error names the key."""

    def __init__(self, values: Any, path: Path, within: str = "") -> None:
        self.path, self.within = path, within
        if not isinstance(values, dict):
            raise FormatError(f"'{within}' is {_shown(values)} (expected an object)", path=path)
        self.values: dict[str, Any] = values

    def error(self, key: str, reason: str) -> FormatError:
        return FormatError(f"'{self.within + '.' if self.within else ''}{key}' {reason}", path=self.path)

    def value(self, key: str, kind: type) -> Any:
        if key not in self.values:
            raise self.error(key, "is missing")
        value = self.values[key]
        if type(value) is not kind:
            word = {str: "a string", int: "a whole number", list: "a list", dict: "an object"}[kind]
            raise self.error(key, f"is {_shown(value)} (expected {word})")
        return value

    def integer(self, key: str, low: int, high: int) -> int:
        value = self.value(key, int)
        if not low <= value <= high:
            raise self.error(key, f"is {_shown(value)} (expected {low} to {high})")
        return value

    def sha256(self, key: str) -> str:
        value = self.value(key, str)
        if len(value) != 64 or not set(value) <= set("0123456789abcdef"):
            raise self.error(key, f"is {_shown(value)} (expected a sha256, 64 hexadecimal digits)")
        return value


def _shown(value: Any) -> str:
    return escape_control(repr(value)[:60])


def _open_bare_folder(folder: Path) -> TokenData:
    names = sorted(p.name for p in folder.glob("*.bin"))
    if not names:
        raise DataError(
            f"holds no tokens: neither {INDEX} nor *.bin files",
            path=folder,
            hint="make them from a text with: llamakit data prepare TEXT -o FOLDER",
        )
    if set(names) == {"train.bin", "val.bin"}:  # nanoGPT's: the other way round, and no BOS
        train, validation = (_mapped(member(folder, name), DTYPES["uint16"]) for name in ("train.bin", "val.bin"))
        return TokenData(folder, None, None, "", _bare_split([train], None), _bare_split([validation], None), None)
    if len(names) < 2:
        return _open_bare_file(member(folder, names[0]), folder)
    shards = [_mapped(member(folder, name), DTYPES["uint16"]) for name in names]
    bos = int(shards[0][0])
    return TokenData(folder, None, bos, "", _bare_split(shards[1:], bos), _bare_split(shards[:1], bos), None)


def _open_bare_file(path: Path, shown: Path | None = None) -> TokenData:
    """The last 5 % are held out, from the start of a document on where BOS shows one nearby."""
    tokens = _mapped(path, DTYPES["uint16"])
    bos = int(tokens[0])
    starts = _starts(tokens, bos)
    cut = len(tokens) - int(len(tokens) * _BARE_VALIDATION)
    after = int(np.searchsorted(starts, cut))
    if after < len(starts) and starts[after] - cut < (len(tokens) - cut) // 2:
        cut = int(starts[after])
    held_out = [tokens[cut:]] if cut < len(tokens) else []
    train, validation = _bare_split([tokens[:cut]], bos), _bare_split(held_out, bos)
    return TokenData(shown or path, None, bos, "", train, validation, None)


def _bare_split(shards: list[np.ndarray], bos: int | None) -> Split:
    bounds = tuple(_starts(shard, bos) for shard in shards)
    return Split(tuple(shards), bounds, sum(map(len, shards)), sum(map(len, bounds)), None, None)


def _starts(shard: np.ndarray, bos: int | None) -> np.ndarray:
    """Where BOS stands, (m,) int64; 0 is always a start."""
    found = [np.zeros(1, np.int64)]
    if bos is not None:
        found += [np.flatnonzero(block == bos) + start for start, block in _blocks(shard)]
    starts = np.concatenate(found)
    return starts[1:] if len(starts) > 1 and starts[1] == 0 else starts
