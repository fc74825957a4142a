"""`llamakit convert SOURCE -o TARGET`: models, adapters and vocabularies from one format into another."""

from __future__ import annotations

import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llamakit import hub
from llamakit.cli import render
from llamakit.cli.options import (
    FILES,
    MODEL,
    OUTPUT,
    ConfigOption,
    JsonOption,
    OfflineOption,
    RopeFreqBaseOption,
    ThreadsOption,
    VocabOption,
    keep_freed_memory,
    set_threads,
)
from llamakit.cli.sources import local
from llamakit.cli.verify import print_report
from llamakit.conversion.convert_config import ConvertConfig, Target
from llamakit.errors import LlamakitError, UsageError

if TYPE_CHECKING:
    from llamakit.conversion.convert import Converted, ConvertPlan, Report
    from llamakit.formats.base import ModelFile
    from llamakit.inference.verify import VerifyReport

_MB = 1e6
_SPLIT, _OLLAMA = "Parts", "Modelfile"
_VOCABULARIES = ("sentencepiece", "llama2c-tokenizer", "text")
#: options that only one kind of source or target has, by kind
_OTHERS = {
    "Modelfile": ("--system", "--parameter"),
    "adapter": ("--base", "--force", "--to"),
    "vocabulary": ("--to", "--pre", "--vocab-only"),
}
_NOT_FOR_MODELS = ("--base", "--force", "--system", "--parameter")
_NAMED = {"model": "a model", "adapter": "an adapter", "vocabulary": "a vocabulary", "Modelfile": "a Modelfile"}


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A model: GGUF, Hugging Face folder, Meta checkpoint, llama2.c file; an adapter; a vocabulary; "
            "a path, hf:user/repo[:QUANT] or a URL.",
        ),
    ],
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            metavar="TARGET",
            help="What to write: *.gguf, *.bin (llama2.c), Modelfile (Ollama), else a Hugging Face folder.",
            show_default="SOURCE/ggml-model-TYPE.gguf",
            rich_help_panel=FILES,
        ),
    ] = ConvertConfig.out,
    to: Annotated[
        Literal["gguf", "hf", "llama2c"] | None,
        typer.Option("--to", help="Form of the target, whatever its name.", show_default=False, rich_help_panel=FILES),
    ] = ConvertConfig.to,
    outtype: Annotated[
        str,
        typer.Option(
            "--outtype",
            metavar="TYPE",
            help="f32, f16, bf16, q8_0, or one of quantize's, as q4_k_m; auto: as it is, a checkpoint in 16 bits.",
            rich_help_panel=OUTPUT,
        ),
    ] = ConvertConfig.outtype,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="The model that an adapter is for.", rich_help_panel=FILES),
    ] = None,
    vocab: VocabOption = None,
    vocab_type: Annotated[
        Literal["spm", "bpe", "hfft"] | None,
        typer.Option(
            "--vocab-type",
            help="Which vocabulary of a folder: tokenizer.model (spm) or tokenizer.json.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = ConvertConfig.vocab_type,
    pre: Annotated[
        str | None,
        typer.Option(
            "--pre", metavar="NAME", help="How BPE cuts words, where it is not recognised.", rich_help_panel=MODEL
        ),
    ] = ConvertConfig.pre,
    ctx: Annotated[
        int | None,
        typer.Option("--ctx", metavar="N", help="Context length, where the source lacks it.", rich_help_panel=MODEL),
    ] = ConvertConfig.ctx,
    rope_freq_base: RopeFreqBaseOption = ConvertConfig.rope_freq_base,
    model_name: Annotated[
        str | None,
        typer.Option("--model-name", metavar="NAME", help="general.name of a GGUF.", rich_help_panel=OUTPUT),
    ] = ConvertConfig.model_name,
    vocab_only: Annotated[
        bool, typer.Option("--vocab-only", help="Write a GGUF with the vocabulary alone.", rich_help_panel=OUTPUT)
    ] = ConvertConfig.vocab_only,
    version: Annotated[
        int,
        typer.Option("--version", metavar="0|1|2", help="Version of a llama2.c file.", rich_help_panel=OUTPUT),
    ] = ConvertConfig.version,
    split_max_size: Annotated[
        str | None,
        typer.Option("--split-max-size", metavar="N(M|G)", help="Parts of at most this size.", rich_help_panel=_SPLIT),
    ] = None,
    split_max_tensors: Annotated[
        int | None,
        typer.Option(
            "--split-max-tensors", metavar="N", help="Parts of at most this many tensors.", rich_help_panel=_SPLIT
        ),
    ] = ConvertConfig.split_max_tensors,
    no_tensor_first_split: Annotated[
        bool, typer.Option("--no-tensor-first-split", help="No tensors in the first part.", rich_help_panel=_SPLIT)
    ] = ConvertConfig.no_tensor_first_split,
    system: Annotated[
        str | None,
        typer.Option("--system", metavar="TEXT", help="SYSTEM of a Modelfile.", rich_help_panel=_OLLAMA),
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "--parameter", metavar="KEY=VALUE", help="PARAMETER of a Modelfile; repeatable.", rich_help_panel=_OLLAMA
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Take an adapter of another model.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not compare what was written with the source.")
    ] = False,
    threads: ThreadsOption = None,
    offline: OfflineOption = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Convert a model, an adapter or a vocabulary; what was written is compared with its source."""
    from llamakit.formats.gguf_split import parse_size

    if out is None and hub.is_remote(source):
        raise UsageError("where should it go?", path=source, hint="name the target with -o")
    place = local(source, offline=offline)
    is_modelfile = out is not None and out.name.endswith("Modelfile")
    kind = "Modelfile" if is_modelfile else _kind(place)
    given = {
        "--to": to, "--outtype": outtype, "--base": base, "--vocab": vocab, "--vocab-type": vocab_type, "--pre": pre,
        "--ctx": ctx, "--rope-freq-base": rope_freq_base, "--model-name": model_name, "--vocab-only": vocab_only,
        "--version": version, "--split-max-size": split_max_size, "--split-max-tensors": split_max_tensors,
        "--no-tensor-first-split": no_tensor_first_split, "--system": system, "--parameter": parameter,
        "--force": force, "--dry-run": dry_run,
    }  # fmt: skip
    _refuse_idle_options(kind, given)
    if out is None and kind != "model":
        raise UsageError("where should it go?", hint="name the target with -o")
    if out is not None and kind != "model":
        if is_modelfile:
            _write_modelfile(place, out, system, parameter or [])
        elif kind == "adapter":
            _convert_adapter(place, out, local(base, offline=offline), to, force, json)
        else:
            _convert_vocabulary(place, out, to, pre, json)
        return
    wanted = ConvertConfig(
        source=place, out=out, to=to, outtype=outtype, vocab=local(vocab, offline=offline), vocab_type=vocab_type,
        pre=pre, ctx=ctx, rope_freq_base=rope_freq_base, model_name=model_name, vocab_only=vocab_only, version=version,
        split_max_bytes=None if split_max_size is None else parse_size(split_max_size),
        split_max_tensors=split_max_tensors, no_tensor_first_split=no_tensor_first_split,
    )  # fmt: skip
    keep_freed_memory()
    set_threads(threads)
    if dry_run:
        _show_plan(wanted, json)
    else:
        _convert_model(wanted, no_verify, json)


def _kind(path: Path) -> str:
    """model, adapter or vocabulary."""
    from llamakit.formats.open import open_model, sniff

    kind = sniff(path)
    if kind == "gguf":
        with open_model(path) as file:
            if file.metadata.get("general.type") == "adapter":
                return "adapter"
            return "model" if file.tensors else "vocabulary"
    if kind == "directory" and any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return "vocabulary"
    return "vocabulary" if kind in _VOCABULARIES else "adapter" if kind in ("peft", "ggla") else "model"


def _refuse_idle_options(kind: str, given: dict[str, Any]) -> None:
    """No option is taken and then ignored."""
    defaults = {"--outtype": (ConvertConfig.outtype, "f32") if kind == "adapter" else (ConvertConfig.outtype,)}
    for option, value in given.items():
        is_for_kind = (option not in _NOT_FOR_MODELS) if kind == "model" else option in _OTHERS[kind]
        if not is_for_kind and value and value not in defaults.get(option, ()):
            raise UsageError(f"{option} has no meaning for {_NAMED[kind]}")


def _show_plan(config: ConvertConfig, json: bool) -> None:
    from llamakit.conversion.convert import open_source, plan_conversion

    with open_source(config) as source:
        plan = plan_conversion(source, config)
        _tell(plan.notes)
        if json:
            render.print_json(_plan_json(plan))
            return
        rows = [(name, " x ".join(map(str, source.tensors[name].shape)), t.name) for name, t in plan.types.items()]
        render.table(("tensor", "shape", "type"), rows)
        render.say(f"{plan.path}: {len(plan.types)} tensors, {render.human_bytes(plan.n_bytes)} ({plan.outtype})")


def _plan_json(plan: ConvertPlan) -> dict[str, Any]:
    types = {name: kind.name for name, kind in plan.types.items()}
    return asdict(plan) | {"types": types}


def _convert_model(config: ConvertConfig, no_verify: bool, json: bool) -> None:
    from llamakit.conversion.convert import convert as run

    render.loading(config.source)
    check = _Check()
    started = time.perf_counter()
    with _View(json) as view:
        written = run(config, verify=None if no_verify else check, on_report=view.show)
    seconds = time.perf_counter() - started
    _tell(written.notes)
    if json:
        render.print_json(_as_json(written, check.report, seconds))
        return
    _say_written(written)
    if check.report is not None:
        print_report(check.report)
    render.say(f"next: {shlex.join(_next_command(config, written))}")
    render.log(f"converted in {render.human_duration(seconds)}")


class _Check:
    """Holds what was written against its source, before it gets its name."""

    def __init__(self) -> None:
        self.report: VerifyReport | None = None

    def __call__(self, expected: ModelFile, written: ModelFile) -> None:
        from llamakit.inference.verify import verify

        self.report = verify(expected, written)
        if not self.report.passed:
            first, more = self.report.failures[0], len(self.report.failures) - 1
            others = f" (and {more} more)" if more else ""
            raise LlamakitError(
                f"what was written is not the source: {first}{others}; nothing is left of it", path=expected.path
            )


class _View:
    """Shows a conversion: a bar on a terminal, else the lines of llama.cpp's convert.py, one for each tensor."""

    def __init__(self, json: bool) -> None:
        self._json, self._started = json, time.perf_counter()
        self._bar: render.Progress | None = None
        self._n_tensors = 0

    def __enter__(self) -> _View:
        return self

    def show(self, report: Report) -> None:
        """Take a report as it comes."""
        from llamakit.conversion.convert import ConvertPlan

        if isinstance(report, ConvertPlan):
            _tell(report.notes)
            self._n_tensors = len(report.types)
            self._bar = render.Progress("converting (MB)", total=round(report.n_bytes / _MB), fields=("MB/s",))
            self._bar.__enter__()
            return
        assert self._bar is not None
        elapsed = time.perf_counter() - self._started
        if self._bar.visible:
            speed = report.bytes_done / _MB / max(1e-9, elapsed)
            self._bar.update(round(report.bytes_done / _MB), **{"MB/s": f"{speed:.0f}"})
        elif report.done and not self._json:
            size = " x ".join(f"{n:6d}" for n in report.shape)
            n = str(self._n_tensors)
            render.say(
                f"[{report.index:{len(n)}d}/{n}] Writing tensor {report.name:38s} | size {size:16} "
                f"| type {report.type.name:4} | T+{int(elapsed):4}"
            )

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)


def _tell(notes: tuple[str, ...]) -> None:
    for text in notes:
        render.note(text)


def _say_written(written: Converted) -> None:
    for path in written.paths:
        render.say(f"Wrote {path}")
    render.say(f"{render.human_bytes(written.n_bytes)} in all")


def _as_json(written: Converted, report: VerifyReport | None, seconds: float) -> dict[str, Any]:
    return {
        "paths": written.paths,
        "n_bytes": written.n_bytes,
        "seconds": seconds,
        "notes": written.notes,
        "verify": None if report is None else asdict(report) | {"passed": report.passed},
    }


def _next_command(config: ConvertConfig, written: Converted) -> list[str]:
    model = str(written.paths[0])
    if config.vocab_only:
        return ["llamakit", "tokenize", "-m", model, "-p", "Hello world"]
    if config.target == "llama2c":
        if len(written.paths) == 1:
            return ["llamakit", "inspect", model]
        return ["llamakit", "generate", "-m", model, "-z", str(written.paths[1])]
    return ["llamakit", "generate", "-m", model, "-p", "Once upon a time"]


def _convert_adapter(source: Path, out: Path, base: Path | None, to: Target | None, force: bool, json: bool) -> None:
    from llamakit.conversion.adapters import convert_adapter

    if base is None:
        raise UsageError(
            "is an adapter: the model that it is for is needed", path=source, hint="name it with --base MODEL"
        )
    _show_small(convert_adapter(source, out, base, to=to, force=force), json)


def _convert_vocabulary(source: Path, out: Path, to: Target | None, pre: str | None, json: bool) -> None:
    from llamakit.conversion.adapters import convert_vocabulary

    _show_small(convert_vocabulary(source, out, to=to, pre=pre), json)


def _show_small(written: Converted, json: bool) -> None:
    _tell(written.notes)
    if json:
        render.print_json(asdict(written))
    else:
        _say_written(written)


def _write_modelfile(source: Path, out: Path, system: str | None, parameters: list[str]) -> None:
    from llamakit.conversion.modelfile import split_parameter, write_modelfile
    from llamakit.formats.open import open_model

    with open_model(source, n_ctx=0) as file:
        report = write_modelfile(
            out, file, source, system=system, parameters=[split_parameter(text) for text in parameters]
        )
    _tell(report.notes)
    render.say(f"Wrote {out}")
    render.say(f"next: {report.create}")
    render.say(f"      {report.run}")
