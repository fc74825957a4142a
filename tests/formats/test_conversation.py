"""Conversations as files: what OpenAI's interface takes, and nothing that is none."""

import json

import pytest

from llamakit.errors import FormatError, SaveError, UsageError
from llamakit.formats.conversation import read_messages, write_messages

MESSAGES = [
    {"role": "system", "content": "Sei kurz."},
    {"role": "user", "content": "Grüße\n\x1b[31m \u2028"},
    {"role": "assistant", "content": ""},
]


def test_what_is_written_is_plain_json_and_is_read_back(tmp_path):
    write_messages(tmp_path / "chat.json", MESSAGES)
    assert json.loads((tmp_path / "chat.json").read_text(encoding="utf-8")) == MESSAGES
    assert read_messages(tmp_path / "chat.json") == MESSAGES
    write_messages(tmp_path / "chat.json", [])
    assert read_messages(tmp_path / "chat.json") == []
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]
    with pytest.raises(SaveError, match=r"none/chat\.json"):
        write_messages(tmp_path / "none" / "chat.json", MESSAGES)


def test_a_whole_request_and_keys_of_others_are_read_too(tmp_path):
    request = {"model": "x", "messages": [{"role": "user", "content": "hi", "name": "me"}]}
    (tmp_path / "request.json").write_text(json.dumps(request))
    assert read_messages(tmp_path / "request.json") == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no sound JSON"),
        ("[" * 100_000, "too deeply nested"),
        ('{"messages": {}}', "holds no messages"),
        ("5", "holds no messages"),
        ('["hi"]', "message 1 is none"),
        ('[{"role": "user", "content": [{"type": "text"}]}]', "message 1 is none"),
        ('[{"role": "user"}]', "message 1 is none"),
        ('[{"role": "\\u001b[2J", "content": ""}]', r"role '\\x1b\[2J' \(expected one of system, user, assistant\)"),
        ('[{"role": ["user"], "content": ""}]', "role"),
        ('[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]', "message 2 is of the system"),
        ('[{"role": "user", "content": "\\ud800"}]', "no sound JSON"),
    ],
)
def test_what_is_refused(text, reason, tmp_path):
    path = tmp_path / "chat.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=reason) as caught:
        read_messages(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    with pytest.raises(UsageError):
        read_messages(tmp_path)
