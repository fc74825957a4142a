"""--config FILE.toml on a command of our own, run through the real Typer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.main import get_command

from llamakit.cli.options import ConfigOption, DeviceOption
from llamakit.errors import UsageError
from tests.helpers import assert_error, cli

seen: dict[str, Any] = {}


def work(
    n: Annotated[int, typer.Option("--count", min=1)] = 3,
    adam_alpha: Annotated[float, typer.Option()] = 1e-3,
    lora: Annotated[list[Path] | None, typer.Option("--lora")] = None,
    out: Annotated[Path | None, typer.Option()] = None,
    mode: Annotated[Literal["a", "b"], typer.Option()] = "a",
    escape: Annotated[bool, typer.Option("--escape/--no-escape")] = True,
    device: DeviceOption = "auto",
    config: ConfigOption = None,
) -> None:
    seen.update(locals())


@pytest.fixture
def run(tmp_path: Path) -> Any:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(work)

    def run_with(toml: str, *args: str) -> dict[str, Any]:
        path = tmp_path / "c.toml"
        path.write_text(toml, encoding="utf-8")
        seen.clear()
        get_command(app).main(args=["--config", str(path), *args], prog_name="work", standalone_mode=False)
        return dict(seen)

    return run_with


def test_values_become_defaults_by_name_or_spelling(run: Any) -> None:
    got = run('count = 7\nadam-alpha = 1\nescape = false\nlora = ["x", "y"]\nmode = "b"\nout = "o.bin"\n')
    assert (got["n"], got["adam_alpha"], got["escape"], got["mode"]) == (7, 1.0, False, "b")
    assert [str(p) for p in got["lora"]] == ["x", "y"] and got["out"] == Path("o.bin") and got["device"] == "auto"


def test_the_command_line_overrides(run: Any) -> None:
    got = run("n = 7\nadam_alpha = 0.5\nescape = false\n", "--count", "9", "--escape")
    assert (got["n"], got["adam_alpha"], got["escape"]) == (9, 0.5, True)


def test_order_on_the_command_line_does_not_matter(run: Any) -> None:
    assert run("count = 7\n", "--adam-alpha", "2")["n"] == 7


@pytest.mark.parametrize(
    ("toml", "line", "message", "hint"),
    [
        ("count = 7\n\nadam-alfa = 1\n", 3, "unknown key 'adam-alfa'", "did you mean adam_alpha?"),
        ("zzz = 1", 1, "unknown key 'zzz'", "--help"),
        ("config = 'x'", 1, "unknown key 'config'", ""),
        ("count = 'x'", 1, "key 'count': expected an integer, got 'x'", None),
        ("count = 1.5", 1, "key 'count': expected an integer, got 1.5", None),
        ("count = true", 1, "key 'count': expected an integer, got true", None),
        ("escape = 1", 1, "key 'escape': expected true or false, got 1", None),
        ("mode = 'c'", 1, "key 'mode': expected one of a, b, got 'c'", None),
        ("lora = 'x'", 1, "key 'lora': expected a list (a string each), got 'x'", None),
        ("[count]\nx = 1", 1, "key 'count': expected an integer, got a table", None),
        ("count = ", 1, "is not TOML: Invalid value", None),
        ("count = 1\ncount = 2", 2, "is not TOML: Cannot overwrite a value", None),
    ],
)
def test_mistakes_name_file_line_and_key(run: Any, toml: str, line: int, message: str, hint: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        run(toml)
    error = caught.value
    assert str(error).endswith(f"c.toml:{line}: {error.reason}") and error.reason.startswith(message)
    assert hint is None or hint in (error.hint or "")


def test_a_value_out_of_range_is_refused_by_the_option(run: Any) -> None:
    with pytest.raises(typer.BadParameter):
        run("count = 0")


def test_a_missing_or_binary_file_is_a_usage_error(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(work)
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "none.toml", tmp_path / "b.toml"):
        with pytest.raises(UsageError):
            get_command(app).main(args=["--config", str(path)], prog_name="work", standalone_mode=False)


def test_config_of_a_real_command(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('model_base = "no-such.gguf"\ntrain-data = "t.txt"\nadam-iters = 3\n')
    result = cli("finetune", "--config", path)
    assert_error(result, 2, f"error: {path}:3: unknown key 'adam-iters'", "hint: did you mean adam_iter?")
    path.write_text('model_base = "no-such.gguf"\nbatch = 2.5\n')
    assert_error(cli("finetune", "--config", path), 2, f"error: {path}:2: key 'batch': expected an integer, got 2.5")
    path.write_text('gpu-layers = "all"\n')  # an old spelling
    assert_error(cli("finetune", "--config", path), 2, f"error: {path}:1: key 'gpu-layers': expected an integer")
