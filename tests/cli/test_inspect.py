from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from llamakit.formats.gguf import GGUFFile, write_gguf
from tests.formats.files import split_gguf
from tests.helpers import assert_error, called
from tests.tiny import cached_tiny_gguf


def test_report_in_lines(capfd: pytest.CaptureFixture[str]) -> None:
    path = cached_tiny_gguf()
    result = called(capfd, "inspect", path)
    assert result.returncode == 0 and not result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"{path}: model (GGUF V3)"
    assert lines[1].startswith("- kv   0: ") and any(line.startswith("- type  f32: ") for line in lines)
    assert [line for line in lines if line.startswith("bits per weight  32.00")]
    next_line = next(line for line in lines if line.startswith("next:"))
    assert shlex.split(next_line)[1:4] == ["llamakit", "generate", "-m"]
    assert "token_embd.weight" not in result.stdout


def test_tensors_table(capfd: pytest.CaptureFixture[str]) -> None:
    path = cached_tiny_gguf()
    lines = called(capfd, "inspect", path, "--tensors").stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split() == ["tensor", "shape", "type", "bytes"])
    with GGUFFile(path) as file:
        first = next(iter(file.tensors.values()))
        shape = " x ".join(map(str, first.shape))
        assert lines[start + 1].split("  ")[0] == first.name
        assert f"{shape}  F32" in lines[start + 1] and lines[start + 1].endswith(str(first.n_bytes))


def test_json_is_one_object(capfd: pytest.CaptureFixture[str]) -> None:
    path = cached_tiny_gguf()
    report = json.loads(called(capfd, "inspect", path, "--json", "--tensors").stdout)
    assert report["kind"] == "model" and report["path"] == str(path) and report["file_bytes"] == path.stat().st_size
    assert report["n_tensors"] == len(report["tensors"]) and report["bits_per_weight"] == 32
    assert report["metadata"]["general.architecture"] == {"type": "str", "value": "llama"}
    tokens = report["metadata"]["tokenizer.ggml.tokens"]
    assert tokens["n"] > len(tokens["value"]) == 32
    assert "tensors" not in json.loads(called(capfd, "inspect", path, "--json").stdout)


def test_hostile_text_reaches_no_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "h.gguf"
    write_gguf(path, metadata={"general.name": "\x1b[2J\u202eevil", "k\x1b": "v\x9b"}, tensors=[])
    for args in ((), ("--json",)):
        result = called(capfd, "inspect", path, *args)
        assert result.returncode == 0
        assert not set(result.stdout) & {"\x1b", "\u202e", "\x9b"}


def test_broken_file_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "b.gguf"
    path.write_bytes(cached_tiny_gguf().read_bytes()[:100])
    result = called(capfd, "inspect", path)
    assert_error(result, 2, f"error: {path}@")
    assert not result.stdout


def test_a_part_shows_the_whole(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = cached_tiny_gguf()
    parts = split_gguf(tmp_path / "m.gguf", whole, 8)
    expected = json.loads(called(capfd, "inspect", whole, "--json", "--tensors").stdout)
    report = json.loads(called(capfd, "inspect", parts[1], "--json", "--tensors").stdout)
    assert report["facts"].pop("split") == "part 2 of 3, all 3 parts counted"
    assert (report["path"], report["file_bytes"]) == (str(parts[1]), sum(p.stat().st_size for p in parts))
    assert shlex.split(report["next"][0])[3] == str(parts[0])
    for key in ("kind", "format", "n_parameters", "bits_per_weight", "n_tensors", "facts", "metadata", "tensors"):
        assert report[key] == expected[key], key
    parts[2].unlink()
    assert_error(called(capfd, "inspect", parts[1]), 2, f"error: {parts[2]}: is missing, the model has 3 parts")
