"""Ollama's Modelfile for a GGUF: the model, its chat template in Go's language, where an answer stops, the context.

The format: docs/modelfile.mdx and parser/parser.go of Ollama. A value goes on until a line ends that closes its
quotes, there is no escape inside, and letters that are not printable are dropped.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llamakit.conversion.go_template import GoTemplate, go_template
from llamakit.errors import FormatError, UnsupportedError, UsageError
from llamakit.files import atomic_path, escape_control
from llamakit.formats.base import ModelFile
from llamakit.formats.open import check_is_model
from llamakit.tokenizer import Tokenizer, load_tokenizer

#: what PARAMETER takes (docs/modelfile.mdx; api/types.go, Options and Runner), and the pattern of its value
_WHOLE, _NUMBER, _TRUTH = r"-?\d{1,18}", r"-?(\d{1,18}\.?\d*|\.\d+)([eE](-\d{1,2}|[+]?\d))?", "true|false"
PARAMETERS = {
    "num_ctx": _WHOLE, "repeat_last_n": _WHOLE, "repeat_penalty": _NUMBER, "temperature": _NUMBER, "seed": _WHOLE,
    "stop": r"(?s:.+)", "num_predict": _WHOLE, "draft_num_predict": _WHOLE, "top_k": _WHOLE, "top_p": _NUMBER,
    "min_p": _NUMBER, "typical_p": _NUMBER, "presence_penalty": _NUMBER, "frequency_penalty": _NUMBER,
    "num_keep": _WHOLE, "num_batch": _WHOLE, "num_gpu": _WHOLE, "main_gpu": _WHOLE, "num_thread": _WHOLE,
    "use_mmap": _TRUTH,
}  # fmt: skip
_KINDS = {_WHOLE: "a whole number", _NUMBER: "a number", _TRUTH: "true or false"}
#: what users of llama.cpp will try
_ALIASES = {"temp": "temperature", "ctx_size": "num_ctx", "n_predict": "num_predict", "threads": "num_thread"}
_LONG = 32768  # a context whose memory is worth a word
_ADAPTER_NOTE = "recent versions of Ollama refuse ADAPTER with a GGUF: merge the adapter into the model instead"


@dataclass(frozen=True)
class ModelfileReport:
    """text: the Modelfile; template: its TEMPLATE, None where Ollama is left to the one in the GGUF; notes: what it
    cannot do, one line each; create and run: the two commands to give next."""

    text: str
    template: GoTemplate | None
    notes: tuple[str, ...]
    create: str
    run: str


def split_parameter(text: str) -> tuple[str, str]:
    """KEY=VALUE as (key, value). Raises UsageError without the equals sign."""
    key, found, value = text.partition("=")
    if not found:
        raise UsageError(f"'{escape_control(text)}' is no parameter (expected KEY=VALUE, as in temperature=0.7)")
    return key.strip(), value


def modelfile_text(
    file: ModelFile,
    from_path: str,
    *,
    system: str | None = None,
    parameters: Sequence[tuple[str, str]] = (),
    adapter_path: str | None = None,
    name: str | None = None,
    modelfile: str = "Modelfile",
) -> ModelfileReport:
    """The Modelfile of a model, and how to give it to Ollama.

    from_path, adapter_path: as they are to stand in it, absolute or relative to the Modelfile. parameters: (key,
    value), after those that the model gives; a `num_ctx` replaces the model's, a `stop` joins the others. name: the
    model's in Ollama, by default made of from_path. modelfile: its path, for the command.
    Raises UsageError for a parameter or a value that Ollama would not take, with a suggestion, for a system message
    that the model cannot have, and for an adapter in place of a model; what `load_tokenizer` raises for a file whose
    vocabulary is missing, broken or of another kind.
    """
    if file.metadata.get("general.type") == "adapter":
        hint = "merge it into its model first, and make the Modelfile of the result"
        raise UsageError("is an adapter, a Modelfile needs a model", path=file.path, hint=hint)
    check_is_model(file)
    template, stops, notes = _chat(load_tokenizer(file))
    notes += [_ADAPTER_NOTE] if adapter_path is not None else []
    if system is not None:
        notes += _check_system(system, template)
    lines = [f"FROM {_path(from_path)}"]
    lines += [f"ADAPTER {_path(adapter_path)}"] if adapter_path is not None else []
    lines += [f"TEMPLATE {_quoted(template.text)}"] if template is not None else []
    lines += [f"SYSTEM {_quoted(system)}"] if system is not None else []
    n_ctx = None if any(key == "num_ctx" for key, _ in parameters) else _context(file)
    if n_ctx is not None and n_ctx > _LONG:
        notes.append(f"num_ctx is the model's {n_ctx}, and takes memory: --parameter num_ctx={_LONG // 4} takes less")
    lines += [f"PARAMETER {key} {value}" for key, value in _parameters(stops, n_ctx, parameters)]
    name = _model_name(name, from_path)
    return ModelfileReport(
        text="\n".join(lines) + "\n",
        template=template,
        notes=tuple(notes),
        create=f"ollama create {name} -f {shlex.quote(modelfile)}",
        run=f"ollama run {name}",
    )


def write_modelfile(
    path: str | os.PathLike[str],
    file: ModelFile,
    from_path: str | os.PathLike[str],
    *,
    system: str | None = None,
    parameters: Sequence[tuple[str, str]] = (),
    adapter_path: str | os.PathLike[str] | None = None,
    name: str | None = None,
) -> ModelfileReport:
    """Write `modelfile_text` to `path`, whole or not at all; from_path and adapter_path are as seen from here.

    Raises what `modelfile_text` raises, SaveError when the disk refuses.
    """
    path = Path(path)
    report = modelfile_text(
        file,
        _seen_from(path, from_path),
        system=system,
        parameters=parameters,
        adapter_path=None if adapter_path is None else _seen_from(path, adapter_path),
        name=name,
        modelfile=os.fspath(path),
    )
    with atomic_path(path) as temporary:
        temporary.write_bytes(report.text.encode())
    return report


def _seen_from(modelfile: Path, path: str | os.PathLike[str]) -> str:
    """A path as it stands in the Modelfile: an absolute one stays, a relative one starts at the Modelfile."""
    return os.fspath(path) if os.path.isabs(path) else os.path.relpath(path, modelfile.parent)


def _chat(tokenizer: Tokenizer) -> tuple[GoTemplate | None, list[str], list[str]]:
    """The template, where an answer stops, and what is to be told."""
    texts = (tokenizer.piece(id, special=True).decode("utf-8", "replace") for id in sorted(tokenizer.eog_ids))
    stops = [text for text in texts if text.strip() and text.isprintable()]
    try:
        template = go_template(tokenizer)
    except (UnsupportedError, FormatError) as error:
        return None, stops, [f"no TEMPLATE: {error.reason}; Ollama takes the one in the GGUF, where it can"]
    own = template.family.stops if template.family else ()
    return template, list(dict.fromkeys([*own, *stops])), list(template.notes)


def _check_system(system: str, template: GoTemplate | None) -> list[str]:
    """What would happen to the system message, one line each. Raises UsageError where it would be lost."""
    if template is not None and not template.takes_system:
        raise UsageError("the model's chat template takes no system message", hint="leave --system out")
    if any("\ud800" <= letter <= "\udfff" for letter in system):
        raise UsageError("the system message is not UTF-8")
    lost = sorted({letter for letter in system if not _kept(letter)})
    if not lost:
        return []
    return [f"Ollama drops these letters from the system message: {', '.join(f'U+{ord(c):04X}' for c in lost)}"]


def _kept(letter: str) -> bool:
    return letter.isprintable() or letter in "\n\r\t"


def _context(file: ModelFile) -> int | None:
    """The model's context in tokens, None where the file does not say it."""
    n_ctx = file.metadata.get(f"{file.metadata.get('general.architecture')}.context_length")
    return n_ctx if isinstance(n_ctx, int) and not isinstance(n_ctx, bool) and n_ctx > 0 else None


def _parameters(stops: Sequence[str], n_ctx: int | None, extra: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """(key, value as it stands in the file), the model's own first."""
    for key, value in extra:
        _check_parameter(key, value)
    own = [("stop", _quoted(text, '"')) for text in stops]
    own += [("num_ctx", str(n_ctx))] if n_ctx is not None else []
    own += [(key, _quoted(value, '"') if key == "stop" else value) for key, value in extra]
    return list(dict.fromkeys(own))


def _check_parameter(key: str, value: str) -> None:
    pattern = PARAMETERS.get(key)
    if pattern is None:
        near = [_ALIASES[key]] if key in _ALIASES else difflib.get_close_matches(key, PARAMETERS, 1, 0.6)
        hint = f"did you mean {near[0]}?" if near else f"it knows {', '.join(PARAMETERS)}"
        raise UsageError(f"Ollama has no parameter '{escape_control(key)}'", hint=hint)
    if not re.fullmatch(pattern, value, re.ASCII):
        kind = _KINDS.get(pattern, "a text")
        raise UsageError(f"the parameter {key} is '{escape_control(value)}' (expected {kind})")
    if not all(map(_kept, value)):
        raise UsageError(f"the parameter {key} is '{escape_control(value)}', and Ollama drops what is not printable")


def _quoted(text: str, quote: str = '"""') -> str:
    """A value in quotes. Raises UsageError for the one text that Ollama would end too soon."""
    if quote in text or "\n" in text:
        quote = '"""'
    read = "".join(filter(_kept, text))
    for line in re.finditer("[\n\r]", read):
        so_far = (quote + read[: line.start()]).strip()
        if len(so_far) >= 6 and so_far.endswith('"""'):
            raise UsageError('a line ends with """, where a Modelfile ends the text', hint="add a dot after it")
    return quote + text + quote


def _path(path: str) -> str:
    """A path for FROM or ADAPTER, which cannot be taken for a model's name or for the home directory."""
    if not path.isprintable() or path != path.strip():
        raise UsageError(f"a Modelfile cannot hold the path '{escape_control(path)}'", hint="rename the file")
    return path if path.startswith(("/", "./", "../")) else f"./{path}"


def _model_name(name: str | None, from_path: str) -> str:
    """A name that Ollama takes (types/model/name.go): letters, digits, `_`, `-` and `.`, in lower case."""
    if name is None:
        return re.sub("[^a-z0-9_.-]+", "-", Path(from_path).stem.lower()).strip("-.")[:80] or "model"
    if not re.fullmatch(r"([A-Za-z0-9_][\w.-]*/)*[A-Za-z0-9_][\w.-]{0,79}(:[A-Za-z0-9_][\w.-]{0,79})?", name, re.ASCII):
        raise UsageError(f"'{escape_control(name)}' is no name of a model in Ollama (expected letters, digits, _ - .)")
    return name
