from __future__ import annotations

import pytest

from llamakit.errors import UsageError
from llamakit.inference.bench_config import BenchConfig


def test_tests_come_in_llama_benchs_order() -> None:
    """llama-bench -p 8 -n 2 -pg 4,2 -d 0,4"""
    config = BenchConfig(n_prompt=(8,), n_gen=(2,), n_pg=((4, 2),), n_depth=(0, 4))
    assert [test.name for test in config.tests()] == [
        "pp8", "tg2", "pp4+tg2", "pp8 @ d4", "tg2 @ d4", "pp4+tg2 @ d4",
    ]  # fmt: skip


def test_none_is_left_out_and_every_combination_is_there() -> None:
    config = BenchConfig(n_prompt=(0, 8), n_gen=(0,), n_batch=(4, 64), n_ubatch=(2, 16))
    assert [(test.name, test.chunk) for test in config.tests()] == [("pp8", 2), ("pp8", 4), ("pp8", 2), ("pp8", 16)]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"n_prompt": (0,), "n_gen": (0,)}, "nothing is left to measure"),
        ({"n_prompt": (8, -1)}, "-p is -1 (expected 0 or more)"),
        ({"n_pg": ((8, -1),)}, "-pg is -1"),
        ({"n_ubatch": (0,)}, "-ub is 0 (expected 1 or more)"),
        ({"repetitions": 0}, "-r is 0 (expected 1 or more)"),
        ({"delay": -1}, "--delay is -1"),
    ],
)
def test_what_cannot_be(settings: dict, reason: str) -> None:
    with pytest.raises(UsageError) as error:
        BenchConfig(**settings)
    assert reason in str(error.value)
