"""Split GGUF files: one model in parts PREFIX-00001-of-00003.gguf ..., read as one file, written as one set.

Each part is a GGUF file of its own and says where it belongs: split.no (u16, from 0), split.count (u16) and
split.tensors.count (i32, of all parts together). The metadata of the model stands in the first. Facts of names, keys
and cuts: llama.cpp, tools/gguf-split/gguf-split.cpp and src/llama-model-loader.cpp.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from llamakit.errors import FormatError, SaveError, UsageError
from llamakit.files import atomic_files, escape_control
from llamakit.formats.base import TensorData, TensorInfo, read_back
from llamakit.formats.gguf_reader import DEFAULT_ALIGNMENT, GGUFFile
from llamakit.formats.gguf_values import GGUFValueType, ValueType
from llamakit.formats.gguf_writer import Typed, written_tensors

DEFAULT_MAX_TENSORS = 128

_NO, _COUNT, _N_TENSORS = "split.no", "split.count", "split.tensors.count"
_KEY_TYPES = {_NO: GGUFValueType.UINT16, _COUNT: GGUFValueType.UINT16, _N_TENSORS: GGUFValueType.INT32}
_MAX_PARTS = (1 << 16) - 1
_SIZE = re.compile(r"([0-9]{1,9})([MG])")


class _Place(NamedTuple):
    """What a part says of itself: its number from 0, how many parts there are, how many tensors in all of them."""

    no: int
    n_parts: int
    n_tensors: int

    def __str__(self) -> str:
        return f"part {self.no + 1} of {self.n_parts} with {self.n_tensors} tensors in all"


class SplitGGUF:
    """All parts of a split GGUF file as one `ModelFile`, opened by the path of any of them.

    path: the first part. parts: all of them, in order. part: the number of the given one, from 1.
    metadata, metadata_types: of the first part, without what concerns the split. version, alignment: of the first part.
    tensors: name -> TensorInfo, of all parts in order; `offset` counts in the tensor's own part.
    n_bytes: of all parts together.

    The other parts are found by their names, which follow from the given one's; nothing in a file names another file.
    Raises UsageError when a part is missing or no readable regular file, FormatError when one is broken, or is not the
    part that it should be; each names the part.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        with GGUFFile(path, part=True) as given:
            place = _place(given)
        prefix = _prefix(Path(path), place)
        self.part = place.no + 1
        with ExitStack() as stack:
            files: list[GGUFFile] = []
            for no in range(place.n_parts):
                one = Path(path) if no == place.no else part_path(prefix, no, place.n_parts)
                files.append(stack.enter_context(_opened(one, place)))
                _check_place(files[-1], place._replace(no=no), given.path)
            self._tensors, self._homes = _joined(files, place.n_tensors)
            self._files = tuple(files)
            stack.pop_all()
        self.parts = tuple(file.path for file in files)
        self.path, self.version, self.alignment = files[0].path, files[0].version, files[0].alignment
        self._metadata = _without_split(files[0].metadata)
        self._types = _without_split(files[0].metadata_types)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Values under their keys, in the order of the first part."""
        return self._metadata

    @property
    def metadata_types(self) -> Mapping[str, ValueType]:
        """Key -> (type, element type or None), as stored."""
        return self._types

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """In the order of the parts, and of each part."""
        return self._tensors

    @property
    def n_bytes(self) -> int:
        """Size of all parts together when they were opened."""
        return sum(file.n_bytes for file in self._files)

    def part_of(self, name: str) -> int:
        """Which part a tensor lies in, from 0."""
        return self._files.index(self._homes[name])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Packed rows [start, stop) as a fresh, writable uint8 array (rows, row_bytes); raises what GGUFFile.read
        raises."""
        return self._homes[name].read(name, start, stop)

    def close(self) -> None:
        """Close all parts; `read` fails afterwards, metadata and tensor table stay."""
        for file in self._files:
            file.close()

    def __enter__(self) -> SplitGGUF:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile | SplitGGUF:
    """A GGUF file, or the whole of which it is a part. Raises what GGUFFile and SplitGGUF raise.

    Files that were joined again say that they have 0 parts.
    """
    file = GGUFFile(path, part=True)
    count = file.metadata.get(_COUNT, 0)
    if isinstance(count, int) and count == 0:
        return file
    file.close()
    return SplitGGUF(path)


def part_path(prefix: str | os.PathLike[str], no: int, count: int) -> Path:
    """The path of part `no` (from 0) of `count`: PREFIX-00001-of-00003.gguf."""
    return Path(f"{os.fspath(prefix)}-{no + 1:05d}-of-{count:05d}.gguf")


def _place(file: GGUFFile) -> _Place:
    for key, kind in _KEY_TYPES.items():
        if key not in file.metadata:
            raise FormatError(f"is no part of a split GGUF file ({key} is missing)", path=file.path)
        found = file.metadata_types[key][0]
        if found is not kind:
            raise FormatError(f"{key} has the wrong type (expected {kind.name}, got {found.name})", path=file.path)
    place = _Place(*(file.metadata[key] for key in _KEY_TYPES))
    if place.no >= place.n_parts or place.n_tensors < len(file.tensors):
        raise FormatError(f"cannot be {place} (it has {len(file.tensors)} itself)", path=file.path)
    return place


def _prefix(path: Path, place: _Place) -> str:
    """What all parts' paths begin with. A single part may have any name: there is no other to be found by it."""
    end = part_path("", place.no, place.n_parts).name
    if place.n_parts > 1 and not path.name.endswith(end):
        raise UsageError(
            f"is part {place.no + 1} of {place.n_parts}, so its name should end in {end}",
            path=path,
            hint="give the parts their names back: the others are found by them",
        )
    return os.fspath(path).removesuffix(end)


def _opened(path: Path, place: _Place) -> GGUFFile:
    if not os.path.lexists(path):
        hint = "all parts belong into one folder; get this one, too"
        raise UsageError(f"is missing, the model has {place.n_parts} parts", path=path, hint=hint)
    return GGUFFile(path, part=True)


def _check_place(file: GGUFFile, expected: _Place, given: Path) -> None:
    place = _place(file)
    if place != expected:
        name = escape_control(given.name)
        raise FormatError(f"is not of this set (expected {expected}, as {name} says, got {place})", path=file.path)


def _joined(files: Sequence[GGUFFile], n_tensors: int) -> tuple[Mapping[str, TensorInfo], dict[str, GGUFFile]]:
    """The tensors of all parts, and in which part each lies."""
    tensors: dict[str, TensorInfo] = {}
    homes: dict[str, GGUFFile] = {}
    for file in files:
        for name, info in file.tensors.items():
            if name in homes:
                shown, other = escape_control(name), escape_control(homes[name].path.name)
                raise FormatError(f"has the tensor '{shown}', which is in {other} already", path=file.path)
            tensors[name], homes[name] = info, file
    if len(tensors) != n_tensors:
        raise FormatError(
            f"{_N_TENSORS} is wrong (expected {n_tensors} tensors in all parts, got {len(tensors)})", path=files[0].path
        )
    return MappingProxyType(tensors), homes


def _without_split(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType({key: value for key, value in metadata.items() if key not in _KEY_TYPES})


def write_gguf_split(
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any],
    tensors: Iterable[TensorData],
    max_bytes: int | None = None,
    max_tensors: int | None = None,
    no_tensor_first_split: bool = False,
    verify: Callable[[SplitGGUF], None] | None = None,
) -> list[Path]:
    """Write a GGUF file in parts, all of them or none, and return their paths: `model.gguf` becomes
    model-00001-of-00003.gguf and so on, a single part, too.

    metadata, tensors: as for `write_gguf`; metadata of an older split is dropped. max_bytes: of the tensors of a part,
    each padded to 32; a larger tensor has a part of its own. max_tensors: of a part, 128 where neither is given.
    no_tensor_first_split: the first part holds metadata alone. verify: called with the opened whole before the parts
    get their names; what it raises leaves everything as it was.
    The parts are those of llama-gguf-split, byte for byte, for the default alignment and shapes without outer axes of
    size 1, which that tool drops.

    Raises UsageError for limits that cannot be kept, SaveError when the disk refuses; ValueError or TypeError for
    arguments that no GGUF file can hold.
    """
    tensors = list(tensors)
    parts = _cut(tensors, max_bytes, max_tensors, no_tensor_first_split)
    own = _without_split(metadata)
    keys = [_split_keys(_Place(no, len(parts), len(tensors))) for no in range(len(parts))]
    whole = [({**own, **keys[no]} if no == 0 else keys[no], part) for no, part in enumerate(parts)]
    for _ in written_parts(path, whole, verify=verify):
        pass
    return part_paths(path, len(parts))


def part_paths(path: str | os.PathLike[str], count: int) -> list[Path]:
    """Where `write_gguf_split` and `written_parts` put the parts of `path`, with .gguf at its end or without."""
    return [part_path(part_prefix(path), no, count) for no in range(count)]


def part_prefix(path: str | os.PathLike[str]) -> Path:
    """What the names of the parts of `path` begin with."""
    path = Path(path)
    return path.with_suffix("") if path.suffix.lower() == ".gguf" else path


def split_keys(no: int, n_parts: int, n_tensors: int) -> dict[str, Any]:
    """What part `no` (from 0) says of its place, in the order in which llama-quantize writes it."""
    keys = _split_keys(_Place(no, n_parts, n_tensors))
    return {key: keys[key] for key in _KEY_TYPES}


def written_parts(
    path: str | os.PathLike[str],
    parts: Sequence[tuple[Mapping[str, Any], Sequence[TensorData]]],
    *,
    verify: Callable[[SplitGGUF], None] | None = None,
) -> Iterator[TensorData]:
    """Write the parts of a split GGUF, all of them or none, at `part_paths`; gives each tensor once it is written.

    parts: (metadata with what concerns the split, tensors) of each. A single part may be without it, a whole file then.
    verify: called with the opened whole before the parts get their names; what it raises leaves everything as it was.
    The files are in their places when the iterator ends. Raises what `write_gguf_split` raises.
    """
    names = [tensor.name for _, tensors in parts for tensor in tensors]
    if len(set(names)) != len(names):
        raise ValueError("two tensors have the same name")
    targets = part_paths(path, len(parts))

    def check(folder: Path) -> None:
        with read_back(open_gguf, folder / targets[0].name, "parts") as file:
            if list(file.tensors) != names or list(file.metadata) != list(_without_split(parts[0][0])):
                raise OSError(errno.EIO, "the parts read back with other names than were written")
            if verify is not None and isinstance(file, SplitGGUF):
                verify(file)

    with atomic_files(path, check) as folder:
        for target, (metadata, tensors) in zip(targets, parts, strict=True):
            yield from _written_part(folder, target, metadata, tensors)


def _written_part(
    folder: Path, target: Path, metadata: Mapping[str, Any], tensors: Sequence[TensorData]
) -> Iterator[TensorData]:
    try:
        yield from written_tensors(folder / target.name, metadata=metadata, tensors=tensors)
    except SaveError as error:
        raise SaveError(error.reason, path=target, hint=error.hint) from error


def _split_keys(place: _Place) -> dict[str, Any]:
    """In the order in which llama-gguf-split leaves them: the count is only known, and set, at last."""
    values = {_NO: place.no, _N_TENSORS: place.n_tensors, _COUNT: place.n_parts}
    return {key: Typed(value, _KEY_TYPES[key]) for key, value in values.items()}


def _cut(
    tensors: Sequence[TensorData], max_bytes: int | None, max_tensors: int | None, no_tensor_first_split: bool
) -> list[list[TensorData]]:
    """The tensors of each part: greedy, in order."""
    if max_bytes is not None and max_tensors is not None:
        raise UsageError("parts are limited by bytes or by tensors, not by both")
    limit = max_bytes if max_bytes is not None else max_tensors if max_tensors is not None else DEFAULT_MAX_TENSORS
    if limit < 1:
        raise UsageError(f"a part cannot be limited to {limit} {'bytes' if max_bytes is not None else 'tensors'}")
    parts: list[list[TensorData]] = [[], []] if no_tensor_first_split else [[]]
    used = 0
    for tensor in tensors:
        n_bytes = TensorInfo(tensor.name, tensor.shape, tensor.type, 0).n_bytes
        weight = 1 if max_bytes is None else n_bytes + -n_bytes % DEFAULT_ALIGNMENT
        if used + weight > limit:
            if not parts[-1]:
                name = escape_control(tensor.name)
                raise UsageError(f"the first tensor, '{name}', needs {weight} bytes, more than a part may have")
            parts.append([])
            used = 0
        parts[-1].append(tensor)
        used += weight
    if len(parts) > _MAX_PARTS:
        raise UsageError(f"that would give {len(parts)} parts, a split file has at most {_MAX_PARTS}")
    return parts


def parse_size(text: str) -> int:
    """Bytes of a size in decimal megabytes or gigabytes: `300M`, `2G`. Raises UsageError for anything else."""
    found = _SIZE.fullmatch(text)
    if not found or not int(found[1]):
        raise UsageError(f"'{escape_control(text)}' is no size of a part (expected a number with M or G, as in 2G)")
    return int(found[1]) * (1_000_000 if found[2] == "M" else 1_000_000_000)
