from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llamakit.cli import run
from tests.formats.files import split_gguf
from tests.helpers import cli
from tests.tiny import cached_tiny_gguf
from tests.tokenizer.vocabularies import CONTROL, bpe_metadata, spm_metadata, write_vocabulary

Run = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    metadata = spm_metadata([("\u2581", -1), ("a", -2), ("\u2581a", -3)], [("<|user|>", CONTROL)])
    return write_vocabulary(tmp_path_factory.mktemp("spm") / "spm.gguf", metadata)


def test_lines(spm: Path) -> None:
    result = cli("tokenize", "-m", spm, "-p", "a<|user|>é", "--show-count", text=False)
    assert result.returncode == 0 and result.stderr == b""
    assert result.stdout == (
        b"     1 -> '<s>'\n   261 -> ' a'\n   262 -> '<|user|>'\n   259 -> ' '\n"
        b"   198 -> '\xc3'\n   172 -> '\xa9'\nTotal number of tokens: 6\n"
    )


@pytest.fixture
def tokens(spm: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """(stdout, stderr) of `llamakit tokenize -m spm ARGS`, run in this process."""

    def run_it(*args: str) -> tuple[str, str]:
        assert run(["tokenize", "-m", str(spm), *args]) == 0
        return tuple(capfd.readouterr())

    return run_it


def test_ids(tokens: Run) -> None:
    assert tokens("-p", "a a", "--ids")[0] == "[1, 261, 261]\n"
    assert tokens("-p", "", "--ids", "--no-bos")[0] == "[]\n"
    plain = tokens("-p", "<|user|>", "--ids", "--no-bos", "--no-parse-special")[0]
    assert "262" not in plain and plain.startswith("[259, 63, 127")


def test_escapes(tokens: Run) -> None:
    assert tokens("-p", r"\n\x61\\", "--ids")[0] == "[1, 259, 13, 260, 95]\n"
    assert tokens("-p", r"\n", "--ids", "--no-escape")[0] == "[1, 259, 95, 113]\n"


def test_files_and_standard_input_are_verbatim(tokens: Run, spm: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"a\r\n")
    assert tokens("-f", str(text), "--ids")[0] == "[1, 261, 16, 13]\n"
    result = cli("tokenize", "-m", spm, "--stdin", "-p", "x", "--ids", input="a\n")
    assert result.stdout == "[1, 261, 13]\n" and "-p and -f are ignored" in result.stderr


def test_bad_input(spm: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin").write_bytes(b"a\n\xe9")
    bad = write_vocabulary(tmp_path / "bad.gguf", bpe_metadata(pre="kimi-k2"))
    for model, args, *fragments in (
        (spm, [], "there is no text"),
        (spm, ["-p", "a", "-f", "b"], "twice"),
        (spm, ["-f", str(tmp_path / "none")], str(tmp_path / "none"), "cannot be read"),
        (spm, ["-f", str(tmp_path / "latin")], "latin:2: is not UTF-8 text (byte 0xe9)"),
        (spm, ["-p", "\\xff"], "the text is not UTF-8"),
        (tmp_path / "none.gguf", ["-p", "a"], "none.gguf"),
        (bad, ["-p", "a"], "bad.gguf", "'kimi-k2'"),
    ):
        assert run(["tokenize", "-m", str(model), *args]) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("error: ") and all(f in err for f in fragments)
        assert len([line for line in err.splitlines() if not line.startswith("hint: ")]) == 1


def test_any_architecture(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    metadata = bpe_metadata(pre=None) | {"general.architecture": "gpt2"}
    path = write_vocabulary(tmp_path / "a.gguf", metadata)
    assert run(["tokenize", "-m", str(path), "-p", "a", "--ids"]) == 0
    out, err = capfd.readouterr()
    assert out == "[97]\n" and "warning: tokenizer.ggml.pre is missing" in err


def test_a_model_in_parts(tmp_path: Path) -> None:
    whole = cached_tiny_gguf()
    parts = split_gguf(tmp_path / "m.gguf", whole, 8)
    expected, found = (cli("tokenize", "-m", path, "-p", "The king") for path in (whole, parts[1]))
    assert found.returncode == 0 and found.stdout == expected.stdout
