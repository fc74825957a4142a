"""`llamakit imatrix`: which columns of each matrix matter, measured on a text; for `llamakit quantize --imatrix`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llamakit.cli import render
from llamakit.cli.options import (
    COMPUTE,
    DATA,
    FILES,
    OUTPUT,
    ConfigOption,
    DeviceOption,
    JsonOption,
    OfflineOption,
    ThreadsOption,
    keep_freed_memory,
    set_threads,
)
from llamakit.cli.sources import local
from llamakit.errors import UsageError

if TYPE_CHECKING:
    from llamakit.inference.imatrix import Collected
    from llamakit.inference.imatrix_config import ImatrixConfig


def imatrix(
    model: Annotated[str | None, typer.Option("-m", metavar="FILE", help="The model.", rich_help_panel=FILES)] = None,
    file: Annotated[
        Path | None, typer.Option("-f", metavar="FILE", help="Text that it reads.", rich_help_panel=FILES)
    ] = None,
    output: Annotated[Path, typer.Option("-o", metavar="FILE", help="File to write.", rich_help_panel=FILES)] = Path(
        "imatrix.gguf"
    ),
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
    ] = None,
    ctx: Annotated[int, typer.Option("--ctx", "-c", help="Tokens of a chunk.", rich_help_panel=DATA)] = 512,
    batch: Annotated[
        int, typer.Option("--batch", "-b", help="Tokens computed at once, whole chunks.", rich_help_panel=COMPUTE)
    ] = 2048,
    chunk: Annotated[int, typer.Option("--chunk", help="Chunks to skip at the start.", rich_help_panel=DATA)] = 0,
    chunks: Annotated[int, typer.Option("--chunks", help="Chunks at most; -1: all.", rich_help_panel=DATA)] = -1,
    output_frequency: Annotated[
        int, typer.Option("--output-frequency", help="Save every so many chunks.", rich_help_panel=OUTPUT)
    ] = 10,
    save_frequency: Annotated[
        int,
        typer.Option("--save-frequency", help="Keep a copy every so many chunks; 0: never.", rich_help_panel=OUTPUT),
    ] = 0,
    process_output: Annotated[
        bool, typer.Option("--process-output", help="Measure output.weight, too.", rich_help_panel=DATA)
    ] = False,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Read special tokens in the text as such.", rich_help_panel=DATA)
    ] = False,
    ppl: Annotated[
        bool, typer.Option("--ppl/--no-ppl", help="Show the perplexity on the way.", rich_help_panel=OUTPUT)
    ] = True,
    show_statistics: Annotated[
        bool, typer.Option("--show-statistics", help="Show what the --in-file says, and end.", rich_help_panel=OUTPUT)
    ] = False,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    dtype: Annotated[
        Literal["auto", "f32", "bf16"],
        typer.Option("--dtype", help="Type to compute in; auto is f32, for accuracy.", rich_help_panel=COMPUTE),
    ] = "auto",
    offline: OfflineOption = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Measure on a text which columns of each matrix matter (an importance matrix), or merge such files."""
    from llamakit.inference.imatrix_config import ImatrixConfig

    earlier = tuple(path for item in in_files or () for path in _paths(item))
    if show_statistics:
        _show_statistics(earlier, json)
        return
    settings = ImatrixConfig(
        model=Path(local(model, offline=offline)) if model is not None else None,
        file=file, output=output, in_files=earlier, output_format=output_format, ctx=ctx, batch=batch,
        chunk=chunk, chunks=chunks, output_frequency=output_frequency, save_frequency=save_frequency,
        process_output=process_output, parse_special=parse_special, ppl=ppl,
    )  # fmt: skip
    keep_freed_memory()
    set_threads(threads)
    _measure(settings, device, dtype, json)


def _paths(item: str) -> list[Path]:
    """One path, or several between commas; a comma may as well be part of a file's name."""
    return [Path(item)] if Path(item).exists() else [Path(part) for part in item.split(",")]


def _measure(settings: ImatrixConfig, device: str, dtype: str, json: bool) -> None:
    import torch

    from llamakit.formats.open import check_is_model, open_model
    from llamakit.inference.imatrix import Chunk
    from llamakit.inference.imatrix import imatrix as measure
    from llamakit.model.device import resolve_device

    if settings.model is not None and settings.file is not None:
        with open_model(settings.model) as file:
            check_is_model(file)
        render.loading(settings.model)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    running = settings.ppl and not json
    # A bar and figures that grow on the same terminal would write over each other.
    bar = (
        None
        if running and render.is_terminal(sys.stdout)
        else render.Progress("measuring", total=None, fields=("chunk",))
    )
    result: Collected | None = None
    with bar or nullcontext():
        for report in measure(settings, device=str(resolve_device(device)), dtype=kind):
            if isinstance(report, Chunk):
                if bar is not None:
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
