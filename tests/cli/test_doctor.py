"""`llamakit doctor`, and what is said once where there is no native code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamakit import native
from llamakit.cli import run
from llamakit.cli.doctor import say_once_what_is_missing
from llamakit.errors import UsageError

MISSING = native.Status(reason="it was not built", hint="build it")


def pretend(monkeypatch: pytest.MonkeyPatch, status: native.Status) -> None:
    monkeypatch.setattr(native, "status", lambda: status)


def test_it_says_what_is_in_use(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, native.Status(Path("lib.so"), ("baseline", "avx2"), "avx2"))
    assert run(["doctor"]) == 0
    out, err = capsys.readouterr()
    labels = [line.split("  ")[0] for line in out.splitlines()]
    assert labels == [
        "llamakit",
        "packages",
        "platform",
        "device",
        "threads",
        "bf16",
        "native code",
        "memory",
        "temporary",
    ]
    assert "avx2 (of baseline, avx2), on " in out and not err


def test_json_has_the_same(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, MISSING)
    assert run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["native"]["isa"] is None and found["native"]["reason"] == "it was not built"
    assert found["problems"] == [] and found["threads"] == 1 and found["versions"]["torch"]


def test_missing_is_no_fault_and_has_a_hint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, MISSING)
    assert run(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert "native code  none: it was not built\n" in out and err == "hint: build it\n"


def test_broken_is_a_fault(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, native.Status(Path("lib.so"), reason="lib.so is older than its sources", hint="build it"))
    assert run(["doctor"]) == 1
    assert "error: native code: lib.so is older than its sources\n" in capsys.readouterr().err


def test_a_variable_that_cannot_be_followed_is_a_fault(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> native.Status:
        raise UsageError("instruction set 'x' is not there")

    monkeypatch.setattr(native, "status", refuse)
    assert run(["doctor"]) == 1
    assert "none: instruction set 'x' is not there" in capsys.readouterr().out


def test_it_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pretend(monkeypatch, MISSING)
    assert run(["inspect", "nothing.gguf"]) == 2
    assert "native" not in capsys.readouterr().err
    assert run(["verify", "nothing.gguf", "nothing.gguf"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("note: no native code: it was not built; quantizing")
    assert lines[1] == "hint: build it; llamakit doctor says what is in use"
    assert run(["verify", "nothing.gguf", "nothing.gguf"]) == 2
    assert "native" not in capsys.readouterr().err


def test_broken_is_said_every_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pretend(monkeypatch, native.Status(Path("lib.so"), reason="lib.so is stale", hint="build it"))
    for _ in range(2):
        say_once_what_is_missing()
        assert "lib.so is stale" in capsys.readouterr().err


@pytest.mark.parametrize(
    "status", [native.Status(Path("lib.so"), ("baseline",), "baseline"), native.Status(reason="turned off")]
)
def test_nothing_is_said_where_all_is_as_wanted(
    status: native.Status, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pretend(monkeypatch, status)
    say_once_what_is_missing()
    assert not capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_home_that_cannot_be_written_to_is_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    pretend(monkeypatch, MISSING)
    say_once_what_is_missing()
    assert "no native code" in capsys.readouterr().err
