"""`llamakit finetune` on data that cannot be used: one line with file and line, exit 2, or skipped, told and counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llamakit.cli import run
from tests.helpers import render_in_this_process
from tests.tiny import cached_tiny_gguf

GOOD = '{"prompt": "Who rules?", "completion": "The old king."}'
MANY = " ".join(["word"] * 60)
RAISES = """{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('no bad words') }}{% endif %}
[{{ m.role }}]{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""
LOOPS = RAISES.replace("{{ raise_exception('no bad words') }}", "{% for i in range(90000) %}{% for j in range(90000) %}"
                       "{% endfor %}{% endfor %}")  # fmt: skip

Finetune = Callable[..., tuple[int, str, str]]

CASES = {
    "broken JSON": ('{"prompt": ', "chatml", "is not JSON"),
    "not an object": ('"text"', "chatml", "expected an object"),
    "unknown role": (
        '{"messages": [{"role": "wizard", "content": "q"}, {"role": "assistant", "content": "a"}]}',
        "chatml",
        "message 1 has the unknown role 'wizard'",
    ),
    "empty answer": ('{"prompt": "q", "completion": ""}', "chatml", "answer 1 of 1 is empty"),
    "no answer": ('{"messages": [{"role": "user", "content": "q"}]}', "chatml", "no message is an assistant's"),
    "nothing trained is left": (f'{{"prompt": "{MANY}", "completion": "a"}}', "chatml", "nothing to train on is left"),
    "a template that raises": ('{"prompt": "bad", "completion": "a"}', RAISES, "no bad words"),
    "an answer without a loss": (
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}',
        "chatml",
        "every answer has the weight 0",
    ),
}


@pytest.fixture
def finetune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Finetune:
    """Exit code, stdout and stderr of a step on train.jsonl in the current directory."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.gguf").symlink_to(cached_tiny_gguf(tokenizer="bpe", n_layer=1))

    def call(*lines: str, template: str = "chatml", options: tuple[str, ...] = ()) -> tuple[int, str, str]:
        (tmp_path / "train.jsonl").write_text("".join(f"{line}\n" for line in lines))
        (tmp_path / "template.jinja").write_text(template)
        name = "template.jinja" if "{" in template else template
        words = ["--model-base", "base.gguf", "--train-data", "train.jsonl", "--chat-template", name, "--ctx", "96"]
        words += ["--adam-iter", "1", "--warmup", "0", "--batch", "1", "--save-every", "0", "--checkpoint-in", ""]
        words += ["--checkpoint-out", "", "--lora-out", "lora.gguf", "--seed", "1", *options]
        code = run(["finetune", *words])
        told = capfd.readouterr()
        return code, told.out, told.err

    return call


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    render_in_this_process(monkeypatch)


def errors(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("error: ")]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("case", CASES)
def test_it_stops_the_run_or_is_skipped_told_and_counted(finetune: Finetune, tmp_path: Path, case: str) -> None:
    line, template, reason = CASES[case]
    before = {"base.gguf", "train.jsonl", "template.jinja"}
    code, _, err = finetune(GOOD, line, GOOD, template=template)
    (error,) = errors(err)
    assert code == 2 and error.startswith("error: train.jsonl:2: ") and reason in error
    assert "--on-error skip" in err and {path.name for path in tmp_path.iterdir()} == before
    code, out, err = finetune(GOOD, line, GOOD, template=template, options=("--on-error", "skip"))
    assert code == 0 and not errors(err), err
    assert f"warning: skipped: train.jsonl:2: {error.partition(':2: ')[2]}" in err
    assert "number of records: 3 (2 prompt/completion), 1 skipped" in out and "number of samples: 2" in out


@pytest.mark.usefixtures("quick")
def test_data_with_nothing_to_train_on(finetune: Finetune, tmp_path: Path) -> None:
    line, _, reason = CASES["no answer"]
    code, _, err = finetune(line, line, options=("--on-error", "skip"))
    (error,) = errors(err)
    assert code == 2 and "all 2 records were skipped" in error and error.startswith("error: train.jsonl:1: ")
    assert reason in error and "llamakit data check" in err
    for options in ((), ("--on-error", "skip")):
        code, _, err = finetune(options=options)
        assert code == 2 and errors(err) == ["error: train.jsonl: is empty: there is nothing to train on"]
    assert not (tmp_path / "lora.gguf").exists()


@pytest.mark.usefixtures("quick")
def test_held_out_data_is_held_to_the_same(finetune: Finetune, tmp_path: Path) -> None:
    (tmp_path / "val.jsonl").write_text(f"{GOOD}\n{CASES['empty answer'][0]}\n")
    code, _, err = finetune(GOOD, options=("--val-data", "val.jsonl"))
    assert code == 2 and errors(err)[0].startswith("error: val.jsonl:2: answer 1 of 1 is empty")
    code, _, err = finetune(GOOD, options=("--val-data", "val.jsonl", "--on-error", "skip"))
    assert code == 0 and "warning: skipped: val.jsonl:2: answer 1 of 1 is empty" in err


@pytest.mark.usefixtures("quick")
def test_many_are_counted_and_the_first_are_named(finetune: Finetune) -> None:
    _, out, err = finetune(GOOD, *[CASES["empty answer"][0]] * 14, options=("--on-error", "skip"))
    assert err.count("warning: skipped: train.jsonl:") == 10 and "skipped: 4 more; llamakit data check" in err
    assert "14 skipped" in out


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("full", [False, True])
def test_training_all_weights_reads_the_same_data(finetune: Finetune, tmp_path: Path, full: bool) -> None:
    (tmp_path / "chat.json").write_text(json.dumps([json.loads(GOOD), {"prompt": "q", "completion": ""}]))
    kind = ("--full", "--model-out", "model.gguf", "--lora-out", "ggml-lora-ITERATION-f32.gguf") if full else ()
    code, _, err = finetune(GOOD, options=(*kind, "--train-data", "chat.json"))
    assert code == 2 and errors(err)[0].startswith("error: chat.json") and "answer 1 of 1 is empty" in errors(err)[0]


@pytest.mark.slow  # a process for each half of the data, until its time is over
def test_a_template_that_loops_names_the_record(finetune: Finetune) -> None:
    bad = '{"prompt": "bad", "completion": "a"}'
    code, _, err = finetune(GOOD, bad, GOOD, template=LOOPS)
    assert code == 2 and errors(err)[0].startswith("error: train.jsonl:2: ")
    assert "exceeded its limits on time and memory" in err
    code, out, err = finetune(GOOD, bad, GOOD, template=LOOPS, options=("--on-error", "skip"))
    assert code == 0 and "warning: skipped: train.jsonl:2: " in err and "1 skipped" in out
    code, _, err = finetune(*[bad] * 3, template=LOOPS)
    assert code == 2 and errors(err)[0].startswith("error: train.jsonl:1: ") and "exceeded its limits" in err
