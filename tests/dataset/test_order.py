"""The counter-based numbers and orders."""

import numpy as np
import pytest

from llamakit.dataset.order import SampleOrder, counter_normal, counter_uniform, shuffled


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_every_epoch_is_a_permutation(count):
    for epoch in (0, 1, 5):
        order = shuffled(42, epoch, np.arange(count), count)
        assert sorted(order.tolist()) == list(range(count))


def test_an_order_depends_on_seed_and_epoch_and_on_nothing_else():
    a = shuffled(1, 0, np.arange(500), 500)
    assert not np.array_equal(a, shuffled(2, 0, np.arange(500), 500))
    assert not np.array_equal(a, shuffled(1, 1, np.arange(500), 500))
    assert np.array_equal(a[100:200], shuffled(1, 0, np.arange(100, 200), 500))


def test_the_order_stays_what_it_was_in_earlier_versions():
    """Checkpoints of earlier versions go on with the same samples: these numbers must never change."""
    assert shuffled(42, 0, np.arange(8), 1000).tolist() == [842, 471, 848, 974, 808, 866, 911, 610]
    assert np.allclose(
        counter_uniform(42, 1, np.arange(3)),
        [0.03528070956364493, 0.1752956097232744, 0.5023013662446149],
        rtol=0,
        atol=1e-12,
    )


def test_the_positions_of_an_item_are_spread_evenly():
    count, epochs = 50, 2000
    places = np.array([np.flatnonzero(shuffled(7, e, np.arange(count), count) == 3)[0] for e in range(epochs)])
    histogram = np.bincount(places, minlength=count)
    chi_squared = ((histogram - epochs / count) ** 2 / (epochs / count)).sum()
    assert chi_squared < 100  # 49 degrees of freedom: 5 standard deviations above the mean


def test_normals_have_the_moments_of_a_normal_distribution():
    x = counter_normal(3, -5, 200_000)
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    assert abs((x**3).mean()) < 0.05 and abs((x**4).mean() - 3) < 0.06
    assert not np.array_equal(counter_normal(3, -6, 10), x[:10])


def test_an_epoch_ends_when_its_samples_are_used_up():
    order = SampleOrder(seed=1, count=10)
    assert not order.advance(9)
    assert (order.epoch, order.next_sample) == (0, 9)
    assert order.advance(4)
    assert (order.epoch, order.next_sample) == (1, 0)
    assert order.sample(3) == order.sample(13)
