"""How fast packed weights are decoded, natively and by torch: a table of G weights/s per type.

    python benchmarks/dequantize.py [--threads 2] [--rows 4096] [--columns 4096] [--types Q4_0,Q6_K]

Medians over repeated decodes into the same `out`; native and torch take turns. `gain` is the median of their ratios.
`GB/s` is what native code reads and writes for bf16, `memory` its share of what the same threads read and write in the
best of several copies of 256 MB, which no cache holds. `fresh` is bf16 into a new result each time, which costs
the page faults of that result. `core` is bf16 on one thread by CPU time, the fastest of the repeats: the figure that
means something where other work shares the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from llamakit import native
from llamakit.ggml import GGMLType, row_bytes
from llamakit.quant import can_decode, dequantize

DENSE = {GGMLType.F32, GGMLType.F16, GGMLType.BF16}


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median duration of a call, after one that warms up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def core_seconds(run: Callable[[], object], repeats: int) -> float:
    """CPU time of the fastest call on one thread."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run()
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    torch.set_num_threads(n_threads)
    return min(times)


def in_turn(run: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Median seconds of a call with native code, without it, and the median of the ratios of the two."""

    def without() -> object:
        with native.using(None):
            return run()

    times = []
    for _ in range(repeats + 1):
        pair = []
        for call in (run, without):
            start = time.perf_counter()
            call()
            pair.append(time.perf_counter() - start)
        times.append(pair)
    ours, torchs = zip(*times[1:], strict=True)
    return statistics.median(ours), statistics.median(torchs), statistics.median(b / a for a, b in times[1:])


def copy_rate(repeats: int) -> float:
    """Bytes per second, read and written, of the fastest copy of 256 MB."""
    source, target = torch.ones(1 << 26), torch.empty(1 << 26)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--types", default="", help="comma-separated, default all that have a decoder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = [name for name in options.types.split(",") if name]
    types = [GGMLType[name] for name in names] or [t for t in GGMLType if can_decode(t) and t not in DENSE]

    shape = options.rows, options.columns
    n_weights = options.rows * options.columns
    generator = torch.Generator().manual_seed(0)
    bf16, f32 = torch.empty(shape, dtype=torch.bfloat16), torch.empty(shape)
    copy = copy_rate(options.repeats)
    library = native.library()
    print(
        f"{options.rows} x {options.columns}, {options.threads} threads, native: {library and library.isa}; "
        f"a copy reads and writes {copy / 1e9:.1f} GB/s\n"
    )
    heads = "".join(f"{head:>7}" for head in ("bf16", "torch", "gain", "f32", "fresh", "core"))
    print(f"{'type':8}{heads}  G weights/s    GB/s  memory")
    for ggml_type in types:
        n_bytes = row_bytes(options.columns, ggml_type)
        data = torch.randint(0, 256, (options.rows, n_bytes), dtype=torch.uint8, generator=generator)

        def rate(run: Callable[[], object]) -> float:
            return n_weights / seconds(run, options.repeats) / 1e9

        ours, torchs, gain = in_turn(lambda data=data, t=ggml_type: dequantize(data, t, out=bf16), options.repeats)
        fresh = rate(lambda data=data, t=ggml_type: dequantize(data, t, torch.bfloat16))
        to_f32 = rate(lambda data=data, t=ggml_type: dequantize(data, t, out=f32))
        seconds_on_core = core_seconds(lambda data=data, t=ggml_type: dequantize(data, t, out=bf16), options.repeats)
        traffic = (data.numel() + 2 * n_weights) / ours
        rates = (
            n_weights / ours / 1e9,
            n_weights / torchs / 1e9,
            gain,
            to_f32,
            fresh,
            n_weights / seconds_on_core / 1e9,
        )
        figures = "".join(f"{rate:7.2f}" for rate in rates)
        print(f"{ggml_type.name:8}{figures}             {traffic / 1e9:6.1f}  {traffic / copy:6.0%}")


if __name__ == "__main__":
    main()
