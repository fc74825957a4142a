from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamakit.errors import FormatError, LlamakitError, UsageError
from llamakit.formats.gguf import TensorData, write_gguf
from llamakit.formats.imatrix import read_imatrix
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
