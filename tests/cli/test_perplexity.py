from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llamakit.formats.adapter import Adapter, write_adapter
from llamakit.formats.open import open_model
from tests.helpers import assert_error, called
from tests.tiny import cached_tiny_gguf

Command = Callable[..., subprocess.CompletedProcess[str]]
TEXT = "the king has a crown and the sailor has a boat by the river. " * 40


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run `perplexity` in this process, in a directory with model.gguf, other.gguf and text.txt."""
    shutil.copyfile(cached_tiny_gguf(), tmp_path / "model.gguf")
    shutil.copyfile(cached_tiny_gguf(type="Q4_0"), tmp_path / "other.gguf")
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return lambda *args: called(capfd, "perplexity", *args)


def adapter(path: Path, size: float) -> None:
    rng = np.random.default_rng(3)
    a, b = (rng.normal(0, size, shape).astype(np.float32) for shape in ((4, 64), (64, 4)))
    with open_model("model.gguf") as file:
        write_adapter(path, Adapter(4.0, {"blk.0.attn_q.weight": (a, b)}), file)


LINE = ("-m", "model.gguf", "-f", "text.txt", "-c", "32")


def test_perplexity(here: Command) -> None:
    result = here(*LINE, "--chunks", "3")
    assert result.returncode == 0, result.stderr
    running, final = result.stdout.splitlines()
    assert [part.partition("]")[0] for part in running.split(",")] == ["[1", "[2", "[3", ""]
    ppl = running.split(",")[2].partition("]")[2]
    assert final.startswith(f"Final estimate: PPL = {ppl} +/- ")
    log = result.stderr.splitlines()
    assert log[0].startswith("loading model.gguf (") and log[1].startswith("3 chunks of 32 tokens in ")
    assert " - ETA " in log[1] and len(log) == 2


def test_a_line_for_each_chunk(here: Command) -> None:
    result = here(*LINE, "--chunks", "3", "-b", "64", "--ppl-output-type", "1")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[0] for line in lines[:3]] == ["0", "0", "64"] and all(len(line) == 4 for line in lines[:3])


def test_chunks_that_overlap(here: Command) -> None:
    result = here(*LINE, "--chunks", "3", "--ppl-stride", "8")
    assert result.returncode == 0 and result.stdout.splitlines()[0].count("[") == 3, result.stderr
    result = here(*LINE, "--chunks", "3", "--ppl-stride", "8", "--ppl-output-type", "1")
    assert [line.split()[0] for line in result.stdout.splitlines()[:3]] == ["0", "8", "16"]


def test_the_spellings_of_llama_perplexity(here: Command) -> None:
    ours = here(*LINE, "--threads", "1").stdout
    words = "--model model.gguf --file text.txt --ctx-size 32 -t 1 --batch-size 2048 -ngl 0 -fa off -ctk f32 --no-mmap"
    result = here(*words.split())
    assert result.returncode == 0, result.stderr
    assert result.stdout == ours and "note: -ctk has no effect" in result.stderr


def test_divergence(here: Command, tmp_path: Path) -> None:
    assert here(*LINE, "--save-all-logits", "base.kl").returncode == 0
    result = here("-m", "other.gguf", "--kl-divergence-base", "base.kl", "--kl-divergence")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == [
        "chunk",
        "PPL",
        "ln(PPL(Q)/PPL(base))",
        "KL",
        "Divergence",
        "Δp",
        "RMS",
        "Same",
        "top",
        "p",
    ]
    assert lines[1].startswith("   1    ") and lines[1].count("±") == 5
    assert "====== Perplexity statistics ======" in lines and lines[-1].startswith("Same top p: ")
    again = here(
        "-m", "other.gguf", "--kl-divergence-base", "base.kl", "--kl-divergence", "-f", "text.txt", "--chunks", "2"
    )
    assert again.returncode == 0 and "too few for statistics" in again.stderr
    report = json.loads(
        here(
            "-m", "model.gguf", "-m", "other.gguf", "--kl-divergence-base", "base.kl", "--kl-divergence", "--json"
        ).stdout
    )
    itself, other = (row["divergence"] for row in report["results"])
    assert abs(itself["kld"]["value"]) < 1e-5 and other["kld"]["value"] > 1e-3
    assert other["kld_shares"]["1.0"] >= other["kld_shares"]["0.999"] and report["best"] == "model.gguf"
    table = here("-m", "model.gguf", "-m", "other.gguf", "--kl-divergence-base", "base.kl", "--kl-divergence").stdout
    assert "mean KLD" in table and "100.00 %" in table


def test_several_models(here: Command) -> None:
    result = here(*LINE, "-m", "other.gguf", "--chunks", "2")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.endswith(".gguf") and "best" not in line] == ["model.gguf", "other.gguf"]
    header, first, second, last = lines[-4:]
    assert header.split() == ["name", "size", "BPW", "PPL", "+/-"]
    rows = {row.split()[-6]: row for row in (first, second)}
    assert set(rows) == {"model.gguf", "other.gguf"} and "32.00" in first
    ppl = {name: float(row.split()[-2]) for name, row in rows.items()}
    best = min(ppl, key=lambda name: ppl[name])
    assert (
        last == f"best: {best}"
        and rows[best].startswith("*")
        and sum(row.startswith("*") for row in rows.values()) == 1
    )


def test_adapters(here: Command, tmp_path: Path) -> None:
    adapter(tmp_path / "a.gguf", 0.5)
    adapter(tmp_path / "zero.gguf", 0.0)
    result = here(
        *LINE, "--chunks", "2", "--lora", "a.gguf", "--lora", "zero.gguf", "--lora-scaled", "a.gguf:0.5", "--json"
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("loading ") == 1
    rows = json.loads(result.stdout)["results"]
    assert [(row["name"], row["scale"]) for row in rows] == [
        ("model.gguf", None), ("a.gguf", 1.0), ("zero.gguf", 1.0), ("a.gguf:0.5", 0.5),
    ]  # fmt: skip
    bare, one, zero, half = (row["ppl"] for row in rows)
    assert zero == bare and len({bare, one, half}) == 3  # each is taken off before the next
    assert json.loads(here(*LINE, "--chunks", "2", "--json").stdout)["results"][0]["ppl"] == bare


def test_limits_are_exit_codes(here: Command, tmp_path: Path) -> None:
    adapter(tmp_path / "a.gguf", 0.5)
    line = (*LINE, "--chunks", "2", "--lora", "a.gguf", "--json")
    bare, adapted = (row["ppl"] for row in json.loads(here(*line).stdout)["results"])
    rise = 100 * (adapted / bare - 1)
    low, high = min(bare, adapted), max(bare, adapted)
    assert here(*line, "--max-ppl", str(high + 0.01), "--max-rise", str(max(rise, 0) + 0.1)).returncode == 0
    failed = here(*line, "--max-ppl", str((low + high) / 2))
    assert_error(failed, 1, f": the perplexity is {high:.4f} (--max-ppl is ")
    assert len(json.loads(failed.stdout)["results"]) == 2  # what was measured is told all the same
    backwards = (*LINE, "--chunks", "2", "-m", "other.gguf", "--max-rise", "0", "--json")
    pair = [row["ppl"] for row in json.loads(here(*backwards[:-3], "--json").stdout)["results"]]
    order = ("model.gguf", "other.gguf") if pair[0] < pair[1] else ("other.gguf", "model.gguf")
    worse = here("-m", order[0], "-m", order[1], *LINE[2:], "--chunks", "2", "--max-rise", "0")
    assert_error(worse, 1, f"{order[1]}: the perplexity is ", f" % against {order[0]} (--max-rise is 0 %)")
    assert here("-m", order[1], "-m", order[0], *LINE[2:], "--chunks", "2", "--max-rise", "0").returncode == 0
    assert_error(here(*LINE, "--max-rise", "5"), 2, "--max-rise compares with the first", "hint: give the base")
    assert_error(here(*LINE, "--max-ppl", "0.5"), 2, "--max-ppl is 0.5 (expected 1 or more)")
    assert_error(here(*line, "--max-rise", "-1"), 2, "--max-rise is -1.0 (expected 0 or more")


def test_mistakes(here: Command, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the king")
    assert here(*LINE, "--kl-divergence-base", "base.kl").returncode == 0
    before = sorted(os.listdir(tmp_path))
    assert_error(here("-m", "model.gguf"), 2, "missing option '-f'")
    assert_error(here("-f", "text.txt"), 2, "missing option '-m'")
    assert_error(here(*LINE, "--kl-divergence"), 2, "--kl-divergence-base FILE")
    assert_error(here(*LINE, "-m", "x.gguf", "--kl-divergence-base", "b"), 2, "of one model (there are 2 results)")
    assert_error(
        here(*LINE, "-c", "999"), 2, "text.txt: the text has", "(expected at least 1998", "hint: give a longer text"
    )
    assert_error(here("-m", "none.gguf", "-f", "text.txt"), 2, "none.gguf: cannot be opened")
    assert_error(here(*LINE[:2], "-f", "none.txt", "-c", "32"), 2, "none.txt")
    assert_error(here(*LINE, "--kl-divergence-base", "no/b"), 2, "hint: create it with: mkdir -p no")
    assert_error(
        here(*LINE, "--kl-divergence-base", "model.gguf"), 2, "model.gguf: input and output files are the same"
    )
    assert_error(here(*LINE, "--kl-divergence-base", "text.txt"), 2, "text.txt: input and output files are the same")
    assert_error(here(*LINE, "-c", "3"), 2, "--ctx is 3")
    assert_error(here(*LINE, "--hellaswag"), 2, "--hellaswag is not supported", "hint: llamakit perplexity measures")
    assert_error(here(*LINE, "--ppl-stride", "80"), 2, "--ppl-stride is 80 (expected 0, or less than a chunk, 72 tok")
    assert_error(here(*LINE, "--ppl-stride", "8", "--kl-divergence-base", "b"), 2, "--ppl-stride does not go with")
    read = ("--kl-divergence-base", "base.kl", "--kl-divergence")
    assert_error(here("-m", "model.gguf", *read, "-c", "16"), 2, "made with a context of 32 tokens (--ctx is 16)")
    assert_error(here("-m", "model.gguf", *read, "-f", "short.txt"), 2, "short.txt: is not the text")
    assert_error(here("-m", "model.gguf", "--kl-divergence-base", "text.txt", "--kl-divergence"), 2, "is no file of")
    (tmp_path / "bpe.gguf").symlink_to(cached_tiny_gguf(tokenizer="bpe"))
    assert_error(here("-m", "bpe.gguf", *read), 2, "base.kl: holds log-probabilities of ")
    assert sorted({*os.listdir(tmp_path)} - {"bpe.gguf"}) == before
