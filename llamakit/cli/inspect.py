"""`llamakit inspect FILE`: what a file is, what is in it, and what to do with it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamakit.cli import render
from llamakit.cli.options import OUTPUT, JsonOption, OfflineOption
from llamakit.cli.sources import local

if TYPE_CHECKING:
    from llamakit.conversion.inspect import FileReport


def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A model, adapter, checkpoint or vocabulary file.")],
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor: name, shape, type, bytes.", rich_help_panel=OUTPUT)
    ] = False,
    offline: OfflineOption = False,
    json: JsonOption = False,
) -> None:
    """Say what a model, adapter, checkpoint or vocabulary file is, and which command comes next."""
    from llamakit.conversion.inspect import inspect as inspect_file

    report = inspect_file(local(file, offline=offline))
    if json:
        render.print_json(_as_json(report, tensors))
    else:
        _print_report(report, tensors)


def _print_report(report: FileReport, tensors: bool) -> None:
    form = f" ({report.format})" if report.format else ""
    render.say(f"{report.path}: {report.what}{form}")
    for line in report.metadata_lines() + report.type_lines():
        render.say(line)
    for label, value in _facts(report).items():
        render.say(f"{label:<16} {value}")
    if tensors and report.tensors:
        rows = [(t.name, _shape(t.shape), t.type, t.n_bytes) for t in report.tensors]
        render.table(("tensor", "shape", "type", "bytes"), rows, right=(1, 3))
    for i, command in enumerate(report.next_commands):
        render.say(f"{'next:' if i == 0 else '':<16} {shlex.join(command)}")


def _facts(report: FileReport) -> dict[str, str]:
    facts = {label: _fact(value) for label, value in report.facts.items()}
    if report.n_parameters:
        facts["parameters"] = render.human_count(report.n_parameters)
        facts["bits per weight"] = f"{report.bits_per_weight:.2f}"
    return facts | {"file size": render.human_bytes(report.n_bytes)}


def _fact(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _as_json(report: FileReport, tensors: bool) -> dict[str, Any]:
    """The report as one object; arrays of the metadata are cut to their first elements, `n` says how many there are."""
    metadata = {
        kv.key: {"type": kv.type, "value": kv.value} | ({} if kv.n is None else {"n": kv.n}) for kv in report.metadata
    }
    value: dict[str, Any] = {
        "path": report.path,
        "kind": report.kind,
        "what": report.what,
        "format": report.format,
        "file_bytes": report.n_bytes,
        "n_parameters": report.n_parameters,
        "bits_per_weight": report.bits_per_weight,
        "n_tensors": len(report.tensors),
        "facts": report.facts,
        "metadata": metadata,
        "next": [shlex.join(command) for command in report.next_commands],
    }
    if tensors:
        value["tensors"] = [
            {"name": t.name, "shape": t.shape, "type": t.type, "bytes": t.n_bytes} for t in report.tensors
        ]
    return value
