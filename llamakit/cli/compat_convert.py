"""Command lines of the converters that `convert` stands for, in its own spelling.

llama2.c's export.py names the target first and the source by its kind; convert-llama2c-to-ggml names everything by an
option; convert_hf_to_gguf.py and the old convert.py differ in names alone (compat.py's table). A pure function.
"""

from __future__ import annotations

from llamakit.errors import UsageError

#: export.py's options that name the source
_EXPORT = ("--meta-llama", "--hf", "--checkpoint")
#: options that take a value, ours and theirs: the word after them is no argument
_VALUED = frozenset(
    {
        *_EXPORT, "-o", "--outfile", "--output", "--to", "--outtype", "--vocab", "--vocab-dir", "--vocab-type",
        "--pre", "--ctx", "-c", "--rope-freq-base", "--model-name", "--version", "--split-max-size",
        "--split-max-tensors", "--base", "--system", "--parameter", "--threads", "--config", "--dtype",
        "--concurrency", "--metadata", "--llama2c-model", "--llama2c-output-model", "--copy-vocab-from-model", "-m",
        "--model",
    }
)  # fmt: skip


def rewrite_convert(words: list[str]) -> list[str]:
    """The words of a `convert` command as SOURCE and options. Raises UsageError for an option without its value."""
    options, arguments = _sorted_out(words)
    if any(name in _EXPORT for name, _ in options):
        return _from_export(options, arguments)
    if any(name == "--llama2c-model" for name, _ in options):
        return _from_llama2c(options, arguments)
    if ("--remote", None) in options:
        arguments = [word if word.startswith("hf:") else f"hf:{word}" for word in arguments]
        options = [option for option in options if option != ("--remote", None)]
    return [*arguments, *_joined(options)]


def _sorted_out(words: list[str]) -> tuple[list[tuple[str, str | None]], list[str]]:
    """(options with their values, arguments)."""
    options: list[tuple[str, str | None]] = []
    arguments: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        name = name.replace("_", "-") if name.startswith("--") else name
        if not word.startswith("-") or word == "-":
            arguments.append(word)
        elif equals:
            options.append((name, value))
        elif name in _VALUED:
            if not queue:
                raise UsageError(f"option {name} requires an argument")
            options.append((name, queue.pop(0)))
        else:
            options.append((name, None))
    return options, arguments


def _joined(options: list[tuple[str, str | None]]) -> list[str]:
    return [word for name, value in options for word in ((name,) if value is None else (name, value))]


def _from_export(options: list[tuple[str, str | None]], arguments: list[str]) -> list[str]:
    """export.py OUT --checkpoint F | --meta-llama DIR | --hf DIR [--version N] [--dtype T]."""
    sources = [value for name, value in options if name in _EXPORT and value is not None]
    if len(sources) != 1:
        raise UsageError(f"{', '.join(_EXPORT)} exclude each other: one of them names the source")
    rest = [(name, value) for name, value in options if name not in (*_EXPORT, "--dtype")]
    if not any(name == "--to" for name, _ in rest):
        to_folder = ("--version", "-1") in rest
        rest = [option for option in rest if option != ("--version", "-1")]
        rest.append(("--to", "hf" if to_folder else "llama2c"))
    out = [("-o", word) for word in arguments]
    return [*sources, *_joined([*out, *rest])]


def _from_llama2c(options: list[tuple[str, str | None]], arguments: list[str]) -> list[str]:
    """convert-llama2c-to-ggml --llama2c-model F --copy-vocab-from-model F --llama2c-output-model F."""
    renamed = {"--llama2c-output-model": "-o", "--copy-vocab-from-model": "--vocab"}
    sources = [value for name, value in options if name == "--llama2c-model" and value is not None]
    rest = [(renamed.get(name, name), value) for name, value in options if name != "--llama2c-model"]
    if not any(name == "-o" for name, _ in rest):
        rest.append(("-o", "ak_llama_model.bin"))  # that program's default; a GGUF in spite of its name
    return [*sources, *arguments, *_joined([*rest, ("--to", "gguf")])]
