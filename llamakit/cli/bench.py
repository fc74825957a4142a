"""`llamakit bench`: tokens a second, with llama-bench's options and outputs, beside what the machine allows."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llamakit.cli import render
from llamakit.cli.bench_view import Format, Record, Report, Subject, record
from llamakit.cli.doctor import processor_name
from llamakit.cli.loading import LoadedEngine, load_engine
from llamakit.cli.options import (
    COMPUTE,
    FILES,
    OUTPUT,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    ForceOption,
    LoraOption,
    LoraScaledOption,
    OfflineOption,
    keep_freed_memory,
    listed,
    named_adapters,
)
from llamakit.cli.sources import local
from llamakit.errors import UsageError
from llamakit.inference.bench_config import BenchConfig

if TYPE_CHECKING:
    from llamakit.inference.bench import Phase, Result

_TESTS = "Tests"
_D = BenchConfig()
_ITEMSIZE = {"f32": 4, "f16": 2, "bf16": 2}
# first[-last[+step or *factor]], with commas between
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9})(?:([+*])(\d{1,9}))?)?")
_MOST_VALUES = 1000


def _many(*flags: str, text: str, default: str, panel: str = _TESTS) -> typer.models.OptionInfo:
    """An option that takes several numbers, as `512,1024` or `1-8*2` or given again."""
    return typer.Option(*flags, metavar="N,...", help=text, show_default=default, rich_help_panel=panel)


def _shown(default: tuple[int, ...]) -> str:
    return ",".join(map(str, default))


def bench(
    *,
    models: Annotated[
        list[str],
        typer.Option(
            "-m",
            metavar="FILE,...",
            help="Model: a path, hf:user/repo[:QUANT] or a URL; repeatable.",
            rich_help_panel=FILES,
        ),
    ],
    n_prompt: Annotated[
        list[str] | None, _many("-p", "--n-prompt", text="Prompt of so many tokens.", default=_shown(_D.n_prompt))
    ] = None,
    n_gen: Annotated[
        list[str] | None, _many("-n", "--n-gen", text="So many tokens one at a time.", default=_shown(_D.n_gen))
    ] = None,
    n_pg: Annotated[
        list[str] | None,
        typer.Option(
            "-pg", metavar="PP,TG", help="A prompt, then tokens, as one test; repeatable.", rich_help_panel=_TESTS
        ),
    ] = None,
    n_depth: Annotated[
        list[str] | None, _many("-d", "--n-depth", text="Tokens in the context beforehand.", default=_shown(_D.n_depth))
    ] = None,
    n_batch: Annotated[
        list[str] | None,
        _many("-b", "--batch-size", text="Prompt tokens handed over at once.", default=_shown(_D.n_batch)),
    ] = None,
    n_ubatch: Annotated[
        list[str] | None,
        _many("-ub", "--ubatch-size", text="Prompt tokens computed at once.", default=_shown(_D.n_ubatch)),
    ] = None,
    repetitions: Annotated[
        int, typer.Option("-r", "--repetitions", help="How often each test is measured.", rich_help_panel=_TESTS)
    ] = _D.repetitions,
    delay: Annotated[
        int, typer.Option("--delay", help="Seconds to wait before each test.", rich_help_panel=_TESTS)
    ] = _D.delay,
    no_warmup: Annotated[
        bool, typer.Option("--no-warmup", help="Measure at once, without a run beforehand.", rich_help_panel=_TESTS)
    ] = False,
    lora: LoraOption = None,
    lora_scaled: LoraScaledOption = None,
    force: ForceOption = False,
    threads: Annotated[
        list[str] | None, _many("-t", "--threads", text="CPU threads.", default="all cores", panel=COMPUTE)
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    output: Annotated[Format, typer.Option("-o", "--output", help="Format on stdout.", rich_help_panel=OUTPUT)] = "md",
    output_err: Annotated[
        Format | None,
        typer.Option("-oe", "--output-err", help="Format on stderr, too.", show_default="none", rich_help_panel=OUTPUT),
    ] = None,
    progress: Annotated[
        bool, typer.Option("--progress", help="Say on stderr what is running.", rich_help_panel=OUTPUT)
    ] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Say what the machine's limits are.", rich_help_panel=OUTPUT)
    ] = False,
    offline: OfflineOption = False,
    config: ConfigOption = None,
) -> None:
    """Measure prompts (pp) and generation (tg) in tokens a second, and as a share of what the machine allows."""
    wanted = BenchConfig(
        n_prompt=_numbers("-p", n_prompt, _D.n_prompt), n_gen=_numbers("-n", n_gen, _D.n_gen),
        n_pg=tuple(_pair(item) for item in n_pg or ()), n_depth=_numbers("-d", n_depth, _D.n_depth),
        n_batch=_numbers("-b", n_batch, _D.n_batch), n_ubatch=_numbers("-ub", n_ubatch, _D.n_ubatch),
        repetitions=repetitions, delay=delay, warmup=not no_warmup,
    )  # fmt: skip
    counts = _numbers("-t", threads, ()) or (None,)
    named = named_adapters(lora, lora_scaled)
    adapters = [(local(name, offline=offline), scale) for name, scale in named]
    paths = [local(name, offline=offline) for name in listed(models)]
    columns = tuple(name for name in ("n_batch", "n_ubatch") if getattr(wanted, name) != getattr(_D, name))
    columns += ("lora",) if adapters else ()
    reports = [(Report(output, columns=columns), sys.stdout)]
    reports += [(Report(output_err, columns=columns), sys.stderr)] if output_err else []
    keep_freed_memory()
    for path, count in product(paths, counts):
        loading = partial(load_engine, path, adapters=adapters, force=force, threads=count, device=device, dtype=dtype)
        for values in _records(loading, adapters, wanted, progress=progress, verbose=verbose):
            for report, stream in reports:
                stream.write(report.add(values))
                stream.flush()
    for report, stream in reports:
        stream.write(report.footer())


def _records(
    loading: Callable[[], LoadedEngine],
    adapters: Sequence[tuple[Path, float]],
    config: BenchConfig,
    *,
    progress: bool,
    verbose: bool,
) -> Iterator[Record]:
    """Every test of one model, which is in memory meanwhile."""
    loaded = loading()
    with loaded.file:
        subject = _subject(loaded, adapters, verbose)
        for result in _results(loaded, subject, config, progress):
            yield record(subject, result)


def _subject(loaded: LoadedEngine, adapters: Sequence[tuple[Path, float]], verbose: bool) -> Subject:
    import torch

    from llamakit.inference.engine import TorchEngine
    from llamakit.inference.limits import measure_limits

    limits = measure_limits(loaded.device)
    on_gpu = loaded.device == "cuda"
    if verbose:
        render.log(f"loaded in {loaded.load_s:.2f} s")
        render.log(f"limits: {limits.read_bandwidth / 1e9:.1f} GB/s, {limits.gemm_peak / 1e9:.0f} GFLOP/s")
    return Subject(
        file=loaded.file,
        backend="CUDA" if on_gpu else "CPU",
        processor=torch.cuda.get_device_name() if on_gpu else processor_name(),
        engine="torch" if isinstance(loaded.engine, TorchEngine) else "native",
        n_threads=torch.get_num_threads(),
        kv_type=loaded.kv_type,
        lora=",".join(f"{path}" if scale == 1 else f"{path}:{scale:g}" for path, scale in adapters),
        limits=limits,
    )


def _results(loaded: LoadedEngine, subject: Subject, config: BenchConfig, progress: bool) -> Iterator[Result]:
    from llamakit.inference.bench import Result, workload
    from llamakit.inference.bench import bench as measure

    work = workload(loaded.engine.config, loaded.file.tensors, kv_itemsize=_ITEMSIZE[subject.kv_type])
    for report in measure(loaded.engine, config, work, subject.limits):
        if isinstance(report, Result):
            yield report
        elif progress:
            render.log(f"bench: {loaded.file.path}: {_phase(report, config)}")


def _phase(phase: Phase, config: BenchConfig) -> str:
    run = f" {phase.run}/{config.repetitions}" if phase.name == "run" else ""
    return f"{phase.test.name}: {phase.name}{run}"


def _numbers(flag: str, items: Sequence[str] | None, default: tuple[int, ...]) -> tuple[int, ...]:
    """512,1024 and 1-8*2, as llama-bench reads them, one after the other. Raises UsageError naming the flag."""
    if not items:
        return default
    return tuple(number for item in items for part in item.split(",") for number in _range(flag, part))


def _range(flag: str, text: str) -> list[int]:
    match = _RANGE.fullmatch(text)
    if match is None:
        raise UsageError(f"{flag} is {text!r} (expected a number, first-last, first-last+step or first-last*factor)")
    first, last, step = int(match[1]), int(match[2] or match[1]), int(match[4] or 1)
    numbers = []
    while first <= last:
        numbers.append(first)
        following = first * step if match[3] == "*" else first + step
        if following <= first or len(numbers) > _MOST_VALUES:
            raise UsageError(f"{flag} {text} never ends or is too long (expected at most {_MOST_VALUES} numbers)")
        first = following
    return numbers


def _pair(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9}),(\d{1,9})", text)
    if match is None:
        raise UsageError(f"-pg is {text!r} (expected two numbers, such as 512,128)")
    return int(match[1]), int(match[2])
