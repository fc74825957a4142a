"""`llamakit run`: what run.c prints, from files of its own and from others."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from llamakit.cli import run
from tests.helpers import ROOT, assert_error, called
from tests.tiny import cached_tiny_gguf


@pytest.fixture(scope="module")
def gguf() -> Path:
    return cached_tiny_gguf(n_ctx=64)


@pytest.fixture(scope="module")
def llama2c(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as llama2.c has it, with its tokenizer.bin beside it."""
    folder = tmp_path_factory.mktemp("llama2c")
    assert run(["convert", str(gguf), "-o", str(folder / "model.bin"), "--to", "llama2c", "--no-verify"]) == 0
    (vocabulary,) = [path for path in folder.iterdir() if path.name != "model.bin"]
    vocabulary.rename(folder / "tokenizer.bin")
    return folder / "model.bin"


def _stories() -> tuple[Path, Path]:
    folder = Path(os.environ.get("LLAMAKIT_SHARED", ROOT.parent / "shared")) / "models"
    if not folder.exists():
        pytest.skip(f"{folder} is not there (LLAMAKIT_SHARED names the folder)")
    return folder / "stories260K.bin", folder / "tok512.bin"


def _typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))


# sha256 of what run.c (karpathy/llama2.c 350e04f, gcc 12) prints, the same with -O2, -O3 and -Ofast
@pytest.mark.parametrize(("options", "digest"), [
    pytest.param(("-s", "133742"), "0d33d0d617b86488", marks=pytest.mark.slow),
    pytest.param(("-t", "0", "-p", "0.9", "-s", "1", "-n", "256", "-i", "Once upon a time"), "a3213f9ea026d75b", marks=pytest.mark.slow),
    (("-t", "0.8", "-p", "0.5", "-s", "7", "-n", "60", "-i", " two  spaces "), "442531eb60c75ee1"),
    (("-t", "1.5", "-p", "0", "-s", "3", "-n", "100", "-i", "héllo wörld ✓ 中文"), "b9269e00bf2ba1be"),
    pytest.param(("-t", "1.0", "-p", "1", "-s", "-12345", "-n", "0", "-i", "One day, Lily"), "f4f3294a5700cff0", marks=pytest.mark.slow),
    (("-s", "5", "-n", "4", "-i", "a prompt that is longer than all the steps"), "c33d0ae1e51d55dc"),
    pytest.param(("-t", "1.0", "-p", "2", "-s", "3000000000", "-n", "-1", "-i", "\n"), "aa15dd2cdc618b62", marks=pytest.mark.slow),
    (("-t", "-1", "-p", "-1", "-s", "9", "-n", "1", "-i", ""), "bc15aea0cf5608b9"),
])  # fmt: skip
def test_a_text_is_run_cs_to_the_byte(options: tuple[str, ...], digest: str, capfd) -> None:
    model, vocabulary = _stories()
    result = called(capfd, "run", model, "-z", vocabulary, *options)
    assert hashlib.sha256(result.stdout.encode()).hexdigest()[:16] == digest, result.stdout
    speed = result.stderr.removeprefix("achieved tok/s: ")
    assert float(speed) > 0 if "-1" not in options[:2] else not speed  # one step alone is not timed


@pytest.mark.parametrize(("options", "typed", "digest"), [
    pytest.param(("-s", "5", "-n", "150"), "Be kind.\nTell me a story\nAnd then?\n", "c117909810219753", marks=pytest.mark.slow),
    pytest.param(("-t", "3", "-p", "0", "-s", "11", "-n", "400", "-i", "Hello", "-y", ""), "Who?\n\nWhere?\n", "593aa3ac5b4a8618", marks=pytest.mark.slow),
    (("-t", "0", "-s", "1", "-n", "60", "-i", "héllo"), "x" * 600 + "\n", "f4f424fe1ed3d489"),
    pytest.param(("-t", "20", "-p", "0", "-s", "8", "-n", "0"), "Be kind.\nTell me a story\n\nAnd then?\n", "514bfc4354165c89", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_chat_is_run_cs_to_the_byte(options, typed: str, digest: str, capfd, monkeypatch) -> None:
    model, vocabulary = _stories()
    _typed(monkeypatch, typed)
    result = called(capfd, "run", model, "-z", vocabulary, "-m", "chat", *options)
    assert hashlib.sha256(result.stdout.encode()).hexdigest()[:16] == digest, result.stdout


def test_a_llama2c_model_takes_the_tokenizer_beside_the_caller(llama2c: Path, gguf: Path, capfd, monkeypatch) -> None:
    monkeypatch.chdir(llama2c.parent)
    options = ("-t", "0", "-n", "20", "-i", "The old king")
    result = called(capfd, "run", llama2c, *options)
    assert result.returncode == 0 and result.stdout.startswith("The old king")
    # of letters in single bytes, run.c prints none
    assert result.stdout == called(capfd, "run", gguf, *options).stdout.replace("\ufffd", "")
    monkeypatch.chdir(llama2c.parent.parent)
    assert_error(called(capfd, "run", llama2c, *options), 2, "tokenizer.bin")
    assert called(capfd, "run", llama2c, *options, "-z", llama2c.parent / "tokenizer.bin").stdout == result.stdout


def test_no_arguments_at_all(gguf: Path, capfd, monkeypatch) -> None:
    monkeypatch.setenv("LLAMAKIT_MODEL", str(gguf))
    assert called(capfd, "run").stdout.startswith("Once upon a time")
    monkeypatch.delenv("LLAMAKIT_MODEL")
    assert_error(called(capfd, "run"), 2, "no model is named", "LLAMAKIT_MODEL")


def test_a_value_may_begin_with_a_dash(gguf: Path, capfd) -> None:
    result = called(capfd, "run", gguf, "-i", "--help", "-n", "12", "-i", "-n", "-t", "0")
    assert result.returncode == 0 and result.stdout.startswith("-n")


@pytest.mark.parametrize(
    "words",
    [["-t"], ["-q", "1"], ["-t1", "x"], ["--top-p", "1"], ["x", "y"], ["-t", "hot"], ["-n", "1.5"], ["-m", "x"]],
)
def test_the_usage_is_shown_for_what_run_c_refuses(words: list[str], gguf: Path, capfd) -> None:
    result = called(capfd, "run", gguf, *words)
    assert_error(result, 1, "usage: llamakit run MODEL", "-z  vocabulary")
    assert not result.stdout


def test_the_help_is_as_of_any_command(capfd) -> None:
    result = called(capfd, "run", "--help")
    assert result.returncode == 0 and "-y TEXT" in result.stdout


def test_bad_files_are_errors_as_ever(gguf: Path, tmp_path: Path, capfd) -> None:
    assert_error(called(capfd, "run", tmp_path / "none.bin"), 2, "none.bin")
    assert_error(called(capfd, "run", gguf, "-z", gguf), 2, "-z is for llama2.c models")
