"""Every command in the documentation works: each line of every `sh` block is run, or checked where it installs."""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamakit.tokenizer.chat_templates import find_chat_template
from tests.helpers import ROOT
from tests.tiny import cached_tiny_gguf, tiny_text

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
#: The files that the pages speak of; everything else they make themselves.
MODELS, TEXTS = ("model.gguf", "base.gguf"), ("text.txt", "shakespeare.txt")
CHATS = ("chat.jsonl", "anchor.jsonl")
#: A model with a chat template, and with more than ten blocks, as configs/instruct.toml expects.
CHAT_MODELS = ("smollm2.gguf",)
_BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_ITERATIONS = "3"


def commands(page: str) -> list[str]:
    """The command lines of a page's `sh` blocks, continued lines joined, comments left out."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines: list[str] = []
    for language, body in _BLOCK.findall(text):
        if language in ("sh", "bash", "shell", "console"):
            lines += [line.strip() for line in body.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _pages_with_commands() -> Iterator[str]:
    yield from (page for page in PAGES if commands(page))


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with the files that the pages assume, as the current one; torch's threads are put back afterwards."""
    import torch

    for name in MODELS:
        (tmp_path / name).symlink_to(cached_tiny_gguf(n_layer=1))
    for name in CHAT_MODELS:
        (tmp_path / name).symlink_to(
            cached_tiny_gguf(n_layer=11, tokenizer="bpe", chat_template=find_chat_template("chatml"))
        )
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in TEXTS:
        (tmp_path / name).write_text(tiny_text(8000), encoding="utf-8")
    for name in CHATS:
        lines = (ROOT / "data" / "llamakit-instruct.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / name).write_text("".join(lines[:40]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0})  # one thread: a tiny model has no use for more
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=[] if p == "README.md" else [pytest.mark.slow]) for p in _pages_with_commands()]
)
def test_commands_of_a_page_work(page: str, directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for line in commands(page):
        words = shlex.split(line)
        if words[0] == "llamakit":
            _run(_shortened(words[1:]), line, capfd)
        elif words[0] == "make":
            assert_targets(words[1:], line)
        elif words[:2] == ["pip", "install"]:
            assert_installs(words[2:], line)
        else:
            pytest.fail(f"{page}: no test knows how to check this command: {line}")


def _shortened(words: list[str]) -> list[str]:
    """The same command with few iterations: nothing is learnt from more of them here."""
    if "--adam-iter" in words:
        at = words.index("--adam-iter") + 1
        # train counts all iterations, finetune those of this run: a later, larger number must stay the larger one
        few = str(int(words[at]) // 100) if words[0] == "train" else _ITERATIONS
        words = [*words[:at], few, *words[at + 1 :]]
    elif words[:1] == ["finetune"] and "--config" in words:
        words = [*words, "--adam-iter", _ITERATIONS]
    return words


def _run(words: list[str], line: str, capfd: pytest.CaptureFixture[str]) -> None:
    from llamakit.cli import run

    code = run(words)
    output = capfd.readouterr()
    assert code == 0, f"{line}\n{output.err}"
    assert "error:" not in output.err, f"{line}\n{output.err}"
    assert output.out, line


def assert_targets(words: list[str], line: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in words:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), line


def assert_installs(words: list[str], line: str) -> None:
    """`.` or `.[extra,extra]`, with the extras that there are."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    targets = [word for word in words if not word.startswith("-")]
    assert targets, line
    for target in targets:
        match = re.fullmatch(r"\.(?:\[([\w,-]+)\])?", target)
        assert match, line
        for extra in filter(None, (match[1] or "").split(",")):
            assert extra in project["optional-dependencies"], line


def test_the_readme_has_the_two_commands() -> None:
    assert {"make demo", "make test"} <= set(commands("README.md"))


def test_what_the_makefile_says_it_has() -> None:
    assert_targets(["help", "demo", "test", "check", "prove", "docs", "clean"], "Makefile")
