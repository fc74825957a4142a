"""The forms in which people write down questions and answers, found by their keys and brought into one.

| schema | an object has |
|---|---|
| text | "text" |
| prompt/completion | "prompt" or "question", and "completion", "response" or "answer" |
| instruction | "instruction", perhaps "input", and "output"; "history" of earlier pairs, "system" |
| messages | "messages": [{"role", "content"}, ...], or such a list itself |
| conversations | "conversations": [{"from", "value"}, ...], "system" |
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SCHEMAS = ("text", "prompt/completion", "instruction", "messages", "conversations")

#: who speaks, by the names that data has -> by the names that chat templates know
_ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "chatgpt": "assistant", "model": "assistant", "tool": "tool",
}  # fmt: skip
_QUESTIONS, _ANSWERS = ("prompt", "question"), ("completion", "response", "answer")
#: what a message may hold beside its text and would be lost in silence
_BEYOND_TEXT = ("tool_calls", "function_call", "reasoning_content", "thinking")


@dataclass(frozen=True)
class Message:
    """One turn: who says what. trained: whether an answer is learnt from, or only shown as context."""

    role: str
    content: str
    trained: bool = True


@dataclass(frozen=True)
class Conversation:
    """What an object says: its schema, and messages or, where it has none, a text."""

    schema: str
    messages: tuple[Message, ...] = ()
    text: str = ""


class SchemaError(Exception):
    """An object that cannot be used. kind: schema, role or empty; str(): the reason in one line."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def read_object(value: Any) -> Conversation:
    """The conversation or the text that a JSON value (or a CSV row, as an object of texts) holds.

    Raises SchemaError for a form that is not known, an unknown role, an empty answer, or no answer at all.
    """
    if isinstance(value, list):
        value = {"messages": value}
    if not isinstance(value, dict):
        raise SchemaError("schema", f"is {_kind(value)} (expected an object)")
    if "messages" in value:
        return _checked("messages", _messages(value, "messages"))
    for key in ("conversations", "conversation"):
        if key in value:
            return _checked("conversations", _messages(value, key))
    if "instruction" in value and "output" in value:
        return _checked("instruction", _instruction(value))
    question = next((key for key in _QUESTIONS if key in value), None)
    answer = next((key for key in _ANSWERS if key in value), None)
    if question and answer:
        return _checked("prompt/completion", _pair(value, question, answer))
    if "text" in value:
        text = _text(value, "text")
        if not text.strip():
            raise SchemaError("empty", "the text is empty")
        return Conversation("text", text=text)
    keys = ", ".join(repr(str(key))[:40] for key in list(value)[:6]) or "none"
    raise SchemaError(
        "schema",
        f"no known schema, its keys are {keys} (expected text, prompt and completion, instruction and output,"
        " messages, or conversations)",
    )


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "something else")


def _text(value: Mapping[str, Any], key: str, *, optional: bool = False) -> str:
    """A text under a key. A part of a surrogate pair alone is no text: no file could hold it."""
    text = value.get(key)
    if text is None and optional:
        return ""
    if not isinstance(text, str):
        raise SchemaError("schema", f"{key!r} is {_kind(text)} (expected a text)")
    return _well_formed(text, key)


def _well_formed(text: str, key: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SchemaError(
            "schema", f"{key!r} holds half of a surrogate pair (U+{ord(text[error.start]):04X})"
        ) from error
    return text


def _checked(schema: str, messages: Sequence[Message]) -> Conversation:
    """A conversation that has answers, none of them empty."""
    answers = [m for m in messages if m.role == "assistant"]
    if not answers:
        raise SchemaError("empty", "has no answer: no message is an assistant's")
    for number, answer in enumerate(answers, 1):
        if not answer.content.strip():
            raise SchemaError("empty", f"answer {number} of {len(answers)} is empty")
    if not any(m.trained for m in answers):
        raise SchemaError("empty", "every answer has the weight 0: there is nothing to train on")
    return Conversation(schema, tuple(messages))


def _messages(value: Mapping[str, Any], key: str) -> list[Message]:
    items = value[key]
    if isinstance(items, str):  # a column of a CSV file
        try:
            items = json.loads(items)
        except (ValueError, RecursionError) as error:
            raise SchemaError("schema", f"{key!r} is a text that is no JSON: {error}") from error
    if not isinstance(items, list):
        raise SchemaError("schema", f"{key!r} is {_kind(items)} (expected a list of messages)")
    messages = [_message(item, number) for number, item in enumerate(items, 1)]
    system = _text(value, "system", optional=True)
    return _with_system(system, messages)


def _with_system(system: str, messages: list[Message]) -> list[Message]:
    has_one = bool(messages) and messages[0].role == "system"
    return [Message("system", system), *messages] if system and not has_one else messages


def _message(item: object, number: int) -> Message:
    if not isinstance(item, dict):
        raise SchemaError("schema", f"message {number} is {_kind(item)} (expected an object)")
    role_key = "role" if "role" in item else "from"
    if role_key not in item:
        raise SchemaError("role", f"message {number} has no role (expected 'role', or 'from')")
    role = item[role_key]
    if not isinstance(role, str) or role not in _ROLES:
        shown = repr(role)[:40]
        raise SchemaError(
            "role", f"message {number} has the unknown role {shown} (expected system, user, assistant or tool)"
        )
    for extra in _BEYOND_TEXT:
        if item.get(extra):
            raise SchemaError("schema", f"message {number} has {extra!r}, which is not supported (expected text alone)")
    content = _content(item, "content" if "content" in item else "value", number)
    weight = item.get("weight", 1)
    if weight not in (0, 1):
        raise SchemaError("schema", f"message {number} has the weight {str(weight)[:20]} (expected 0 or 1)")
    return Message(_ROLES[role], content, bool(weight))


def _content(item: Mapping[str, Any], key: str, number: int) -> str:
    """A text, or a list of parts that all are texts."""
    content = item.get(key)
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise SchemaError("schema", f"message {number} has a part that is no text (images are not supported)")
        content = "".join(str(part) for part in parts)
    if content is None:
        raise SchemaError("empty", f"message {number} has no content")
    if not isinstance(content, str):
        raise SchemaError("schema", f"message {number}: {key!r} is {_kind(content)} (expected a text)")
    return _well_formed(content, key)


def _instruction(value: Mapping[str, Any]) -> list[Message]:
    """Alpaca's: the input, where there is one, follows the instruction after an empty line."""
    instruction, extra = _text(value, "instruction"), _text(value, "input", optional=True)
    question = f"{instruction}\n\n{extra}" if instruction and extra else instruction or extra
    messages = [Message("user", question), Message("assistant", _text(value, "output"))]
    history = value.get("history") or []
    if not isinstance(history, list):
        raise SchemaError("schema", f"'history' is {_kind(history)} (expected a list of pairs)")
    earlier: list[Message] = []
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise SchemaError("schema", f"pair {number} of 'history' is no list of two texts")
        earlier += [
            Message("user", _well_formed(pair[0], "history")),
            Message("assistant", _well_formed(pair[1], "history")),
        ]
    return _with_system(_text(value, "system", optional=True), earlier + messages)


def _pair(value: Mapping[str, Any], question: str, answer: str) -> list[Message]:
    """Two texts, or two lists of messages, of which only the second is learnt from."""
    if isinstance(value[question], list) and isinstance(value[answer], list):
        before = [Message(m.role, m.content, trained=False) for m in _messages({question: value[question]}, question)]
        return before + _messages({answer: value[answer]}, answer)
    messages = [Message("user", _text(value, question)), Message("assistant", _text(value, answer))]
    return _with_system(_text(value, "system", optional=True), messages)
