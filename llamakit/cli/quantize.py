"""`llamakit quantize IN [OUT] TYPE [THREADS]`: a model in smaller types, as llama-quantize writes it."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamakit import hub
from llamakit.cli import quantize_cost, render
from llamakit.cli.options import (
    FILES,
    OUTPUT,
    ConfigOption,
    JsonOption,
    OfflineOption,
    RopeFreqBaseOption,
    StatedCtxOption,
    ThreadsOption,
    VocabOption,
    keep_freed_memory,
    set_threads,
)
from llamakit.cli.sources import local
from llamakit.conversion.file_types import parse_file_type, types_table
from llamakit.conversion.quantize_config import QuantizeConfig
from llamakit.errors import UsageError
from llamakit.files import as_argument, escape_control

if TYPE_CHECKING:
    from llamakit.conversion.quantize import PlannedTensor, Quantized, QuantizedTensor, QuantizePlan

_MB, _MIB = 1e6, 1 << 20
_TYPES, _IMATRIX = "Types", "Importance matrix"
_N_WORST = 5
#: what the help ends with; \b keeps the lines as they are
EPILOG = "\b\n" + types_table()


def quantize(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="IN [OUT] TYPE [THREADS]",
            help="A model (a GGUF file, a Hugging Face or Meta folder, a llama2.c file, hf:user/repo[:QUANT], a URL), "
            "what to write (ggml-model-TYPE.gguf beside it by default), one of the types below, CPU threads.",
        ),
    ],
    *,
    allow_requantize: Annotated[
        bool,
        typer.Option(
            "--allow-requantize", help="Quantize what is quantized already; it loses more.", rich_help_panel=_TYPES
        ),
    ] = QuantizeConfig.allow_requantize,
    leave_output_tensor: Annotated[
        bool, typer.Option("--leave-output-tensor", help="Keep output.weight as it is.", rich_help_panel=_TYPES)
    ] = QuantizeConfig.leave_output_tensor,
    pure: Annotated[
        bool,
        typer.Option("--pure", help="No mixture: all matrices in the same type.", rich_help_panel=_TYPES),
    ] = QuantizeConfig.pure,
    output_tensor_type: Annotated[
        str | None,
        typer.Option(
            "--output-tensor-type", metavar="TYPE", help="Tensor type of output.weight.", rich_help_panel=_TYPES
        ),
    ] = QuantizeConfig.output_tensor_type,
    token_embedding_type: Annotated[
        str | None,
        typer.Option(
            "--token-embedding-type",
            metavar="TYPE",
            help="Tensor type of the token embedding.",
            rich_help_panel=_TYPES,
        ),
    ] = QuantizeConfig.token_embedding_type,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            "--tensor-type",
            metavar="NAME=TYPE",
            help="Tensor type where the regular expression NAME is found; repeatable, the first counts.",
            rich_help_panel=_TYPES,
        ),
    ] = None,
    tensor_type_file: Annotated[
        list[Path] | None,
        typer.Option(
            "--tensor-type-file",
            metavar="FILE",
            help="A file of such rules; they come after those of --tensor-type.",
            rich_help_panel=_TYPES,
        ),
    ] = None,
    imatrix: Annotated[
        str | None,
        typer.Option(
            "--imatrix",
            metavar="FILE",
            help="How much errors in each column matter (llamakit imatrix).",
            rich_help_panel=_IMATRIX,
        ),
    ] = QuantizeConfig.imatrix,
    include_weights: Annotated[
        list[str] | None,
        typer.Option(
            "--include-weights",
            metavar="NAME",
            help="Use it for tensors with this in their name alone; repeatable.",
            rich_help_panel=_IMATRIX,
        ),
    ] = None,
    exclude_weights: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude-weights",
            metavar="NAME",
            help="Do not use it for tensors with this in their name; repeatable.",
            rich_help_panel=_IMATRIX,
        ),
    ] = None,
    prune_layers: Annotated[
        str | None,
        typer.Option("--prune-layers", metavar="N,N", help="Leave these layers out.", rich_help_panel=OUTPUT),
    ] = QuantizeConfig.prune_layers,
    override_kv: Annotated[
        list[str] | None,
        typer.Option(
            "--override-kv",
            metavar="KEY=TYPE:VALUE",
            help="Set metadata: int, float, bool or str; repeatable.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    keep_split: Annotated[
        bool, typer.Option("--keep-split", help="Write the parts that IN has.", rich_help_panel=FILES)
    ] = QuantizeConfig.keep_split,
    kl: Annotated[
        Path | None,
        typer.Option(
            "--kl",
            metavar="TEXT",
            help="Compare the result with IN on a text: perplexity, divergence.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
    vocab: VocabOption = None,
    ctx: StatedCtxOption = QuantizeConfig.ctx,
    rope_freq_base: RopeFreqBaseOption = QuantizeConfig.rope_freq_base,
    threads: ThreadsOption = None,
    offline: OfflineOption = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Make a model smaller: the file that llama-quantize writes, and what it lost."""
    words = _sorted_out(arguments)
    if words.out is None and hub.is_remote(words.source) and not dry_run:
        raise UsageError("where should it go?", path=words.source, hint="name the output before the type")
    wanted = QuantizeConfig(
        source=local(words.source, offline=offline), out=words.out, type=words.type, allow_requantize=allow_requantize,
        leave_output_tensor=leave_output_tensor, pure=pure, output_tensor_type=output_tensor_type,
        token_embedding_type=token_embedding_type, tensor_type=tuple(tensor_type or ()),
        tensor_type_file=tuple(tensor_type_file or ()), imatrix=_local_text(imatrix, offline),
        include_weights=tuple(include_weights or ()), exclude_weights=tuple(exclude_weights or ()),
        prune_layers=prune_layers, override_kv=tuple(override_kv or ()), keep_split=keep_split,
        vocab=local(vocab, offline=offline), ctx=ctx, rope_freq_base=rope_freq_base,
    )  # fmt: skip
    keep_freed_memory()
    set_threads(threads if threads is not None else words.threads)
    if dry_run:
        if kl is not None:
            quantize_cost.count_chunks(wanted, kl)
        _show_plan(wanted, json)
    else:
        _run(wanted, kl, json)


@dataclass(frozen=True)
class _Words:
    """The arguments: IN [OUT] TYPE [THREADS]."""

    source: str
    out: Path | None
    type: str
    threads: int | None


def _sorted_out(arguments: Sequence[str]) -> _Words:
    """As llama-quantize tells them apart: a second argument that names a type is the type."""
    source, *rest = arguments
    out = Path(rest.pop(0)) if rest and not _is_type(rest[0]) else None
    if not rest:
        raise UsageError("missing argument 'TYPE'", hint="as in: llamakit quantize model.gguf small.gguf Q4_K_M")
    parse_file_type(rest[0])
    if len(rest) > 2:
        raise UsageError(f"got unexpected extra argument ({escape_control(rest[2])})")
    if len(rest) == 2 and not (rest[1].isascii() and rest[1].isdigit() and int(rest[1][:6]) > 0):
        raise UsageError(f"THREADS is {rest[1]!r} (expected a number from 1)")
    return _Words(source, out, rest[0], int(rest[1][:6]) if len(rest) == 2 else None)


def _is_type(word: str) -> bool:
    """Raises UnsupportedError for a type that llamakit does not make."""
    try:
        parse_file_type(word)
    except UsageError:
        return False
    return True


def _local_text(imatrix: str | None, offline: bool) -> str | None:
    """The path of an importance matrix; as it was given, which is how the result records it."""
    if imatrix is None or not hub.is_remote(imatrix):
        return imatrix
    return str(local(imatrix, offline=offline))


def _show_plan(config: QuantizeConfig, json: bool) -> None:
    from llamakit.conversion.quantize import open_source, plan_quantization

    with open_source(config) as source:
        plan = plan_quantization(source, config)
    _tell(plan)
    if json:
        render.print_json(_plan_json(plan))
        return
    for index, tensor in enumerate(plan.tensors, 1):
        render.say(_line(index, len(plan.tensors), tensor, f" ({_type_name(tensor)})"))
    _say_sizes(plan)
    if plan.without_imatrix:
        render.warn(f"{plan.type} needs --imatrix FILE: without one nothing would be written")
    if plan.requantized and not config.allow_requantize:
        render.warn(f"{len(plan.requantized)} tensors are quantized already: this needs --allow-requantize")


def _run(config: QuantizeConfig, text: Path | None, json: bool) -> None:
    n_chunks = None if text is None else quantize_cost.count_chunks(config, text)
    render.loading(config.source)
    started = time.perf_counter()
    plan, tensors, written = _watch(config, json)
    seconds = time.perf_counter() - started
    cost = None
    if text is not None and n_chunks is not None:
        cost = quantize_cost.measure(config, written.paths[0], text, n_chunks)
    following = ("llamakit", "generate", "-m", as_argument(written.paths[0]), "-p", "Once upon a time")
    if json:
        kl = {} if cost is None else {"kl": quantize_cost.as_json(cost)}
        render.print_json(_as_json(config, plan, tensors, written, seconds, following) | kl)
        return
    _report(plan, tensors)
    if cost is not None:
        quantize_cost.print_cost(cost)
    render.say(
        f"{', '.join(map(str, written.paths))}: {plan.type}, {render.human_bytes(plan.source_bytes)} -> "
        f"{render.human_bytes(written.n_bytes)}, {_bits(plan):.2f} bits per weight"
    )
    render.say(f"next: {shlex.join(following)}")
    render.log(f"quantized in {render.human_duration(seconds)}")


def _watch(config: QuantizeConfig, json: bool) -> tuple[QuantizePlan, list[QuantizedTensor], Quantized]:
    """Take the reports to their end: a bar on a terminal, else llama-quantize's line for each tensor."""
    from llamakit.conversion.quantize import Quantized, QuantizedTensor, QuantizePlan, quantize

    reports = quantize(config)
    plan = next(reports)
    assert isinstance(plan, QuantizePlan)
    _tell(plan)
    tensors: list[QuantizedTensor] = []
    started = time.perf_counter()
    with render.Progress("quantizing (MB)", total=round(plan.source_bytes / _MB), fields=("MB/s",)) as bar:
        for report in reports:
            if isinstance(report, Quantized):
                return plan, tensors, report
            if isinstance(report, QuantizedTensor):
                tensors.append(report)
                speed = report.bytes_done / _MB / max(1e-9, time.perf_counter() - started)
                bar.update(round(report.bytes_done / _MB), **{"MB/s": f"{speed:.0f}"})
                if not bar.visible and not json:
                    render.log(_line(report.index, len(plan.tensors), report.tensor))
    raise AssertionError("quantizing ends with Quantized")


def _tell(plan: QuantizePlan) -> None:
    for text in plan.notes:
        render.note(text)
    if plan.fallbacks:
        render.warn(f"{len(plan.fallbacks)} of {len(plan.tensors)} tensor(s) required fallback quantization")


def _line(index: int, count: int, tensor: PlannedTensor, end: str = "") -> str:
    """llama-quantize's line for a tensor."""
    from llamakit.conversion.quantize import type_name

    shape = ", ".join(f"{n:6d}" for n in (*reversed(tensor.shape), 1, 1, 1)[:4])
    head = f"[{index:4d}/{count:4d}] {tensor.name:<36} - [{shape}], type = {type_name(tensor.source_type):>6}, "
    if tensor.type is tensor.source_type:
        return f"{head}size = {tensor.n_bytes / _MIB:8.3f} MiB"
    middle = "" if end else f"converting to {_type_name(tensor)} .. "
    return f"{head}{middle}size = {tensor.source_bytes / _MIB:8.2f} MiB -> {tensor.n_bytes / _MIB:8.2f} MiB{end}"


def _type_name(tensor: PlannedTensor) -> str:
    from llamakit.conversion.quantize import type_name

    return type_name(tensor.type)


def _say_sizes(plan: QuantizePlan) -> None:
    for what, n_bytes in (("model", plan.source_bytes), ("quant", plan.n_bytes)):
        bits = 8 * n_bytes / max(1, plan.n_weights)
        render.say(f"{what} size  = {n_bytes / _MIB:8.2f} MiB ({bits:.2f} BPW)")


def _bits(plan: QuantizePlan) -> float:
    return 8 * plan.n_bytes / max(1, plan.n_weights)


def _report(plan: QuantizePlan, tensors: Sequence[QuantizedTensor]) -> None:
    """What is in the file, and the tensors that lost most."""
    counts = Counter(tensor.type for tensor in plan.tensors)
    sizes: Counter[Any] = Counter()
    for tensor in plan.tensors:
        sizes[tensor.type] += tensor.n_bytes
    rows = [(t.name, n, render.human_bytes(sizes[t])) for t, n in counts.most_common()]
    render.table(("type", "tensors", "size"), rows, right=(1, 2))
    worst = sorted((t for t in tensors if t.error), key=lambda t: -(t.error or 0))[:_N_WORST]
    if worst:
        render.say()
        rows = [(t.tensor.name, t.tensor.type.name, f"{t.error:.2%}") for t in worst]
        render.table(("most changed", "type", "error"), rows, right=(2,))
        render.say()


def _plan_json(plan: QuantizePlan) -> dict[str, Any]:
    return {
        "paths": plan.paths,
        "type": plan.type,
        "source_bytes": plan.source_bytes,
        "n_bytes": plan.n_bytes,
        "bits_per_weight": _bits(plan),
        "n_tensors": len(plan.tensors),
        "types": dict(Counter(tensor.type.name for tensor in plan.tensors)),
        "fallbacks": plan.fallbacks,
        "requantized": plan.requantized,
        "without_imatrix": plan.without_imatrix,
        "notes": plan.notes,
        "tensors": [_tensor_json(tensor) for tensor in plan.tensors],
    }


def _tensor_json(tensor: PlannedTensor) -> dict[str, Any]:
    types = {"source_type": tensor.source_type.name, "type": tensor.type.name}
    return {"name": tensor.name, "shape": tensor.shape, **types, "n_bytes": tensor.n_bytes}


def _as_json(
    config: QuantizeConfig,
    plan: QuantizePlan,
    tensors: Sequence[QuantizedTensor],
    written: Quantized,
    seconds: float,
    following: Sequence[str],
) -> dict[str, Any]:
    done = [{**_tensor_json(report.tensor), "error": report.error} for report in tensors]
    more = {"file_bytes": written.n_bytes, "seconds": seconds, "tensors": done, "next": [shlex.join(following)]}
    return {"source": config.source, **_plan_json(plan), **more}
