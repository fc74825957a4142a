from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamakit.formats.imatrix import read_imatrix
from tests.helpers import assert_error, called
from tests.inference.imatrix_files import write_three
from tests.tiny import cached_tiny_gguf, tiny_text

Command = Callable[..., Any]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run `imatrix` in this process, in a directory with model.gguf, text.txt, one.gguf, two.gguf and old.dat."""
    shutil.copy(cached_tiny_gguf(), tmp_path / "model.gguf")
    (tmp_path / "text.txt").write_text(tiny_text(3000))
    write_three(tmp_path)
    monkeypatch.chdir(tmp_path)
    return lambda *args: called(capfd, "imatrix", *args)


def test_what_is_printed(here: Command) -> None:
    result = here("-m", "model.gguf", "-f", "text.txt", "-c", "16", "--chunks", "6", "--process-output")
    assert (result.returncode, result.stderr) == (0, "loading model.gguf (520 kB)\n")
    lines = result.stdout.splitlines()  # the figures are llama-imatrix's, with -fa off -ctk f32 -ctv f32
    running = [float(item.partition("]")[2]) for item in lines[0].rstrip(",").split(",")]
    assert running == pytest.approx([1770.3177, 2660.5533, 5891.3967, 4708.2786, 6011.0845, 6003.6843], rel=1e-5)
    assert re.fullmatch(r"Final estimate: PPL = 6003\.\d{4} \+/- 1929\.\d{5}", lines[1])
    assert lines[2:] == ["imatrix.gguf: 15 entries from 6 chunks"]
    assert "output.weight" in read_imatrix("imatrix.gguf").entries


def test_json_is_one_object(here: Command) -> None:
    result = here("-m", "model.gguf", "-f", "text.txt", "-c", "16", "--chunks", "2", "--json", "-o", "i.gguf")
    value = json.loads(result.stdout)
    assert value.pop("ppl") == pytest.approx(2660.553, abs=0.01) and value.pop("ppl_error") > 0
    assert value == {"path": "i.gguf", "n_entries": 14, "chunk_count": 2, "warnings": []}


def test_spellings_of_llama_imatrix(here: Command) -> None:
    result = here(
        "--model", "model.gguf", "--file", "text.txt", "--ctx-size", "16", "--batch-size", "32", "--from-chunk", "2",
        "--chunks", "2", "--output-file", "i.dat", "--output-format", "dat", "--no-ppl", "-t", "1", "-ub", "16",
    )  # fmt: skip
    assert result.returncode == 0 and result.stdout == "i.dat: 14 entries from 2 chunks\n"
    found = read_imatrix("i.dat")
    assert found.legacy and found.chunk_count == 2 and found.datasets == ("text.txt",)


def test_files_are_merged(here: Command, tmp_path: Path) -> None:
    three = ("--in-file", "one.gguf", "--in-file", "two.gguf", "--in-file", "old.dat")
    result = here(*three, "-c", "8", "-o", "a.gguf")
    assert (result.returncode, result.stdout) == (0, "a.gguf: 5 entries from 8 chunks\n")
    assert result.stderr.splitlines() == [
        "warning: entry experts has partial data (66.67%)",
        "warning: entry none has partial data (0.00%)",
    ]
    assert here("--in-file", "one.gguf,two.gguf,old.dat", "-c", "8", "-o", "b.gguf").returncode == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    (tmp_path / "one.gguf").rename(tmp_path / "o,ne.gguf")
    assert here("--in-file", "o,ne.gguf", "-o", "c.gguf").returncode == 0
    result = here(*three[2:], "-c", "8", "-o", "a.dat")
    assert "warning: a.dat is in the GGUF format" in result.stderr and not read_imatrix("a.dat").legacy


def test_a_result_grows(here: Command) -> None:
    common = ("-m", "model.gguf", "-f", "text.txt", "-c", "16", "--chunks", "2", "--no-ppl", "-fa", "on", "-ctk", "f32")
    assert here(*common).returncode == 0
    assert here(*common, "--in-file", "imatrix.gguf").returncode == 0
    assert read_imatrix("imatrix.gguf").chunk_count == 4


def test_a_context_that_the_model_was_not_trained_for(here: Command) -> None:
    result = here("-m", "model.gguf", "-f", "text.txt", "-c", "300", "--chunks", "1")
    assert result.returncode == 0 and "was trained for 256 tokens, a chunk has 300" in result.stderr


def test_statistics(here: Command) -> None:
    result = here("--in-file", "one.gguf", "--show-statistics")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert lines[0].split()[:3] == ["layer", "tensor", "Σ(act²)"] and len(lines) == 5
    assert [line.split()[:2] for line in lines[1:3]] == [["-", "a"], ["-", "experts"]]
    value = json.loads(here("--in-file", "one.gguf", "--show-statistics", "--json").stdout)
    assert [row["tensor"] for row in value["tensors"]] == ["a", "experts"] and value["layers"] == []
    assert_error(here("--show-statistics"), 2, "--show-statistics is of one --in-file (got 0)")
    assert_error(here("--in-file", "one.gguf,two.gguf", "--show-statistics"), 2, "(got 2)")
    assert_error(here("--in-file", "text.txt", "--show-statistics"), 2, "text.txt@", "is no importance matrix")


def test_bad_input(here: Command, tmp_path: Path) -> None:
    out = ("-o", "i.gguf")
    assert_error(here(*out), 2, "there is no text and no --in-file")
    assert_error(here("-f", "text.txt", *out), 2, "there is no model to read the text")
    assert_error(here("-m", "model.gguf", "-f", "none.txt", *out), 2, "none.txt")
    assert_error(here("-m", "model.gguf", "-f", "text.txt", "-c", "1000", *out), 2, "text.txt: the text has")
    assert_error(here("-m", "old.dat", "-f", "text.txt", *out), 2, "old.dat: is an importance matrix, not a model")
    assert_error(here("-m", "one.gguf", "-f", "text.txt", *out), 2, "one.gguf: is not a model")
    for name in ("model.gguf", "text.txt"):
        before = (tmp_path / name).read_bytes()
        assert_error(here("-m", "model.gguf", "-f", "text.txt", "-c", "16", "-o", name), 2, f"{name}: would be")
        assert (tmp_path / name).read_bytes() == before
    assert_error(here("-m", "model.gguf", "-f", "text.txt", "-c", "3", *out), 2, "--ctx is 3 (expected 4 or more)")
    assert_error(here("--in-file", "model.gguf", *out), 2, "model.gguf: is no importance matrix")
    assert_error(here("--in-file", "one.gguf", "-o", "none/i.gguf"), 2, "mkdir -p none")
    assert not (tmp_path / "i.gguf").exists()
