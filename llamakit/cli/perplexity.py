"""`llamakit perplexity`: how well models predict a text, and how far they are from another; as llama-perplexity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llamakit.cli import perplexity_view, render
from llamakit.cli.options import (
    COMPUTE,
    DATA,
    FILES,
    LORA,
    OUTPUT,
    AccurateDtypeOption,
    ConfigOption,
    DeviceOption,
    ForceOption,
    JsonOption,
    LoraScaledOption,
    OfflineOption,
    RopeFreqBaseOption,
    ThreadsOption,
    keep_freed_memory,
    named_adapters,
    set_threads,
)
from llamakit.cli.perplexity_view import Row, Watch
from llamakit.cli.sources import local
from llamakit.errors import LlamakitError, UsageError
from llamakit.files import check_writable, is_same_file
from llamakit.inference.config import PerplexityConfig

if TYPE_CHECKING:
    import numpy as np

    from llamakit.formats.adapter import Adapter
    from llamakit.formats.base import ModelFile
    from llamakit.formats.kl_base import KLBaseFile
    from llamakit.inference.perplexity import Estimate
    from llamakit.model import Llama

_BASE = "Another model as the measure"
_LIMITS = "Limits"


def perplexity(
    *,
    models: Annotated[
        list[str],
        typer.Option(
            "-m",
            metavar="FILE",
            help="Model: a path, hf:user/repo[:QUANT] or a URL; repeat it for a comparison.",
            rich_help_panel=FILES,
        ),
    ],
    file: Annotated[Path | None, typer.Option("-f", metavar="FILE", help="The text.", rich_help_panel=FILES)] = None,
    ctx: Annotated[
        int, typer.Option("--ctx", "-c", help="Tokens of a chunk, whose second half is scored.", rich_help_panel=DATA)
    ] = PerplexityConfig.ctx,
    chunks: Annotated[
        int, typer.Option("--chunks", help="Chunks at most; -1: the whole text.", rich_help_panel=DATA)
    ] = PerplexityConfig.chunks,
    ppl_stride: Annotated[
        int,
        typer.Option(
            "--ppl-stride",
            metavar="N",
            help="Chunks overlap: each begins N tokens after the one before, and its last N are scored.",
            rich_help_panel=DATA,
        ),
    ] = PerplexityConfig.ppl_stride,
    kl_divergence_base: Annotated[
        Path | None,
        typer.Option(
            "--kl-divergence-base",
            metavar="FILE",
            help="Write the model's log-probabilities; with --kl-divergence read them.",
            rich_help_panel=_BASE,
        ),
    ] = None,
    kl_divergence: Annotated[
        bool,
        typer.Option(
            "--kl-divergence", help="Measure the divergence from the model of that file.", rich_help_panel=_BASE
        ),
    ] = False,
    max_ppl: Annotated[
        float | None,
        typer.Option(
            "--max-ppl", help="End with exit code 1 where a perplexity is above this.", rich_help_panel=_LIMITS
        ),
    ] = PerplexityConfig.max_ppl,
    max_rise: Annotated[
        float | None,
        typer.Option(
            "--max-rise",
            metavar="PERCENT",
            help="Likewise where one is more than this above the first, that of the first -m without an adapter.",
            rich_help_panel=_LIMITS,
        ),
    ] = PerplexityConfig.max_rise,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora", metavar="FILE", help="Adapter to measure beside the bare model; repeatable.", rich_help_panel=LORA
        ),
    ] = None,
    lora_scaled: LoraScaledOption = None,
    force: ForceOption = False,
    batch: Annotated[
        int,
        typer.Option("--batch", "-b", help="Tokens computed at once, in whole chunks.", rich_help_panel=COMPUTE),
    ] = PerplexityConfig.batch,
    rope_freq_base: RopeFreqBaseOption = PerplexityConfig.rope_freq_base,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    dtype: AccurateDtypeOption = "auto",
    ppl_output_type: Annotated[
        int,
        typer.Option(
            "--ppl-output-type", help="1: a line for each chunk, with the error so far.", rich_help_panel=OUTPUT
        ),
    ] = PerplexityConfig.ppl_output_type,
    offline: OfflineOption = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Measure how well a model predicts a text, or several models, or adapters on one; less is better."""
    wanted = PerplexityConfig(
        ctx=ctx,
        batch=batch,
        chunks=chunks,
        ppl_output_type=ppl_output_type,
        ppl_stride=ppl_stride,
        max_ppl=max_ppl,
        max_rise=max_rise,
        rope_freq_base=rope_freq_base,
    )
    named = named_adapters(lora, lora_scaled)
    n_results = len(models) * (1 + len(named))
    _check_base(kl_divergence_base, kl_divergence, file, n_results)
    if ppl_stride and kl_divergence_base is not None:
        raise UsageError("--ppl-stride does not go with --kl-divergence-base: its chunks stand side by side")
    if max_rise is not None and n_results == 1:
        raise UsageError(
            "--max-rise compares with the first result, and there is one", hint="give the base as first -m"
        )
    job = _Job(
        config=wanted,
        text=file,
        base_path=kl_divergence_base,
        read_base=kl_divergence,
        device=device,
        dtype=dtype,
        json=json,
        force=force,
    )
    adapters = [(local(name, offline=offline), scale) for name, scale in named]
    paths = [local(name, offline=offline) for name in models]
    if not kl_divergence:
        _check_target(kl_divergence_base, [*paths, *(path for path, _ in adapters), file])
    keep_freed_memory()
    set_threads(threads)
    with ExitStack() as stack:
        _run(job, paths, adapters, stack)


@dataclass(frozen=True)
class _Job:
    """What is measured on every model, and how."""

    config: PerplexityConfig
    text: Path | None
    base_path: Path | None
    read_base: bool
    device: str
    dtype: str
    json: bool
    force: bool


@dataclass(frozen=True)
class _Opened:
    """A model that is not loaded yet, and its adapters."""

    path: Path
    file: ModelFile
    adapters: list[tuple[Adapter, float]]


def _check_base(base: Path | None, read: bool, text: Path | None, n_results: int) -> None:
    """Refuse what cannot be meant, before anything is fetched."""
    if read and base is None:
        raise UsageError("--kl-divergence needs the log-probabilities of a model: --kl-divergence-base FILE")
    if not read and text is None:
        raise UsageError("missing option '-f'", hint="name the text to measure on: -f FILE")
    if base is not None and not read:
        if n_results > 1:
            reason = f"--kl-divergence-base writes the log-probabilities of one model (there are {n_results} results)"
            raise UsageError(reason, hint="give one -m; add --kl-divergence to read the file")
        check_writable(base)


def _check_target(target: Path | None, inputs: Sequence[Path | None]) -> None:
    """The file of log-probabilities may be none of those that it is made of."""
    for path in inputs:
        if target is not None and path is not None and is_same_file(target, path):
            raise UsageError("input and output files are the same", path=target, hint="name another output")


def _run(job: _Job, paths: Sequence[Path], adapters: Sequence[tuple[Path, float]], stack: ExitStack) -> None:
    """Open everything first, so that a mistake in the last name shows at once; then measure one after the other."""
    from llamakit.formats.kl_base import KLBaseFile

    base = KLBaseFile(job.base_path) if job.read_base and job.base_path is not None else None
    opened = [_open(job, path, adapters, stack) for path in paths]
    rows: list[Row] = []
    several = len(opened) * (1 + len(adapters)) > 1
    for model in opened:
        for row in _measure_model(job, model, base, several):
            rows.append(row)
            if not job.json:
                perplexity_view.print_result(row)
    if job.base_path is not None and not job.read_base:
        render.log(f"{job.base_path}: log-probabilities of {rows[0].result.chunk} chunks, for --kl-divergence")
    if job.json:
        render.print_json(perplexity_view.as_json(rows, job.text, base.n_ctx if base is not None else job.config.ctx))
    elif several:
        perplexity_view.print_comparison(rows)
    _check_limits(rows, job.config)


def _check_limits(rows: Sequence[Row], config: PerplexityConfig) -> None:
    """Raises LlamakitError for the first result above a limit; one that is no number is above any."""
    first = rows[0].ppl.value
    for row in rows:
        ppl = row.ppl.value
        if config.max_ppl is not None and not ppl <= config.max_ppl:
            raise LlamakitError(f"the perplexity is {ppl:.4f} (--max-ppl is {config.max_ppl:g})", path=row.name)
        if config.max_rise is not None and not ppl <= first * (1 + config.max_rise / 100):
            rise = f"{ppl:.4f}, {100 * (ppl / first - 1):+.2f} % against {rows[0].name}"
            raise LlamakitError(f"the perplexity is {rise} (--max-rise is {config.max_rise:g} %)", path=row.name)


def _open(job: _Job, path: Path, adapters: Sequence[tuple[Path, float]], stack: ExitStack) -> _Opened:
    from llamakit.formats.adapter import check_adapter, read_adapter
    from llamakit.formats.open import check_is_model, open_stated
    from llamakit.model import load_config

    stated = {"n_ctx": job.config.n_window, "rope_theta": job.config.rope_freq_base}
    file = stack.enter_context(open_stated(path, **stated))
    check_is_model(file)
    load_config(file)
    read = [(read_adapter(adapter, file), scale) for adapter, scale in adapters]
    for adapter, _ in read:
        for note in check_adapter(adapter, file, force=job.force):
            render.note(f"{adapter.path}: {note}")
    return _Opened(path, file, read)


def _measure_model(job: _Job, opened: _Opened, base: KLBaseFile | None, several: bool) -> Iterator[Row]:
    """The bare model, then each adapter on it; the model is loaded once."""
    from llamakit.model import attach, detach, load_model
    from llamakit.model.device import measuring_dtype, resolve_device

    tokens, seen = _chunks(job, opened.file, base)
    where = resolve_device(job.device)
    render.loading(opened.path)
    model = load_model(opened.file, device=where, dtype=measuring_dtype(job.dtype))
    _remarks(opened, tokens.shape[1], model)
    for adapter, scale in [(None, 1.0), *opened.adapters]:
        if adapter is not None:
            attach(model, adapter, scale)
        name = _name(opened.path, adapter, scale)
        if several and not job.json:
            render.heading(name)
        yield _measure(job, opened, model, tokens, seen, base, name, adapter, scale)
        detach(model)


def _chunks(job: _Job, file: ModelFile, base: KLBaseFile | None) -> tuple[np.ndarray, np.ndarray]:
    """(tokens as they stand in the text, tokens as the model sees them), both (B, T)."""
    from llamakit.inference.chunks import cut, overlapping, read_tokens, with_bos
    from llamakit.inference.divergence import check_same_text
    from llamakit.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(file)
    for warning in tokenizer.warnings:
        render.note(f"{file.path}: {warning}")
    if base is None:
        assert job.text is not None
        ids, config = read_tokens(job.text, tokenizer), job.config
        if config.ppl_stride:
            tokens = overlapping(ids, config.n_window, config.ppl_stride, chunks=config.chunks, source=job.text)
            return tokens, tokens
        tokens = cut(ids, config.ctx, chunks=config.chunks, source=job.text)
        return tokens, with_bos(tokens, tokenizer)
    if base.n_ctx > job.config.ctx:
        reason = f"was made with a context of {base.n_ctx} tokens (--ctx is {job.config.ctx})"
        raise UsageError(reason, path=base.path, hint=f"give -c {base.n_ctx}")
    if job.text is not None:
        check_same_text(base, read_tokens(job.text, tokenizer), job.text)
    tokens = base.tokens[: job.config.chunks if job.config.chunks > 0 else None]
    return tokens, with_bos(tokens, tokenizer)


def _remarks(opened: _Opened, n_ctx: int, model: Llama) -> None:
    if n_ctx > model.config.n_ctx:
        render.warn(f"{opened.path} was trained for {model.config.n_ctx} tokens, the context has {n_ctx}: -c")


def _name(path: Path, adapter: Adapter | None, scale: float) -> str:
    if adapter is None:
        return str(path)
    return str(adapter.path) if scale == 1 else f"{adapter.path}:{scale:g}"


def _measure(
    job: _Job,
    opened: _Opened,
    model: Llama,
    tokens: np.ndarray,
    seen: np.ndarray,
    base: KLBaseFile | None,
    name: str,
    adapter: Adapter | None,
    scale: float,
) -> Row:
    from llamakit.inference.divergence import DivergenceTable, divergence

    n_ctx = tokens.shape[1]
    result, table = None, None
    n_seq = max(1, job.config.batch // n_ctx)
    with Watch(len(tokens), n_ctx, n_seq, job.config, json=job.json) as watch:
        reports = (
            divergence(model, base, seen, job.config) if base is not None else _estimates(job, model, tokens, seen)
        )
        for report in reports:
            if isinstance(report, DivergenceTable):
                table = report
            else:
                result = report
                watch.show(report)
        seconds = watch.seconds
    assert result is not None
    n_bytes = sum(info.n_bytes for info in opened.file.tensors.values())
    n_weights = sum(info.n_elements for info in opened.file.tensors.values())
    lora = adapter.path if adapter is not None else None
    return Row(name, opened.path, lora, scale, n_bytes, 8 * n_bytes / n_weights, seconds, result, table)


def _estimates(job: _Job, model: Llama, tokens: np.ndarray, seen: np.ndarray) -> Iterator[Estimate]:
    """The estimates; on the way the file of log-probabilities, where one is wanted."""
    from llamakit.formats.kl_base import kl_base_writer
    from llamakit.inference.perplexity import perplexity as measure

    if job.base_path is None:
        yield from measure(model, tokens, seen, job.config)
        return
    with kl_base_writer(job.base_path, tokens, model.config.n_vocab) as write:
        yield from measure(model, tokens, seen, job.config, write=write)
