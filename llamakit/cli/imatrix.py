"""`llamakit imatrix`: which columns of each matrix matter, measured on a text; for `llamakit quantize --imatrix`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llamakit.cli import render
from llamakit.cli.options import (
    COMPUTE,
    DATA,
    FILES,
    OUTPUT,
    AccurateDtypeOption,
    ConfigOption,
    DeviceOption,
    JsonOption,
    OfflineOption,
    RopeFreqBaseOption,
    ThreadsOption,
    keep_freed_memory,
    listed,
    set_threads,
)
from llamakit.cli.sources import local
from llamakit.errors import UsageError
from llamakit.inference.imatrix_config import ImatrixConfig

if TYPE_CHECKING:
    from llamakit.inference.imatrix import Collected

_D = ImatrixConfig


def imatrix(
    model: Annotated[str | None, typer.Option("-m", metavar="FILE", help="The model.", rich_help_panel=FILES)] = None,
    file: Annotated[
        Path | None, typer.Option("-f", metavar="FILE", help="Text that it reads.", rich_help_panel=FILES)
    ] = None,
    output: Annotated[
        Path, typer.Option("-o", metavar="FILE", help="File to write.", rich_help_panel=FILES)
    ] = _D.output,
    in_files: Annotated[
        list[str] | None,
        typer.Option(
            "--in-file",
            metavar="FILE",
            help="Earlier result to add to; repeatable, or separated by commas.",
            rich_help_panel=FILES,
        ),
    ] = None,
    output_format: Annotated[
        Literal["gguf", "dat"] | None,
        typer.Option("--output-format", help="Format to write.", show_default="gguf", rich_help_panel=OUTPUT),
    ] = _D.output_format,
    ctx: Annotated[int, typer.Option("--ctx", "-c", help="Tokens of a chunk.", rich_help_panel=DATA)] = _D.ctx,
    batch: Annotated[
        int, typer.Option("--batch", "-b", help="Tokens computed at once, whole chunks.", rich_help_panel=COMPUTE)
    ] = _D.batch,
    chunk: Annotated[
        int, typer.Option("--chunk", help="Chunks to skip at the start.", rich_help_panel=DATA)
    ] = _D.chunk,
    chunks: Annotated[int, typer.Option("--chunks", help="Chunks at most; -1: all.", rich_help_panel=DATA)] = _D.chunks,
    output_frequency: Annotated[
        int, typer.Option("--output-frequency", help="Save every so many chunks.", rich_help_panel=OUTPUT)
    ] = _D.output_frequency,
    save_frequency: Annotated[
        int,
        typer.Option("--save-frequency", help="Keep a copy every so many chunks; 0: never.", rich_help_panel=OUTPUT),
    ] = _D.save_frequency,
    process_output: Annotated[
        bool, typer.Option("--process-output", help="Measure output.weight, too.", rich_help_panel=DATA)
    ] = _D.process_output,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Read special tokens in the text as such.", rich_help_panel=DATA)
    ] = _D.parse_special,
    ppl: Annotated[
        bool, typer.Option("--ppl/--no-ppl", help="Show the perplexity on the way.", rich_help_panel=OUTPUT)
    ] = _D.ppl,
    show_statistics: Annotated[
        bool, typer.Option("--show-statistics", help="Show what the --in-file says, and end.", rich_help_panel=OUTPUT)
    ] = False,
    rope_freq_base: RopeFreqBaseOption = _D.rope_freq_base,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    dtype: AccurateDtypeOption = "auto",
    offline: OfflineOption = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Measure on a text which columns of each matrix matter (an importance matrix), or merge such files."""
    earlier = tuple(Path(name) for name in listed(in_files or ()))
    if show_statistics:
        _show_statistics(earlier, json)
        return
    settings = ImatrixConfig(
        model=Path(local(model, offline=offline)) if model is not None else None,
        file=file, output=output, in_files=earlier, output_format=output_format, ctx=ctx, batch=batch,
        chunk=chunk, chunks=chunks, output_frequency=output_frequency, save_frequency=save_frequency,
        process_output=process_output, parse_special=parse_special, ppl=ppl, rope_freq_base=rope_freq_base,
    )  # fmt: skip
    keep_freed_memory()
    set_threads(threads)
    _measure(settings, device, dtype, json)


def _measure(settings: ImatrixConfig, device: str, dtype: str, json: bool) -> None:
    from llamakit.inference.imatrix import Chunk
    from llamakit.inference.imatrix import imatrix as measure
    from llamakit.model.device import measuring_dtype, resolve_device

    if settings.model is not None and settings.file is not None:
        render.loading(settings.model)
    running = settings.ppl and not json
    result: Collected | None = None
    with render.Progress("measuring", total=None, fields=("chunk",), beside_output=running) as bar:
        for report in measure(settings, device=str(resolve_device(device)), dtype=measuring_dtype(dtype)):
            if isinstance(report, Chunk):
                bar.update(report.done, chunk=f"{report.done} of {report.total}")
                if running:
                    render.stream(f"[{report.done}]{report.ppl:.4f},")
            else:
                result = report
    assert result is not None
    _print_result(result, json)


def _print_result(report: Collected, json: bool) -> None:
    if report.ppl is not None and not json:
        render.say("")
        error = f" +/- {report.ppl_error:.5f}" if report.ppl_error is not None else ""
        render.say(f"Final estimate: PPL = {report.ppl:.4f}{error}")
    for warning in report.warnings:
        render.warn(warning)
    if json:
        render.print_json(vars(report))
    else:
        render.say(f"{report.path}: {report.n_entries} entries from {report.chunk_count} chunks")


def _show_statistics(in_files: Sequence[Path], json: bool) -> None:
    from llamakit.formats.imatrix import read_imatrix
    from llamakit.inference.imatrix_statistics import layer_statistics, tensor_statistics

    if len(in_files) != 1:
        raise UsageError(f"--show-statistics is of one --in-file (got {len(in_files)})")
    rows = tensor_statistics(read_imatrix(in_files[0]))
    layers = layer_statistics(rows)
    if json:
        render.print_json({"tensors": [vars(row) for row in rows], "layers": [vars(row) for row in layers]})
        return
    _table(
        ("layer", "tensor", "Σ(act²)", "min", "max", "μ", "σ", "active", "N", "entropy", "E (norm)", "ZD", "cos sim"),
        [
            ("-" if r.layer is None else r.layer, r.tensor, f"{r.total:.2f}", f"{r.min:.4f}", f"{r.max:.4f}",
             f"{r.mean:.2f}", f"{r.stddev:.2f}", f"{r.active:.2%}", r.n, f"{r.entropy:.4f}", f"{r.entropy_norm:.2%}",
             f"{r.zd:.2%}", f"{r.cossim:.4f}")
            for r in rows
        ],
    )  # fmt: skip
    render.say("")
    means = [(row.layer, f"{row.total:.2f}", f"{row.zd:.4%}", f"{row.cossim:.4f}") for row in layers]
    _table(("layer", "μΣ(act²)", "μZD", "μ cos sim"), means)


def _table(headers: tuple[str, ...], rows: Sequence[Sequence[object]]) -> None:
    render.table(headers, rows, right=[i for i, header in enumerate(headers) if header != "tensor"])
