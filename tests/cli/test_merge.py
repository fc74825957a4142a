from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llamakit.cli import run
from llamakit.formats.adapter import Adapter, write_adapter
from llamakit.formats.gguf import GGUFFile
from llamakit.formats.open import open_model
from llamakit.ggml import GGMLType
from tests.conversion.merge_files import SHAPES, UNTOUCHED, numbers, write_base, write_lora
from tests.formats.files import split_gguf
from tests.formats.test_peft import folder
from tests.formats.torch_models import meta_model
from tests.helpers import assert_error, warm
from tests.tiny import cached_tiny_gguf

Done = subprocess.CompletedProcess[str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run the command in this process, in the test's directory."""
    monkeypatch.chdir(tmp_path)

    def command(*args: str | Path) -> Done:
        capfd.readouterr()
        words = [str(arg) for arg in args]
        code = run(words)
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return command


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """base.gguf, a.gguf and b.gguf in a directory of their own."""
    base = write_base(tmp_path / "base.gguf")
    write_lora(tmp_path / "a.gguf", base, 2)
    write_lora(tmp_path / "b.gguf", base, 4, seed=300)
    return tmp_path


@pytest.mark.slow
def test_merge(files: Path) -> None:
    result = warm(
        "merge", "-m", "base.gguf", "--lora", "a.gguf", "--lora-scaled", "b.gguf:0.4", "-o", "out.gguf", cwd=files
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["tensor", "n", "type", "rmse", "change", "kept"]
    assert [line for line in lines if line.split() == ["blk.*.attn_q.weight", "1", "F32", "0", "all"]]
    n_changed = len(SHAPES) - len(UNTOUCHED)
    assert lines[-2].startswith(f"out.gguf: {n_changed} of {len(SHAPES)} tensors changed, ")
    assert lines[-1] == "next: llamakit generate -m out.gguf -p 'Once upon a time'"
    assert result.stderr.splitlines()[0].startswith("loading base.gguf (")
    with GGUFFile(files / "out.gguf") as file:
        assert list(file.metadata)[-1] == "general.file_type"


def test_spellings_of_llama_cpp_give_the_same_file(files: Path, here: Callable[..., Done]) -> None:
    expected = None
    for line in (
        "-m base.gguf --lora a.gguf --lora b.gguf -o out.gguf",
        "--model base.gguf --lora a.gguf,b.gguf --output out.gguf -t 1",
        "--model-base base.gguf --model-out out.gguf -l a.gguf -l b.gguf --threads 1",
        "-m base.gguf -s a.gguf 1.0 -s b.gguf 1 -o out.gguf",
        "-m base.gguf --lora-scaled a.gguf:1,b.gguf:1.0 -o out.gguf",
    ):
        result = here("merge", *line.split())
        assert result.returncode == 0, result.stderr
        data = (files / "out.gguf").read_bytes()
        assert expected in (None, data), line
        expected = data
        (files / "out.gguf").unlink()


def test_a_comma_in_a_name(files: Path, here: Callable[..., Done]) -> None:
    (files / "a.gguf").rename(files / "a,b.gguf")
    assert here("merge", "-m", "base.gguf", "--lora", "a,b.gguf").returncode == 0
    assert (files / "ggml-lora-merged-f16.gguf").exists()  # llama-export-lora's default


def test_json(files: Path, here: Callable[..., Done]) -> None:
    result = here("merge", "-m", "base.gguf", "--lora", "a.gguf", "-o", "out.gguf", "--outtype", "bf16", "--json")
    report = json.loads(result.stdout)
    assert report["path"] == "out.gguf" and report["adapters"] == [{"path": "a.gguf", "scale": 1.0}]
    assert report["file_bytes"] == (files / "out.gguf").stat().st_size
    assert report["n_tensors"] == len(report["tensors"]) == len(SHAPES)
    first = report["tensors"][0]
    assert first["name"] == "token_embd.weight" and first["base_type"] == "F32" and first["type"] == "BF16"
    assert 0.9 < first["change_kept"] < 1.1 and 0 < first["rmse"] < 0.01
    assert shlex.split(report["next"][0])[:4] == ["llamakit", "generate", "-m", "out.gguf"]


def test_little_that_is_left_is_said(tmp_path: Path, here: Callable[..., Done]) -> None:
    base = cached_tiny_gguf(type="Q4_0")
    with open_model(base) as file:
        pair = (numbers(1, 64, seed=0), numbers(64, 1, seed=1) * np.float32(1e-3))
        write_adapter(tmp_path / "a.gguf", Adapter(1.0, {"blk.0.attn_q.weight": pair}), file)
    result = here("merge", "-m", base, "--lora", "a.gguf", "-o", "out.gguf", "--outtype", "same")
    assert re.search(r"warning: only \d+% of the adapters' change survived", result.stderr)
    assert "hint: leave --outtype out (changed tensors become f16), or keep the adapter beside" in result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith("blk.0.attn_q.weight") and "Q4_0" in line]
    result = here("merge", "-m", base, "--lora", "a.gguf", "-o", "out.gguf")
    assert "warning" not in result.stderr
    with GGUFFile(tmp_path / "out.gguf") as file:
        assert file.tensors["blk.0.attn_q.weight"].type is GGMLType.F16
        assert file.tensors["blk.1.attn_q.weight"].type is GGMLType.Q4_0


def test_peft_folders_in_merge_and_generate(tmp_path: Path, here: Callable[..., Done]) -> None:
    base = cached_tiny_gguf()
    folder(tmp_path / "peft", lora_alpha=600)
    result = here("merge", "-m", base, "--lora", "peft", "-o", "out.gguf")
    assert result.returncode == 0 and "1 of 21 tensors changed" in result.stdout
    options = ("-p", "The old king", "-n", "12", "-t", "0", "--dtype", "f32")
    merged = here("generate", "-m", "out.gguf", *options)
    adapted = here("generate", "-m", base, "--lora", "peft", *options)
    plain = here("generate", "-m", base, *options)
    assert merged.stdout == adapted.stdout != plain.stdout and adapted.returncode == 0
    result = here("inspect", "peft")
    assert "llamakit merge -m BASE.gguf --lora peft -o merged.gguf" in result.stdout


def test_errors(files: Path, here: Callable[..., Done]) -> None:
    def run(*args: str):
        return here("merge", *args)

    assert_error(run("--lora", "a.gguf"), 2, "missing option '-m'")
    assert_error(run("-m", "base.gguf"), 2, "nothing to merge", "hint: name an adapter: --lora FILE")
    assert_error(run("-m", "base.gguf", "--lora", "a.gguf", "-o", "base.gguf"), 2, "would be overwritten")
    assert_error(run("-m", "base.gguf", "--lora-scaled", "a.gguf"), 2, "expected FILE:SCALE")
    assert_error(run("-m", "base.gguf", "--lora-scaled", "a.gguf:inf"), 2, "--lora-scaled has the scale inf")
    assert_error(run("-m", "base.gguf", "--lora", "a.gguf", "--outtype", "q9"), 2, "--outtype is 'q9'")
    assert_error(run("-m", "base.gguf", "--lora", "missing.gguf"), 2, "missing.gguf: cannot be opened")
    assert_error(run("-m", str(cached_tiny_gguf()), "--lora", "a.gguf"), 2, "a.gguf", "LoRA tensor 'token_embd.weight'")
    assert sorted(path.name for path in files.iterdir()) == ["a.gguf", "b.gguf", "base.gguf"]


def test_a_base_in_parts(files: Path, here: Callable[..., Done]) -> None:
    parts = split_gguf(files / "m.gguf", files / "base.gguf", 2)
    for base, out in (("base.gguf", "whole.gguf"), (str(parts[1]), "split.gguf")):
        assert here("merge", "-m", base, "--lora", "a.gguf", "-o", out).returncode == 0
    assert (files / "whole.gguf").read_bytes() == (files / "split.gguf").read_bytes()
    result = here("merge", "-m", str(parts[1]), "--lora", "a.gguf", "-o", str(parts[0]))
    assert_error(result, 2, f"{parts[0]}: would be overwritten")


def test_a_base_that_states_no_context_and_one_without_a_vocabulary(tmp_path: Path, here: Callable[..., Done]) -> None:
    meta = meta_model(tmp_path / "meta")
    with open_model(meta, n_ctx=0) as base:
        lora = (np.ones((2, 64), np.float32), np.ones((96, 2), np.float32))
        write_adapter(tmp_path / "a.gguf", Adapter(2.0, {"blk.0.ffn_up.weight": lora}), base)
    assert_error(here("merge", "-m", meta, "--lora", "a.gguf", "-o", "out.gguf"), 2, "params.json", "--ctx")
    result = here("merge", "-m", meta, "--lora", "a.gguf", "-o", "out.gguf", "--ctx", "77")
    assert result.returncode == 0 and "warning" not in result.stderr, result.stderr
    with open_model("out.gguf") as file:
        assert file.metadata["llama.context_length"] == 77 and "tokenizer.ggml.tokens" in file.metadata
    assert here("convert", "out.gguf", "-o", "m.bin", "--no-verify").returncode == 0
    warned = here("merge", "-m", "m.bin", "--lora", "a.gguf", "-o", "bare.gguf", "--force").stderr.splitlines()
    assert [line for line in warned if line.startswith("warning: ") and "no vocabulary" in line and "--vocab" in line]
    result = here("merge", "-m", "m.bin", "--lora", "a.gguf", "-o", "m.gguf", "--vocab", "tokenizer.bin")
    assert result.returncode == 0 and "warning" not in result.stderr, result.stderr
    assert here("generate", "-m", "m.gguf", "-p", "ab", "-n", "1").returncode == 0
    for option in (("--ctx", "0"), ("--rope-freq-base", "inf")):
        assert_error(here("merge", "-m", "m.bin", "--lora", "a.gguf", "-o", "x.gguf", *option), 2, option[0])


def test_nothing_that_the_result_is_made_of_is_overwritten(files: Path, here: Callable[..., Done]) -> None:
    assert here("convert", cached_tiny_gguf(), "-o", "hf").returncode == 0
    with open_model("hf") as base:
        pair = np.ones((2, 64), np.float32), np.ones((64, 2), np.float32)
        write_adapter(files / "l.gguf", Adapter(2.0, {"blk.0.attn_q.weight": pair}), base)
    assert here("convert", "l.gguf", "-o", "peft", "--base", "hf").returncode == 0
    for out in ("hf/model.safetensors", "peft/adapter_model.safetensors", "hf/tokenizer.json"):
        before = (files / out).read_bytes()
        assert_error(here("merge", "-m", "hf", "--lora", "peft", "-o", out), 2, "would be overwritten")
        assert (files / out).read_bytes() == before
    assert_error(here("merge", "-m", "hf", "--lora", "peft", "-o", "-"), 2, "standard output")
