from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamakit.errors import FormatError, LlamakitError, UsageError
from llamakit.files import escape_control
from llamakit.formats.gguf import TensorData, write_gguf
from llamakit.formats.imatrix import is_dat, read_imatrix
from llamakit.formats.source import FileSource
from llamakit.ggml import GGMLType
from tests.conversion.quantize_files import DATASET, write_model

METADATA = {"general.type": "imatrix", "imatrix.datasets": ["t"], "imatrix.chunk_count": 3, "imatrix.chunk_size": 8}


def f32(name: str, values: Any) -> TensorData:
    array = np.asarray(values, np.float32)
    return TensorData(name, array.shape, GGMLType.F32, array)


def dat(*entries: tuple[bytes, int, list[float]], end: bytes = b"") -> bytes:
    data = struct.pack("<i", len(entries))
    for name, calls, sums in entries:
        data += struct.pack("<i", len(name)) + name + struct.pack("<2i", calls, len(sums))
        data += np.array(sums, "<f4").tobytes()
    return data + end


def test_means_of_experts(tmp_path: Path) -> None:
    tensors = [f32("a.in_sum2", [[2, 4], [6, 8]]), f32("a.counts", [[2], [0]])]
    write_gguf(tmp_path / "i.gguf", metadata=METADATA, tensors=tensors)
    found = read_imatrix(tmp_path / "i.gguf")
    assert (list(found.datasets), found.chunk_count, found.chunk_size) == (["t"], 3, 8)
    assert found.entries["a"].sums.tolist() == [[2, 4], [6, 8]] and found.entries["a"].counts.tolist() == [2, 0]
    assert found.weights("a").tolist() == [[1, 2], [1, 1]] and found.weights("a").dtype == np.float32


def test_dat(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(dat((b"a", 4, [2, 4]), (b"b", 0, [3]), end=struct.pack("<2i", 9, 3) + b"txt"))
    found = read_imatrix(path)
    assert found.weights("a").tolist() == [[0.5, 1]] and found.weights("b").tolist() == [[3]]
    assert (found.datasets, found.chunk_count) == (("txt",), 9)
    path.write_bytes(dat((b"a", 4, [2, 4])))
    assert (read_imatrix(path).datasets, read_imatrix(path).chunk_count) == ((), 0)


def test_the_files_of_other_tests(tmp_path: Path) -> None:
    write_model(tmp_path, "experts")
    found = read_imatrix(tmp_path / "imatrix.gguf")
    assert list(found.datasets) == [DATASET, "more.txt"]
    assert found.weights("blk.0.ffn_up_exps.weight").shape == (2, 256)
    assert (found.weights("blk.0.ffn_up_exps.weight")[1] == 1).all()


def test_what_is_none(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"

    def refuses(message: str, kind: type[LlamakitError] = FormatError) -> None:
        with pytest.raises(kind, match=message):
            read_imatrix(path)

    refuses("cannot be opened", UsageError)
    good = [f32("a.in_sum2", [2, 4]), f32("a.counts", [1])]
    for metadata, tensors, message in (
        ({"a": 1}, good, "imatrix.datasets is missing"),
        (METADATA, good[:1], "sums without counts"),
        (METADATA, [], "has no entries"),
        (METADATA, [good[0], f32("a.counts", [1, 2, 3])], "2 sums and 3 counts"),
        (METADATA, [good[0], TensorData("a.counts", (1,), GGMLType.F16, np.ones(1, "<f2"))], "is F16"),
        (METADATA | {"imatrix.chunk_count": "x"}, good, "imatrix.chunk_count is no number"),
    ):
        write_gguf(path, metadata=metadata, tensors=tensors)
        refuses(message)
    whole = dat((b"a", 4, [2, 4]))
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refuses("is no importance matrix")
    for data in (b"\0" * 8, b"\xff" * 40, struct.pack("<2i", 1, 2**31 - 1), struct.pack("<i", 2**31 - 1) + whole[4:]):
        path.write_bytes(data)
        refuses("is no importance matrix")


def test_numbers_that_no_measurement_gives(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    for sums, counts, message in (
        ([2, np.nan], [1], "has nan as a sum of a"),
        ([2, np.inf], [1], "has inf as a sum of a"),
        ([2, -1], [1], "has -1.0 as a sum of a"),
        ([2, 4], [np.nan], "has nan as a count of a"),
        ([2, 4], [-2], "has -2.0 as a count of a"),
    ):
        write_gguf(path, metadata=METADATA, tensors=[f32("a.in_sum2", sums), f32("a.counts", counts)])
        with pytest.raises(FormatError, match=message):
            read_imatrix(path)
    for data, message in (
        (dat((b"a", 4, [2, np.nan])), "has nan as a sum of a"),
        (dat((b"a", 4, [2, -1])), "has -1.0 as a sum of a"),
        (dat((b"a", -4, [2])), "has -4 as the number of calls"),
        (dat((b"a", 4, [])), "has 0 as the number of values"),
        (dat((b"a", 4, [2]), (b"a", 4, [2])), "has two entries of a"),
        (dat((b"a", 4, [2]), end=struct.pack("<i", -1)), "has -1 as the number of chunks"),
        (struct.pack("<i", 65537) + bytes(20 * 65537), "has 65537 as the number of entries"),
    ):
        path.write_bytes(data)
        with pytest.raises(FormatError, match=message):
            read_imatrix(path)


def test_datasets_are_names(tmp_path: Path) -> None:
    path, tensors = tmp_path / "i.gguf", [f32("a.in_sum2", [2, 4]), f32("a.counts", [1])]
    for datasets in ("t", np.array([1, 2]), 3):
        write_gguf(path, metadata=METADATA | {"imatrix.datasets": datasets}, tensors=tensors)
        with pytest.raises(FormatError, match="is no list of names"):
            read_imatrix(path)


def test_cut_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    write_gguf(path, metadata=METADATA, tensors=[f32("a.in_sum2", [2, 4]), f32("a.counts", [1])])
    whole = path.read_bytes()[:-28]  # behind the last number is padding alone
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError):
            read_imatrix(path)
    entries = dat((b"a", 4, [2, 4]))
    whole = entries + struct.pack("<2i", 9, 3) + b"txt"
    for length in range(len(entries) + 1, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match="ends too soon"):
            read_imatrix(path)


def test_what_is_a_dat(tmp_path: Path) -> None:
    path = tmp_path / "i"

    def is_one(data: bytes) -> bool:
        path.write_bytes(data)
        with FileSource(path) as source:
            return is_dat(source)

    whole = dat((b"blk.0.a.weight", 4, [2, 4]), (b"b", 0, [3]), end=struct.pack("<2i", 9, 3) + b"txt")
    assert is_one(whole) and is_one(whole[:-11])
    assert not any(is_one(whole[:length]) for length in range(len(whole)) if length != len(whole) - 11)
    assert not is_one(whole + b"\0") and not is_one(dat((b"", 4, [2]))) and not is_one(dat((b"a\n", 4, [2])))


def test_mutants(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    write_gguf(path, metadata=METADATA, tensors=[f32("a.in_sum2", [[2, 4], [6, 8]]), f32("a.counts", [[2], [0]])])
    seeds = (path.read_bytes(), dat((b"a", 4, [2, 4]), (b"b", 0, [3]), end=struct.pack("<2i", 9, 3) + b"txt"))
    rng, accepted = random.Random(5), 0
    for number in range(400):
        data = bytearray(seeds[number % 2])
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data) - 3)
            edge = rng.choice([0, 1, 2, 255, 2**31 - 1, 2**31, 2**32 - 1, rng.randrange(2**32)])
            data[at : at + 4] = (
                struct.pack("<I", edge) if rng.random() < 0.5 else bytes([edge & 255]) + data[at + 1 : at + 4]
            )
        path.write_bytes(data)
        try:
            found = read_imatrix(path)
        except LlamakitError as error:
            assert str(error).startswith(str(path)) and str(error) == escape_control(str(error))
            continue
        accepted += 1
        for name, (sums, counts) in found.entries.items():
            assert found.weights(name).shape == sums.shape and np.isfinite(sums).all() and (counts >= 0).all()
    assert 20 < accepted < 380
