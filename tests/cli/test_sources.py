from __future__ import annotations

from pathlib import Path

import pytest

from llamakit import hub
from llamakit.cli import run
from llamakit.cli.sources import local
from tests.tiny import cached_tiny_gguf


def test_a_path_stays_a_path() -> None:
    assert local("a/b.gguf", offline=False) == Path("a/b.gguf") == local(Path("a/b.gguf"), offline=True)
    assert local(None, offline=False) is None


def test_progress_is_a_line_where_nobody_watches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cached_tiny_gguf()
    asked: list[tuple[str, bool]] = []

    def fetch(source: str, *, offline: bool, on_progress: hub.OnProgress) -> Path:
        asked.append((source, offline))
        for n in (0, 500, 2000):
            on_progress(hub.Download("m.gguf", n, 2000))
        return Path(path)

    monkeypatch.setattr(hub, "fetch", fetch)
    assert run(["inspect", "https://example.invalid/m.gguf", "--offline"]) == 0
    assert run(["tokenize", "-hf", "u/r:Q8_0", "-p", "a", "--ids"]) == 0
    assert asked == [("https://example.invalid/m.gguf", True), ("hf:u/r:Q8_0", False)]
    assert capsys.readouterr().err.splitlines().count("downloading m.gguf (2.0 kB)") == 2


def test_offline_and_absent(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "https://example.invalid/never-there.gguf", "--offline"]) == 2
    assert "is not in the cache" in capsys.readouterr().err


def test_what_is_converted_from_elsewhere_needs_a_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", "hf:u/r"]) == 2
    assert "name the target with -o" in capsys.readouterr().err
    assert run(["convert", "https://example.invalid/m.gguf", "-o", "m.gguf", "--offline"]) == 2
    assert "is not in the cache" in capsys.readouterr().err
