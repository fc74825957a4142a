"""`generate --prompts FILE`: many prompts, several at once, a JSON line for each in the order of the prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamakit.cli import render
from llamakit.cli.completion_view import continuation_json
from llamakit.cli.prompt import read_stdin
from llamakit.errors import EXIT_INTERRUPTED, EXIT_OK, UsageError
from llamakit.files import read_text

if TYPE_CHECKING:
    from llamakit.cli.loading import Loaded
    from llamakit.inference.config import GenerateConfig
    from llamakit.inference.continuation import Done, Token


@dataclass
class Prompt:
    """A prompt of the file, where it stands, and what has come of it so far."""

    text: str
    line: int
    ids: list[int] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    done: Done | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, or of standard input for `-`, without empty lines.

    A file whose name ends with .jsonl, or whose first line is a JSON object with "prompt", has one of those on each
    line; any other has a prompt on each, taken as it is. Raises UsageError for a file without prompts, and for a line
    that is none.
    """
    text = read_stdin() if str(path) == "-" else read_text(path)
    lines = [(line.removesuffix("\r"), i) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UsageError("has no prompt", path=_name(path))
    if path.suffix == ".jsonl" or _prompt_of(lines[0][0]) is not None:
        return [Prompt(_required_prompt(line, path, i), i) for line, i in lines]
    return [Prompt(line, i) for line, i in lines]


def _name(path: Path) -> str:
    return "<stdin>" if str(path) == "-" else str(path)


def _prompt_of(line: str) -> str | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    prompt = value.get("prompt") if isinstance(value, dict) else None
    return prompt if isinstance(prompt, str) else None


def _required_prompt(line: str, path: Path, number: int) -> str:
    prompt = _prompt_of(line)
    if prompt is None:
        raise UsageError('is no JSON object with a text as "prompt"', path=_name(path), line=number)
    return prompt


def run_prompts(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    path: Path,
    config: GenerateConfig,
    encode: Callable[[str], list[int]],
) -> int:
    """Continue all prompts, encoded by `encode`, and print a line for each as soon as those before it are there."""
    from llamakit.inference.completion import generate_batch
    from llamakit.inference.continuation import Done

    for prompt in prompts:
        prompt.ids = _ids(loaded, prompt, path, config, encode)
    next_shown = 0
    render.log(f"{len(prompts)} prompts, {min(config.parallel, len(prompts))} at once")
    try:
        for number, report in generate_batch(loaded.engine, loaded.tokenizer, [p.ids for p in prompts], config):
            prompt = prompts[number]
            prompt.pieces.append(report.text)
            if isinstance(report, Done):
                prompt.done = report
            else:
                prompt.tokens.append(report)
            while next_shown < len(prompts) and prompts[next_shown].done is not None:
                _print(loaded, prompts, next_shown, config)
                next_shown += 1
    except KeyboardInterrupt:  # what there is so far counts
        for number in range(next_shown, len(prompts)):
            if prompts[number].tokens:
                _print(loaded, prompts, number, config)
        render.note("interrupted")
        return EXIT_INTERRUPTED
    return EXIT_OK


def _ids(
    loaded: Loaded, prompt: Prompt, path: Path, config: GenerateConfig, encode: Callable[[str], list[int]]
) -> list[int]:
    from llamakit.inference.completion import checked_prompt

    try:
        return checked_prompt(loaded.engine, loaded.tokenizer, encode(prompt.text), config)
    except UsageError as error:
        raise UsageError(error.reason, path=_name(path), line=prompt.line, hint=error.hint) from error


def _print(loaded: Loaded, prompts: Sequence[Prompt], number: int, config: GenerateConfig) -> None:
    p = prompts[number]
    value: dict[str, Any] = {"index": number, "prompt": p.text, "prompt_tokens": p.ids}
    value |= continuation_json(
        loaded.tokenizer, p.tokens, "".join(p.pieces), p.done, logprobs=config.logprobs is not None
    )
    render.print_json(value, flush=True)
    p.tokens, p.pieces = [], []  # there may be many prompts
