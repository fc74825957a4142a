from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from llamakit.errors import UnsupportedError
from llamakit.formats.imatrix import Entry, Imatrix, read_imatrix
from llamakit.formats.imatrix_writer import write_imatrix, write_imatrix_dat

SHARED = Path(os.environ.get("LLAMAKIT_SHARED", Path(__file__).parents[2].parent / "shared"))

EXPERTS = Imatrix(
    {
        "b": Entry(np.array([[2, 4], [6, 8]], np.float32), np.array([16, 0], np.float32)),
        "a": Entry(np.array([[3, 5, 7]], np.float32), np.array([17], np.float32)),
        "none": Entry(np.zeros((1, 2), np.float32), np.zeros(1, np.float32)),
    },
    ("one.txt", "two.txt"),
    2,
    8,
)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the golden files of {SHARED}")
def test_the_file_of_llama_imatrix_again(tmp_path: Path) -> None:
    golden = SHARED / "golden/llama.cpp-2026/imatrix.gguf"
    write_imatrix(tmp_path / "again.gguf", read_imatrix(golden))
    assert (tmp_path / "again.gguf").read_bytes() == golden.read_bytes()


def test_read_back(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", EXPERTS)
    found = read_imatrix(tmp_path / "i.gguf")
    assert list(found.entries) == ["a", "b", "none"]
    assert (list(found.datasets), found.chunk_count, found.chunk_size) == (["one.txt", "two.txt"], 2, 8)
    for name, (sums, counts) in EXPERTS.entries.items():
        assert np.array_equal(found.entries[name].sums, sums) and np.array_equal(found.entries[name].counts, counts)


def test_dat(tmp_path: Path) -> None:
    write_imatrix_dat(tmp_path / "i.dat", EXPERTS)
    a, b = (np.array([3, 5, 7], "<f4") / np.float32(17) * np.float32(3), np.array([0.25, 0.5, 2, 2], "<f4"))
    expected = struct.pack("<2i", 2, 1) + b"a" + struct.pack("<2i", 3, 3) + a.tobytes()
    expected += struct.pack("<i", 1) + b"b" + struct.pack("<2i", 2, 4) + b.tobytes()
    assert (tmp_path / "i.dat").read_bytes() == expected + struct.pack("<2i", 2, 7) + b"two.txt"
    assert read_imatrix(tmp_path / "i.dat").chunk_count == 2
    with pytest.raises(ValueError, match="size of a chunk"):
        write_imatrix_dat(tmp_path / "again.dat", read_imatrix(tmp_path / "i.dat"))


def test_a_name_that_does_not_fit(tmp_path: Path) -> None:
    for name in ("x" * 60, "a\0b", "\udcff"):
        with pytest.raises(UnsupportedError, match="cannot hold an entry"):
            write_imatrix(tmp_path / "i.gguf", Imatrix({name: EXPERTS.entries["a"]}, (), 1, 8))
    assert not list(tmp_path.iterdir())
