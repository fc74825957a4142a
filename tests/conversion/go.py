"""As much of Go's text/template, of Ollama's use of it, and of its Modelfiles, as our own ones need."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_TOKEN = re.compile(r'\s*(?:("(?:[^"\\]|\\.)*")|([()])|(:?=)|([^\s()"]+))')


def render(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """What Ollama makes of messages: .Messages, and .System, the system messages joined by an empty line."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    fields = [{"Role": m["role"], "Content": m["content"]} for m in messages]
    root = {"System": system, "Messages": fields}
    pieces = re.split(r"\{\{ (.*?) \}\}", template, flags=re.S)
    assert "{{" not in "".join(pieces[::2]) and not any(p.endswith("{") for p in pieces[::2])
    nodes, end = _parse(deque((i % 2 == 1, text) for i, text in enumerate(pieces)))
    assert not end
    out: list[str] = []
    _run(nodes, root, {"$": root}, out)
    return "".join(out)


def _parse(pieces: deque[tuple[bool, str]]) -> tuple[list[Any], str]:
    """Nodes, and the end or else that does not belong to one of them ("" at the end of all)."""
    nodes: list[Any] = []
    while pieces:
        is_action, text = pieces.popleft()
        if is_action and (text == "end" or text.startswith("else")):
            return nodes, text
        if is_action and text.startswith(("if ", "range ")):
            nodes.append(_block(text, pieces))
        else:
            nodes.append(("do", text, [], []) if is_action else text)
    return nodes, ""


def _block(text: str, pieces: deque[tuple[bool, str]]) -> tuple[str, str, list[Any], list[Any]]:
    """(keyword, condition, nodes, nodes otherwise)."""
    keyword, condition = text.split(" ", 1)
    body, end = _parse(pieces)
    otherwise: list[Any] = []
    if end.startswith("else if "):
        otherwise = [_block(end.removeprefix("else "), pieces)]
    elif end == "else":
        otherwise, end = _parse(pieces)
    assert end == "end" or end.startswith("else if ")
    return keyword, condition, body, otherwise


def _run(nodes: list[Any], dot: Any, variables: dict[str, Any], out: list[str]) -> None:
    for node in nodes:
        if isinstance(node, str):
            out.append(node)
            continue
        keyword, text, body, otherwise = node
        if keyword == "if":
            _run(body if _value(text, dot, variables) else otherwise, dot, variables, out)
        elif keyword == "range":
            index, _, source = re.fullmatch(r"(\$\w+), (\$\w+) := (.+)", text).groups()  # type: ignore[union-attr]
            for i, item in enumerate(_value(source, dot, variables)):
                variables[index] = i
                _run(body, item, variables, out)
        elif assigned := re.fullmatch(r"(\$\w+) :?= (.+)", text):
            variables[assigned[1]] = _value(assigned[2], dot, variables)
        else:
            out.append(_value(text, dot, variables))


def _value(text: str, dot: Any, variables: dict[str, Any]) -> Any:
    return _pipeline(iter([m[0].strip() for m in _TOKEN.finditer(text)]), dot, variables)


def _pipeline(tokens: Iterator[str], dot: Any, variables: dict[str, Any]) -> Any:
    """A function and its arguments, up to the closing parenthesis."""
    values = []
    for token in tokens:
        if token == ")":
            break
        values.append(_pipeline(tokens, dot, variables) if token == "(" else _operand(token, dot, variables))
    if not callable(values[0]):
        (value,) = values
        return value
    return values[0](*values[1:])


def _operand(token: str, dot: Any, variables: dict[str, Any]) -> Any:
    if token.startswith('"'):
        return re.sub(r"\\(?:U([0-9a-f]{8})|(.))", lambda m: chr(int(m[1], 16)) if m[1] else m[2], token[1:-1])
    if token.startswith("."):
        return dot[token[1:]]
    if token.startswith("$"):
        name, _, field = token.partition(".")
        return variables[name][field] if field else variables[name]
    return int(token) if token.isdigit() else _FUNCTIONS[token]


_FUNCTIONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "not": lambda a: not a,
    "and": lambda a, b: a and b,
    "len": len,
    "slice": lambda items, start: items[start:],
}


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """(instruction, value) as Ollama's parser.go reads them; a PARAMETER's name belongs to the instruction."""
    commands, at = [], 0
    while at < len(text):
        start = re.compile(r"(PARAMETER \w+|[A-Z]+) ").match(text, at)
        assert start, f"no instruction at {text[at : at + 40]!r}"
        at = end = start.end()
        while True:
            end = text.index("\n", end)
            value = "".join(c for c in text[at:end] if c.isprintable() or c in "\n\r\t").strip()
            if (unquoted := _unquoted(value)) is not None:
                break
            end += 1
        commands.append((start[1], unquoted))
        at = end + 1
    return commands


def _unquoted(value: str) -> str | None:
    """None for quotes that are not closed yet."""
    if value.startswith('"""'):
        return value[3:-3] if len(value) >= 6 and value.endswith('"""') else None
    if value.startswith('"'):
        return value[1:-1] if len(value) >= 2 and value.endswith('"') else None
    return value
