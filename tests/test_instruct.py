"""The instruction set in data/ is true: every command and every flag that it names exists."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from typer.main import get_command

from llamakit.cli import build_app, chat_commands
from llamakit.dataset.chat_records import Record, read_records
from llamakit.dataset.check import CheckReport, check
from llamakit.dataset.config import CheckConfig
from llamakit.formats.open import open_model
from llamakit.tokenizer import load_tokenizer
from tests.helpers import ROOT, render_in_this_process
from tests.tiny import cached_tiny_gguf

TRAIN, HELD_OUT = ROOT / "data" / "llamakit-instruct.jsonl", ROOT / "data" / "llamakit-instruct-heldout.jsonl"
_FLAG = re.compile(r"(?<!\S)(--?[a-zA-Z][\w-]*)")
_COMMAND = re.compile(r"llamakit ((?:data |tokenizer )?[a-z]+)")
_SLASH = re.compile(r"(?<!\S)(/[a-z]+)\b")


def pairs() -> list[tuple[str, str]]:
    found = [item for item in read_records(TRAIN) if isinstance(item, Record)]
    return [(record.messages[0].content, record.messages[1].content) for record in found]


def held_out() -> list[dict[str, str]]:
    return [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]


def options() -> dict[str, set[str]]:
    """Command, those of groups with both words -> its options."""
    root: Any = get_command(build_app())
    found: dict[str, set[str]] = {}

    def walk(name: str, command: Any) -> None:
        if hasattr(command, "commands"):
            for inner, subcommand in command.commands.items():
                walk(f"{name} {inner}".strip(), subcommand)
        else:
            found[name] = {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)}

    walk("", root)
    return found


def test_every_command_and_flag_exists() -> None:
    known = options()
    anywhere = set().union(*known.values())
    slashes = {name.split()[0] for name, _ in chat_commands._HELP if name.startswith("/")}
    for question, answer in pairs():
        commands = _COMMAND.findall(answer)
        assert all(command in known for command in commands), (answer, commands)
        allowed = set().union(*(known[command] for command in commands)) if commands else anywhere
        assert set(_FLAG.findall(answer)) <= allowed, answer
        assert set(_SLASH.findall(answer)) <= slashes, answer
        assert set(_FLAG.findall(question)) <= anywhere, question


def test_every_command_is_asked_about() -> None:
    answers = " ".join(answer for _, answer in pairs())
    named = set(_COMMAND.findall(answers))
    taught = {"finetune", "generate", "chat", "convert", "quantize", "merge", "perplexity", "imatrix", "bench", "run"}
    assert taught | {"tokenize", "inspect", "verify", "doctor", "data check", "data show"} <= named


def test_it_is_large_and_varied_enough() -> None:
    found = pairs()
    questions = [question for question, _ in found]
    assert len(found) >= 300 and len(set(questions)) == len(questions)
    answers = {answer for _, answer in found}
    assert all(sum(answer == other for _, other in found) >= 5 for answer in answers) and len(answers) >= 60
    assert max(len(answer) for answer in answers) < 160


def test_what_is_held_out_is_a_paraphrase_of_what_is_trained() -> None:
    questions, answers = zip(*pairs(), strict=True)
    items = held_out()
    assert len(items) == 60 and all(item.keys() == {"question", "expect"} for item in items)
    assert len({item["question"] for item in items}) == 60
    assert not {item["question"].casefold().strip("?. ") for item in items} & {
        q.casefold().strip("?. ") for q in questions
    }
    for item in items:
        assert any(item["expect"] in answer for answer in answers), item
        assert item["expect"] not in item["question"], item  # the question does not give the answer away


def test_the_doctor_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    render_in_this_process(monkeypatch)
    tokenizer = load_tokenizer(open_model(cached_tiny_gguf(tokenizer="bpe")))
    *problems, report = check([TRAIN], tokenizer, CheckConfig(chat_template="chatml"), ctx=512)
    assert isinstance(report, CheckReport) and report.is_clean and not report.findings and not problems
    assert report.schemas == {"messages": report.n_records}
