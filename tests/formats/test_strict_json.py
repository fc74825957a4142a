"""JSON that two readers could take two ways is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamakit.errors import FormatError, UsageError
from llamakit.formats.strict_json import parse_object, read_object


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "no sound JSON"),
        (b"[]", "no object"),
        (b'"x"', "no object"),
        (b'{"a": 1, "a": 2}', "'a' stands there twice"),
        (b'{"b": {"a": 1, "\\u0061": 2}}', "'a' stands there twice"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": 1e999}', "out of range"),
        (b'{"a": -0}', "out of range"),
        (b'{"a": ' + b"9" * 50 + b"}", "out of range"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too deeply nested"),
        (b'{"a": "\\ud800"}', "no sound JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "no sound JSON"),
        (b'{"a": 1} x', "no sound JSON"),
        (b"{'a': 1}", "no sound JSON"),
    ],
)
def test_what_is_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=reason) as caught:
        parse_object(raw, "x.json", "the file")
    assert str(caught.value).startswith("x.json: the file is")
    assert "\n" not in str(caught.value)


def test_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes('{"a": [1, 2.5, null, true, {"b": "ü"}]} \n'.encode())
    assert read_object(tmp_path / "x") == {"a": [1, 2.5, None, True, {"b": "ü"}]}
    with pytest.raises(UsageError, match="No such file"):
        read_object(tmp_path / "y")
