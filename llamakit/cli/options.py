"""Options that several commands share, and `--config FILE.toml`, which sets any option of any command."""

from __future__ import annotations

import ctypes
import inspect
import os
import re
import tomllib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from llamakit.cli.compat import ALIASES, closest
from llamakit.errors import UsageError
from llamakit.files import read_text

#: Help groups, shared so that every command names them alike.
FILES, MODEL, CHAT, SAMPLING, TRAINING, LORA, DATA, EVALUATION, OUTPUT, COMPUTE = (
    "Files",
    "Model",
    "Chat",
    "Sampling",
    "Training",
    "LoRA",
    "Data",
    "Evaluation",
    "Output",
    "Compute",
)


_LARGEST_FLOAT32 = 3.4e38


def scaled_adapter(item: str) -> tuple[str, float]:
    """FILE:S -> (FILE, S). Raises UsageError where S is no number, or none that a float32 holds."""
    path, _, scale = item.rpartition(":")
    try:
        number = float(scale)
    except ValueError as error:
        raise UsageError(f"--lora-scaled is {item!r} (expected FILE:SCALE, such as lora.gguf:0.5)") from error
    if not abs(number) <= _LARGEST_FLOAT32:
        raise UsageError(f"--lora-scaled has the scale {number:g} for {path} (expected a finite number)")
    return path or "?", number


def named_adapters(lora: Sequence[str] | None, lora_scaled: Sequence[str] | None) -> list[tuple[str, float]]:
    """What --lora and --lora-scaled name, with its scale. Raises UsageError as `scaled_adapter` does."""
    return [(path, 1.0) for path in lora or ()] + [scaled_adapter(item) for item in lora_scaled or ()]


def listed(items: Sequence[str]) -> list[str]:
    """Lists with commas, one by one; a comma in a URL or in the name of a file that is there is none of a list."""
    whole = [Path(item).exists() or item.startswith("http") for item in items]
    return [p for item, one in zip(items, whole, strict=True) for p in ([item] if one else item.split(",")) if p]


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of the command: the command line still overrides them."""
    if path is None or context.resilient_parsing:
        return path
    text = read_text(path)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _not_toml(path, text, str(error)) from error
    options = _options(context)
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name, annotation = _find(key, options, path, _line_of(key, text), _command(context))
        _check(key, value, annotation, path, _line_of(key, text))
        defaults[name] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _not_toml(path: Path, text: str, message: str) -> UsageError:
    """tomllib's message, its place moved to where llamakit's errors have it."""
    reason, _, place = message.partition(" (at ")
    line = re.match(r"line (\d+)", place)
    n_lines = max(1, len(text.splitlines()))
    return UsageError(f"is not TOML: {reason}", path=path, line=int(line[1]) if line else n_lines)


def _options(context: typer.Context) -> dict[str, tuple[str, Any]]:
    """Every spelling with underscores of the command's options -> (parameter name, its annotation)."""
    function = inspect.unwrap(context.command.callback) if context.command.callback else None
    hints = get_type_hints(function) if function else {}
    options: dict[str, tuple[str, Any]] = {}
    for param in context.command.params:
        if param.name in hints and param.name != "config":
            for spelling in (param.name, *param.opts):
                options[_key(spelling)] = (param.name, hints[param.name])
    for old, new in ALIASES.get(_command(context), {}).items():
        if _key(new) in options:
            options.setdefault(_key(old), options[_key(new)])
    return options


def _command(context: typer.Context) -> str:
    """The command as a user calls it, `data prepare` for one of a group."""
    path = context.command_path.partition(" ")[2]
    return path if path in ALIASES else context.command.name or ""


def _key(spelling: str) -> str:
    return spelling.lstrip("-").replace("-", "_")


def _find(key: str, options: dict[str, tuple[str, Any]], path: Path, line: int | None, command: str) -> tuple[str, Any]:
    normal = _key(key)
    if normal in options:
        return options[normal]
    near = closest(normal, options)
    hint = f"did you mean {near}?" if near else f"llamakit {command} --help lists the options"
    raise UsageError(f"unknown key {key!r}", path=path, line=line, hint=hint)


def _line_of(key: str, text: str) -> int | None:
    """The line, from 1, on which a top-level key stands; None where it is written in some unusual way."""
    match = re.search(rf"^[ \t]*(?:\[[ \t]*)?([\"']?){re.escape(key)}\1[ \t]*[=.\]]", text, re.MULTILINE)
    return text.count("\n", 0, match.start()) + 1 if match else None


def _check(key: str, value: Any, annotation: Any, path: Path, line: int | None) -> None:
    """Raise UsageError where a TOML value has not the type of its option."""
    if not _accepts(annotation, value):
        reason = f"key {key!r}: expected {_describe(annotation)}, got {_describe_value(value)}"
        raise UsageError(reason, path=path, line=line)


def _accepts(annotation: Any, value: Any) -> bool:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return any(_accepts(part, value) for part in get_args(annotation) if part is not type(None))
    if origin is Literal:
        return value in get_args(annotation)
    if origin in (list, tuple):
        return isinstance(value, list) and all(_accepts(get_args(annotation)[0], item) for item in value)
    if annotation is bool or isinstance(value, bool):
        return annotation is bool and isinstance(value, bool)
    if annotation is float:
        return isinstance(value, (int, float))
    if annotation is int:
        return isinstance(value, int)
    return isinstance(value, str)


def _describe(annotation: Any) -> str:
    """What an option takes, in a user's words."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(part) for part in get_args(annotation) if part is not type(None))
    if origin is Literal:
        return "one of " + ", ".join(str(word) for word in get_args(annotation))
    if origin in (list, tuple):
        return f"a list ({_describe(get_args(annotation)[0])} each)"
    return {bool: "true or false", int: "an integer", float: "a number"}.get(annotation, "a string")


def _describe_value(value: Any) -> str:
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if len(repr(value)) <= 60 else f"a {type(value).__name__}"


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.toml",
        help="Set any option from a TOML file (keys are option names); the command line overrides it.",
        is_eager=True,
        callback=_read_config,
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.", rich_help_panel=OUTPUT)]
OfflineOption = Annotated[
    bool,
    typer.Option("--offline", help="Fetch nothing: hf: and https sources from the cache alone.", rich_help_panel=FILES),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="CPU threads.", show_default="all cores", rich_help_panel=COMPUTE),
]
DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option("--device", help="Where to compute; auto takes CUDA where there is one.", rich_help_panel=COMPUTE),
]
DtypeOption = Annotated[
    Literal["auto", "f32", "bf16"],
    typer.Option(
        "--dtype", help="Type to compute in; auto is bf16 where the processor has it.", rich_help_panel=COMPUTE
    ),
]
#: of what measures models
AccurateDtypeOption = Annotated[
    Literal["auto", "f32", "bf16"],
    typer.Option("--dtype", help="Type to compute in; auto is f32, for accuracy.", rich_help_panel=COMPUTE),
]
VocabOption = Annotated[
    str | None, typer.Option("--vocab", metavar="FILE", help="Take the vocabulary from here.", rich_help_panel=MODEL)
]
StatedCtxOption = Annotated[
    int | None,
    typer.Option("--ctx", metavar="N", help="Context length, where the model lacks it.", rich_help_panel=MODEL),
]
RopeFreqBaseOption = Annotated[
    float | None,
    typer.Option("--rope-freq-base", metavar="N", help="Base of the rotary embedding.", rich_help_panel=MODEL),
]


def set_threads(threads: int | None) -> None:
    """Use this many CPU threads, all that there are by default; more than there are would only get in their way."""
    if threads is not None:
        import torch

        torch.set_num_threads(min(threads, len(os.sched_getaffinity(0))))


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for the next use, instead of giving it back to the system.

    By default every large array costs fresh pages each time: a third of a training step at 4 x 512 tokens. The peak
    stays the same. Only glibc has these switches (malloc.h); elsewhere nothing happens.
    """
    _mallopt(trim=2**31 - 1, mmap=2**30)


def give_back_freed_memory() -> None:
    """Have the C library give every large array back when it is freed: what is gathered of a sharded model for a moment
    would leave holes that nothing fits into, twice the model in the end."""
    _mallopt(trim=2**20, mmap=2**20)


def _mallopt(*, trim: int, mmap: int) -> None:
    trim_threshold, mmap_threshold = -1, -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(trim_threshold, trim)
        mallopt(mmap_threshold, mmap)


LoraOption = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE", help="Adapter to put on; repeatable.", rich_help_panel=LORA),
]
LoraScaledOption = Annotated[
    list[str] | None,
    typer.Option("--lora-scaled", metavar="FILE:S", help="Adapter times S; repeatable.", rich_help_panel=LORA),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Take an adapter of another model.", rich_help_panel=LORA)]
