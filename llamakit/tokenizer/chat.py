"""Chat templates: messages -> the prompt that a model was trained on."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from llamakit.errors import FormatError, UnsupportedError
from llamakit.tokenizer.base import Tokenizer

_RENDERER = Path(__file__).with_name("render_template.py")
_LONGEST_TEMPLATE, _DEADLINE_S = 256 << 10, 10


Messages = Sequence[Mapping[str, str]]


def render_chat(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    add_generation_prompt: bool = True,
    renderer: Renderer | None = None,
) -> str:
    """The prompt for messages ({"role", "content"} each), by the vocabulary's own Jinja template.

    The template runs in a sandbox, in a process of its own with 512 MB of memory and 2 s of processor time; renderer:
    that process, where it is to stay for the next time. Raises UnsupportedError where there is no template, FormatError
    for one that fails or exceeds its limits.
    """
    (text,) = render_chats(tokenizer, [(messages, add_generation_prompt)], renderer=renderer)
    if isinstance(text, FormatError):
        raise text
    return text


def render_chats(
    tokenizer: Tokenizer, conversations: Sequence[tuple[Messages, bool]], *, renderer: Renderer | None = None
) -> list[str | FormatError]:
    """`render_chat` for several (messages, add_generation_prompt), in one process: the prompt of each, or its error.

    renderer: the process, where it is to stay for the next time. Raises UnsupportedError where there is no template,
    FormatError where the template or all of it together exceeds its limits.
    """
    template = tokenizer.chat_template
    if not template:
        raise UnsupportedError("the model has no chat template (tokenizer.chat_template)")
    if len(template) > _LONGEST_TEMPLATE:
        raise FormatError(
            f"tokenizer.chat_template has {len(template)} characters (expected at most {_LONGEST_TEMPLATE})"
        )
    specials = {"bos_token": _text(tokenizer, tokenizer.bos_id), "eos_token": _text(tokenizer, tokenizer.eos_id)}
    variables = [
        {"messages": [dict(message) for message in messages], "add_generation_prompt": prompt, **specials}
        for messages, prompt in conversations
    ]
    run = renderer.run if renderer is not None else _run
    answers = run(json.dumps({"template": template, "variables": variables}))
    if answers is None:
        raise _failure("it exceeded its limits on time and memory")
    return [answer["text"] if "text" in answer else _failure(answer["error"]) for answer in answers]


def _failure(reason: str) -> FormatError:
    return FormatError(f"tokenizer.chat_template cannot be rendered: {' '.join(reason.split())[:300]}")


def encode_chat(tokenizer: Tokenizer, messages: Messages, *, renderer: Renderer | None = None) -> list[int]:
    """The rendered messages as ids; a BOS that the template wrote itself is not written twice."""
    return encode_rendered(tokenizer, render_chat(tokenizer, messages, renderer=renderer))


def encode_rendered(tokenizer: Tokenizer, text: str) -> list[int]:
    """What a template wrote, as ids; a BOS that it wrote itself is not written twice."""
    bos = _text(tokenizer, tokenizer.bos_id)
    return tokenizer.encode(text, add_special=not (bos and text.startswith(bos)), parse_special=True)


def _text(tokenizer: Tokenizer, token: int | None) -> str:
    return "" if token is None else tokenizer.piece(token, special=True).decode("utf-8", "replace")


def _run(request: str) -> list[dict[str, str]] | None:
    try:
        result = subprocess.run(
            [sys.executable, "-I", str(_RENDERER)],
            check=False, input=request, capture_output=True, text=True, encoding="utf-8", timeout=_DEADLINE_S,
        )  # fmt: skip
        return json.loads(result.stdout)
    except (subprocess.TimeoutExpired, json.JSONDecodeError):
        return None


class Renderer:
    """The process that renders, kept for many conversations: one then takes a millisecond. For any thread.

    A template that exceeds its limits ends it, and the next conversation gets a new one.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def run(self, request: str) -> list[dict[str, str]] | None:
        """What the process answers to one line of JSON, None where it exceeded its limits."""
        with self._lock:
            process = self._process = self._process or subprocess.Popen(
                [sys.executable, "-I", str(_RENDERER)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
            )  # fmt: skip
            assert process.stdin is not None and process.stdout is not None, "they are pipes"
            deadline = threading.Timer(_DEADLINE_S, process.kill)
            deadline.start()
            try:
                process.stdin.write(request + "\n")
                process.stdin.flush()
                return json.loads(process.stdout.readline())
            except (BrokenPipeError, json.JSONDecodeError):
                self._end()
                return None
            finally:
                deadline.cancel()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        with contextlib.suppress(BrokenPipeError), process:  # closes its pipes, and waits for it
            pass
