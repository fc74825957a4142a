import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from llamakit.cli.loading import load
from llamakit.cli.prompts import read_prompts, run_prompts
from llamakit.errors import UsageError
from llamakit.inference.config import GenerateConfig
from tests.helpers import assert_error, called, warm
from tests.tiny import cached_tiny_gguf
from tests.warm import Process

TEXTS = ["The old king", "{not json", "A queen", "  indented"]
OPTIONS = ("-n", "8", "--seed", "4")


@pytest.fixture(scope="module")
def model() -> Path:
    return cached_tiny_gguf(n_ctx=64)


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([*TEXTS[:2], "", *TEXTS[2:]]) + "\n", encoding="utf-8")
    return path


def _lines(result) -> list[dict]:
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_file_holds_a_prompt_a_line_or_json_lines(prompts, tmp_path):
    assert [(p.text, p.line) for p in read_prompts(prompts)] == list(zip(TEXTS, [1, 2, 4, 5], strict=True))
    lines = tmp_path / "prompts.json"
    lines.write_text('{"prompt": "a\\nb", "id": 5}\r\n\n{"prompt": ""}\n', encoding="utf-8")
    assert [(p.text, p.line) for p in read_prompts(lines)] == [("a\nb", 1), ("", 3)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "a.txt: has no prompt"),
        ("a.txt", '{"prompt": "x"}\nplain', "a.txt:2: is no JSON object with a text"),
        ("a.jsonl", "plain", "a.jsonl:1: is no JSON object with a text"),
        ("a.jsonl", '{"prompt": 5}', "a.jsonl:1: is no JSON object with a text"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: is no JSON object with a text"),
    ],
)
def test_files_that_cannot_be_are_named(name, text, message, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as error:
        read_prompts(tmp_path / name)
    assert message in str(error.value)


@pytest.mark.parametrize("parallel", [1, 3, 10])
def test_each_prompt_has_a_line_in_its_place_and_the_text_that_it_has_alone(parallel, model, prompts, capfd):
    lines = _lines(called(capfd, "generate", "-m", model, "--prompts", prompts, *OPTIONS, "-np", str(parallel)))
    assert [(line["index"], line["prompt"]) for line in lines] == list(enumerate(TEXTS))
    for line in lines:
        (alone,) = _lines(
            called(capfd, "generate", "-m", model, "-p", line["prompt"], *OPTIONS, "--json", "--no-escape")
        )
        assert {key: value for key, value in line.items() if key != "index"} == {
            key: alone[key] for key in line if key != "index"
        }


def test_the_hint_at_a_chat_comes_once_and_one_process_renders_all_chats(prompts, capfd, monkeypatch):
    from llamakit.tokenizer import chat

    model = cached_tiny_gguf(n_ctx=64, chat_template="{% for m in messages %}[{{ m.content }}]{% endfor %}")
    plain = called(capfd, "generate", "-m", model, "--prompts", prompts, *OPTIONS)
    assert plain.returncode == 0 and plain.stderr.count("hint: this model has a chat template") == 1
    started = []
    popen = chat.subprocess.Popen
    monkeypatch.setattr(chat.subprocess, "Popen", lambda *args, **more: started.append(args) or popen(*args, **more))
    asked = called(capfd, "generate", "-m", model, "-cnv", "--prompts", prompts, *OPTIONS)
    assert len(_lines(asked)) == len(TEXTS) and "hint" not in asked.stderr and len(started) == 1


def test_stops_and_logprobs_go_with_many_prompts(model, prompts, capfd):
    options = ("-t", "0", "--stop", "e", "--logprobs", "1", "--in-prefix", ":")
    lines = _lines(called(capfd, "generate", "-m", model, "--prompts", prompts, *OPTIONS, *options))
    assert {line["stop_reason"] for line in lines} <= {"stop", "length", "end"}
    assert all("e" not in line["text"] for line in lines)
    assert all(len(line["logprobs"]["content"]) == len(line["tokens"]) for line in lines)


def test_a_prompt_that_is_too_long_is_named_by_its_line_before_anything_is_computed(model, tmp_path, capfd):
    path = tmp_path / "p.txt"
    path.write_text("short\n" + "x" * 500 + "\n", encoding="utf-8")
    result = called(capfd, "generate", "-m", model, "--prompts", path, *OPTIONS)
    assert_error(result, 2, "p.txt:2: the prompt has", "the context holds 64")
    assert result.stdout == ""


@pytest.mark.slow
def test_standard_input_is_a_file_of_prompts_too(model, prompts, capfd):
    arguments = ("generate", "-m", model, *OPTIONS, "--prompts")
    piped = warm(*arguments, "-", input=prompts.read_text(encoding="utf-8"))
    assert _lines(piped) == _lines(called(capfd, *map(str, arguments), prompts))
    assert_error(warm(*arguments, "-", input=""), 2, "<stdin>: has no prompt")


class Interrupted:
    """An engine at which somebody presses Ctrl-C in the third step."""

    def __init__(self, engine) -> None:
        self.engine, self.config, self.n_steps = engine, engine.config, 0

    def context(self, n_ctx):
        return self.engine.context(n_ctx)

    def feed_batch(self, feeds):
        self.n_steps += 1
        if self.n_steps == 3:
            raise KeyboardInterrupt
        return self.engine.feed_batch(feeds)


def test_ctrl_c_prints_what_there_is_of_each_prompt(model, prompts, capfd):
    loaded = load(model)
    config = GenerateConfig(temperature=0, parallel=2)
    many = read_prompts(prompts)
    capfd.readouterr()
    loaded = replace(loaded, engine=Interrupted(loaded.engine))
    assert run_prompts(loaded, many, prompts, config, loaded.tokenizer.encode) == 130
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [(line["index"], line["stop_reason"], len(line["tokens"])) for line in lines] == [
        (0, "interrupted", 2),
        (1, "interrupted", 2),
    ]


@pytest.mark.slow
def test_ctrl_c_ends_many_prompts_with_130(prompts):
    model = cached_tiny_gguf(n_ctx=64)
    options = ["-t", "0", "--ignore-eos", "--context-shift"]  # they would never end
    with Process("generate", "-m", model, "--prompts", prompts, *options) as child:
        assert child.stderr is not None
        while "at once" not in child.stderr.readline():
            assert child.poll() is None
        child.send_signal(signal.SIGINT)
        stdout, stderr = child.communicate(timeout=250)
    assert child.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert {json.loads(line)["stop_reason"] for line in stdout.splitlines()} <= {"interrupted"}
