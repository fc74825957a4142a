from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llamakit.tokenizer import load_tokenizer
from tests.dataset.token_folders import documents
from tests.helpers import assert_error, called
from tests.tiny import cached_tiny_gguf, tiny_text


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(tiny_text(4000))
    result = called(
        capfd, "data", "prepare", "text.txt", "-o", "tokens", "-m", cached_tiny_gguf(), "--split-on", "paragraph"
    )
    assert result.returncode == 0, result.stderr
    return tmp_path / "tokens"


def test_prepare_prints_json(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = called(
        capfd,
        "data",
        "prepare",
        "text.txt",
        "-o",
        "again",
        "--vocab_size",
        "300",
        "--json",
        "--name",
        "tinyshakespeare",
    )
    told = json.loads(result.stdout)
    assert told["path"] == "again" and told["n_vocab"] == 300 and told["n_documents"] == 2
    assert told["shards"][0]["file"] == "data00.bin" and told["bytes_per_token"] > 1
    assert "making a vocabulary of 300 tokens" in result.stderr
    assert (folder.parent / "again" / "tokenizer.model").exists()


def test_prepare_takes_a_config(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("c.toml").write_text(f'vocab-model = "{cached_tiny_gguf()}"\nval_split = 0\nsplit-on = "line"\n')
    result = called(capfd, "data", "prepare", "text.txt", "--config", "c.toml", "-o", "lines")
    assert result.returncode == 0 and "(0 held out)" in result.stdout
    assert "nothing is held out" in result.stderr
    Path("c.toml").write_text("val_splitt = 0\n")
    result = called(capfd, "data", "prepare", "text.txt", "--config", "c.toml", "-o", "other")
    assert_error(result, 2, "c.toml:1: unknown key 'val_splitt'", "did you mean val_split?")


def test_prepare_needs_a_folder_a_text_and_a_vocabulary(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_error(called(capfd, "data", "prepare", "text.txt"), 2, "no folder to write is named")
    assert_error(called(capfd, "data", "prepare", "-o", "x"), 2, "there is no text")
    assert_error(called(capfd, "data", "prepare", "text.txt", "-o", "x"), 2, "no vocabulary is given", "--vocab-size N")
    taken = called(capfd, "data", "prepare", "text.txt", "-o", "tokens", "--vocab-size", "300")
    assert_error(taken, 2, "tokens: is not empty")


def test_show_prints_windows_with_special_tokens(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = called(capfd, "data", "show", "tokens", "-n", "2", "--ctx", "30")
    first, second = result.stdout.split("train 1 of ")
    assert first.startswith("train 0 of ") and "tokens 0 to 29 of data01.bin\n<s> The " in first
    assert "tokens 30 to 59 of data01.bin" in second and not result.stderr
    told = json.loads(called(capfd, "data", "show", "tokens", "--split", "validation", "-c", "10", "--json").stdout)
    sample = told["samples"][0]
    shard = np.fromfile(folder / "data00.bin", "<u2")
    assert sample["ids"] == shard[:10].tolist() and sample["text"].startswith("<s> ")
    assert told["split"] == "validation" and len(told["samples"]) == min(3, sample["count"])
    ids = called(capfd, "data", "show", "tokens", "--ids", "--ctx", "5", "-n", "1").stdout
    assert f"[{', '.join(map(str, np.fromfile(folder / 'data01.bin', '<u2')[:5]))}]" in ids


def test_show_a_bare_file_with_a_vocabulary_or_without(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    np.concatenate([[1, *text] for text in documents(30)]).astype("<u2").tofile("bare.bin")
    result = called(capfd, "data", "show", "bare.bin", "-n", "1", "--ctx", "4")
    assert "[1, " in result.stdout and "--vocab-model FILE shows them as text" in result.stderr
    result = called(capfd, "data", "show", "bare.bin", "-n", "1", "--ctx", "4", "--vocab-model", cached_tiny_gguf())
    assert "\n<s>" in result.stdout and not result.stderr
    from llamakit.formats.open import open_model

    n_vocab = load_tokenizer(open_model(cached_tiny_gguf(), n_ctx=0)).n_vocab
    np.array([1, n_vocab] * 100, "<u2").tofile("bare.bin")
    result = called(capfd, "data", "show", "bare.bin", "--ctx", "4", "--vocab-model", cached_tiny_gguf())
    assert_error(result, 2, f"bare.bin: token 1 is {n_vocab}, the vocabulary has {n_vocab} tokens")


def test_show_refuses_what_it_cannot_show(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_error(called(capfd, "data", "show", "text.txt"), 2, "text.txt: holds no tokens", "llamakit data prepare")
    assert_error(called(capfd, "data", "show", "nothing"), 2, "nothing: cannot be read")
    assert_error(called(capfd, "data", "show", "tokens", "--ctx", "100000"), 2, "has no 100000 tokens in a row")
    assert_error(called(capfd, "data", "show", "tokens", "--first", "99999"), 2, "--first is 99999, there are")
    assert_error(called(capfd, "data", "show", "tokens", "-n", "0"), 2, "-n 0")
    other = called(capfd, "data", "show", "tokens", "--vocab-model", cached_tiny_gguf(tokenizer="bpe"))
    assert_error(other, 2, "another tokenizer")


@pytest.mark.parametrize(
    ("args", "error", "hint"),
    [
        (["data", "prepar"], "no such command 'prepar'", "did you mean prepare?"),
        (["data", "prepare", "--val-splt", "1"], "no such option: --val-splt", "did you mean --val-split?"),
        (["data", "show"], "missing argument 'DIR|FILE'", "llamakit data show --help"),
        (["tokenizer", "train", "--zzz"], "no such option: --zzz", "llamakit tokenizer train --help"),
    ],
)
def test_usage_errors_in_a_group(capfd: pytest.CaptureFixture[str], args: list[str], error: str, hint: str) -> None:
    assert_error(called(capfd, *args), 2, f"error: {error}", f"hint: {hint}")


@pytest.mark.parametrize("group", ["data", "tokenizer"])
def test_a_group_alone_lists_its_commands(capfd: pytest.CaptureFixture[str], group: str) -> None:
    alone, helped = called(capfd, group), called(capfd, group, "--help")
    assert alone.returncode == helped.returncode == 0
    assert alone.stdout == helped.stdout and "Commands:" in alone.stdout


def test_tokenizer_train(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = called(capfd, "tokenizer", "train", "text.txt", "-o", "t.model", "--vocab-size", "320")
    assert result.returncode == 0, result.stderr
    assert (
        result.stdout.startswith("t.model: 320 tokens, ")
        and "llamakit data prepare INPUT --vocab-model t.model" in result.stderr
    )
    told = json.loads(
        called(capfd, "tokenizer", "train", "-f", "text.txt", "-o", "t.gguf", "--vocab_size=320", "--json").stdout
    )
    assert told["n_vocab"] == 320
    for name in ("t.model", "t.gguf"):
        assert called(capfd, "data", "prepare", "text.txt", "-o", f"with-{name}", "--vocab-model", name).returncode == 0
    assert Path("with-t.model/data01.bin").read_bytes() == Path("with-t.gguf/data01.bin").read_bytes()
    assert called(capfd, "tokenize", "-m", "t.gguf", "-p", "The old king").returncode == 0
    assert_error(
        called(capfd, "tokenizer", "train", "text.txt", "-o", "x.model"), 2, "the size of the vocabulary is not given"
    )
    wrong = called(capfd, "tokenizer", "train", "text.txt", "-o", "x.model", "--vocab-size", "260")
    assert_error(wrong, 2, "--vocab-size is 260, the smallest possible for this text is")
    assert not Path("x.model").exists()


def test_other_commands_know_the_folder(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told = called(capfd, "inspect", "tokens")
    assert told.returncode == 0 and "folder of tokens to train on" in told.stdout
    assert "llamakit data show tokens" in told.stdout + told.stderr
    assert_error(
        called(capfd, "generate", "-m", "tokens", "-p", "x"), 2, "is a folder of tokens to train on, not a model"
    )
    again = called(
        capfd, "data", "prepare", "text.txt", "--vocab-model", "tokens", "--split-on", "paragraph", "-o", "again"
    )
    assert again.returncode == 0
    assert Path("again/data01.bin").read_bytes() == (folder / "data01.bin").read_bytes()
