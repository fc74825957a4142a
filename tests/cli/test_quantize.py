from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamakit.conversion.file_types import BITS_PER_WEIGHT, QUANTIZE_TYPES
from tests.conversion.quantize_files import write_model
from tests.helpers import assert_error, called, cli
from tests.tiny import cached_tiny_gguf

Command = Callable[..., Any]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run `quantize` in this process, in a directory with model.gguf and imatrix.gguf."""
    write_model(tmp_path, "two")
    monkeypatch.chdir(tmp_path)
    return lambda *args: called(capfd, "quantize", *args)


@pytest.mark.slow
def test_quantize(tmp_path: Path) -> None:
    write_model(tmp_path, "two")
    result = cli("quantize", "model.gguf", "out.gguf", "Q4_K_M", "1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    log = result.stderr.splitlines()
    assert log[0].startswith("loading model.gguf (")
    assert log[1] == "warning: 15 of 21 tensor(s) required fallback quantization"
    assert log[2] == (
        "[   1/  21] output.weight                        - [    64,    362,      1,      1], type =    f32, "
        "converting to q8_0 .. size =     0.09 MiB ->     0.02 MiB"
    )
    assert log[3].endswith(
        "output_norm.weight                   - [    64,      1,      1,      1], type =    f32, size =    0.000 MiB"
    )
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["type", "tensors", "size"]
    assert sum(int(line.split()[1]) for line in lines[1:4]) == 21
    assert lines[5].split() == ["most", "changed", "type", "error"]
    assert lines[-2].startswith("out.gguf: Q4_K_M, ") and lines[-2].endswith(" bits per weight")
    assert lines[-1] == "next: llamakit generate -m out.gguf -p 'Once upon a time'"


def test_the_orders_and_spellings_of_llama_quantize_give_the_same_file(here: Command, tmp_path: Path) -> None:
    expected = None
    for line in (
        "--pure model.gguf out.gguf Q4_0",
        "model.gguf out.gguf Q4_0 --pure",
        "model.gguf --pure out.gguf q4_0 2",
        "--pure --max-buffer-size 64 model.gguf out.gguf 2 4",
        "--threads 1 --pure model.gguf Q4_0",
    ):
        result = here(*line.split())
        assert result.returncode == 0, result.stderr
        out = tmp_path / ("out.gguf" if "out.gguf" in line else "ggml-model-Q4_0.gguf")
        assert expected in (None, out.read_bytes())
        expected = out.read_bytes()
        out.unlink()


def test_dry_run(here: Command, tmp_path: Path) -> None:
    before = sorted(os.listdir(tmp_path))
    result = here("--dry-run", "model.gguf", "Q8_0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0].endswith("size =     0.09 MiB ->     0.02 MiB (q8_0)")
    sizes = [line for line in result.stdout.splitlines() if " size  = " in line]
    assert len(sizes) == 2 and sizes[0].startswith("model size  = ") and sizes[0].endswith(" MiB (32.00 BPW)")
    assert sizes[1].startswith("quant size  = ")
    report = json.loads(here("--dry-run", "--json", "model.gguf", "Q2_K_S", "--tensor-type", "attn_q=q2_k").stdout)
    assert report["paths"] == ["ggml-model-Q2_K_S.gguf"] and report["n_tensors"] == 21
    assert sorted(os.listdir(tmp_path)) == before


def test_dry_run_says_what_stands_in_the_way(here: Command, tmp_path: Path) -> None:
    shutil.copyfile(write_model(tmp_path, "q8_0"), tmp_path / "q.gguf")
    result = here("--dry-run", "q.gguf", "Q2_K_S")
    assert result.returncode == 0
    assert "warning: Q2_K_S needs --imatrix FILE: without one nothing would be written" in result.stderr
    assert "tensors are quantized already: this needs --allow-requantize" in result.stderr


def test_json(here: Command, tmp_path: Path) -> None:
    result = here("model.gguf", "out.gguf", "Q8_0", "--json", "--imatrix", "imatrix.gguf")
    report = json.loads(result.stdout)
    assert report["type"] == "Q8_0" and report["paths"] == ["out.gguf"]
    assert report["file_bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert 8.5 < report["bits_per_weight"] < 8.7 and report["types"] == {"Q8_0": 16, "F32": 5}
    first = report["tensors"][0]
    assert first["name"] == "output.weight" and (first["source_type"], first["type"]) == ("F32", "Q8_0")
    assert 0.001 < first["error"] < 0.01 and report["tensors"][1]["error"] is None
    assert "importance matrix has nothing for 1 of 16" in report["notes"][0]


def test_what_it_cost(here: Command, tmp_path: Path) -> None:
    shutil.copyfile(cached_tiny_gguf(), tmp_path / "tiny.gguf")
    (tmp_path / "text.txt").write_text("the king has a crown and the sailor has a boat by the river. " * 60)
    result = here("tiny.gguf", "out.gguf", "Q4_0", "--kl", "text.txt")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.split() == ["on", "text.txt", "value", "+/-"])
    shown = {line[:24].strip(): line[24:].split() for line in lines[at + 1 : at + 9]}
    report = json.loads(here("tiny.gguf", "out.gguf", "Q4_0", "--kl", "text.txt", "--json").stdout)["kl"]
    assert (
        shown["PPL before"][0] == f"{report['source_ppl']:.4f}"
        and shown["PPL after"][0] == f"{report['ppl']['value']:.4f}"
    )
    assert shown["mean KLD"][0] == f"{report['kld']['value']:.6f}" and 0 < report["kld"]["value"] < 1
    assert sorted(os.listdir(tmp_path)) == sorted(["imatrix.gguf", "model.gguf", "out.gguf", "text.txt", "tiny.gguf"])


def test_a_text_that_is_too_short_is_found_before_anything_is_written(here: Command, tmp_path: Path) -> None:
    shutil.copyfile(cached_tiny_gguf(), tmp_path / "tiny.gguf")
    (tmp_path / "short.txt").write_text("the king")
    before = sorted(os.listdir(tmp_path))
    assert_error(here("tiny.gguf", "out.gguf", "Q4_0", "--kl", "short.txt"), 2, "short.txt: the text has 5 tokens")
    assert_error(here("tiny.gguf", "out.gguf", "Q4_0", "--kl", "none.txt"), 2, "none.txt")
    assert_error(here("--dry-run", "tiny.gguf", "Q4_0", "--kl", "short.txt"), 2, "short.txt: the text has 5 tokens")
    assert sorted(os.listdir(tmp_path)) == before


def test_parts(here: Command, tmp_path: Path) -> None:
    first = write_model(tmp_path, "split")
    result = here("--keep-split", first.name, "q.gguf", "Q4_0")
    names = [f"q-0000{no}-of-00003.gguf" for no in (1, 2, 3)]
    assert result.returncode == 0 and f"{', '.join(names)}: Q4_0, " in result.stdout
    assert all((tmp_path / name).exists() for name in names)


def test_the_help_lists_the_types() -> None:
    lines = cli("quantize", "--help").stdout.splitlines()
    for name, kind in QUANTIZE_TYPES.items():
        words = next(line.split() for line in lines if line.split()[:1] == [name])
        assert name == "COPY" or words[1:3] == [str(kind.number), f"{BITS_PER_WEIGHT[name]:.2f}"]


def test_mistakes(here: Command, tmp_path: Path) -> None:
    before = sorted(os.listdir(tmp_path))
    assert_error(here(), 2, "missing argument 'IN [OUT] TYPE [THREADS]'")
    assert_error(here("model.gguf"), 2, "missing argument 'TYPE'", "hint: as in: llamakit quantize model.gguf")
    assert_error(here("model.gguf", "out.gguf"), 2, "missing argument 'TYPE'")
    assert_error(here("model.gguf", "out.gguf", "Q9"), 2, "unknown type to quantize to: Q9", "hint: take one of F32")
    assert_error(
        here("model.gguf", "IQ2_XS"), 2, "quantizing to IQ2_XS is not supported", "hint: the nearest that is: Q2_K"
    )
    assert_error(here("model.gguf", "out.gguf", "19"), 2, "quantizing to IQ2_XXS is not supported")
    assert_error(here("model.gguf", "Q4_0", "x"), 2, "THREADS is 'x' (expected a number from 1)")
    assert_error(here("model.gguf", "Q4_0", "0"), 2, "THREADS is '0'")
    assert_error(here("model.gguf", "out.gguf", "Q4_0", "1", "2"), 2, "got unexpected extra argument (2)")
    assert_error(here("none.gguf", "Q4_0"), 2, "none.gguf: cannot be opened")
    assert_error(here("model.gguf", "model.gguf", "Q4_0"), 2, "model.gguf: input and output files are the same")
    assert_error(here("model.gguf", "no/out.gguf", "Q4_0"), 2, "hint: create it with: mkdir -p no")
    assert_error(here("--keep-split", "model.gguf", "no/out", "Q4_0"), 2, "hint: create it with: mkdir -p no")
    assert_error(here("--pur", "model.gguf", "Q4_0"), 2, "no such option: --pur", "hint: did you mean --pure?")
    assert_error(here("hf:u/r", "Q4_0"), 2, "hf:u/r: where should it go?")
    assert sorted(os.listdir(tmp_path)) == before
