"""How fast an engine is: llama-bench's tests (tools/llama-bench/llama-bench.cpp), each beside the machine's limit.

pp: a prompt of n tokens, whose last logits count; tg: n tokens one at a time; neither tokenizes nor samples.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llamakit.formats.base import TensorInfo
from llamakit.inference.bench_config import BenchConfig, BenchTest
from llamakit.inference.engine import Context, Engine
from llamakit.inference.limits import Limits
from llamakit.model import ModelConfig

PhaseName = Literal["warmup", "depth", "run"]


@dataclass(frozen=True)
class Phase:
    """What begins: a warm-up, the filling of the context up to the test's depth, or a run that counts (from 1)."""

    test: BenchTest
    name: PhaseName
    run: int = 0


@dataclass(frozen=True)
class Result:
    """One test: nanoseconds of each run; test_time: when it began, seconds since 1970; limit_ts: tokens a second that
    the machine's limits allow."""

    test: BenchTest
    samples_ns: tuple[int, ...]
    test_time: float
    limit_ts: float

    @property
    def samples_ts(self) -> list[float]:
        """Tokens a second of each run, prompt and generated ones together."""
        return [1e9 * (self.test.n_prompt + self.test.n_gen) / ns for ns in self.samples_ns]

    @property
    def avg_ns(self) -> int:
        """Mean of the runs."""
        return sum(self.samples_ns) // len(self.samples_ns)

    @property
    def stddev_ns(self) -> int:
        """Standard deviation of the sample; 0 for one run."""
        return int(_stdev(self.samples_ns))

    @property
    def avg_ts(self) -> float:
        """Mean of the runs."""
        return statistics.fmean(self.samples_ts)

    @property
    def stddev_ts(self) -> float:
        """Standard deviation of the sample; 0 for one run."""
        return _stdev(self.samples_ts)

    @property
    def limit_share(self) -> float:
        """What the mean is of the limit; above 1 where a small model is read from the processor's caches."""
        return self.avg_ts / self.limit_ts


@dataclass(frozen=True)
class Workload:
    """What a model costs: bytes of weights read for a token, as packed as in the file; bytes of keys and values for
    each token of the context; FLOP of the blocks' matrices and of the output matrix, and of attention for each pair
    of tokens."""

    weight_bytes: int
    kv_bytes: int
    block_flop: int
    output_flop: int
    pair_flop: int


def workload(config: ModelConfig, tensors: Mapping[str, TensorInfo], *, kv_itemsize: int) -> Workload:
    """The cost of a model by its hyper-parameters and tensors, without adapters. kv_itemsize: bytes of one number in
    the key-value cache."""
    # Of an embedding that is not the output matrix, too, a token reads one row.
    rows_only = set() if config.tied_output else {"token_embd.weight"}
    output_weights = config.n_vocab * config.n_embd
    return Workload(
        weight_bytes=sum(info.n_bytes for name, info in tensors.items() if name not in rows_only),
        kv_bytes=2 * config.n_layer * config.n_head_kv * config.head_dim * kv_itemsize,
        block_flop=2 * (config.n_matmul - output_weights),
        output_flop=2 * output_weights,
        pair_flop=4 * config.n_layer * config.n_head * config.head_dim,
    )


def limit_s(test: BenchTest, work: Workload, limits: Limits) -> float:
    """Seconds that a test takes at least: for every step the longer of reading its weights and keys and computing its
    products, nothing else being there to do."""
    seconds, n_past = 0.0, test.n_depth
    for n in _steps(test):
        n_bytes = work.weight_bytes + work.kv_bytes * (n_past + n)
        n_pairs = n * n_past + n * (n + 1) // 2
        flop = n * work.block_flop + work.output_flop + n_pairs * work.pair_flop
        seconds += max(n_bytes / limits.read_bandwidth, flop / limits.gemm_peak)
        n_past += n
    return seconds


def bench(engine: Engine, config: BenchConfig, work: Workload, limits: Limits) -> Iterator[Phase | Result]:
    """Every test of a configuration: what begins, and its result once it is measured. Waits config.delay seconds
    before each."""
    for test in config.tests():
        if config.delay:
            time.sleep(config.delay)
        yield from _measure(engine, test, config, limit_s(test, work, limits))


def _measure(engine: Engine, test: BenchTest, config: BenchConfig, least_s: float) -> Iterator[Phase | Result]:
    context, began = engine.context(test.n_depth + test.n_prompt + test.n_gen), time.time()
    tokens = _random_tokens(engine.config.n_vocab, context.n_ctx)
    if config.warmup:
        yield Phase(test, "warmup")
        # llama-bench warms up with the whole prompt and one generated token.
        _run(engine, context, [*_prompt_steps(test), *([1] if test.n_gen else [])], tokens)
        context.truncate(0)
    if test.n_depth:
        yield Phase(test, "depth")
        _run(engine, context, _chunks(test.n_depth, test.chunk), tokens)
    samples = []
    for i in range(config.repetitions):
        yield Phase(test, "run", i + 1)
        context.truncate(test.n_depth)
        started = time.perf_counter_ns()
        _run(engine, context, _steps(test), tokens)
        samples.append(time.perf_counter_ns() - started)
    yield Result(test, tuple(samples), began, (test.n_prompt + test.n_gen) / least_s)


def _run(engine: Engine, context: Context, steps: list[int], tokens: list[int]) -> None:
    """Feed the tokens that belong at the context's places, in steps of so many."""
    at = context.n_past
    for n in steps:
        engine.feed(context, tokens[at : at + n])
        at += n


def _steps(test: BenchTest) -> list[int]:
    """How many tokens are computed at once, from the first to the last."""
    return _prompt_steps(test) + [1] * test.n_gen


def _prompt_steps(test: BenchTest) -> list[int]:
    return _chunks(test.n_prompt, test.chunk)


def _chunks(n: int, size: int) -> list[int]:
    return [min(size, n - start) for start in range(0, n, size)]


def _random_tokens(n_vocab: int, n: int) -> list[int]:
    return np.random.default_rng(0).integers(n_vocab, size=n).tolist()


def _stdev(values: tuple[int, ...] | list[float]) -> float:
    return float(statistics.stdev(values)) if len(values) > 1 else 0.0
