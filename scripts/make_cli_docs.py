"""Write docs/cli.md from the commands themselves, and the examples into docs/api.md. `make docs` runs it.

A test holds both pages against their sources.
"""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from typer.main import get_command

from llamakit.cli import build_app
from llamakit.cli.compat import ALIASES, NO_OPS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
_HEAD = """\
# Commands and options

This page is made from the command line's own help by `make docs`; a test keeps it current. Every option of a command
can also stand in a file given with `--config FILE.toml`: the keys are the option names without their dashes, and the
command line overrides the file.

An option that is not known is refused, and the nearest one is named. Exit codes are listed in the README.
"""


def page() -> str:
    """The whole page."""
    root: Any = get_command(build_app())
    parts = [_HEAD]
    for name, command in leaves(root):
        parts.append(_command(name, command))
    return "\n".join(parts)


def leaves(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """(name, command) of every command, those of groups under both names: `data prepare`."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaves(command, f"{before}{name} ")
        else:
            yield before + name, command


def _command(name: str, command: Any) -> str:
    lines = [f"## llamakit {name}", "", inspect.cleandoc(command.help or ""), ""]
    panels: dict[str, list[str]] = {}
    hints = get_type_hints(inspect.unwrap(command.callback))
    for param in command.params:
        row = _row(param, hints.get(param.name))
        if row:
            title = getattr(param, "rich_help_panel", None) or "Other options"
            panels.setdefault("Arguments" if param.param_type_name == "argument" else title, []).append(row)
    rest = panels.pop("Other options", [])
    for title, rows in [*panels.items(), *([("Other options", rest)] if rest else [])]:
        lines += [f"### {title}", "", "| option | default | meaning |", "|---|---|---|", *rows, ""]
    if command.epilog:
        lines += ["```text", inspect.cleandoc(command.epilog).removeprefix("\b\n"), "```", ""]
    shown = {spelling for param in command.params for spelling in param.opts}
    return "\n".join(lines + _old_spellings(name, shown))


def _row(param: Any, annotation: Any) -> str:
    """One line of a table, "" for a hidden option."""
    if getattr(param, "hidden", False):
        return ""
    if param.param_type_name == "argument":
        return f"| `{param.metavar or param.name.upper()}` | | {_cell(getattr(param, 'help', '') or '')} |"
    names = ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts))
    value = _cell(_metavar(param, annotation))
    return f"| {names} {value} | {_default(param)} | {_cell(param.help or '')} |".replace("  ", " ")


def _metavar(param: Any, annotation: Any) -> str:
    """What stands for the option's value: from the types in the code, since Typer's words change between versions."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, parts))
    if get_origin(annotation) in (Union, types.UnionType):
        return _metavar(param, parts[0])
    return param.metavar or {bool: "", int: "N", float: "F"}.get(annotation, "TEXT")


def _default(param: Any) -> str:
    if param.required:
        return "required"
    if isinstance(param.show_default, str):
        return param.show_default
    default = param.default
    if param.secondary_opts:
        return f"`{param.opts[0] if default else param.secondary_opts[0]}`"
    if default is None or default == "" or default is False or default == []:
        return ""
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _old_spellings(name: str, shown: set[str]) -> list[str]:
    """What the command also understands, for scripts written for other tools."""
    lines: list[str] = []
    aliases = {old: new for old, new in ALIASES.get(name, {}).items() if new and old not in shown}
    if aliases:
        lines += ["### Other spellings that are understood", "", "| spelling | option |", "|---|---|"]
        lines += [f"| `{old}` | `{new}` |" for old, new in sorted(aliases.items())]
        lines += [""]
    no_ops = NO_OPS.get(name, {})
    if no_ops:
        lines += ["### Accepted without effect", "", "| option | why |", "|---|---|"]
        lines += [f"| `{old}` | {_cell(reason)} |" for old, (_, reason) in sorted(no_ops.items())]
        lines += [""]
    return lines


def with_examples(text: str) -> str:
    """docs/api.md with each marked place filled with its example as it is."""

    def block(match: re.Match[str]) -> str:
        source = (PAGE.parent / "examples" / match[1]).read_text(encoding="utf-8")
        return f"<!-- example: {match[1]} -->\n```python\n{source}```\n"

    return re.sub(r"<!-- example: (\S+) -->\n(?:```python\n.*?```\n)?", block, text, flags=re.DOTALL)


def main() -> int:
    """Write both pages."""
    PAGE.write_text(page(), encoding="utf-8")
    api = PAGE.with_name("api.md")
    api.write_text(with_examples(api.read_text(encoding="utf-8")), encoding="utf-8")
    print("wrote docs/cli.md and the examples in docs/api.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
