"""What is imported when: `--help` stays fast because nothing that computes is loaded, and every export resolves."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tomllib

import pytest

import llamakit
from tests.helpers import ROOT

HEAVY = {"torch", "numpy", "gguf", "tokenizers", "sentencepiece", "safetensors", "jinja2", "rich"}
COMMANDS = ("finetune", "generate", "chat", "convert", "merge", "tokenize", "inspect", "verify", "doctor", "perplexity")
GROUPED = (["data", "prepare"], ["data", "show"], ["tokenizer", "train"])
CONFIGS = (
    "llamakit.training.config",
    "llamakit.inference.config",
    "llamakit.conversion.convert_config",
    "llamakit.conversion.merge_config",
    "llamakit.dataset.prepare_config",
)

_PROBE = """
import json, sys
from llamakit.cli import run
code = run({argv!r})
sys.stdout.flush()
print("\\n" + json.dumps([code, sorted(sys.modules)]))
"""


def modules_after(code: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter after running code that prints a JSON list last."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=100
    )
    assert result.returncode == 0, result.stderr
    exit_code, names = json.loads(result.stdout.splitlines()[-1])
    assert exit_code == 0, result.stderr
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--help"],
        ["--version"],
        *([command, "--help"] for command in COMMANDS),
        *([*words, "--help"] for words in GROUPED),
    ],
)
def test_help_loads_nothing_heavy(argv: list[str]) -> None:
    assert not modules_after(_PROBE.format(argv=argv)) & HEAVY


def test_import_llamakit_loads_nothing_heavy() -> None:
    code = "import json, sys, llamakit; print(json.dumps([0, sorted(sys.modules)]))"
    assert not modules_after(code) & (HEAVY | {"typer"})


@pytest.mark.parametrize("module", CONFIGS)
def test_configs_are_torch_free(module: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps([0, sorted(sys.modules)]))"
    assert not modules_after(code) & HEAVY


def test_conversion_and_formats_are_torch_free() -> None:
    code = (
        "import json, sys, llamakit.conversion.inspect, llamakit.formats.adapter; "
        "print(json.dumps([0, sorted(sys.modules)]))"
    )
    assert "torch" not in modules_after(code)


def test_every_export_resolves() -> None:
    missing = [name for name in llamakit.__all__ if getattr(llamakit, name, None) is None]
    assert not missing
    assert sorted(llamakit.__all__) == llamakit.__all__
    assert set(llamakit._EXPORTS) <= set(llamakit.__all__)
    for name, module in llamakit._EXPORTS.items():
        assert getattr(importlib.import_module(module), name) is getattr(llamakit, name)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = llamakit.nothing
    assert "load_model" in dir(llamakit)


def test_version_is_the_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == llamakit.__version__
