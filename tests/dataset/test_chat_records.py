"""Data as people have it: every form becomes the same messages, and what is broken is named by its line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamakit.dataset.chat_records import Problem, Record, data_files, is_chat_file, read_records
from llamakit.dataset.schemas import Message, SchemaError, read_object
from llamakit.errors import UsageError

U, A = "user", "assistant"
QA = (Message(U, "q"), Message(A, "a"))


def written(path: Path, content: str | bytes) -> list[Record | Problem]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_records(path))


@pytest.mark.parametrize(
    ("value", "schema", "messages"),
    [
        ({"prompt": "q", "completion": "a"}, "prompt/completion", QA),
        ({"prompt": "q", "response": "a", "id": 7}, "prompt/completion", QA),
        ({"question": "q", "answer": "a"}, "prompt/completion", QA),
        ({"prompt": "q", "completion": "a", "system": "s"}, "prompt/completion", (Message("system", "s"), *QA)),
        (
            {
                "prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "q"}],
                "completion": [{"role": "assistant", "content": "a"}],
            },
            "prompt/completion",
            (Message(U, "x"), Message(A, "y", False), Message(U, "q", False), Message(A, "a")),
        ),
        ({"instruction": "q", "output": "a"}, "instruction", QA),
        ({"instruction": "q", "input": "", "output": "a", "text": "t"}, "instruction", QA),
        ({"instruction": "do", "input": "it", "output": "a"}, "instruction", (Message(U, "do\n\nit"), Message(A, "a"))),
        ({"instruction": "q", "output": "a", "history": [["x", "y"]]}, "instruction", (Message(U, "x"), Message(A, "y"), *QA)),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "messages", QA),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "messages", QA),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a", "weight": 1}]},
            "messages",
            QA,
        ),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b", "weight": 0}, {"role": "assistant", "content": "a"}]},
            "messages",
            (Message(U, "q"), Message(A, "b", False), Message(A, "a")),
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "conversations", QA),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "conversations",
            (Message("system", "s"), *QA),
        ),
        ({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "conversations", QA),
    ],
)  # fmt: skip
def test_schemas(value: Any, schema: str, messages: tuple[Message, ...]) -> None:
    found = read_object(value)
    assert found.schema == schema
    # In a list of messages before the completion only the role decides: a question is never trained anyway.
    assert [(m.role, m.content) for m in found.messages] == [(m.role, m.content) for m in messages]
    assert [m.trained for m in found.messages if m.role == A] == [m.trained for m in messages if m.role == A]


def test_a_text_stays_a_text() -> None:
    assert read_object({"text": "<s>[INST] q [/INST] a </s>"}).text == "<s>[INST] q [/INST] a </s>"
    assert read_object({"text": " a "}).messages == ()


@pytest.mark.parametrize(
    ("value", "kind", "reason"),
    [
        (7, "schema", "is a number (expected an object)"),
        (None, "schema", "is null"),
        ({"a": 1, "b": 2}, "schema", "its keys are 'a', 'b' (expected text, prompt and completion"),
        ({}, "schema", "its keys are none"),
        ({"text": 5}, "schema", "'text' is a number (expected a text)"),
        ({"text": " \n"}, "empty", "the text is empty"),
        ({"text": "a\ud800"}, "schema", "half of a surrogate pair (U+D800)"),
        ({"prompt": "q", "completion": " "}, "empty", "answer 1 of 1 is empty"),
        ({"instruction": "q", "output": ""}, "empty", "answer 1 of 1 is empty"),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, "schema", "pair 1 of 'history'"),
        ({"instruction": "q", "output": "a", "history": "x"}, "schema", "'history' is a text"),
        ({"messages": []}, "empty", "has no answer"),
        ({"messages": [{"role": "user", "content": "q"}]}, "empty", "has no answer"),
        ({"messages": {"role": "user"}}, "schema", "'messages' is an object (expected a list"),
        ({"messages": ["q"]}, "schema", "message 1 is a text (expected an object)"),
        ({"messages": [{"content": "q"}]}, "role", "message 1 has no role"),
        ({"messages": [{"role": "bot", "content": "q"}]}, "role", "the unknown role 'bot' (expected system, user, assistant or tool)"),
        ({"messages": [{"role": ["x"], "content": "q"}]}, "role", "unknown role"),
        ({"messages": [{"role": "user"}]}, "empty", "message 1 has no content"),
        ({"messages": [{"role": "user", "content": 5}]}, "schema", "'content' is a number"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "schema", "'tool_calls', which is not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "schema", "images are not supported"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 2}]}, "schema", "weight 2 (expected 0 or 1)"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0}]}, "empty", "every answer has the weight 0"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "gpt", "value": ""}]}, "empty", "answer 2 of 2 is empty"),
    ],
)  # fmt: skip
def test_what_is_refused_says_why(value: Any, kind: str, reason: str) -> None:
    with pytest.raises(SchemaError) as caught:
        read_object(value)
    assert caught.value.kind == kind and reason in str(caught.value)
    assert "\n" not in str(caught.value)


GOOD = '{"prompt": "q", "completion": "a"}'


@pytest.mark.parametrize(
    ("name", "content", "line", "reason"),
    [
        ("a.jsonl", f"{GOOD}\n\n{{bad\n{GOOD}", 3, "is not JSON: Expecting property name enclosed in double quotes, column 2"),
        ("a.jsonl", f"{GOOD}\n".encode() + b'{"text": "\xe9"}\n', 2, "is not UTF-8 text (byte 0xe9)"),
        ("a.jsonl", "[" * 100000, 1, "is not JSON: "),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", 1, "is not JSON: "),
        ("a.jsonl", f"{GOOD}\r\n5\r\n", 2, "is a number"),
        ("a.jsonl", " \n\n", None, "is empty"),
        ("a.json", "", None, "is empty"),
        ("a.json", "[]", 1, "is an empty list"),
        ("a.json", f"[\n{GOOD},\n{GOOD}\n{GOOD}]", 4, "expected a comma or the list's end: what follows in this file cannot be read"),
        ("a.json", f"[\n{GOOD},\n{{bad}}]", 3, "is not JSON"),
        ("a.json", f"[\n{GOOD},\n", 3, "is not JSON"),
        ("a.json", f"[{GOOD}]\nx", 2, "text after the list's end"),
        ("a.json", f"{GOOD}\n{GOOD}\n{{", 3, "is not JSON"),
        ("a.json", b"[\n\xff]", 2, "is not UTF-8 text (byte 0xff)"),
        ("a.csv", "", None, "is empty"),
        ("a.csv", "prompt,completion\n", None, "has a header and no row"),
        ("a.csv", "prompt,completion\nq,a\nq\n", 3, "has 1 columns (expected 2, as in the header)"),
        ("a.csv", 'prompt,completion\n"q\nr",a\nq,\n', 4, "answer 1 of 1 is empty"),
        ("a.csv", 'prompt,completion\nq,"a', 2, "is not CSV: unexpected end of data"),
        ("a.csv", "x,y\n1,2\n", 2, "no known schema, its keys are 'x', 'y'"),
        ("a.csv", "messages\nno\n", 2, "'messages' is a text that is no JSON"),
        ("a.txt", " \n", None, "is empty"),
        ("a.txt", b"a\nb\xff", 2, "is not UTF-8 text (byte 0xff)"),
    ],
)  # fmt: skip
def test_broken_data_is_named_by_file_and_line(
    name: str, content: str | bytes, line: int | None, reason: str, tmp_path: Path
) -> None:
    problems = [item for item in written(tmp_path / name, content) if isinstance(item, Problem)]
    assert [p.line for p in problems] == [line]
    assert reason in problems[0].reason and problems[0].path == str(tmp_path / name)
    error = str(problems[0].error())
    assert error.startswith(f"{tmp_path / name}{f':{line}' if line else ''}: ") and "\n" not in error


def test_what_surrounds_a_broken_line_is_read(tmp_path: Path) -> None:
    found = written(tmp_path / "a.jsonl", f"\ufeff{GOOD}\n{{\n{GOOD}\n")
    assert [type(item).__name__ for item in found] == ["Record", "Problem", "Record"]
    assert [item.line for item in found] == [1, 2, 3]


def test_tables_and_lists_and_texts(tmp_path: Path) -> None:
    table = written(tmp_path / "a.csv", '\ufeffinstruction;input;output\n"a; b";"c\nd";e\n\nf;;g\n')
    assert [(r.line, r.messages) for r in table if isinstance(r, Record)] == [
        (2, (Message(U, "a; b\n\nc\nd"), Message(A, "e"))),
        (5, (Message(U, "f"), Message(A, "g"))),
    ]
    assert [r.line for r in written(tmp_path / "a.json", f"[{GOOD},\n\n{GOOD}]")] == [1, 3]
    talk = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], indent=1)
    (record,) = written(tmp_path / "talk.json", talk)  # what `llamakit chat` writes for /save
    assert isinstance(record, Record) and record.messages == QA and record.schema == "messages"
    (text,) = written(tmp_path / "a.txt", "Once\nupon")
    assert text == Record(str(tmp_path / "a.txt"), 1, "text", text="Once\nupon")
    quoted = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    buffer = io.StringIO()
    csv.writer(buffer).writerows([["messages"], [quoted]])
    (row,) = written(tmp_path / "m.csv", buffer.getvalue())
    assert isinstance(row, Record) and row.messages == QA


def test_folders(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.csv", "sub/c.txt", "README", ".hidden/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found, aside = data_files([tmp_path])
    assert [f.relative_to(tmp_path).as_posix() for f in found] == ["a.csv", "b.jsonl", "sub/c.txt"]
    assert [f.name for f in aside] == ["README"]
    assert is_chat_file(tmp_path) and is_chat_file("x.jsonl") and not is_chat_file("x.txt")
    assert not is_chat_file(tmp_path / "sub")
    for path, reason in ((tmp_path / ".hidden", "has no training data"), (tmp_path / "none", "no such file")):
        if path.name == ".hidden":
            (path / "d.jsonl").unlink()
        with pytest.raises(UsageError, match=reason):
            data_files([path])
    with pytest.raises(UsageError, match="cannot be read"):
        list(read_records(tmp_path / "none.jsonl"))


_TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
_ANSWERS = _TEXTS.filter(lambda text: bool(text.strip()))
_TALKS = st.lists(st.tuples(_TEXTS, _ANSWERS), min_size=1, max_size=3)


def _forms(talk: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """One conversation in every schema that can hold it."""
    openai = [m for q, a in talk for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    share = [m for q, a in talk for m in ({"from": "human", "value": q}, {"from": "gpt", "value": a})]
    forms = {"messages": {"messages": openai}, "conversations": {"conversations": share}}
    *earlier, (question, answer) = talk
    forms["instruction"] = {
        "instruction": question,
        "input": "",
        "output": answer,
        "history": [list(p) for p in earlier],
    }
    if len(talk) == 1:
        forms["prompt/completion"] = {"prompt": question, "completion": answer}
    return forms


@given(talks=st.lists(_TALKS, min_size=1, max_size=3))
def test_every_form_gives_the_same_messages(
    talks: list[list[tuple[str, str]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("forms")
    expected = [[m for q, a in talk for m in ((U, q), (A, a))] for talk in talks]
    for schema in ("messages", "conversations", "instruction"):
        values = [_forms(talk)[schema] for talk in talks]
        lines = "\n".join(json.dumps(value, ensure_ascii=False) for value in values)
        for name, content in (("a.jsonl", lines), ("a.json", json.dumps(values, indent=1)), ("b.json", lines)):
            found = written(folder / name, content)
            assert [item.schema for item in found if isinstance(item, Record)] == [schema] * len(talks), found
            assert [
                [(m.role, m.content) for m in item.messages] for item in found if isinstance(item, Record)
            ] == expected
    singles = [talk[0] for talk in talks if len(talk) == 1 and not any("\0" in text for text in talk[0])]
    if singles:
        buffer = io.StringIO()
        csv.writer(buffer).writerows([("prompt", "completion"), *singles])
        found = written(folder / "a.csv", buffer.getvalue())
        assert [tuple(m.content for m in item.messages) for item in found if isinstance(item, Record)] == singles


@given(data=st.binary(max_size=60), suffix=st.sampled_from([".jsonl", ".json", ".csv", ".txt"]))
def test_any_bytes_are_records_or_problems(data: bytes, suffix: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    found = written(tmp_path_factory.mktemp("any") / f"a{suffix}", data)
    assert found and all(isinstance(item, (Record, Problem)) for item in found)
    assert all("\n" not in item.reason for item in found if isinstance(item, Problem))
