"""How `--help` looks: options in named groups, one renderer for terminals and pipes, no rich (it costs 0.1 s)."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

from llamakit.cli import render

#: Wide enough that most options keep their help on one line.
CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 118}

MAIN, MORE = "Main commands", "More commands"
#: of a group
COMMANDS = "Commands"
OTHER = "Other options"


def _write_options(command: Any, ctx: Any, formatter: Any) -> None:
    """Arguments, then the options of each panel in the order in which the panels first appear."""
    arguments: list[tuple[str, str]] = []
    panels: dict[str, list[tuple[str, str]]] = {}
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx)
        if record is None:
            continue
        if param.param_type_name == "argument":
            arguments.append(record)
        else:
            panels.setdefault(getattr(param, "rich_help_panel", None) or OTHER, []).append(record)
    other = panels.pop(OTHER, None)
    if other:
        panels[OTHER] = other
    sections = ([("Arguments", arguments)] if arguments else []) + list(panels.items())
    for title, rows in sections:
        with formatter.section(render.bold(title)):
            formatter.write_dl(rows, col_max=38)


class Command(TyperCommand):
    """A command whose help lists its options by `rich_help_panel`, with or without a terminal."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the option groups to the formatter."""
        _write_options(self, ctx, formatter)


class Group(TyperGroup):
    """The root command: its help lists the commands by `rich_help_panel`, then its few options."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the command groups, then the options, to the formatter."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                panel = getattr(command, "rich_help_panel", None) or MORE
                panels.setdefault(panel, []).append((name, command.get_short_help_str(limit=90)))
        for title, rows in panels.items():
            with formatter.section(render.bold(title)):
                formatter.write_dl(rows)
        _write_options(self, ctx, formatter)
