from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from llamakit.errors import UsageError
from llamakit.formats.imatrix import Imatrix, read_imatrix
from llamakit.inference.imatrix import Collected, imatrix
from llamakit.inference.imatrix_config import ImatrixConfig
from tests.tiny import cached_tiny_gguf, tiny_text

SHARED = Path(os.environ.get("LLAMAKIT_SHARED", Path(__file__).parents[2].parent / "shared"))


def measured(**options) -> tuple[Imatrix, Collected]:
    *_, last = imatrix(ImatrixConfig(**options))
    assert isinstance(last, Collected)
    return read_imatrix(last.path), last


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


def test_what_cannot_be(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("short")
    with pytest.raises(UsageError, match="tokens"):
        measured(model=cached_tiny_gguf(), file=text, output=tmp_path / "i.gguf")
    with pytest.raises(UsageError, match="no text and no --in-file"):
        ImatrixConfig()
    with pytest.raises(UsageError, match="no model"):
        ImatrixConfig(file=text)
    assert not (tmp_path / "i.gguf").exists()
