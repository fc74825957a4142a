from __future__ import annotations

import numpy as np
import pytest
import torch

from llamakit.conversion import delta
from llamakit.conversion.delta import low_rank_product, vector_lanes


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="numpy has no 80-bit numbers here")
def test_fused_rounds_once() -> None:
    x, y, z = (normal(1 << 16, seed=seed) for seed in range(3))
    # 80 bits hold the product (48) and a sum whose parts are not far apart
    exact = x.numpy().astype(np.longdouble) * y.numpy() + z.numpy()
    assert np.array_equal(delta._fused(x, y, z).numpy(), exact.astype(np.float32))


def test_fused_where_two_roundings_differ() -> None:
    """z + x y lies 2^-70 below the middle of two float32: float64 rounds it into the middle, and then away."""
    x, y = torch.tensor([2**-12 * (1 + 2**-23)]), torch.tensor([2**-12 * (1 - 2**-23)])
    z = torch.tensor([1 + 2**-23])
    assert (z.double() + x.double() * y.double()).float().item() == 1 + 2**-22
    for sign in (1, -1):
        assert delta._fused(sign * x, y, sign * z).item() == sign * (1 + 2**-23)
    z = torch.tensor([1.0])
    assert delta._fused(x, y.new_tensor([2**-12]), z).item() == 1 + 2**-23  # just above the middle


@pytest.mark.parametrize("lanes", [8, 16])
def test_is_the_product(lanes: int) -> None:
    for rank in (*range(1, 20), 32, 40, 64, 72, 128):
        b, a = normal(23, rank), normal(rank, 44, seed=1)
        exact = b.double() @ a.double()
        assert torch.allclose(low_rank_product(b, a, n_out=23, lanes=lanes).double(), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("rank", [4, 7, 8, 12, 16, 32, 40])
def test_rows_do_not_depend_on_their_neighbours(rank: int) -> None:
    b, a = normal(30, rank), normal(rank, 101, seed=1)
    whole = low_rank_product(b, a, n_out=30, lanes=16)
    parts = [low_rank_product(b[i : i + 7], a, n_out=30, lanes=16) for i in range(0, 30, 7)]
    assert torch.equal(whole, torch.cat(parts))


def test_without_a_fused_addcmul_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = {rank: (normal(9, rank), normal(rank, 60, seed=1)) for rank in (3, 12, 32, 48)}
    first = {rank: low_rank_product(b, a, n_out=9, lanes=16) for rank, (b, a) in pairs.items()}
    monkeypatch.setattr(delta, "_addcmul_is_fused", lambda: False)
    for rank, (b, a) in pairs.items():
        assert torch.equal(low_rank_product(b, a, n_out=9, lanes=16), first[rank])


def test_the_order_is_ggml_s() -> None:
    """Numbers so different that each order of additions shows: 2^24 swallows a 1 that comes after it alone."""
    big, rank = 2.0**24, 16
    b = torch.ones(2, rank)
    a = torch.ones(rank, 4)
    a[0] = big
    # lanes: big + 1 (lane 8) is big, plus 2 (lanes 4, 12), plus 4, plus 8
    assert low_rank_product(b, a, n_out=2, lanes=16)[0, 0] == big + 14
    # one row: in order, every 1 is lost
    assert low_rank_product(b[:1], a, n_out=1, lanes=16)[0, 0] == big
    # 8 lanes hold 2 ranks each: big + 1, then 2, 4 and 8 more
    assert low_rank_product(b, a, n_out=2, lanes=8)[0, 0] == big + 14
    assert low_rank_product(b[:, :12], a[:12], n_out=2, lanes=8)[0, 0] == big
    assert vector_lanes() in (8, 16)
