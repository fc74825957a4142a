"""The `llamakit` command: options -> dataclass -> verb -> rendering, and one way out for every error.

The modules of the commands hold signatures and import what computes inside their function bodies, so that
`llamakit --help` loads neither torch nor numpy.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
import warnings
from collections.abc import Collection
from typing import Annotated, Any, NoReturn

import typer
from typer.main import get_command

import llamakit
from llamakit.cli import (
    bench,
    chat,
    compat,
    convert,
    data,
    data_check,
    doctor,
    finetune,
    generate,
    imatrix,
    inspect,
    launch,
    llama2c_run,
    merge,
    perplexity,
    plan,
    plot,
    quantize,
    render,
    serve,
    tokenize,
    tokenizer,
    train,
    verify,
)
from llamakit.cli.help import COMMANDS, CONTEXT_SETTINGS, MAIN, MORE, Command, Group
from llamakit.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_MEMORY, EXIT_OK, EXIT_SAVE, LlamakitError

_DEBUG = "LLAMAKIT_DEBUG"
#: command -> what of it needs less memory
_MEMORY_HINTS = {
    "llamakit finetune": "a smaller --batch or --ctx, --use-checkpointing or --weight-cache none need less, and an"
    " adapter less than --full",
    "llamakit train": "a smaller --batch with a larger --grad-acc, --use-checkpointing, a smaller --ctx or model need"
    " less",
}
_MEMORY_HINT = "a smaller --ctx or a model with fewer bits per weight needs less"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

_OVERVIEW = """\
llamakit: fine-tune, run, convert, quantize and merge Llama models, on the files that you already have

{commands}
Start with:  llamakit inspect MODEL.gguf
Then:        llamakit generate -m MODEL.gguf -p "Once upon a time"
Options:     llamakit COMMAND --help"""

#: command -> what reads its arguments, where that is not the usual way
_CLASSES = {"run": llama2c_run.RunCommand}
#: command -> what its help ends with
_EPILOGS = {"quantize": quantize.EPILOG}
#: command -> (its function, its group in the help), in the order of the help
_COMMANDS = {
    "train": (train.train, MAIN),
    "finetune": (finetune.finetune, MAIN),
    "generate": (generate.generate, MAIN),
    "chat": (chat.chat, MAIN),
    "serve": (serve.serve, MAIN),
    "convert": (convert.convert, MAIN),
    "quantize": (quantize.quantize, MAIN),
    "merge": (merge.merge, MAIN),
    "plan": (plan.plan, MORE),
    "perplexity": (perplexity.perplexity, MORE),
    "imatrix": (imatrix.imatrix, MORE),
    "plot": (plot.plot, MORE),
    "bench": (bench.bench, MORE),
    "run": (llama2c_run.run, MORE),
    "tokenize": (tokenize.tokenize, MORE),
    "inspect": (inspect.inspect, MORE),
    "verify": (verify.verify, MORE),
    "doctor": (doctor.doctor, MORE),
}
#: group of commands -> (what it says of itself, its group in the help, its commands)
_GROUPS = {
    "data": (
        "Turn a corpus into tokens to train on, check training data, and look at what a model will see.",
        MORE,
        {"prepare": data.prepare, "check": data_check.check, "show": data.show},
    ),
    "tokenizer": ("Make a vocabulary of your own.", MORE, {"train": tokenizer.train}),
}
#: commands that have no use for native code
_LIGHT = {"plot", "tokenize", "inspect", "doctor", *_GROUPS}


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Fine-tune, run, convert, quantize and merge Llama models, on the files that you already have."""
    if version:
        render.say(f"llamakit {llamakit.__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        _print_overview(context)


def _print_overview(context: typer.Context) -> None:
    group: Any = context.command
    lines: list[str] = []
    for title in (MAIN, MORE):
        commands = [c for c in group.commands.values() if c.rich_help_panel == title]
        if commands:
            lines += [render.bold(title)]
            lines += [f"  {c.name:<10} {c.get_short_help_str(limit=90)}" for c in commands]
            lines += [""]
    print(_OVERVIEW.format(commands="\n".join(lines)))


def build_app(names: Collection[str] | None = None) -> typer.Typer:
    """The Typer application with the commands and groups of these names, by default with every one.

    None of them has computed or imported anything heavy yet.
    """
    app = typer.Typer(
        cls=Group,
        context_settings=CONTEXT_SETTINGS,
        invoke_without_command=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    for name, (function, panel) in _COMMANDS.items():
        if names is not None and name not in names:
            continue
        settings = {"context_settings": CONTEXT_SETTINGS, "epilog": _EPILOGS.get(name), "rich_help_panel": panel}
        app.command(name, cls=_CLASSES.get(name, Command), **settings)(function)
    for name, (about, panel, commands) in _GROUPS.items():
        if names is None or name in names:
            app.add_typer(_group(about, commands), name=name, rich_help_panel=panel)
    return app


def _group(about: str, commands: dict[str, Any]) -> typer.Typer:
    group = typer.Typer(
        cls=Group,
        context_settings=CONTEXT_SETTINGS,
        invoke_without_command=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        help=about,
    )
    group.callback()(_show_group)
    for name, function in commands.items():
        group.command(name, cls=Command, context_settings=CONTEXT_SETTINGS, rich_help_panel=COMMANDS)(function)
    return group


def _show_group(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> NoReturn:
    """Run the command line of this process and exit with its code."""
    # libgomp's threads spin while they wait. On a core that somebody else needs too, its default makes a training
    # step six times as long; this much spinning costs nothing on an idle machine. Read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    _open_standard_streams()
    code = run(sys.argv[1:])
    launch.end(code)
    sys.exit(code)


def _open_standard_streams() -> None:
    """A stream that the caller closed (`>&-`) goes nowhere; else the next file that is opened would stand for it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8"))


def run(argv: list[str]) -> int:
    """Run one command line (without the program's name) and return its exit code; never shows a traceback.

    LLAMAKIT_DEBUG=1 in the environment adds the traceback of an error, and lets libraries' warnings through.
    """
    debug = bool(os.environ.get(_DEBUG))
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="backslashreplace")
    if not debug and not sys.warnoptions:
        warnings.simplefilter("ignore")
    try:
        launch.prepare(argv)
        argv, notes = compat.rewrite(argv)
        for kind, text in () if launch.repeats() else notes:
            (render.warn if kind == "warning" else render.note)(text)
        code = _invoke(argv)
        sys.stdout.flush()
        return code if isinstance(code, int) else EXIT_OK
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except SystemExit:  # shell completion and a closed pipe, both handled inside typer
        raise
    except BaseException as error:  # tokenizers raises a PanicException, which is no Exception
        if debug:
            traceback.print_exception(error)
        return _report(error, _name_of(argv))


def _name_of(argv: list[str]) -> str:
    """The command in a command line, as a user calls it."""
    name = argv[0] if argv else ""
    if name in _GROUPS:
        return f"llamakit {' '.join(argv[:2])}" if argv[1:2] and argv[1] in _GROUPS[name][2] else f"llamakit {name}"
    return f"llamakit {name}" if name in _COMMANDS else "llamakit"


def _invoke(argv: list[str]) -> object:
    """Parse and run a command line.

    A command is called without the root, whose options would cost 0.1 s to process, and made alone, which spares as
    much.
    """
    if not argv or argv[0] not in {*_COMMANDS, *_GROUPS}:
        root: Any = get_command(build_app())
        return root.main(args=argv, prog_name="llamakit", standalone_mode=False)
    alone: Any = get_command(build_app(argv[:1]))
    command = alone.commands[argv[0]]
    if argv[0] not in _LIGHT and not {"-h", "--help"} & set(argv) and not launch.repeats():
        doctor.say_once_what_is_missing()
    return command.main(args=argv[1:], prog_name=f"llamakit {argv[0]}", standalone_mode=False)


def _report(error: BaseException, command: str) -> int:
    """Say in one line what went wrong, hint at the next step, and return the exit code."""
    if isinstance(error, BrokenPipeError):
        return _discard_stdout()
    message, hint, code = _explain(error, command)
    if not launch.may_tell(error, code):
        return code
    code = _fail(launch.rank_prefix() + message, hint, code)
    launch.told()
    return code


def _explain(error: BaseException, command: str) -> tuple[str, str | None, int]:
    """What went wrong, what to do next, the exit code."""
    if isinstance(error, LlamakitError):
        return str(error), error.hint, error.exit_code
    if isinstance(error, typer.TyperException):
        return *_explain_usage(error, command), error.exit_code
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        _discard_stdout()  # what is still in its buffer has no place to go
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}cannot write: {error.strerror}", "free some space, or write to another disk", EXIT_SAVE
    if _is_out_of_memory(error):
        return "out of memory", _MEMORY_HINTS.get(command, _MEMORY_HINT), EXIT_MEMORY
    if isinstance(error, typer.Abort):
        return "aborted", None, EXIT_FAILURE
    text = " ".join(str(error).split())[:300]
    message = f"internal error: {type(error).__name__}: {text}" if text else f"internal error: {type(error).__name__}"
    return message, f"this is a bug in llamakit; {_DEBUG}=1 shows where it happened", EXIT_FAILURE


def _fail(message: str, hint: str | None, code: int) -> int:
    try:
        render.error(message)
        if hint:
            render.hint(hint)
    except BrokenPipeError:
        return _discard_stdout()
    return code


def _discard_stdout() -> int:
    """Nobody can take our output: leave without a word, and without Python's own complaint at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_FAILURE


def _is_out_of_memory(error: BaseException) -> bool:
    # torch is not imported here: its error is known by name, the CPU allocator's by its text.
    by_name = type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch")
    return isinstance(error, MemoryError) or by_name or "DefaultCPUAllocator: can't allocate" in str(error)


def _explain_usage(error: typer.TyperException, command: str) -> tuple[str, str | None]:
    """What Typer says about the command line, as one line, and the hint that goes with it."""
    context: Any = getattr(error, "ctx", None)
    message, _, suggestion = " ".join(error.message.split()).partition(" Did you mean ")
    option = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption" and context is not None:
        message = f"no such option: {option}"
        known = [name for param in context.command.params for name in (*param.opts, *param.secondary_opts)]
        suggestion = compat.closest(str(option), known) or ""
    elif hasattr(error, "param"):
        message = _explain_value(error)
    message = message[:1].lower() + message[1:].removesuffix(".")
    if suggestion:
        return message, f"did you mean {suggestion.replace(chr(39), '').rstrip('?')}?"
    return message, f"{command} --help lists what there is"


def _explain_value(error: typer.TyperException) -> str:
    """An option's bad value in one line: `invalid value for '--batch': expected a valid integer, got 'x'`."""
    message = " ".join(error.format_message().split()).replace(": Value error, ", ": ")
    before, expected, rest = message.partition("Input should be ")
    if not expected:
        return message
    # The validation error underneath knows the value; Typer's message has only what was expected.
    details: Any = getattr(error.__cause__ or error.__context__, "errors", list)()
    got = f", got {str(details[0].get('input'))!r}" if details else ""
    return f"{before}expected {rest.partition(', unable')[0]}{got}"
