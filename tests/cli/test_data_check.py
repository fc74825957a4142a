"""`llamakit data check` and `data show` of questions and answers, as a user sees them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.helpers import assert_error, called, render_in_this_process
from tests.tiny import cached_tiny_gguf

GOOD = '{"prompt": "How?", "completion": "So."}'
Run = Callable[..., CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """`llamakit data ARGS` in this process, in a directory with a model of ChatML's tokens; good.jsonl is clean."""
    render_in_this_process(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.gguf").symlink_to(cached_tiny_gguf(tokenizer="bpe", n_layer=1))
    (tmp_path / "good.jsonl").write_text(f"{GOOD}\n{GOOD.replace('How', 'Why')}\n")
    (tmp_path / "bad.jsonl").write_text(f"{GOOD}\n{{\n{GOOD.replace('So.', ' ')}\n{GOOD}\n")
    return lambda *args: called(capfd, "data", *args)


CHECK = ("-m", "base.gguf", "--chat-template", "chatml")


def test_clean_data(run: Run) -> None:
    result = run("check", "good.jsonl", *CHECK)
    assert result.returncode == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0] == "template   chatml (ChatML); answers end with <|im_end|>"
    assert lines[1] == "records    2: 2 prompt/completion"
    assert re.fullmatch(r"samples    2, \d+ tokens, \d+ trained \(\d+\.\d %\)", lines[2])
    assert re.search(r"^ +\d+-\d+ +#+ \d", result.stdout, re.MULTILINE)
    assert re.search(r"^packed     1 rows of 256 tokens an epoch, \d+ % full$", result.stdout, re.MULTILINE)
    assert lines[-1] == "nothing is refused"


def test_refused_data_is_named_by_line_and_exits_with_2(run: Run) -> None:
    result = run("check", "bad.jsonl", *CHECK)
    assert result.returncode == 2
    lines = result.stdout.splitlines()
    assert lines[0].startswith("bad.jsonl:2: is not JSON: ") and lines[1] == "bad.jsonl:3: answer 1 of 1 is empty"
    assert "refused: 1 broken, 1 empty" in result.stdout and lines[-1] == "refused: 2 of 4 records"
    assert "the same as an earlier one, and count twice: 1 (bad.jsonl:4 is bad.jsonl:1)" in result.stdout


def test_json(run: Run) -> None:
    result = run("check", "bad.jsonl", *CHECK, "--json")
    assert result.returncode == 2
    found = json.loads(result.stdout)
    assert [(p["line"], p["kind"]) for p in found["problems"]] == [(2, "broken"), (3, "empty")]
    assert (found["n_samples"], found["is_clean"], found["ctx"]) == (2, False, 256)
    assert [f["kind"] for f in found["findings"]] == ["duplicate"]
    clean = run("check", "good.jsonl", *CHECK, "--json", "--ctx", "64", "--train-on", "all")
    assert clean.returncode == 0
    found = json.loads(clean.stdout)
    assert found["ctx"] == 64 and found["n_trained"] == found["n_tokens"] - 2


def test_what_is_too_long_is_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(GOOD.replace("So.", "word " * 60))
    cut = run("check", "long.jsonl", *CHECK, "-c", "64")
    assert re.search(r"^long       beyond --ctx 64: 1 are cut, \d+ tokens are lost$", cut.stdout, re.MULTILINE)
    assert cut.returncode == 0
    windows = run("check", "long.jsonl", *CHECK, "-c", "64", "--long-samples", "window")
    assert "long       beyond --ctx 64: 1 become windows" in windows.stdout


def test_several_sources_and_a_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.csv").write_text("prompt,completion\nq,a\n")
    (tmp_path / "folder" / "image.png").write_bytes(b"\x89PNG")
    result = run("check", "good.jsonl", "folder", *CHECK)
    assert result.returncode == 0 and "records    3: 3 prompt/completion" in result.stdout
    assert "files that are no data: 1 (folder/image.png)" in result.stdout


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        (("check", "good.jsonl", "-m", "base.gguf"), ("no chat template", "--chat-template chatml")),
        (("check", "good.jsonl", "-m", "base.gguf", "--chat-template", "chatnl"), ("unknown chat template 'chatnl'",)),
        (("check", "good.jsonl", "-m", "none.gguf"), ("none.gguf",)),
        (("check", "none.jsonl", *CHECK), ("none.jsonl: there is no such file",)),
        (("check", "good.jsonl", *CHECK, "--train-on", "none"), ("--train-on",)),
        (("check", "good.jsonl", *CHECK, "--trainon", "all"), ("did you mean --train-on?",)),
        (("check", *CHECK), ("FILE",)),
    ],
)  # fmt: skip
def test_bad_calls(args: tuple[str, ...], fragments: tuple[str, ...], run: Run) -> None:
    result = run(*args)
    assert_error(result, 2, *fragments)


def test_a_template_that_raises_refuses_every_record_by_its_line(run: Run) -> None:
    result = run("check", "good.jsonl", "-m", "base.gguf", "--chat-template", "{{ raise_exception('no') }}")
    assert result.returncode == 2
    for line in (1, 2):
        assert f"good.jsonl:{line}: tokenizer.chat_template cannot be rendered: TemplateError: no" in result.stdout


def test_show_marks_what_is_trained(run: Run) -> None:
    result = run("show", "good.jsonl", *CHECK, "-n", "1", "--first", "1")
    assert result.returncode == 0
    assert re.fullmatch(r"good\.jsonl:2  prompt/completion, \d+ tokens, \d+ trained", result.stdout.splitlines()[0])
    assert result.stdout.split("\n", 1)[1] == (
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n\u27e6So.<|im_end|>\u27e7\n\n"
    )
    everything = run("show", "good.jsonl", *CHECK, "-n", "1", "--train-on", "all", "--ids")
    assert everything.stdout.count("\u27e6") == 1 and re.search(r"^\[\d+, .*\]$", everything.stdout, re.MULTILINE)


def test_show_in_colour(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from llamakit.cli import render

    monkeypatch.setattr(render, "has_color", lambda _: True)
    shown = run("show", "good.jsonl", *CHECK, "-n", "1").stdout
    assert "\x1b[32;1mSo.<|im_end|>\x1b[0m" in shown and "\u27e6" not in shown


def test_show_lets_no_escape_out(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD.replace("So.", "\\u001b[2Jx"))
    assert "\u27e6\\x1b[2Jx<|im_end|>\u27e7" in run("show", "a.jsonl", *CHECK).stdout


def test_show_in_json_and_what_is_broken(run: Run, tmp_path: Path) -> None:
    found = json.loads(run("show", "good.jsonl", *CHECK, "--json", "-n", "1").stdout)["samples"]
    assert len(found) == 1 and found[0]["text"].startswith("<|im_start|>user\nHow?")
    assert len(found[0]["tokens"]) == len(found[0]["trained"])
    result = run("show", "bad.jsonl", *CHECK)
    assert result.returncode == 2 and "error: bad.jsonl:2: is not JSON" in result.stderr


def test_show_of_a_text(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Once upon a time")
    shown = run("show", "a.txt", "-m", "base.gguf").stdout.split("\n", 1)[1]
    first, _, rest = shown.partition("\u27e6")
    # All but its first token, and an end token behind it.
    assert first and "Once".startswith(first)
    assert f"{first}{rest}".startswith("Once upon a time<|im_end|>\u27e7")


def test_show_of_data_needs_a_base(run: Run) -> None:
    assert_error(run("show", "good.jsonl"), 2, "holds no tokens", "-m MODEL shows questions and answers")


def test_the_template_s_own_limits_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In its own process, as a user has it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text(GOOD)
    template = "{{ ('a' * 900000000) | length }}"
    result = called(
        capfd,
        "data",
        "check",
        "good.jsonl",
        "-m",
        str(cached_tiny_gguf(tokenizer="bpe", n_layer=1)),
        "--chat-template",
        template,
    )
    assert result.returncode == 2 and "it needs too much memory" in result.stdout


@pytest.mark.slow  # it waits for the limit on processor time
def test_a_template_that_never_ends_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text(f"{GOOD}\n" * 500)
    endless = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    base = cached_tiny_gguf(tokenizer="bpe", n_layer=1)
    result = called(capfd, "data", "check", "good.jsonl", "-m", base, "--chat-template", endless)
    assert_error(result, 2, "exceeded its limits on time and memory")
