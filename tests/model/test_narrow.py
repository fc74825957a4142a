"""LoRA's small products: native code and torch against float64, to the last bit on any number of threads."""

from __future__ import annotations

import pytest
import torch

from llamakit.kernels import train
from llamakit.model.narrow import products_for
from llamakit.native import library

SHAPES = [(1, 1, 1), (5, 37, 3), (64, 32, 4), (67, 101, 7), (130, 70, 8)]


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(train, "usable", lambda *_tensors: False)
    elif library() is None:
        pytest.skip("no native library")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("n_rows", "n", "rank"), SHAPES)
def test_the_products_are_those_of_float64(kernels: str, n_rows: int, n: int, rank: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n_rows, n, generator=generator).to(dtype)
    y = torch.randn(n_rows, n, generator=generator).to(dtype)
    m, other = (torch.randn(rank, n, generator=generator) for _ in range(2))
    products = products_for(x, rank)
    kept = [products.kept(m), products.kept(other)]
    exact = [part.double() for part in kept]
    close = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.1}

    low = products.narrow((x, y), kept)
    wanted = torch.cat([x.double() @ exact[0].t(), y.double() @ exact[1].t()], dim=1)
    torch.testing.assert_close(low.double(), wanted, **close)
    part = low[:, rank:]  # its rows are apart
    torch.testing.assert_close(products.outer(part, x).double(), part.double().t() @ x.double(), **close)
    wanted = y.double() + part.double() @ exact[0]
    assert products.widen_(y, part, kept[0]) is y
    torch.testing.assert_close(y.double(), wanted, **close)


def test_native_sums_are_rounded_once() -> None:
    if library() is None:
        pytest.skip("no native library")
    x = torch.full((3, 40), 1.0, dtype=torch.bfloat16)
    m = torch.full((2, 40), 1.001)  # which bfloat16 does not have
    products = products_for(x, 2)
    low = products.narrow((x,), (products.kept(m),))
    assert low == pytest.approx(40.04, abs=1e-3)
    assert products.outer(low, x) == pytest.approx(3 * 40.04, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    if library() is None:
        pytest.skip("no native library")
    generator = torch.Generator().manual_seed(2)
    x, m = torch.randn(999, 333, generator=generator).to(dtype), torch.randn(5, 333, generator=generator)
    results, threads = [], torch.get_num_threads()
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            low = train.narrow(x, m, torch.empty(999, 5))
            results.append((low, train.outer(low, x), train.widen_(x.clone(), low, m)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_wide_pairs_are_torchs_work() -> None:
    x = torch.zeros(2, 64)
    assert type(products_for(x, 64)) is not type(products_for(x, 4)) or library() is None
