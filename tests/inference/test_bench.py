from __future__ import annotations

import pytest

from llamakit.formats.gguf import GGUFFile
from llamakit.inference.bench import Phase, Result, Workload, bench, limit_s, workload
from llamakit.inference.bench_config import BenchConfig, BenchTest
from llamakit.inference.engine import TorchEngine
from llamakit.inference.limits import Limits
from llamakit.model import load_config, load_model
from tests.tiny import cached_tiny_gguf

LIMITS = Limits(read_bandwidth=1000, gemm_peak=100)
WORK = Workload(weight_bytes=500, kv_bytes=10, block_flop=30, output_flop=20, pair_flop=1)


def a_test(n_prompt: int, n_gen: int, n_depth: int = 0, chunk: int = 512) -> BenchTest:
    return BenchTest(n_prompt=n_prompt, n_gen=n_gen, n_depth=n_depth, n_batch=2048, n_ubatch=chunk)


def test_the_figures_of_a_result_are_llama_benchs() -> None:
    """One test of 8 tokens and two runs, as llama-bench printed it."""
    result = Result(a_test(8, 0), (2827980223, 331306231), 0.0, 26.975718)
    assert (result.avg_ns, result.stddev_ns) == (1579643227, 1765415110)
    assert [f"{ts:.6g}" for ts in result.samples_ts] == ["2.82887", "24.1468"]
    assert (f"{result.avg_ts:.6f}", f"{result.stddev_ts:.6f}") == ("13.487859", "15.074081")
    assert result.limit_share == pytest.approx(0.5)
    assert Result(a_test(8, 0), (5,), 0.0, 1.0).stddev_ts == 0


def test_the_limit_is_the_slower_of_reading_and_computing() -> None:
    # tg: 500 bytes of weights and 10 for each token of the context; 51 FLOP, 0.51 s, take as long at a depth of 0
    assert limit_s(a_test(0, 1), WORK, LIMITS) == pytest.approx(0.51)
    assert limit_s(a_test(0, 2, 100), WORK, LIMITS) == pytest.approx(1.51 + (30 + 20 + 102) / 100)
    # pp: ten tokens see 1 + 2 + ... + 10 others and themselves
    assert limit_s(a_test(10, 0), WORK, LIMITS) == pytest.approx((300 + 20 + 55) / 100)
    # in two steps: the output matrix twice
    assert limit_s(a_test(10, 0, chunk=5), WORK, LIMITS) == pytest.approx((300 + 40 + 55) / 100)
    assert limit_s(a_test(10, 1), WORK, LIMITS) == pytest.approx(3.75 + max(0.61, 0.61))


@pytest.mark.parametrize("tied", [False, True])
def test_the_workload_of_a_model(tied: bool) -> None:
    file = GGUFFile(cached_tiny_gguf(tied=tied))
    config = load_config(file)
    work = workload(config, file.tensors, kv_itemsize=2)
    n_bytes = {name: info.n_bytes for name, info in file.tensors.items()}
    assert work.weight_bytes == sum(n_bytes.values()) - (0 if tied else n_bytes["token_embd.weight"])
    assert work.output_flop == 2 * file.tensors["token_embd.weight"].n_elements
    blocks = [i.n_elements for n, i in file.tensors.items() if n.startswith("blk.") and len(i.shape) == 2]
    assert work.block_flop == 2 * sum(blocks)
    k = file.tensors["blk.0.attn_k.weight"].shape[0]
    assert work.kv_bytes == 2 * config.n_layer * k * 2
    assert work.pair_flop == 4 * config.n_layer * file.tensors["blk.0.attn_q.weight"].shape[0]


class Counting(TorchEngine):
    """Remembers (tokens in the context beforehand, tokens fed) of every step."""

    def __init__(self) -> None:
        super().__init__(load_model(GGUFFile(cached_tiny_gguf(n_ctx=64))))
        self.steps: list[tuple[int, int]] = []

    def feed(self, context, tokens):
        self.steps.append((context.n_past, len(tokens)))
        return super().feed(context, tokens)


def test_a_test_feeds_what_its_name_says() -> None:
    engine = Counting()
    config = BenchConfig(n_prompt=(), n_gen=(), n_pg=((5, 2),), n_depth=(3,), n_ubatch=(2,), repetitions=2)
    reports = list(bench(engine, config, WORK, LIMITS))
    warmup, depth = [(0, 2), (2, 2), (4, 1), (5, 1)], [(0, 2), (2, 1)]
    run = [(3, 2), (5, 2), (7, 1), (8, 1), (9, 1)]
    assert engine.steps == [*warmup, *depth, *run, *run]
    assert [(r.name, r.run) for r in reports if isinstance(r, Phase)] == [
        ("warmup", 0), ("depth", 0), ("run", 1), ("run", 2),
    ]  # fmt: skip
    (result,) = [r for r in reports if isinstance(r, Result)]
    assert len(result.samples_ns) == 2 and min(result.samples_ns) > 0
    assert result.limit_ts == pytest.approx(7 / limit_s(result.test, WORK, LIMITS))


def test_without_warming_up() -> None:
    engine = Counting()
    config = BenchConfig(n_prompt=(4,), n_gen=(2,), repetitions=1, warmup=False)
    assert [r.test.name for r in bench(engine, config, WORK, LIMITS) if isinstance(r, Result)] == ["pp4", "tg2"]
    assert engine.steps == [(0, 4), (0, 1), (1, 1)]
