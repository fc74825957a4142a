"""`llamakit chat` and `generate -cnv`: stdout has the answers alone, commands do what they say, Ctrl-C ends an answer."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llamakit.cli import chat_input, run
from llamakit.cli.chat_commands import Commands
from llamakit.formats.adapter import Adapter, write_adapter
from llamakit.formats.gguf import GGUFFile
from llamakit.formats.open import open_model
from llamakit.inference.config import GenerateConfig
from llamakit.inference.conversation import Conversation
from llamakit.inference.engine import TorchEngine
from llamakit.model import load_model
from llamakit.tokenizer import load_tokenizer
from tests.helpers import assert_error, render_in_this_process, warm
from tests.tiny import cached_tiny_gguf
from tests.warm import PIPE, Process

SHORT = "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}"
GREEDY = ("-t", "0", "-n", "5", "--dtype", "f32", "--logit-bias", "13-inf")  # no newline, so that lines can be counted


@pytest.fixture(scope="module")
def model() -> Path:
    return cached_tiny_gguf(chat_template=SHORT, n_ctx=256, seed=1)


@pytest.fixture
def chat(capfd, monkeypatch, tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command line in this process, on lines as its standard input."""
    render_in_this_process(monkeypatch)

    def call(lines: str | bytes, *args: object) -> subprocess.CompletedProcess[str]:
        file = tmp_path / "stdin"
        file.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
        capfd.readouterr()
        before, stdin = os.dup(0), os.open(file, os.O_RDONLY)
        os.dup2(stdin, 0)
        try:
            with open(0, closefd=False) as text:
                monkeypatch.setattr(sys, "stdin", text)
                code = run([str(arg) for arg in args])
        finally:
            os.dup2(before, 0)
            os.close(before)
            os.close(stdin)
        return subprocess.CompletedProcess(args, code, *capfd.readouterr())

    return call


@pytest.fixture
def talk(chat, model):
    """`llamakit chat` on the model, greedily."""
    return lambda lines, *args: chat(lines, "chat", "-m", model, *GREEDY, *args)


@pytest.fixture(scope="module")
def library(model):
    """The answers to these messages as the library gives them."""
    file = open_model(model)
    engine, tokenizer = TorchEngine(load_model(file)), load_tokenizer(file)
    config = GenerateConfig(temperature=0, n_predict=5, logit_bias=((13, -float("inf")),))

    def answers(*messages: str, system: str = "") -> list[str]:
        with pytest.MonkeyPatch.context() as monkeypatch:
            render_in_this_process(monkeypatch)
            conversation = Conversation(engine, tokenizer, config, system=system)
            return ["".join(report.text for report in conversation.say(text)) for text in messages]

    return answers


def lines_of(answers: list[str]) -> str:
    return "".join(answer + "\n" for answer in answers)


def test_each_line_is_a_message_and_stdout_has_the_answers_alone(talk, library):
    result = talk("Who is\u2028 the king?\n\n   \r\nAnd the queen?\r\nWhy")
    assert result.returncode == 0, result.stderr
    assert result.stdout == lines_of(library("Who is\u2028 the king?", "And the queen?", "Why"))
    assert "error" not in result.stderr and "> " not in result.stderr
    for expected in ("loading ", "load: ", "prompt: ", "generation: "):
        assert expected in result.stderr
    assert talk("").stdout == ""


def test_a_message_may_have_several_lines(talk, library):
    lines = 'one\\\ntwo\\\nthree\n"""\nfour\n/quit\n"""\n"""five"""\n//six\n/usr/bin/seven is a path\n"""eight\nnine'
    expected = ("one\ntwo\nthree", "four\n/quit", "five", "/six", "/usr/bin/seven is a path", "eight\nnine")
    assert talk(lines).stdout == lines_of(library(*expected))
    assert talk("an open end\\").stdout == lines_of(library("an open end"))


def test_generate_cnv_is_the_same(chat, talk, model, library, tmp_path):
    both = lines_of(library("hi", "more", system="Be\nbrief."))
    options = ("-m", model, *GREEDY, "-sys", r"Be\nbrief.")
    assert chat("hi\nmore\n", "generate", *options, "-cnv").stdout == both
    assert chat("more\n", "generate", *options, "-cnv", "-p", "hi").stdout == both
    assert talk("more\n", "--system", r"Be\nbrief.", "-p", "hi").stdout == both
    (tmp_path / "system.txt").write_text("Be\nbrief.\n")
    assert talk("hi\nmore\n", "-sysf", tmp_path / "system.txt").stdout == both


def test_a_single_turn_answers_once(chat, model, library):
    options = ("generate", "-m", model, *GREEDY, "-cnv", "-st")
    assert chat("not read\n", *options, "-p", "hi").stdout == lines_of(library("hi"))
    assert chat("all of it\nis one message\n", *options).stdout == lines_of(library("all of it\nis one message"))
    assert_error(chat("", *options), 2, "no message to answer")
    value = json.loads(chat("", *options, "-p", "hi", "--json").stdout)
    assert (value["prompt"], [value["text"]]) == ("hi", library("hi"))
    assert len(value["tokens"]) == 5 and value["stop_reason"] == "length" and value["prompt_tokens"][0] == 1


def test_json_is_one_line_for_each_answer(talk, library):
    values = [json.loads(line) for line in talk("hi\nmore\n/regen\n", "--json").stdout.splitlines()]
    first, second = library("hi", "more")
    assert [(v["prompt"], v["text"]) for v in values] == [("hi", first), ("more", second), ("/regen", second)]


def test_commands_that_change_the_conversation(talk, library):
    plain, brief = library("hi")[0], library("hi", system="Be brief.")[0]
    assert plain != brief
    result = talk('hi\n/undo\n/system Be brief.\nhi\n/clear\nhi\n/regen\n/system\n/system ""\n/clear\nhi\n/quit\nhi\n')
    assert result.stdout == lines_of([plain, brief, brief, brief, plain])
    for expected in ("took back: hi", "system message: Be brief.", "no system message"):
        assert expected in result.stderr
    for name in ("/bye", "/exit", " /quit "):
        assert talk(f"{name}\nhi\n").stdout == ""


def test_help_names_every_command(talk):
    result = talk("/help\n")
    assert result.stdout == ""
    for name in Commands(None, None, False, False)._table():  # type: ignore[arg-type]
        assert name in result.stderr
    assert "Ctrl-C" in result.stderr and "Ctrl-D" in result.stderr


def test_what_cannot_be_done_is_told_in_a_line_and_the_chat_goes_on(talk, library, model, tmp_path):
    (tmp_path / "broken.json").write_text('[{"role": "user"}]')
    wrong = {
        "/foo": "unknown command /foo", "/undo": "nothing to take back", "/regen": "nothing has been asked",
        "/scale 2": "no adapter is on", "/scale x": "/scale is 'x'", "/scale inf": "/scale is 'inf'",
        "/lora": "no adapter is on", f"/lora {tmp_path}/none.gguf": "none.gguf", "/load": "/load needs", "/save": "/save needs",
        f"/load {tmp_path}/broken.json": "broken.json: message 1 is none", f"/load {tmp_path}/none.json": "none.json",
        f"/save {tmp_path}": "is no name of a file", "/save /": "is no name", "/load a\0b": "is no name", "/save ~no-such/x": "~no-such/x",
        f"/save {'x' * 300}": "xxx", f"/load {'x' * 300}": "xxx", "/lora /proc/self/mem": "/lora failed",
        f"/save {model}": "is the model", f"/save {tmp_path}/no/x.json": "x.json", f"/lora {model}": str(model),
    }  # fmt: skip
    result = talk("\n".join([*wrong, "hi"]))
    assert (result.returncode, result.stdout) == (0, lines_of(library("hi")))
    said = [line for line in result.stderr.splitlines() if line.startswith(("error: ", "no adapter is on"))]
    for line, message in zip(said, wrong.values(), strict=True):
        assert message in line
    assert GGUFFile(model).metadata


def test_a_conversation_is_saved_and_loaded(talk, library, tmp_path):
    first, second = library("hi", "more", system="Be brief.")
    path = tmp_path / "my chat.json"
    assert talk(f"hi\n/save {path}\n", "--system", "Be brief.").stdout == lines_of([first])
    expected = [("system", "Be brief."), ("user", "hi"), ("assistant", first)]
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved == [{"role": role, "content": content} for role, content in expected]
    assert talk(f"/load {path}\nmore\n").stdout == lines_of([second])
    path.write_text(json.dumps(saved[:2]), encoding="utf-8")
    result = talk(f"/load {path}\n/regen\n")
    assert result.stdout == lines_of([first]) and "has no answer: /regen gives one" in result.stderr


def test_adapters_are_changed_on_the_way(talk, library, model, tmp_path):
    rng = np.random.default_rng(0)
    a, b = (rng.normal(0, 0.5, shape).astype(np.float32) for shape in ((4, 64), (64, 4)))
    lora = tmp_path / "lo ra.gguf"
    write_adapter(lora, Adapter(4.0, {"blk.0.attn_q.weight": (a, b)}), GGUFFile(model))
    (plain,) = library("hi")
    (changed,) = talk("hi\n", "--lora", lora).stdout.splitlines()
    (half,) = talk("hi\n", "--lora-scaled", f"{lora}:-3").stdout.splitlines()
    assert len({plain, changed, half}) == 3
    result = talk(f"hi\n/lora {lora}\n/regen\n/scale -3\n/regen\n/lora {tmp_path}/no.gguf\n/regen\n/lora off\n/regen\n")
    assert result.stdout == lines_of([plain, changed, half, half, plain])
    assert f"adapter: {lora}, times -3" in result.stderr


def test_the_oldest_messages_make_room(talk):
    result = talk("".join(f"message number {i}\n" for i in range(8)), "--ctx", "128")
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 8
    assert "outgrew the context: its oldest " in result.stderr and "--ctx" in result.stderr
    full = talk("hi\n", "--ctx", "32", "-n", "-1", "--ignore-eos")
    assert full.returncode == 0 and "the context of 32 tokens is full" in full.stderr


def test_messages_that_cannot_be_answered_end_a_pipe(talk, chat, model, tmp_path):
    assert_error(talk("hi\n" + "long " * 400 + "\nhi\n"), 2, "the context holds 256")
    broken = cached_tiny_gguf(chat_template="{{ raise_exception('no\n\x1b[31m') }}")
    assert_error(chat("hi\n", "chat", "-m", broken), 2, "cannot be rendered")
    assert_error(talk(b"hi\n\xff\n"), 2, "<stdin>:2: is not UTF-8 text")


@pytest.mark.slow
def test_what_is_no_input_is_said(model, tmp_path):
    with (tmp_path / "output").open("w") as file:
        result = warm("chat", "-m", model, stdin=file)
    assert_error(result, 2, "<stdin>: cannot be read")


def test_a_line_without_end_is_refused(talk, monkeypatch):
    monkeypatch.setattr(chat_input, "_LONGEST_LINE_BYTES", 20)
    assert_error(talk("x" * 19 + "\n" + "x" * 21), 2, "<stdin>:2: is too long (expected at most 20 bytes)")


def test_templates_by_name_and_file(talk, chat, tmp_path):
    bare = cached_tiny_gguf(seed=1)
    assert_error(chat("hi\n", "chat", "-m", bare), 2, "no chat template", "--chat-template chatml")
    assert_error(talk("", "--chat-template", "chatnl"), 2, "unknown chat template 'chatnl'", "llama2", "zephyr")
    (tmp_path / "short.jinja").write_text(SHORT)
    for name in ("zephyr", tmp_path / "short.jinja"):
        value = chat("hi\n", "chat", "-m", bare, *GREEDY, "--chat-template", name, "--json").stdout
        expected = "<|user|>\nhi<|endoftext|>\n<|assistant|>\n" if name == "zephyr" else "u:hi\n"
        assert json.loads(value)["prompt_tokens"] == load_tokenizer(open_model(bare)).encode(expected)


def test_options_of_a_completion_in_a_chat(talk, chat, model, library, tmp_path):
    (whole,) = library("hi")
    stop = whole[2:]
    result = talk(f"hi\n/save {tmp_path}/chat.json\n", "--stop", stop, "--logprobs", "1")
    assert result.stdout == whole[:2] + "\n"
    assert json.loads((tmp_path / "chat.json").read_text())[1]["content"] == whole[:2]
    assert "likeliest tokens:" in result.stderr
    result = chat("hi\n", "generate", "-m", model, *GREEDY, "-cnv", "--context-shift")
    assert result.stdout == whole + "\n" and "--context-shift has no effect on a chat" in result.stderr
    (tmp_path / "prompts.txt").write_text("hi\nmore\n")
    result = chat("", "generate", "-m", model, *GREEDY, "-cnv", "--prompts", tmp_path / "prompts.txt", "-sys", "x")
    values = [json.loads(line) for line in result.stdout.splitlines()]
    tokenizer = load_tokenizer(open_model(model))
    assert [v["prompt_tokens"] for v in values] == [tokenizer.encode(f"s:x\nu:{text}\n") for text in ("hi", "more")]


def test_a_system_text_that_the_template_refuses_is_said_once(talk, library, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ raise_exception('no') if messages[0].role == 'system' }}" + SHORT)
    result = talk("hi\nmore\n", "--system", "Be brief.", "--chat-template", tmp_path / "t.jinja")
    assert result.stdout.splitlines()[0] == library("Be brief.\n\nhi")[0]
    assert result.stderr.count("takes no system message") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-sys", "x"), "--system is of a chat"),
        (("-st",), "--single-turn is of a chat"),
        (("--chat-template", "zephyr"), "--chat-template is of a chat"),
        (("-cnv", "-sys", "x", "-sysf", "y"), "given more than once"),
        (("-cnv", "-sysf", "none.txt"), "none.txt"),
    ],
)
def test_options_that_cannot_be(options, message, chat, model):
    assert_error(chat("", "generate", "-m", model, *options), 2, message)


# What needs a terminal


class Terminal:
    """The command in a process with a terminal of its own."""

    def __init__(self, *args: object, env: dict[str, str]) -> None:
        self.fd, terminal = pty.openpty()
        self.process = Process(*map(str, args), env={"TERM": "xterm", **env}, terminal=terminal)
        os.close(terminal)
        self.seen = ""

    def until(self, text: str) -> str:
        """What was shown up to this text and with it."""
        deadline = time.monotonic() + 250
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.fd], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.fd, 4096).decode(errors="replace")
                except OSError:  # the other end is closed
                    break
        assert text in self.seen, self.seen
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def interrupt_prompt(self) -> None:
        """Ctrl-C, once the program waits for a key: between the prompt and the wait, Python's readline loses it."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "S":
            os.sched_yield()
        self.type("\x03")

    def ended(self) -> int:
        """The exit code."""
        code = self.process.wait(250)
        os.close(self.fd)
        return code


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_not_the_chat(tmp_path):
    long = cached_tiny_gguf(chat_template=SHORT, n_ctx=100_000, seed=5)
    options = ("-t", "0", "--dtype", "f32", "--ignore-eos")
    terminal = Terminal("chat", "-m", long, *options, env={"NO_COLOR": "1"})
    assert "Ctrl-D ends" in terminal.until("> ")
    terminal.type("hello\n")
    terminal.until("hello\r\n")
    terminal.until("i")  # the answer has begun, and would take minutes
    terminal.type("\x03")
    terminal.until("> ")
    terminal.type(f"/save {tmp_path}/chat.json\n")
    terminal.until("saved 2 messages")
    terminal.until("> ")
    question, answer = json.loads((tmp_path / "chat.json").read_text())
    assert question["content"] == "hello" and answer["role"] == "assistant" and answer["content"]
    terminal.type("half a line")
    terminal.until("half a line")
    terminal.interrupt_prompt()
    terminal.until("Ctrl-C once more, or Ctrl-D")
    terminal.until("> ")
    terminal.type("/load none\n")
    terminal.until("error: none: ")
    terminal.until("> ")
    terminal.type('"""a\n')
    terminal.until(". ")
    terminal.interrupt_prompt()
    terminal.until("> ")
    terminal.interrupt_prompt()
    assert terminal.ended() == 0


@pytest.mark.slow
def test_colours_and_the_end_of_input(model):
    terminal = Terminal("chat", "-m", model, *GREEDY, env={"NO_COLOR": ""})
    terminal.until("\x1b[32;1m> \x1b[0m")
    terminal.type("\x04")
    assert terminal.ended() == 0
    terminal = Terminal("generate", "-m", cached_tiny_gguf(chat_template=SHORT, n_ctx=100_000, seed=5), "-cnv", "-st",
                        "--dtype", "f32", "--ignore-eos", env={"NO_COLOR": "1"})  # fmt: skip
    terminal.until("> ")
    terminal.type("hello\n")
    terminal.until("hello\r\n")
    terminal.until("i")
    terminal.type("\x03")
    assert terminal.ended() == 130


@pytest.mark.slow
def test_ctrl_c_ends_a_pipe(tmp_path):
    long = cached_tiny_gguf(chat_template=SHORT, n_ctx=100_000, seed=5)
    command = ("chat", "-m", long, "--dtype", "f32", "--ignore-eos", "-t", "0")
    with Process(*command, stdin=PIPE, text=False) as process:
        process.stdin.write(b"hello\nagain\n")
        process.stdin.flush()
        text = process.stdout.read(5)
        process.send_signal(signal.SIGINT)
        rest, stderr = process.communicate(timeout=250)
    assert process.returncode == 130
    assert text and rest.endswith(b"\n") and b"Traceback" not in stderr
