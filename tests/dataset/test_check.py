"""The doctor of training data: every mistake that a file can have is found, and named by its line."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamakit.dataset.chat_records import Problem
from llamakit.dataset.check import Checked, CheckReport, check, histogram
from llamakit.dataset.config import CheckConfig
from llamakit.errors import UnsupportedError, UsageError
from llamakit.formats.open import open_model
from llamakit.tokenizer import Tokenizer, load_tokenizer
from tests.helpers import render_in_this_process
from tests.tiny import cached_tiny_gguf

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    render_in_this_process(monkeypatch)
    return load_tokenizer(open_model(cached_tiny_gguf(tokenizer="bpe", chat_template=CHATML)))


def examined(path: Path, tokenizer: Tokenizer, *, ctx: int = 256, **options: Any) -> tuple[list[Problem], CheckReport]:
    items = list(check([path], tokenizer, CheckConfig(**options), ctx=ctx))
    report = items[-1]
    assert isinstance(report, CheckReport)
    return [item for item in items if isinstance(item, Problem)], report


def lines(path: Path, *values: Any) -> Path:
    path.write_text("\n".join(v if isinstance(v, str) else json.dumps(v) for v in values))
    return path


def pair(question: str, answer: str) -> dict[str, str]:
    return {"prompt": question, "completion": answer}


def test_clean_data(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *(pair(f"q{i}", "a" * i) for i in range(1, 21)))
    problems, report = examined(path, tokenizer)
    assert not problems and report.is_clean and not report.findings
    assert (report.n_records, report.n_samples, report.schemas) == (20, 20, {"prompt/completion": 20})
    assert (report.template, report.family) == ("the model's own", "ChatML")
    assert report.ending == report.end_token == "<|im_end|>"
    assert report.longest_source == f"{path}:20" and report.shortest < report.median < report.p95 <= report.longest
    assert sum(n for _, _, n in report.histogram) == 20
    # Letters of the answers, which the tiny vocabulary may merge, and an end token for each.
    assert 20 < report.n_trained <= sum(range(1, 21)) + 20 < report.n_tokens
    assert report.n_cut == report.n_windowed == report.n_lost == 0 and 0 < report.filled <= 1 and report.n_rows >= 1


def test_every_problem_has_its_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.jsonl", pair("q", "a"), "{", pair("q", " "), {"messages": [{"role": "bot", "content": "a"}]}, {"x": 1}
    )  # fmt: skip
    problems, report = examined(path, tokenizer)
    assert [(p.line, p.kind) for p in problems] == [(2, "broken"), (3, "empty"), (4, "role"), (5, "schema")]
    assert report.refused == {"broken": 1, "empty": 1, "role": 1, "schema": 1} and not report.is_clean
    assert (report.n_records, report.n_refused, report.n_samples) == (5, 4, 1)


def test_nothing_to_train_on_is_not_clean(tokenizer: Tokenizer, tmp_path: Path) -> None:
    _, report = examined(lines(tmp_path / "a.jsonl", "{"), tokenizer)
    assert not report.is_clean and report.histogram == () and report.template is None


@pytest.mark.parametrize(
    ("values", "kind", "text", "places"),
    [
        ([pair("q", "a"), pair("r", "a"), pair("q", "a")], "duplicate", "the same as an earlier one", ["{}:3 is {}:1"]),
        ([pair("q", "<|im_end|>")], "marks", "<|im_end|>", ["{}:1"]),
        ([pair("[INST] q [/INST]", "a")], "marks", "[INST], [/INST]", ["{}:1"]),
        ([{"text": "<|eot_id|>"}, {"text": "a"}], None, "has Llama-3 marks and no answer", []),
        (
            [{"text": "<|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|>"}],
            "foreign",
            "<|start_header_id|>, <|end_header_id|>, <|eot_id|>, no special tokens",
            ["{}:1"],
        ),
        ([{"text": "[INST] q [/INST] a"}], "mismatch", "another template (Llama-2) than the model's, which is ChatML's", ["{}:1"]),
        ([{"text": "[INST] q [/INST] a [INST] r [/INST] b"}], "no end", "no end token of the vocabulary", ["{}:1"]),
    ],
)  # fmt: skip
def test_findings(
    values: list[Any], kind: str | None, text: str, places: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = lines(tmp_path / "a.jsonl", *values)
    problems, report = examined(path, tokenizer)
    if kind is None:
        assert any(text in problem.reason for problem in problems)
        return
    (finding,) = [finding for finding in report.findings if finding.kind == kind]
    assert text in finding.text and "\n" not in finding.text and finding.n == len(places)
    assert list(finding.examples) == [place.replace("{}", str(path)) for place in places]
    assert report.is_clean


def test_templates_that_lose_something(tokenizer: Tokenizer, tmp_path: Path) -> None:
    talk = [("system", "s"), ("user", "q"), ("assistant", "a")]
    path = lines(tmp_path / "a.jsonl", {"messages": [{"role": r, "content": c} for r, c in talk]})
    for template, kind in (
        ("{{ '<|endoftext|>' }}{{ '<|endoftext|>' }}" + CHATML, None),
        (CHATML.replace("<|im_end|>", "<|stop|>"), "no end"),
        (CHATML.replace("{{ '<|im_start|>' + m.role", "{% if m.role != 'system' %}{{ '<|im_start|>' + m.role").replace("}}{% endfor", "}}{% endif %}{% endfor"), "dropped"),
    ):  # fmt: skip
        _, report = examined(path, tokenizer, chat_template=template)
        kinds = [finding.kind for finding in report.findings]
        assert kinds == ([kind] if kind else kinds), kinds
        assert report.template == template
    bos = tokenizer.piece(tokenizer.bos_id or 0, special=True).decode()
    _, report = examined(path, tokenizer, chat_template=f"{{{{ '{bos}' }}}}{{{{ '{bos}' }}}}" + CHATML)
    (double,) = [finding for finding in report.findings if finding.kind == "double BOS"]
    assert double.n == 1 and bos in double.text


def test_what_is_too_long(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", pair("q", "a"), pair("q", "x y " * 40), pair("long " * 60, "a"))
    problems, report = examined(path, tokenizer, ctx=64)
    assert (report.n_cut, report.n_windowed) == (1, 0) and report.n_lost == report.longest - 65
    assert [p.kind for p in problems] == ["untrained"] and "nothing to train on is left" in problems[0].reason
    problems, report = examined(path, tokenizer, ctx=64, long_samples="window")
    assert not problems and (report.n_cut, report.n_windowed, report.n_lost) == (0, 2, 0)


def test_progress_is_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"text": f"t{i}"} for i in range(2000)))
    items = list(check([path], tokenizer, CheckConfig(), ctx=64))
    assert [item for item in items if isinstance(item, Checked)] == [Checked(1000), Checked(2000)]


def test_errors_are_of_the_call(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", pair("q", "a"))
    with pytest.raises(UsageError, match="unknown chat template"):
        examined(path, tokenizer, chat_template="none")
    with pytest.raises(UsageError, match="no such file"):
        examined(tmp_path / "none.jsonl", tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UnsupportedError, match="no chat template"):
        examined(path, tokenizer)


@given(st.lists(st.integers(1, 100_000), max_size=30))
def test_a_histogram_holds_every_length(lengths: list[int]) -> None:
    bars = histogram(lengths)
    assert len(bars) <= 12 and sum(n for _, _, n in bars) == len(lengths)
    assert all(n == sum(low <= length <= high for length in lengths) for low, high, n in bars)
    assert all(after[0] == before[1] + 1 for before, after in pairwise(bars))
