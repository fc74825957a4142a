"""The options for structured output, with llama.cpp's names: generate has them, and whatever else generates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llamakit.cli import render
from llamakit.errors import UsageError
from llamakit.files import read_text

if TYPE_CHECKING:
    from llamakit.inference.config import GenerateConfig
    from llamakit.inference.continuation import Done

GRAMMAR = "Structured output"


GrammarOption = Annotated[
    str,
    typer.Option(
        "--grammar",
        metavar="TEXT",
        help="Grammar in GBNF that the text must follow.",
        rich_help_panel=GRAMMAR,
        show_default=False,
    ),
]
GrammarFileOption = Annotated[
    Path | None,
    typer.Option("--grammar-file", metavar="FILE", help="File with the grammar.", rich_help_panel=GRAMMAR),
]
JsonSchemaOption = Annotated[
    str,
    typer.Option(
        "--json-schema",
        "-j",
        metavar="TEXT",
        help="JSON schema that the text must satisfy; {}: any JSON.",
        rich_help_panel=GRAMMAR,
        show_default=False,
    ),
]
JsonSchemaFileOption = Annotated[
    Path | None,
    typer.Option("--json-schema-file", "-jf", metavar="FILE", help="File with the schema.", rich_help_panel=GRAMMAR),
]


def read_structure(
    grammar: str, grammar_file: Path | None, json_schema: str, json_schema_file: Path | None
) -> tuple[str, str, str | None]:
    """(grammar, schema, what an error calls them) of the four options, at most one of which is given.

    Raises UsageError for more than one, for an empty text and for a file that cannot be read.
    """
    options = {
        "--grammar": grammar or None,
        "--grammar-file": grammar_file,
        "--json-schema": json_schema or None,
        "--json-schema-file": json_schema_file,
    }
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} do not go together", hint="give only one of them")
    file = grammar_file or json_schema_file
    if file is None:
        return grammar, json_schema, None
    text = read_text(file)
    if not text.strip():
        raise UsageError("is empty (expected a grammar or a schema)", path=file)
    return ("", text, str(file)) if file is json_schema_file else (text, "", str(file))


def check(config: GenerateConfig, name: str | None) -> None:
    """Raise for a grammar or a schema that cannot be, before anything is loaded; name: what an error calls it."""
    if config.grammar or config.json_schema:
        from llamakit.inference.grammar import check_grammar

        check_grammar(config, name=name)


def ending(config: GenerateConfig, done: Done) -> str | None:
    """What a text that has come to the end of its grammar ended by."""
    return "the end of the grammar" if done.reason == "end" and (config.grammar or config.json_schema) else None


def note_cut(config: GenerateConfig, done: Done | None) -> None:
    """Tell that a text ended before its grammar did."""
    if (config.grammar or config.json_schema) and done is not None and done.reason != "end":
        end = {"context": "a full context", "length": "-n"}.get(done.reason, "a stop")
        render.warn(f"{end} ended the text before its grammar came to an end: it may be incomplete")
