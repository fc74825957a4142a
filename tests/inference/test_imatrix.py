from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from llamakit.errors import FormatError, MismatchError, UsageError
from llamakit.formats.gguf import GGUFFile
from llamakit.formats.imatrix import Imatrix, read_imatrix
from llamakit.formats.imatrix_writer import write_imatrix
from llamakit.inference.imatrix import Chunk, Collected, imatrix
from llamakit.inference.imatrix_config import ImatrixConfig
from tests.inference.imatrix_files import entry, write_three
from tests.tiny import cached_tiny_gguf, tiny_gguf, tiny_text

SHARED = Path(os.environ.get("LLAMAKIT_SHARED", Path(__file__).parents[2].parent / "shared"))


def measured(**options) -> tuple[Imatrix, Collected]:
    *_, last = imatrix(ImatrixConfig(**options))
    assert isinstance(last, Collected)
    return read_imatrix(last.path), last


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the golden files of {SHARED}")
def test_the_file_of_llama_imatrix(tmp_path: Path) -> None:
    golden = SHARED / "golden"
    found, report = measured(
        model=golden / "stories260K-f32.gguf", file=golden / "text40k.txt", ctx=128, output=tmp_path / "i.gguf"
    )
    expected = read_imatrix(golden / "llama.cpp-2026/imatrix.gguf")
    assert list(found.entries) == list(expected.entries)
    assert (found.chunk_count, found.chunk_size) == (expected.chunk_count, expected.chunk_size)
    for name, (sums, counts) in expected.entries.items():
        ours = found.entries[name]
        assert np.array_equal(ours.counts, counts)
        np.testing.assert_allclose(ours.sums, sums, rtol=1e-4)
    assert report.ppl == pytest.approx(103.0165, abs=1e-4) and report.ppl_error == pytest.approx(3.29128, abs=1e-4)


def test_halves_merge_to_the_whole(tmp_path: Path) -> None:
    model, text = cached_tiny_gguf(), tmp_path / "text.txt"
    text.write_text(tiny_text(4000))
    common = {"model": model, "file": text, "ctx": 16}
    whole, _ = measured(**common, chunks=8, output=tmp_path / "whole.gguf", save_frequency=4, batch=32)
    assert (tmp_path / "whole.gguf.at_4").exists() and (tmp_path / "whole.gguf.at_8").exists()
    measured(**common, chunks=4, output=tmp_path / "a.gguf")
    measured(**common, chunk=4, chunks=4, output=tmp_path / "b.gguf")
    both, _ = measured(in_files=(tmp_path / "a.gguf", tmp_path / "b.gguf"), ctx=16, output=tmp_path / "both.gguf")
    assert both.chunk_count == 8 and list(both.datasets) == [str(text)] * 2
    for name, (sums, counts) in whole.entries.items():
        assert np.array_equal(both.entries[name].counts, counts) and counts.tolist() == [128]
        np.testing.assert_allclose(both.entries[name].sums, sums, rtol=1e-5)
    assert (whole.entries["blk.0.attn_q.weight"].sums == whole.entries["blk.0.attn_v.weight"].sums).all()


#: sums, the largest of them, of entries of the tiny model: llama-imatrix with -fa off -ctk f32 -ctv f32
ORACLE = {
    "blk.0.attn_output.weight": (2365.4628, 118.10777),
    "blk.1.attn_q.weight": (6135.671, 312.50858),
    "blk.1.ffn_down.weight": (4006.9993, 188.17093),
    "output.weight": (6149.9854, 261.83615),
}
ORACLE_DAT = {
    "blk.0.attn_output.weight": (85.9804, 3.1506248),
    "blk.1.attn_q.weight": (255.3493, 9.19193),
    "blk.1.ffn_down.weight": (173.6651, 8.216887),
}


def test_a_tiny_model_as_llama_imatrix_measures_it(tmp_path: Path) -> None:
    model, text = cached_tiny_gguf(), tmp_path / "text.txt"
    text.write_text(tiny_text(3000))
    common = {"model": model, "file": text, "ctx": 16}
    found, report = measured(**common, chunks=6, process_output=True, output=tmp_path / "i.gguf")
    assert (report.n_entries, report.chunk_count, report.warnings) == (15, 6, ())
    assert report.ppl == pytest.approx(6003.6843, abs=0.01) and report.ppl_error == pytest.approx(1929.424, abs=0.01)
    for name, expected in ORACLE.items():
        sums, counts = found.entries[name]
        assert counts.tolist() == [96] and [sums.sum(), sums.max()] == pytest.approx(expected, rel=1e-5)
    found, report = measured(**common, chunk=6, chunks=4, output_format="dat", ppl=False, output=tmp_path / "i.dat")
    assert (report.n_entries, found.chunk_count, report.ppl, report.ppl_error) == (14, 4, None, None)
    for name, expected in ORACLE_DAT.items():
        sums, counts = found.entries[name]
        assert counts.tolist() == [4] and [sums.sum(), sums.max()] == pytest.approx(expected, rel=1e-5)


def test_merges_are_those_of_llama_imatrix_byte_for_byte(tmp_path: Path) -> None:
    paths = tuple(write_three(tmp_path))
    for form, digest, more in (
        ("gguf", "bf748aab9269137170d0840840a4f4e5e1ed36cab4578aaed6a1dcae0857d51e", ("none has partial data (0.00%)",)),
        ("dat", "acc9bcce3681eec35f8963e9e20adea6442d183a491d73e81683569ccfed76b4",
         ("none has no data - skipping", "storing only 4 out of 5 entries")),
    ):  # fmt: skip
        out = tmp_path / "merged"
        _, report = measured(in_files=paths, ctx=8, output_format=form, output=out)
        assert hashlib.sha256(out.read_bytes()).hexdigest() == digest
        assert report.warnings[0] == "entry experts has partial data (66.67%)"
        assert [w.removeprefix("entry ") for w in report.warnings[1:]] == list(more)
        assert (report.n_entries, report.chunk_count) == (5 if form == "gguf" else 4, 8)


def test_a_tied_output_has_no_entry(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny_text(400))
    out = tmp_path / "name.dat"
    found, report = measured(
        model=cached_tiny_gguf(tied=True), file=text, ctx=16, chunks=2, process_output=True, output=out
    )
    assert "output.weight" not in found.entries and "has no output.weight" in report.warnings[0]
    assert "is in the GGUF format" in report.warnings[1] and not found.legacy


def test_snapshots_count_the_chunks_of_earlier_files(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny_text(2000))
    common = {"model": cached_tiny_gguf(), "file": text, "ctx": 16, "ppl": False}
    measured(**common, chunks=3, output=tmp_path / "a.gguf")
    reports = imatrix(
        ImatrixConfig(
            **common, chunks=4, batch=16, in_files=(tmp_path / "a.gguf",), output=tmp_path / "b.gguf",
            output_frequency=4, save_frequency=5,
        )
    )  # fmt: skip
    first = next(reports)
    assert isinstance(first, Chunk) and (first.done, first.total, first.ppl) == (1, 4, None)
    assert read_imatrix(tmp_path / "b.gguf").chunk_count == 4
    *_, last = reports
    assert isinstance(last, Collected) and last.chunk_count == 7
    assert sorted(path.name for path in tmp_path.glob("b.*")) == ["b.gguf", "b.gguf.at_5"]
    assert read_imatrix(tmp_path / "b.gguf.at_5").entries["blk.0.attn_q.weight"].counts.tolist() == [80]


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    paths, text = write_three(tmp_path), tmp_path / "text.txt"
    text.write_text(tiny_text(400))
    write_imatrix(tmp_path / "other.gguf", Imatrix({"a": entry(0, 7, 32)}, (), 1, 8))
    with pytest.raises(MismatchError, match="has 7 sums and 1 counts of a "):
        measured(in_files=(paths[0], tmp_path / "other.gguf"), output=tmp_path / "i.gguf")
    write_imatrix(tmp_path / "other.gguf", Imatrix({"blk.0.attn_q.weight": entry(0, 7, 32)}, (), 1, 8))
    with pytest.raises(MismatchError, match="--in-file has 7 sums of"):
        measured(
            model=cached_tiny_gguf(), file=text, ctx=16, in_files=(tmp_path / "other.gguf",), output=tmp_path / "i.gguf"
        )
    assert not (tmp_path / "i.gguf").exists()


def test_a_model_that_gives_no_numbers(tmp_path: Path) -> None:
    path, text = tiny_gguf(tmp_path / "m.gguf"), tmp_path / "text.txt"
    text.write_text(tiny_text(400))
    with GGUFFile(path) as file:
        at = file.tensors["blk.0.ffn_up.weight"].offset
    with open(path, "r+b") as raw:
        raw.seek(at)
        raw.write(np.full(64, 3e38, "<f4").tobytes())
    with pytest.raises(FormatError, match=r"the inputs of .* are no finite numbers"):
        measured(model=path, file=text, ctx=16, output=tmp_path / "i.gguf")
    assert not (tmp_path / "i.gguf").exists()


def test_what_cannot_be(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("short")
    with pytest.raises(UsageError, match="tokens"):
        measured(model=cached_tiny_gguf(), file=text, output=tmp_path / "i.gguf")
    text.write_text(tiny_text(400))
    with pytest.raises(UsageError, match=r"5 \+ 2 chunks"):
        measured(model=cached_tiny_gguf(), file=text, ctx=32, chunk=5, output=tmp_path / "i.gguf")
    with pytest.raises(UsageError, match="--chunks is 0"):
        ImatrixConfig(model=text, file=text, chunks=0)
    with pytest.raises(UsageError, match="no text and no --in-file"):
        ImatrixConfig()
    with pytest.raises(UsageError, match="no model"):
        ImatrixConfig(file=text)
    assert not (tmp_path / "i.gguf").exists()
