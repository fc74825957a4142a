"""`llamakit run MODEL`: llama2.c's run, with its one-letter options, defaults and output (run.c), for any model."""

from __future__ import annotations

import codecs
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llamakit.cli import render
from llamakit.cli.help import Command
from llamakit.cli.loading import Loaded, load
from llamakit.cli.sources import local
from llamakit.errors import EXIT_FAILURE, EXIT_OK, UsageError

_MODEL_VARIABLE, _FIRST_PROMPT, _VOCABULARY = "LLAMAKIT_MODEL", "Once upon a time", "tokenizer.bin"
_LETTERS = "tpsnizmy"
_MODES = ("generate", "chat")
_LONGEST_LINE = 511  # bytes; what is longer is the next line's
_USAGE = """\
usage: llamakit run MODEL [-t F] [-p F] [-s N] [-n N] [-i TEXT] [-z FILE] [-m generate|chat] [-y TEXT]
  -t  temperature, 0 for the likeliest token (1.0)     -i  text to begin with
  -p  top-p, 0 or 1 for off (0.9)                      -z  vocabulary of a llama2.c model (tokenizer.bin)
  -s  seed (the time)                                  -m  generate or chat (generate)
  -n  tokens in all, 0 for the whole context (256)     -y  system prompt of a chat
for example: llamakit run stories15M.bin -t 0.8 -n 256 -i "One day, Lily met a Shoggoth\""""


class RunCommand(Command):
    """Reads its arguments as run.c does: a model, then letters that each have a value, whatever that begins with."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse, with the usage and exit code 1, what run.c refuses."""
        if not args or args[0] in ("-h", "--help"):
            return super().parse_args(ctx, args)
        fault = _fault(args[1:])
        if fault:
            raise _usage(fault)
        return super().parse_args(ctx, [*args[1:], "--", args[0]])


def _fault(options: list[str]) -> str | None:
    """What is wrong with the words after the model, where something is."""
    for i, word in enumerate(options):
        if i % 2 == 0 and (len(word) != 2 or word[0] != "-" or word[1] not in _LETTERS):
            return f"{word!r} is no option of run"
    return f"{options[-1]} has no value" if len(options) % 2 else None


def _usage(fault: str) -> typer.Exit:
    """Say what is wrong and how it is right, and give what ends the program."""
    render.error(fault)
    for line in _USAGE.splitlines():
        render.log(line)
    return typer.Exit(EXIT_FAILURE)


def run(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Model of any format; without any argument: $LLAMAKIT_MODEL."),
    ] = None,
    *,
    temperature: Annotated[str, typer.Option("-t", metavar="F", help="Temperature; 0: the likeliest token.")] = "1.0",
    top_p: Annotated[str, typer.Option("-p", metavar="F", help="Top-p; 0 or 1: off.")] = "0.9",
    seed: Annotated[str, typer.Option("-s", metavar="N", help="Seed; 0: the time.", show_default="the time")] = "0",
    steps: Annotated[
        str, typer.Option("-n", metavar="N", help="Tokens in all, the prompt's too; 0: the whole context.")
    ] = "256",
    prompt: Annotated[str | None, typer.Option("-i", metavar="TEXT", help="Text to begin with.")] = None,
    vocabulary: Annotated[
        str | None,
        typer.Option("-z", metavar="FILE", help="Vocabulary of a llama2.c model.", show_default=_VOCABULARY),
    ] = None,
    mode: Annotated[str, typer.Option("-m", metavar="generate|chat", help="Go on with a text, or chat.")] = "generate",
    system: Annotated[str | None, typer.Option("-y", metavar="TEXT", help="System prompt of a chat.")] = None,
) -> int:
    """Write a text as llama2.c's run does: its options, its defaults, its output, for any model."""
    from llamakit.inference.llama2c_loop import RunConfig

    if mode not in _MODES:
        raise _usage(f"unknown mode {mode!r}")
    config = RunConfig(
        temperature=_number("-t", temperature), top_p=_number("-p", top_p), seed=int(_number("-s", seed, whole=True)),
        steps=int(_number("-n", steps, whole=True)),
    )  # fmt: skip
    if model is None:
        model, prompt = os.environ.get(_MODEL_VARIABLE), _FIRST_PROMPT
        if not model:
            raise UsageError("no model is named", hint=f"llamakit run MODEL, or {_MODEL_VARIABLE} in the environment")
    loaded = _load(local(model, offline=False), local(vocabulary, offline=False))
    return _chat(loaded, config, prompt, system) if mode == "chat" else _generate(loaded, config, prompt or "")


def _number(flag: str, text: str, *, whole: bool = False) -> float:
    try:
        return int(text) if whole else float(text)
    except ValueError as error:
        raise _usage(f"{flag} is {text!r} (expected a {'whole number' if whole else 'number'})") from error


def _load(path: Path, vocabulary: Path | None) -> Loaded:
    """llama2.c's own models get the vocabulary that run.c takes, and the CPU, which computes them in float32."""
    from llamakit.formats.open import sniff

    is_llama2c = sniff(path) in ("llama2c", "zip")
    if is_llama2c and vocabulary is None:
        vocabulary = Path(_VOCABULARY)
    return load(path, vocabulary=vocabulary, device="cpu" if is_llama2c else "auto", silent=True)


def _generate(loaded: Loaded, config: Any, prompt: str) -> int:
    from llamakit.inference.llama2c_loop import Speed, complete

    speed, show = Speed(), _Shown()
    for piece in complete(loaded.engine, loaded.tokenizer, prompt, config, speed):
        show(piece)
    show(b"\n")
    if speed.n_steps > 1:
        render.log(f"achieved tok/s: {speed.tok_per_s:f}")
    return EXIT_OK


def _chat(loaded: Loaded, config: Any, user: str | None, system: str | None) -> int:
    from llamakit.inference.llama2c_loop import chat

    show = _Shown()

    def ask(question: str) -> str | None:
        show(question.encode())
        return _read_line()

    for piece in chat(loaded.engine, loaded.tokenizer, config, user=user, system=system, ask=ask):
        show(piece)
    return EXIT_OK


def _read_line() -> str | None:
    """A line of standard input without its end; None after the last."""
    line = sys.stdin.buffer.readline(_LONGEST_LINE)
    text = line.removesuffix(b"\n").partition(b"\0")[0]
    return text.decode("utf-8", "surrogateescape") if line else None


class _Shown:
    """Bytes on stdout as text, a character once its last byte is there."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, piece: bytes) -> None:
        render.stream(self._decoder.decode(piece))
