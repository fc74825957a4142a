"""`llamakit merge`: put adapters into their base for good."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamakit.cli import render
from llamakit.cli.options import (
    FILES,
    LORA,
    OUTPUT,
    ConfigOption,
    ForceOption,
    JsonOption,
    OfflineOption,
    RopeFreqBaseOption,
    StatedCtxOption,
    ThreadsOption,
    VocabOption,
    listed,
    scaled_adapter,
    set_threads,
)
from llamakit.cli.sources import local
from llamakit.conversion.merge_config import MergeConfig
from llamakit.files import as_argument

if TYPE_CHECKING:
    from llamakit.conversion.merge import Merged, MergedTensor, Report

_MB = 1e6


def merge(
    *,
    model: Annotated[
        str,
        typer.Option(
            "-m", metavar="FILE", help="Base model: a path, hf:user/repo[:QUANT] or a URL.", rich_help_panel=FILES
        ),
    ],
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora",
            metavar="FILE",
            help="Adapter: GGUF, PEFT folder or old .bin; repeatable, or a list with commas.",
            rich_help_panel=LORA,
        ),
    ] = None,
    lora_scaled: Annotated[
        list[str] | None,
        typer.Option(
            "--lora-scaled",
            metavar="FILE:S",
            help="Adapter times S; added after those of --lora.",
            rich_help_panel=LORA,
        ),
    ] = None,
    force: ForceOption = MergeConfig.force,
    out: Annotated[
        Path, typer.Option("-o", metavar="FILE", help="The merged model, GGUF.", rich_help_panel=FILES)
    ] = MergeConfig.out,
    outtype: Annotated[
        str | None,
        typer.Option(
            "--outtype",
            metavar="TYPE",
            help="same: each tensor as in the base; f32, f16, bf16, q8_0 ...: every matrix.",
            show_default="changed tensors f16, or f32 where the base is; the others as they are",
            rich_help_panel=OUTPUT,
        ),
    ] = MergeConfig.outtype,
    vocab: VocabOption = None,
    ctx: StatedCtxOption = MergeConfig.ctx,
    rope_freq_base: RopeFreqBaseOption = MergeConfig.rope_freq_base,
    threads: ThreadsOption = None,
    offline: OfflineOption = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Put LoRA adapters into their base model for good, as llama-export-lora does, and write it as GGUF."""
    scaled = [scaled_adapter(item) for item in listed(lora_scaled or ())]
    wanted = MergeConfig(
        model=local(model, offline=offline),
        lora=tuple(local(item, offline=offline) for item in listed(lora or ())),
        lora_scaled=tuple((local(path, offline=offline), scale) for path, scale in scaled),
        out=out,
        outtype=outtype,
        force=force,
        vocab=local(vocab, offline=offline),
        ctx=ctx,
        rope_freq_base=rope_freq_base,
    )
    from llamakit.conversion.merge import merge

    set_threads(threads)
    render.loading(wanted.model)
    started = time.perf_counter()
    tensors, merged = _watch(merge(wanted))
    _finish(wanted, merged, tensors, time.perf_counter() - started, json)


def _watch(reports: Iterator[Report]) -> tuple[list[MergedTensor], Merged]:
    """Take the reports to their end, with notes and a progress bar on the way."""
    from llamakit.conversion.merge import Merged, MergedTensor, MergePlan

    tensors: list[MergedTensor] = []
    plan = next(reports)
    assert isinstance(plan, MergePlan)
    for note in plan.notes:
        render.note(note)
    for warning in plan.warnings:
        render.warn(warning)
    render.log(f"merging: {plan.n_changed} of {plan.n_tensors} tensors change, {render.human_bytes(plan.n_bytes)}")
    started = time.perf_counter()
    with render.Progress("merging (MB)", total=round(plan.n_bytes / _MB), fields=("MB/s",)) as bar:
        for report in reports:
            if isinstance(report, MergedTensor):
                tensors.append(report)
                speed = report.bytes_done / _MB / max(1e-9, time.perf_counter() - started)
                bar.update(round(report.bytes_done / _MB), **{"MB/s": f"{speed:.0f}"})
            elif isinstance(report, Merged):
                return tensors, report
    raise AssertionError("a merge ends with Merged")


def _finish(config: MergeConfig, merged: Merged, tensors: Sequence[MergedTensor], seconds: float, json: bool) -> None:
    following = ("llamakit", "generate", "-m", as_argument(merged.path), "-p", "Once upon a time")
    if json:
        render.print_json(_as_json(config, merged, tensors, seconds, following))
    else:
        changed = [tensor for tensor in tensors if tensor.changed]
        _table(changed if config.outtype == "same" else _by_kind(changed))
        size = render.human_bytes(merged.n_bytes)
        render.say(f"{merged.path}: {merged.n_changed} of {len(tensors)} tensors changed, {size}")
        render.say(f"next: {shlex.join(following)}")
        render.log(f"merged in {render.human_duration(seconds)}")
    _advise(config, merged)


def _advise(config: MergeConfig, merged: Merged) -> None:
    """Say so when rounding undid most of what the adapter changed."""
    from llamakit.conversion.merge import LITTLE

    if merged.kept is not None and merged.kept < LITTLE:
        render.warn(f"only {merged.kept:.0%} of the adapters' change survived the rounding to the file's types")
        wider = "leave --outtype out (changed tensors become f16)" if config.outtype else "--outtype f32 keeps it all"
        render.hint(f"{wider}, or keep the adapter beside the base: llamakit generate -m BASE --lora ADAPTER")


def _by_kind(tensors: Sequence[MergedTensor]) -> dict[str, list[MergedTensor]]:
    """Tensors of all layers that are alike, under their name without the layer's number."""
    kinds: dict[str, list[MergedTensor]] = {}
    for tensor in tensors:
        parts = tensor.name.split(".")
        kinds.setdefault(f"blk.*.{'.'.join(parts[2:])}" if parts[0] == "blk" else tensor.name, []).append(tensor)
    return kinds


def _table(tensors: Sequence[MergedTensor] | dict[str, list[MergedTensor]]) -> None:
    """A row for each tensor, or for each kind of them: the largest rmse, the smallest share."""
    groups = tensors if isinstance(tensors, dict) else {tensor.name: [tensor] for tensor in tensors}
    rows = [(name, len(group), _types(group), *_rounding(group)) for name, group in groups.items()]
    render.table(("tensor", "n", "type", "rmse", "change kept"), rows, right=(1, 3, 4))


def _types(group: Sequence[MergedTensor]) -> str:
    """F32, or Q4_0 -> F16."""
    found = {t.type.name if t.type is t.base_type else f"{t.base_type.name} -> {t.type.name}" for t in group}
    return ", ".join(sorted(found))


def _rounding(group: Sequence[MergedTensor]) -> tuple[str, str]:
    rmse = [t.rmse for t in group if t.rmse is not None]
    kept = [t.kept for t in group if t.kept is not None]
    return f"{max(rmse):.2e}" if rmse else "0", f"{min(kept):.1%}" if kept else "all"


def _as_json(
    config: MergeConfig, merged: Merged, tensors: Sequence[MergedTensor], seconds: float, following: Sequence[str]
) -> dict[str, Any]:
    return {
        "model": config.model,
        "adapters": [{"path": path, "scale": scale} for path, scale in config.adapters],
        "path": merged.path,
        "file_bytes": merged.n_bytes,
        "n_tensors": len(tensors),
        "n_changed": merged.n_changed,
        "change_kept": merged.kept,
        "seconds": seconds,
        "tensors": [
            {
                "name": t.name,
                "shape": t.shape,
                "base_type": t.base_type.name,
                "type": t.type.name,
                "changed": t.changed,
                "rmse": t.rmse,
                "change_kept": t.kept,
            }
            for t in tensors
        ],
        "next": [shlex.join(following)],
    }
