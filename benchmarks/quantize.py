"""How fast rows are encoded: native code and plain torch beside llama.cpp's `ggml_quantize_chunk`, type by type.

    python benchmarks/quantize.py [--threads 2] [--rows 1024] [--columns 4096] [--types Q4_0] [--imatrix] [--json F]

llama.cpp is the one in the xllamacpp wheel; its rows are divided among as many threads as ours have, as llama-quantize
does. In every round each of the three encodes the same rows, one after the other; `ratio` is the median over the rounds
of llama.cpp's time over ours, and `torch` that of torch's time over llama.cpp's. Torch, which is slow, gets fewer rows.
MB/s are float32 read. The bytes of all three are compared.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common  # before torch: it says how OpenMP's threads wait
import torch

from llamakit import native
from llamakit.ggml import BLOCK_SIZES, GGMLType, row_bytes
from llamakit.quant import can_encode, quantize, uses_importance

GOALS = {GGMLType.Q8_0: 1.5, GGMLType.Q4_0: 1.5}
_pointer, _i64 = ctypes.c_void_p, ctypes.c_int64


class Ggml:
    """ggml_quantize_chunk on several threads."""

    def __init__(self, threads: int) -> None:
        spec = importlib.util.find_spec("xllamacpp")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("llama.cpp is not installed: pip install xllamacpp")
        path = next(Path(next(iter(spec.submodule_search_locations))).glob("*.so"))
        library = ctypes.CDLL(str(path))
        self._encode = library.ggml_quantize_chunk
        self._encode.restype = ctypes.c_size_t
        self._encode.argtypes = [ctypes.c_int, _pointer, _pointer, _i64, _i64, _i64, _pointer]
        library.ggml_quantize_init(int(GGMLType.Q4_0))
        self._pool, self._threads = ThreadPoolExecutor(threads), threads

    def __call__(self, rows: torch.Tensor, ggml_type: GGMLType, imatrix: torch.Tensor | None) -> torch.Tensor:
        n_rows, n_in = rows.shape
        out = torch.empty(n_rows, row_bytes(n_in, ggml_type), dtype=torch.uint8)
        importance = None if imatrix is None else imatrix.data_ptr()

        def part(start: int, stop: int) -> None:
            self._encode(ggml_type, rows.data_ptr(), out.data_ptr(), start * n_in, stop - start, n_in, importance)

        if self._threads == 1:
            part(0, n_rows)
            return out
        step = max(1, n_rows // (8 * self._threads))
        starts = range(0, n_rows, step)
        list(self._pool.map(part, starts, [min(start + step, n_rows) for start in starts]))
        return out


def seconds(run: Callable[[], object]) -> float:
    """Duration of a call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(
    ggml: Ggml, rows: torch.Tensor, ggml_type: GGMLType, imatrix: torch.Tensor | None, rounds: int, torch_share: int
) -> dict[str, Any]:
    """One type: MB/s of each, the median ratios, whether the bytes agree."""
    few = rows[: max(1, len(rows) // torch_share)].contiguous()
    library = native.library()
    has_native = library is not None and library.can_encode(ggml_type)

    def plain() -> torch.Tensor:
        with native.using(None):
            return quantize(few, ggml_type, imatrix=imatrix)

    expected = ggml(rows, ggml_type, imatrix)
    equal = torch.equal(quantize(rows, ggml_type, imatrix=imatrix), expected)
    equal = equal and torch.equal(plain(), expected[: len(few)])
    times: dict[str, list[float]] = {"native": [], "ggml": [], "torch": []}
    for _ in range(rounds):
        times["ggml"].append(seconds(lambda: ggml(rows, ggml_type, imatrix)))
        if has_native:
            times["native"].append(seconds(lambda: quantize(rows, ggml_type, imatrix=imatrix)))
        times["torch"].append(seconds(plain) * len(rows) / len(few))
    size = rows.numel() * 4 / 1e6

    def ratio(over: str, under: str) -> float | None:
        pairs = zip(times[over], times[under], strict=False)
        quotients = [a / b for a, b in pairs]
        return statistics.median(quotients) if quotients else None

    return {
        "mb_per_s": {name: size / statistics.median(t) for name, t in times.items() if t},
        "ratio": ratio("ggml", "native"),
        "torch_times_slower": ratio("torch", "ggml"),
        "equal": equal,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_common_options(parser)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--torch-share", type=int, default=8, help="torch gets one row of so many (default: 8)")
    parser.add_argument("--types", default="", help="comma-separated, default all that have blocks and an encoder")
    parser.add_argument("--imatrix", action="store_true", help="with an importance matrix, where it matters")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    types = [GGMLType[name] for name in options.types.split(",") if name]
    types = types or [t for t in GGMLType if can_encode(t) and BLOCK_SIZES[t][0] > 1]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(options.rows, options.columns, generator=generator) * 0.02
    importance = torch.rand(options.columns, generator=generator) + 0.01 if options.imatrix else None
    library, ggml = native.library(), Ggml(options.threads)
    print(f"{options.rows} x {options.columns}, {options.threads} threads, native: {library and library.isa}")
    print(f"{common.machine()}\n")
    print(f"{'type':7} {'native':>8} {'ggml':>8} {'torch':>8}  MB/s   {'ratio':>6} {'goal':>5}  torch is slower  bytes")
    results = {}
    for ggml_type in types:
        imatrix = importance if uses_importance(ggml_type) else None
        found = measure(ggml, rows, ggml_type, imatrix, options.rounds, options.torch_share)
        results[ggml_type.name] = found
        speed, ratio = found["mb_per_s"], found["ratio"]
        shown = "-" if ratio is None else f"{ratio:.2f}"
        print(
            f"{ggml_type.name:7} {speed.get('native', 0):8.0f} {speed['ggml']:8.0f} {speed['torch']:8.0f}         "
            f"{shown:>6} {GOALS.get(ggml_type, 1.0):5.1f}  {found['torch_times_slower']:14.1f}x  "
            f"{'equal' if found['equal'] else 'DIFFERENT'}",
            flush=True,
        )
    common.write_json(options.json, results)


if __name__ == "__main__":
    main()
