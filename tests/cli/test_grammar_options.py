import json
from pathlib import Path

import pytest

from tests.helpers import assert_error, called
from tests.inference.schemas import SCHEMAS, assert_valid
from tests.tiny import cached_tiny_gguf


@pytest.fixture(scope="module")
def model() -> Path:
    return cached_tiny_gguf()


def _generate(capfd, model, *args):
    return called(
        capfd, "generate", "-m", str(model), "-p", "The", "--no-display-prompt", "--seed", "1", *map(str, args)
    )


def test_a_grammar_on_the_command_line_or_in_a_file(capfd, model, tmp_path):
    path = tmp_path / "my.gbnf"
    path.write_text('root ::= colour "." # the end\ncolour ::= "red" | "→ß"\n', "utf-8")
    for option in (("--grammar", path.read_text("utf-8")), ("--grammar-file", path)):
        result = _generate(capfd, model, *option)
        assert (result.returncode, result.stdout) in [(0, "red.\n"), (0, "→ß.\n")]
        assert "ended by the end of the grammar" in result.stderr


def test_a_schema_on_the_command_line_or_in_a_file(capfd, model, tmp_path):
    path = tmp_path / "my.json"
    path.write_text(json.dumps(SCHEMAS["arrays"]))
    for option in (
        ("-j", path.read_text()),
        ("--json-schema", path.read_text()),
        ("-jf", path),
        ("--json-schema-file", path),
    ):
        result = _generate(capfd, model, *option)
        assert result.returncode == 0
        assert_valid(result.stdout, SCHEMAS["arrays"])


def test_a_text_that_is_cut_is_told(capfd, model):
    result = _generate(capfd, model, "-j", '{"const": "much longer than that"}', "-n", "3")
    assert result.returncode == 0
    assert "warning: -n ended the text before its grammar came to an end" in result.stderr
    result = _generate(capfd, model, "-j", '{"const": "much longer than that"}', "--ctx", "8")
    assert "warning: a full context ended the text" in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--grammar", "root ::= x"), ("--grammar:1: column 10: there is no rule x",)),
        (("-j", "{"), ("--json-schema: the schema is no sound JSON", "line 1 column 2")),
        (("-j", '{"$ref": "#/x"}'), ("--json-schema: the schema cannot be used", "/x")),
        (("-j", "{}", "--grammar", "x"), ("--grammar and --json-schema do not go together",)),
        (("-jf", "no-such-file"), ("no-such-file",)),
        (("--grammar-file", "empty"), ("empty: is empty",)),
        (("--grammar-file", "broken"), ("broken:2: column 3: expected ::=",)),
        (("-jf", "binary"), ("binary", "UTF-8")),
        (("-j", "{}", "--rng", "llama2c"), ("--json-schema does not go with --rng llama2c",)),
    ],
    ids=lambda value: value[-1],
)
def test_what_cannot_be_is_one_line_before_the_model_is_looked_at(capfd, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    Path("empty").touch()
    Path("broken").write_text('root ::= "a"\nx ::')
    Path("binary").write_bytes(b"\xff{}")
    result = _generate(capfd, "no-such-model.gguf", *options)
    assert_error(result, 2, *words)
    assert result.stdout == ""
