"""What many tests share: running the command as a user does, and comparing its defaults with its dataclass."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.warm import Process

ROOT = Path(__file__).resolve().parent.parent


def cli(
    *args: str | os.PathLike[str],
    cwd: str | os.PathLike[str] | None = None,
    input: str | bytes | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 250,
    text: bool = True,
) -> subprocess.CompletedProcess[Any]:
    """Run `llamakit ARGS` in a process of its own and return it finished: returncode, stdout, stderr.

    input: standard input (none: it is closed); text=False gives and takes bytes.
    """
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("LLAMAKIT_DEBUG", "NO_COLOR")},
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
        **(env or {}),
    }
    stdin: dict[str, Any] = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
    return subprocess.run(
        [sys.executable, "-m", "llamakit", *(os.fspath(arg) for arg in args)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        check=False,
        text=text,
        timeout=timeout_s,
        **stdin,
    )


def warm(
    *args: str | os.PathLike[str], cwd: str | os.PathLike[str] | None = None, input: str | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """`cli` in a process that has torch loaded when it starts; options: of `Process`."""
    stdin = {} if input is None else {"stdin": subprocess.PIPE}
    with Process(*args, cwd=cwd, **stdin, **options) as process:
        out, err = process.communicate(input, timeout=250)
    return subprocess.CompletedProcess(args, process.wait(), out, err)


def called(capfd: Any, *args: str | os.PathLike[str]) -> subprocess.CompletedProcess[str]:
    """`llamakit ARGS` in this process, which spares importing torch: returncode, stdout, stderr."""
    from llamakit.cli import run

    capfd.readouterr()
    code = run([os.fspath(arg) for arg in args])
    output = capfd.readouterr()
    return subprocess.CompletedProcess(args, code, output.out, output.err)


def render_in_this_process(monkeypatch: Any) -> None:
    """Have chat templates rendered by the same code, without the process of their own that costs 0.1 s."""
    from llamakit.tokenizer import chat, render_template

    def run(request: str) -> list[dict[str, str]]:
        asked = json.loads(request)
        return [render_template._answer(asked["template"], variables) for variables in asked["variables"]]

    monkeypatch.setattr(chat, "_run", run)


def assert_error(result: subprocess.CompletedProcess[Any], code: int, *fragments: str) -> None:
    """The run failed as a user should see it: this exit code, one `error:` line (and hints), no traceback."""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert len(errors) == 1, result.stderr
    for fragment in fragments:
        assert fragment in result.stderr, result.stderr


def option_defaults(command: Callable[..., Any]) -> dict[str, Any]:
    """Parameter name -> default of a command's function; enumerations by their value."""
    defaults = {name: p.default for name, p in inspect.signature(command).parameters.items()}
    return {name: d.value if isinstance(d, enum.Enum) else d for name, d in defaults.items()}


def field_defaults(config: type) -> dict[str, Any]:
    """Field name -> default of a dataclass; dataclasses.MISSING where it has none."""
    defaults = {}
    for field in dataclasses.fields(config):
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else dataclasses.MISSING
        defaults[field.name] = made if field.default is dataclasses.MISSING else field.default
    return defaults


def assert_parity(
    command: Callable[..., Any],
    config: type,
    *,
    cli_only: Iterable[str] = (),
    config_only: Iterable[str] = (),
    renamed: Mapping[str, str] | None = None,
) -> None:
    """Each option of a command has the default of the dataclass field of the same name, and none is forgotten.

    cli_only: options without a field (such as `config`); config_only: fields without an option; renamed: option ->
    field where the names differ. A required option answers a field without a default; lists and tuples are alike.
    """
    options, fields = option_defaults(command), field_defaults(config)
    names = {(renamed or {}).get(option, option): option for option in options if option not in set(cli_only)}
    assert names.keys() == fields.keys() - set(config_only), (
        f"options without a field: {sorted(names.keys() - fields.keys())}, "
        f"fields without an option: {sorted(fields.keys() - set(config_only) - names.keys())}"
    )
    for field, option in names.items():
        ours, theirs = _comparable(options[option]), _comparable(fields[field])
        assert ours == theirs, f"--{option}: default {ours!r}, {config.__name__}.{field}: {theirs!r}"


def _comparable(default: Any) -> Any:
    if default in (inspect.Parameter.empty, dataclasses.MISSING):
        return "required"
    if isinstance(default, enum.Enum):
        return default.value
    if isinstance(default, os.PathLike):
        return os.fspath(default)
    return tuple(default) if isinstance(default, list) else default
