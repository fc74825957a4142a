"""PyTorch's files (`torch.save`: .pt, .pth, .bin), of which not one byte of code is run.

Such a file is a zip archive without compression: a pickle that describes the tensors (data.pkl), and one entry for the
bytes of each storage. The archive is read here. The pickle alone, once all its operations have been found harmless
(`torch_pickle`), goes to `torch.load(weights_only=True)` in a fresh archive whose storages are empty, under
FakeTensorMode, which knows each tensor's place and allocates nothing. So PyTorch never parses the user's archive,
nobody else's code runs, and memory holds the rows that are asked for. There is no other way to load a pickle here.
Layout: torch/serialization.py and caffe2/serialize of PyTorch 2.13.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple, cast

import numpy as np

from llamakit.errors import FormatError, UnsupportedError
from llamakit.files import escape_control
from llamakit.formats.base import TensorInfo
from llamakit.formats.source import FileSource
from llamakit.formats.torch_pickle import check_pickle
from llamakit.ggml import GGMLType

_MAX_PICKLE_BYTES = 64 << 20
_MAX_DIRECTORY_BYTES, _MAX_ENTRIES = 16 << 20, 200_000
_MAX_DEPTH, _MAX_KEY, _MAX_VALUES = 16, 256, 250_000
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_TYPES = {
    "torch.float32": GGMLType.F32, "torch.float16": GGMLType.F16, "torch.bfloat16": GGMLType.BF16,
    "torch.float64": GGMLType.F64, "torch.int8": GGMLType.I8, "torch.int16": GGMLType.I16,
    "torch.int32": GGMLType.I32, "torch.int64": GGMLType.I64,
}  # fmt: skip
#: the element of each type, for numbers; bfloat16 is the upper half of a float32
_NUMBERS = {
    GGMLType.F32: "<f4", GGMLType.F16: "<f2", GGMLType.F64: "<f8", GGMLType.I8: "i1", GGMLType.I16: "<i2",
    GGMLType.I32: "<i4", GGMLType.I64: "<i8",
}  # fmt: skip
#: what a pickle that is broken, or up to something, makes PyTorch raise
_LOAD_ERRORS = (
    pickle.UnpicklingError, ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, ImportError,
    LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError, struct.error,
)  # fmt: skip
_ABSENT = object()
_PLAIN = (bool, int, float, str, bytes, type(None))


class _Place(NamedTuple):
    """Where a tensor's elements lie: strides in elements, the last axis first to change where it is contiguous."""

    offset: int
    strides: tuple[int, ...]


class TorchFile:
    """An opened PyTorch file, its tensors under their own names; those in nested dicts and lists as "model/norm".

    tensors: in the order of the pickle; other_dtypes: name -> dtype of those whose type GGUF does not have.
    values: everything else, as nested dicts and lists of plain values; tensors without dimensions are numbers in it.
    Raises UsageError when the path is no readable regular file, UnsupportedError for PyTorch's old format, TorchScript
    and compressed archives, FormatError for anything that is not sound, or that asks to run code.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._source = FileSource(path)
        self.path: Path = self._source.path
        try:
            self._records = _archive(self._source)
            self._tensors: dict[str, TensorInfo] = {}
            self._others: dict[str, str] = {}
            self._places: dict[str, _Place] = {}
            self._n_values = 0
            self.values: Any = self._plain(self._load(), "", 0)
        except BaseException:
            self._source.close()
            raise
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(self._tensors)
        self.other_dtypes: Mapping[str, str] = MappingProxyType(self._others)

    def _error(self, reason: str) -> FormatError:
        return FormatError(f"broken PyTorch file: {escape_control(reason)}", path=self.path)

    def _load(self) -> Any:
        """What the pickle holds, its tensors fake."""
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

        offset, n_bytes = self._records["data.pkl"]
        raw = self._source.read(offset, n_bytes).tobytes()
        for storage in check_pickle(raw, self.path):
            there = self._records.get(storage.name)
            if there is None or there[1] != storage.n_bytes:
                size = "none" if there is None else there[1]
                raise self._error(f"{storage.name} has {storage.n_bytes} bytes by its pickle, {size} in the archive")
        archive, self._keys = _description(raw, self._records)
        try:
            with FakeTensorMode(), _quiet():
                return torch.load(archive, weights_only=True, map_location="cpu")
        except _LOAD_ERRORS as error:
            raise FormatError(
                f"its pickle is not loaded: {_why(error)}",
                path=self.path,
                hint="only tensors and plain values are; a pickle that asks for more could run any code",
            ) from error

    def _plain(self, value: Any, name: str, depth: int) -> Any:
        """A value without its tensors, which are noted on the way; _ABSENT for a tensor itself."""
        import torch

        self._n_values += 1
        if depth > _MAX_DEPTH or self._n_values > _MAX_VALUES:
            raise self._error(f"{name[:80]!r} is nested too deeply, or holds too much")
        if isinstance(value, torch.Tensor):
            return self._note(value, name)
        if isinstance(value, dict):
            found = {}
            # A pickle may have given an OrderedDict an attribute of this name: the class is asked, not the object.
            for key, inner in dict.items(value):
                if not isinstance(key, (str, int)) or len(str(key)) > _MAX_KEY:
                    raise self._error(f"{name[:80]!r} has a key that is neither a number nor a name of usual length")
                plain = self._plain(inner, f"{name}/{key}" if name else str(key), depth + 1)
                if plain is not _ABSENT:
                    found[key] = plain
            return found
        if isinstance(value, (list, tuple)):
            found = [self._plain(inner, f"{name}/{i}", depth + 1) for i, inner in enumerate(value)]
            return [plain for plain in found if plain is not _ABSENT]
        return value if isinstance(value, _PLAIN) else str(type(value).__name__)

    def _note(self, tensor: Any, name: str) -> Any:
        """Keep where a tensor lies; gives the number itself where it has no dimensions, else _ABSENT."""
        if name in self._places or name in self._others:
            raise self._error(f"two tensors have the name {name[:80]!r}")
        dtype = str(tensor.dtype)
        if dtype not in _TYPES or tensor.layout is not _strided():
            self._others[name] = dtype.removeprefix("torch.").upper()
            return _ABSENT
        storage = tensor.untyped_storage()
        key = self._keys.get(getattr(storage, "_checkpoint_offset", None))
        if key is None or tensor.is_neg() or tensor.is_conj():
            raise self._error(f"tensor {name[:80]!r} has no data in the file")
        offset, n_bytes = self._records[key]
        size, shape, strides = tensor.element_size(), tuple(tensor.shape), tuple(tensor.stride())
        first, last = tensor.storage_offset(), sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        empty, n = 0 in shape, prod(shape)
        sound = n_bytes >= storage.nbytes() and min((first, *strides, *shape)) >= 0
        if not sound or n * size > n_bytes or (not empty and (first + last + 1) * size > n_bytes):
            raise self._error(
                f"tensor {name[:80]!r} of shape {shape[:8]} and strides {strides[:8]} does not fit into its storage "
                f"of {n_bytes} bytes"
            )
        info = TensorInfo(name, shape, _TYPES[dtype], offset + first * size)
        if not shape:
            return _number(self._source.read(info.offset, size), info.type)
        self._tensors[name], self._places[name] = info, _Place(info.offset, strides)
        return _ABSENT

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) as a fresh, writable uint8 array (rows, row_bytes), whatever the strides.

        Raises KeyError for an unknown name, UnsupportedError for a dtype that GGUF does not have, ValueError for rows
        that are not there, FormatError when the file is shorter than it was when opened.
        """
        if name in self.other_dtypes:
            raise UnsupportedError(
                f"tensor {escape_control(name)} has dtype {self.other_dtypes[name]}, which is not supported",
                path=self.path,
            )
        info = self.tensors[name]
        start, stop = info.row_range(start, stop)
        place = self._places[name]
        if place.strides == _contiguous(info.shape):
            data = self._source.read(info.offset + start * info.row_bytes, (stop - start) * info.row_bytes)
            return data.reshape(stop - start, info.row_bytes)
        return self._gathered(info, place, start, stop)

    def _gathered(self, info: TensorInfo, place: _Place, start: int, stop: int) -> np.ndarray:
        """Rows of a view that is not contiguous: everything between its first and its last element is read."""
        size = info.row_bytes // info.shape[-1] if info.shape[-1] else 1
        if start == stop or not info.n_elements:
            return np.empty((stop - start, info.row_bytes), np.uint8)
        shape, strides, offset = info.shape, place.strides, place.offset
        if len(shape) == 2:
            offset, shape, start, stop = offset + start * strides[0] * size, (stop - start, shape[1]), 0, stop - start
        span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        flat = self._source.read(offset, span * size).view(f"V{size}")
        view = np.lib.stride_tricks.as_strided(flat, shape, [s * size for s in strides])
        rows = np.ascontiguousarray(view).reshape(-1, shape[-1])[start:stop]
        return rows.view(np.uint8).reshape(stop - start, info.row_bytes)

    def close(self) -> None:
        """Close the file; `read` fails afterwards."""
        self._source.close()

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither warnings, about the pickle's protocol, say, nor logged tracebacks: one line tells what is refused."""
    from torch._subclasses import fake_tensor

    logger = fake_tensor.log
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def _why(error: BaseException) -> str:
    """PyTorch's reason, without its advice to switch the protection off."""
    text = str(error)
    lines = (text.partition("WeightsUnpickler error:")[2] or text).strip().splitlines() or [type(error).__name__]
    if "Weights only load failed" in lines[0]:
        return "it asks for more than tensors and plain values"
    return escape_control(lines[0].partition(" was not an allowed")[0].partition(". This is")[0][:200])


def _strided() -> Any:
    import torch

    return torch.strided


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def _number(raw: np.ndarray, type: GGMLType) -> int | float:
    if type is GGMLType.BF16:
        return (raw.view("<u2").astype("<u4") << 16).view("<f4")[0].item()
    return raw.view(_NUMBERS[type])[0].item()


def _archive(source: FileSource) -> dict[str, tuple[int, int]]:
    """Name (without the archive's own folder) -> (offset, number of bytes) of every entry, all of them checked."""

    def error(reason: str) -> FormatError:
        return FormatError(f"broken PyTorch file: {reason}", path=source.path)

    entries = list(_entries(source, error))
    if sum(entry.file_size for entry in entries) > source.size:
        raise error("its entries are larger than the file")
    records: dict[str, tuple[int, int]] = {}
    roots = set()
    for entry in entries:
        root, _, name = entry.filename.partition("/")
        parts = entry.filename.split("/")
        if not all(parts) or {".", ".."}.intersection(parts) or "\\" in entry.filename or len(parts) > 4:
            raise error(f"{escape_control(repr(entry.filename)[:100])} is no name of an entry")
        if name in records:
            raise error(f"it has {escape_control(repr(name)[:100])} twice")
        roots.add(root)
        records[name] = _data_of(entry, source, error)
    if "constants.pkl" in records or any(name.startswith("code/") for name in records):
        raise UnsupportedError(
            "is a TorchScript program, which is never loaded", path=source.path, hint="save its state_dict instead"
        )
    if "data.pkl" not in records or len(roots) != 1:
        raise error("it holds no data.pkl in one folder (expected what torch.save writes)")
    if records["data.pkl"][1] > _MAX_PICKLE_BYTES:
        raise error(f"its pickle has {records['data.pkl'][1]} bytes (expected at most {_MAX_PICKLE_BYTES})")
    if "byteorder" in records and source.read(*_capped(records["byteorder"])).tobytes() != b"little":
        raise UnsupportedError("was written by a machine that is not little-endian", path=source.path)
    return records


def _capped(record: tuple[int, int]) -> tuple[int, int]:
    return record[0], min(record[1], 16)


class _Directory(io.FileIO):
    """A file as zipfile reads it, which takes the directory into memory whatever its size."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"a directory of {size} bytes (expected at most {_MAX_DIRECTORY_BYTES})")
        return super().read(size) or b""


def _entries(source: FileSource, error: Any) -> Iterator[zipfile.ZipInfo]:
    """The zip directory, as Python's zipfile reads it; never compressed, never encrypted."""
    _check_head(source)
    try:
        with _Directory(source.path) as file, zipfile.ZipFile(cast(IO[bytes], file)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, LookupError, struct.error) as cause:
        raise FormatError(
            f"broken PyTorch file: {escape_control(str(cause)[:100])}",
            path=source.path,
            hint="it was cut off while it was copied or downloaded; get it again",
        ) from cause
    if len(entries) > _MAX_ENTRIES:
        raise error(f"it has {len(entries)} entries (expected at most {_MAX_ENTRIES})")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
            raise UnsupportedError(
                f"{escape_control(repr(entry.filename)[:100])} is compressed or encrypted, which torch.save never does",
                path=source.path,
                hint="unpack the archive and save it again with torch.save",
            )
        yield entry


def _check_head(source: FileSource) -> None:
    head = source.read(0, min(4, source.size)).tobytes()
    if head[:1] == b"\x80":
        raise UnsupportedError(
            "is a Python pickle in PyTorch's old format, which is never loaded: it could run any code",
            path=source.path,
            hint="where you trust it, load it with PyTorch and save it again: torch.save writes zip archives since 1.6",
        )
    if head != b"PK\3\4":
        raise FormatError("is no PyTorch file (expected a zip archive)", path=source.path, offset=0)


def _data_of(entry: zipfile.ZipInfo, source: FileSource, error: Any) -> tuple[int, int]:
    """Where an entry's bytes lie, by its local header, whose name must be the directory's."""
    at = entry.header_offset
    if not 0 <= at <= source.size - _LOCAL_HEADER.size:
        raise error("an entry lies outside of the file")
    magic, n_name, n_extra = _LOCAL_HEADER.unpack(source.read(at, _LOCAL_HEADER.size).tobytes())
    offset = at + _LOCAL_HEADER.size + n_name + n_extra
    if magic != b"PK\3\4" or offset + entry.file_size > source.size:
        raise error(f"{escape_control(repr(entry.filename)[:100])} does not lie where the directory says")
    return offset, entry.file_size


def _description(raw: bytes, records: Mapping[str, tuple[int, int]]) -> tuple[io.BytesIO, dict[int | None, str]]:
    """An archive of the pickle and of empty storages, and offset in it -> name of the storage."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (("data.pkl", raw), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
        for name in records:
            if name.startswith("data/"):
                archive.writestr(zipfile.ZipInfo(f"archive/{name}"), b"")
        ends = {i.header_offset + _LOCAL_HEADER.size + len(i.filename.encode()): i.filename for i in archive.infolist()}
    buffer.seek(0)
    return buffer, {end: name.removeprefix("archive/") for end, name in ends.items()}
