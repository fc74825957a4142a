"""The command as a whole: overview, help, exit codes, one-line errors, completion."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import llamakit
from llamakit import cli as command
from llamakit.errors import FormatError, SaveError
from tests.helpers import ROOT, assert_error, called, cli
from tests.tiny import cached_tiny_gguf


def test_alone_prints_a_grouped_overview_and_the_next_command() -> None:
    result = cli()
    assert result.returncode == 0 and not result.stderr
    assert "Main commands" in result.stdout and "More commands" in result.stdout
    assert "llamakit inspect MODEL.gguf" in result.stdout
    assert len(result.stdout.splitlines()) < 32  # one screen


def test_help_lists_main_commands_first_and_has_no_escapes() -> None:
    result = cli("--help")
    assert result.returncode == 0
    order = ("Main commands:", "\n  finetune ", "\n  generate ", "More commands:", "\n  inspect ", "\n  --version ")
    places = [result.stdout.index(text) for text in order]
    assert places == sorted(places)
    assert "\x1b" not in result.stdout
    assert cli("-h").stdout == result.stdout


@pytest.mark.parametrize("name", ["finetune", "generate", "quantize", "tokenize", "inspect"])
def test_every_command_documents_every_option(
    name: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = called(capfd, name, "--help")
    assert result.returncode == 0 and "\x1b" not in result.stdout
    lines = result.stdout.splitlines()
    options = [i for i, line in enumerate(lines) if line.startswith("  -")]
    assert options
    for i in options:  # its help behind it, or on the next line where the left column is too long
        assert len(lines[i].strip().split("  ", 1)) == 2 or lines[i + 1].startswith(" " * 8), lines[i]


def test_version() -> None:
    assert cli("--version").stdout == f"llamakit {llamakit.__version__}\n"


@pytest.mark.parametrize(
    ("args", "error", "hint"),
    [
        (["inspekt"], "no such command 'inspekt'", "did you mean inspect?"),
        (["inspect"], "missing argument 'FILE'", "llamakit inspect --help"),
        (["inspect", "--tensor", "x"], "no such option: --tensor", "did you mean --tensors?"),
        (["inspect", "--zzz", "x"], "no such option: --zzz", "llamakit inspect --help"),
        (["--zzz"], "no such option: --zzz", "llamakit --help"),
        (["inspect", "/no/such/file"], "/no/such/file: ", ""),
        (["inspect", "a", "b"], "got unexpected extra argument", "llamakit inspect --help"),
    ],
)
def test_usage_errors_are_one_line_and_a_hint(
    capfd: pytest.CaptureFixture[str], args: list[str], error: str, hint: str
) -> None:
    result = called(capfd, *args)
    assert_error(result, 2, f"error: {error}", hint and f"hint: {hint}")
    assert not result.stdout
    assert len(result.stderr.splitlines()) == (2 if hint else 1)


def test_control_characters_of_a_path_are_escaped(capfd: pytest.CaptureFixture[str]) -> None:
    result = called(capfd, "inspect", "/no/such\x1b[31m\nfile")
    assert_error(result, 2, r"/no/such\x1b[31m\x0afile")
    assert "\x1b" not in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (FormatError("broken", path="m.gguf", offset=7), 2, "error: m.gguf@7: broken"),
        (SaveError("full", path="o.gguf", hint="free some space"), 3, "error: o.gguf: full"),
        (MemoryError(), 5, "error: out of memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            5,
            "error: out of memory",
        ),
        (KeyboardInterrupt(), 130, ""),
        (ValueError("a\nb"), 1, "error: internal error: ValueError: a b"),
        (type("PanicException", (BaseException,), {})("boom"), 1, "error: internal error: PanicException: boom"),
    ],
)
def test_errors_become_lines_and_codes(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    def fail(_path: str) -> None:
        raise error

    monkeypatch.setattr("llamakit.conversion.inspect.inspect", fail)
    result = called(capfd, "inspect", "x")
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[:1] == ([line] if line else [])
    if code == 1 and line:
        assert "hint: " in result.stderr and "LLAMAKIT_DEBUG=1" in result.stderr


@pytest.mark.parametrize(
    ("command", "option"),
    [("finetune", "--weight-cache"), ("train", "--grad-acc"), ("tokenizer train", "a smaller --ctx or a model")],
)
def test_what_needs_less_memory_is_an_option_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: str, option: str
) -> None:
    def fail(_argv: list[str]) -> object:
        raise MemoryError

    monkeypatch.setattr("llamakit.cli._invoke", fail)
    result = called(capfd, *command.split())
    assert_error(result, 5, "out of memory", option)
    hint = result.stderr.partition("hint: ")[2]
    assert ("--weight-cache" in hint) == (command == "finetune")


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def test_debug_shows_the_traceback() -> None:
    result = cli("inspect", "/no/such/file", env={"LLAMAKIT_DEBUG": "1"})
    assert result.returncode == 2
    assert "Traceback" in result.stderr and result.stderr.splitlines()[-1].startswith("error: ")


def test_a_closed_pipe_is_no_error() -> None:
    shell = f"'{sys.executable}' -m llamakit --help | head -c 1"
    result = subprocess.run(
        ["bash", "-c", shell], capture_output=True, text=True, check=False, env=_environment(), timeout=250
    )
    assert result.stdout == "U" and not result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "llamakit", "--help"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=_environment(), timeout=250,
        )  # fmt: skip
    assert_error(result, 3, "error: cannot write: No space left on device")
    assert len(result.stderr.splitlines()) == 2


def test_install_completion_writes_to_the_home_of_the_user(tmp_path: Path) -> None:
    shell = f"'{sys.executable}' -m llamakit --install-completion; exit $?"
    result = subprocess.run(
        ["bash", "-c", shell], capture_output=True, text=True, check=False, timeout=250,
        env=_environment(HOME=str(tmp_path), SHELL="/bin/bash"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "llamakit" in (tmp_path / ".bashrc").read_text()


def test_exit_code_of_a_command_is_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    for returned, code in ((143, 143), (None, 0)):
        monkeypatch.setattr("llamakit.cli._invoke", lambda argv, value=returned: value)
        assert command.run([]) == code


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.slow
def test_shell_completion(shell: str) -> None:
    script = cli(env={"_LLAMAKIT_COMPLETE": f"source_{shell}"})
    assert script.returncode == 0 and "_LLAMAKIT_COMPLETE" in script.stdout
    words = {"_LLAMAKIT_COMPLETE": f"complete_{shell}", "COMP_WORDS": "llamakit ins", "COMP_CWORD": "1"}
    words |= {"_TYPER_COMPLETE_ARGS": "llamakit ins", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    assert "inspect" in cli(env=words).stdout


def test_show_completion_prints_a_script() -> None:
    shell = f"'{sys.executable}' -m llamakit --show-completion; exit $?"
    result = subprocess.run(
        ["bash", "-c", shell], capture_output=True, text=True, check=False, env=_environment(), timeout=250
    )
    assert result.returncode == 0 and "_LLAMAKIT_COMPLETE" in result.stdout


@pytest.mark.parametrize(
    ("closed", "stdout", "stderr"), [("<&-", True, True), (">&-", False, True), ("2>&-", True, False)]
)
def test_a_closed_stream_takes_nothing_and_breaks_nothing(closed: str, stdout: bool, stderr: bool) -> None:
    words = (
        f"{sys.executable} -m llamakit inspect {cached_tiny_gguf()} {closed}; {sys.executable} -m llamakit x {closed}"
    )
    done = subprocess.run(words, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert ("general.architecture" in done.stdout) is stdout and ("error: " in done.stderr) is stderr
    assert "error" not in done.stdout


@pytest.mark.slow
def test_a_pipe_that_breaks_is_no_disk_that_fails(tmp_path: Path) -> None:
    words = f"{sys.executable} -u -m llamakit convert {cached_tiny_gguf()} -o {tmp_path / 'm.gguf'} | true"
    done = subprocess.run(words, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "error" not in done.stderr and not list(tmp_path.iterdir())
