from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)
SUMS = st.floats(0, 2.0**99, width=32)


@st.composite
def imatrices(draw: st.DrawFn) -> Imatrix:
    entries = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=4, unique=True)):
        n_mat, n_in = draw(st.integers(1, 3)), draw(st.integers(1, 5))
        sums = draw(st.lists(SUMS, min_size=n_mat * n_in, max_size=n_mat * n_in))
        counts = draw(st.lists(st.integers(0, 2**24), min_size=n_mat, max_size=n_mat))
        entries[name] = Entry(np.array(sums, np.float32).reshape(n_mat, n_in), np.array(counts, np.float32))
    datasets = draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), max_size=3))
    return Imatrix(entries, datasets, draw(st.integers(0, 2**31 - 1)), draw(st.integers(1, 2**16)))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(imatrix=imatrices())
def test_any_matrix_comes_back(tmp_path: Path, imatrix: Imatrix) -> None:
    path = tmp_path / "i"
    write_imatrix(path, imatrix)
    found = read_imatrix(path)
    assert found.entries.keys() == imatrix.entries.keys() and list(found.datasets) == imatrix.datasets
    assert (found.chunk_count, found.chunk_size) == (imatrix.chunk_count, imatrix.chunk_size)
    for name, (sums, counts) in imatrix.entries.items():
        assert np.array_equal(found.entries[name].sums, sums) and np.array_equal(found.entries[name].counts, counts)
    kept = [name for name, entry in imatrix.entries.items() if entry.counts.any()]
    write_imatrix_dat(path, imatrix)
    if not kept:
        return
    found = read_imatrix(path)
    assert sorted(found.entries) == sorted(kept) and found.chunk_count == imatrix.chunk_count
    assert list(found.datasets) == [name for name in imatrix.datasets[-1:] if name]
    for name in kept:
        expected = imatrix.weights(name).reshape(1, -1)
        np.testing.assert_allclose(found.weights(name), expected, rtol=3e-7, atol=1e-37)
