"""A conversation as a JSON file: the messages as OpenAI's interface takes them, [{"role": ..., "content": ...}]."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

from llamakit.errors import FormatError
from llamakit.files import atomic_path, escape_control
from llamakit.formats.strict_json import read_value

ROLES = ("system", "user", "assistant")


def read_messages(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """The messages of a file: a list of them, or an object that has one as "messages"; other keys are left out.

    Raises FormatError for what is no such list, for another role than system, user and assistant, for a content that
    is no text, and for a system message that is not the first; UsageError when the file cannot be read.
    """
    value = read_value(path)
    if isinstance(value, dict):
        value = value.get("messages")
    if not isinstance(value, list):
        raise FormatError('holds no messages (expected [{"role": ..., "content": ...}, ...])', path=path)
    return [_message(path, i, item) for i, item in enumerate(value)]


def _message(path: str | os.PathLike[str], i: int, item: object) -> dict[str, str]:
    if not isinstance(item, dict) or not isinstance(item.get("content"), str):
        raise FormatError(f'message {i + 1} is none (expected {{"role": ..., "content": TEXT}})', path=path)
    role = item.get("role")
    if role not in ROLES:
        shown = escape_control(str(role)[:40])
        raise FormatError(f"message {i + 1} has the role '{shown}' (expected one of {', '.join(ROLES)})", path=path)
    if role == "system" and i:
        raise FormatError(f"message {i + 1} is of the system (expected only the first)", path=path)
    return {"role": role, "content": item["content"]}


def write_messages(path: str | os.PathLike[str], messages: Sequence[Mapping[str, str]]) -> None:
    """Write messages as a JSON list, atomically. Raises SaveError when that cannot be."""
    with atomic_path(path) as temporary:
        text = json.dumps([dict(message) for message in messages], ensure_ascii=False, indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")
