"""What a run wrote is read as it went: goes joined, torn lines told, broken ones named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llamakit.errors import DataError, FormatError, UsageError
from llamakit.training.curves import EvalPoint, read_curves, read_runs
from llamakit.training.log import StepLog, end_of_cut_line
from llamakit.training.report import Begin, Evaluation, StepReport
from tests.training.curve_files import eval_line, step_line, write_lines, write_run


def test_a_run_folder_is_read(tmp_path: Path) -> None:
    run = read_curves(write_run(tmp_path / "small"))
    assert (run.name, run.path) == ("small", tmp_path / "small" / "metrics.jsonl")
    assert [point.step for point in run.steps] == list(range(1, 101))
    assert run.steps[9].loss == step_line(10)["loss"] and run.steps[9].tokens == 20480
    assert [point.step for point in run.evaluations] == [20, 40, 60, 80, 100]
    assert run.best == EvalPoint(60, train_loss=1.9, val_loss=2.0, val_bpb=1.0)
    assert (run.n_steps, run.total_s, run.tok_per_s) == (100, 50.0, 4050.5)
    assert (run.n_resumed, run.n_redone, run.remarks) == (0, 0, ())
    assert run.series("val_loss")[0] == [20, 40, 60, 80, 100]
    assert run.series("lr") == (list(range(1, 101)), [5e-4] * 100)


def test_the_log_of_finetune_is_read(tmp_path: Path) -> None:
    """As StepLog writes it: null for a loss that is none, the validation in the line of its step."""
    path = tmp_path / "log.jsonl"
    for begin, resumed in ((0, False), (3, True)):
        steps = [
            StepReport(n, float("nan") if n == 2 else 3.0, 1e-3, 1.0, n, 9, 0.5, 100.0, 0.5 * (n - begin), 0, n == 2,
                       val_loss=2.5 + n if n == begin + 3 else None, val_ppl=12.0 if n == begin + 3 else None)
            for n in range(begin + 1, begin + 4)
        ]  # fmt: skip
        list(StepLog(str(path), append=resumed).follow([Begin(begin, 3), *steps]))
    run = read_curves(path)
    assert run.name == "log" and run.n_resumed == 1 and run.n_redone == 0
    assert run.series("loss") == ([1, 3, 4, 5, 6], [3.0] * 5)
    assert run.evaluations == (EvalPoint(3, val_loss=5.5), EvalPoint(6, val_loss=8.5))
    assert [point.elapsed_s for point in run.steps] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]


def test_the_metrics_of_train_are_read(tmp_path: Path) -> None:
    """As StepLog writes them into a run folder: starts, evaluations, tokens that go on counting."""
    path = tmp_path / "metrics.jsonl"
    for begin, resumed in ((0, False), (2, True)):
        steps = [
            StepReport(n, 3.0, 1e-3, 1.0, n, 9, 0.5, 100.0, 0.5, 0, False, grad_norm=0.25, n_tokens=50 * n)
            for n in (begin + 1, begin + 2)
        ]
        bpb = 1.5 if resumed else None
        evaluation = Evaluation("save", 2.0, 7.4, 10, 10, step=begin + 2, train_loss=1.5, bits_per_byte=bpb)
        told = [Begin(begin, 2), *steps, evaluation, Evaluation("end", float("nan"), 1.0, 0, 0, step=begin + 2)]
        log = StepLog(str(path), append=resumed, events=True)
        assert list(map(repr, log.follow(told))) == list(map(repr, told))
    lines = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    assert lines[0] == {"event": "start", "step": 0, "tokens": 0}
    assert lines[1] == {"step": 1, "loss": 3.0, "lr": 1e-3, "tok_per_s": 100.0, "elapsed_s": 0.5, "grad_norm": 0.25,
                        "step_s": 0.5, "tokens": 50}  # fmt: skip
    assert lines[3] == {"event": "eval", "step": 2, "train_loss": 1.5, "val_loss": 2.0, "val_ppl": 7.4,
                        "val_bpb": None, "elapsed_s": 0.5}  # fmt: skip
    run = read_curves(tmp_path)
    assert (run.n_steps, run.n_resumed, run.n_redone, run.steps[1].tokens) == (4, 1, 0, 100)
    assert run.evaluations == (EvalPoint(2, 1.5, 2.0), EvalPoint(4, 1.5, 2.0, 1.5))


def test_goes_of_one_run_are_joined(tmp_path: Path) -> None:
    """From step 6 to 10 the run was killed, resumed at 6, and killed again at 8: 9 and 10 never were."""
    first = [{"event": "start"}, *(step_line(n) for n in range(1, 11)), eval_line(5, 3.0), eval_line(10, 2.0)]
    second = [{"event": "start"}, *(step_line(n, loss=1.0, elapsed_s=0.5 * (n - 5)) for n in range(6, 9))]
    run = read_curves(write_lines(tmp_path, [*first, *second]))
    assert [point.step for point in run.steps] == list(range(1, 9))
    assert [point.loss for point in run.steps[5:]] == [1.0, 1.0, 1.0]
    assert [point.step for point in run.evaluations] == [5]
    assert (run.n_resumed, run.n_redone, run.total_s) == (1, 5, 5.0 + 1.5)


@pytest.mark.parametrize("started", [True, False])
def test_a_resume_is_seen_with_and_without_its_line(tmp_path: Path, started: bool) -> None:
    start: list[Any] = [{"event": "start"}] if started else []
    goes = [[step_line(n, elapsed_s=0.5 * (n - at)) for n in range(at + 1, at + 5)] for at in (0, 2, 6)]
    run = read_curves(write_lines(tmp_path / "log.jsonl", [line for go in goes for line in (*start, *go)]))
    assert [point.step for point in run.steps] == list(range(1, 11))
    assert (run.n_resumed, run.n_redone, run.total_s) == (2, 2, 6.0)


def test_a_later_evaluation_of_a_step_counts(tmp_path: Path) -> None:
    run = read_curves(write_lines(tmp_path, [step_line(1), eval_line(1, 3.0), eval_line(1, 2.0)]))
    assert run.evaluations == (EvalPoint(1, train_loss=1.9, val_loss=2.0, val_bpb=1.0),)


@pytest.mark.parametrize(
    "tail", ['{"step": 4, "lo', '{"step": 4', '{"event": "eval", "a": {"b": 1}', "{", "\0\0\0", '{"step": 4, "x": {}']
)
def test_what_a_crash_cut_is_left_out_and_told(tmp_path: Path, tail: str) -> None:
    run = read_curves(write_lines(tmp_path, [step_line(n) for n in (1, 2, 3)], end=tail))
    assert [point.step for point in run.steps] == [1, 2, 3]
    if "\0" not in tail:
        assert run.remarks == (f"{tmp_path}/metrics.jsonl: line 4 was cut short when a run was ended, and left out",)


def test_a_line_that_was_cut_before_a_resume_is_left_out(tmp_path: Path) -> None:
    more = '{"step": 4, "lo\n{"event": "start"}\n' + json.dumps(step_line(4)) + "\n"
    run = read_curves(write_lines(tmp_path, [step_line(n) for n in (1, 2, 3)], end=more))
    assert [point.step for point in run.steps] == [1, 2, 3, 4]
    assert len(run.remarks) == 1 and "line 4 " in run.remarks[0]


def test_a_log_is_gone_on_with_on_a_line_of_its_own(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "log.jsonl", [step_line(1)], end='{"step": 2, "lo')
    assert end_of_cut_line(path) == "\n"
    step = StepReport(2, 3.0, 1e-3, 1.0, 1, 9, 0.5, 100.0, 0.5, 0, False)
    list(StepLog(str(path), append=True).follow([Begin(1, 1), step]))
    assert end_of_cut_line(path) == "" and end_of_cut_line(tmp_path / "none") == ""
    assert [point.loss for point in read_curves(path).steps] == [step_line(1)["loss"], 3.0]


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("[1, 2]", "no object"),
        ("what is this", "no sound JSON"),
        ('{"step": 1, "step": 2}', "twice"),
        ('{"step": 1, "loss": NaN}', "NaN is no number"),
        ('{"step": 1, "loss": 1e999}', "out of range"),
        ('{"step": 1, "loss": "3"}', "'loss' is '3' (expected a number or null)"),
        ('{"step": 1, "loss": true}', "'loss' is True"),
        ('{"step": 1, "lr": [1]}', "'lr' is [1]"),
        ('{"step": -1}', "'step' is -1 (expected a whole number from 0)"),
        ('{"step": 1.5}', "'step' is 1.5"),
        ('{"step": 99999999999999999999}', "'step' is 99999999999999999999"),
        ('{"event": "eval", "val_loss": 2}', "has no 'step'"),
        ('{"event": "eval", "step": 2, "val_loss": "x"}', "'val_loss' is 'x'"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "nested"),
        ('{"a": "' + "x" * (1 << 20) + '"}', "too long"),
        ('{"step": 1} {"step": 2}', "no sound JSON"),
    ],
    ids=lambda value: value[:20],
)
def test_a_line_that_is_none_is_named(tmp_path: Path, line: str, fragment: str) -> None:
    with pytest.raises(FormatError) as caught:
        read_curves(write_lines(tmp_path, [{"event": "start"}], end=line + "\n" + json.dumps(step_line(1)) + "\n"))
    assert str(caught.value).startswith(f"{tmp_path}/metrics.jsonl:2: ") and fragment in str(caught.value)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_events_and_keys_of_others_are_passed_over(tmp_path: Path) -> None:
    lines = [{"event": "sample", "text": "{"}, {}, step_line(1, more={"a": [1]}), {"event": "end", "step": "last"}]
    assert read_curves(write_lines(tmp_path, lines)).n_steps == 1


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_curves(tmp_path / "none")
    with pytest.raises(UsageError, match=r"has no metrics\.jsonl"):
        read_curves(tmp_path)
    with pytest.raises(DataError, match="no step and no evaluation yet"):
        read_curves(write_lines(tmp_path, [{"event": "start"}]))
    (tmp_path / "folder.jsonl" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(UsageError, match="cannot be read"):
        read_curves(tmp_path / "folder.jsonl")


def test_runs_have_names_that_differ(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / "a" / "out", 5), write_run(tmp_path / "b" / "out", 5), write_run(tmp_path / "c", 5)]
    assert [run.name for run in read_runs(paths)] == [str(paths[0]), str(paths[1]), "c"]
    assert read_curves(write_run(tmp_path / "e\x1b[31m", 5)).name == "e\\x1b[31m"
