"""The schedule and AdamW, against the definitions."""

import itertools
import math

import numpy as np
import pytest
import torch

from llamakit.training.config import FinetuneConfig
from llamakit.training.optim import AdamW, clip_gradient, schedule


def test_the_warmup_begins_with_an_effect_and_ends_without_a_jump():
    config = FinetuneConfig(warmup=10, cos_decay_steps=100)
    factors = [schedule(i, config) for i in range(1, 200)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == 1.0
    assert all(abs(a - b) <= 0.1 + 1e-9 for a, b in itertools.pairwise(factors))
    assert factors[10] == pytest.approx(0.9 * 0.5 * (1 + math.cos(math.pi / 100)) + 0.1)
    assert factors[-1] == pytest.approx(0.1)


def test_without_a_warmup_the_first_step_is_on_the_curve():
    assert schedule(1, FinetuneConfig(warmup=0)) == pytest.approx(1.0, abs=1e-4)


def test_restarts_stretch_their_periods():
    config = FinetuneConfig(warmup=0, cos_decay_steps=10, cos_decay_restart=2.0, enable_restart=True, cos_decay_min=0.0)
    factors = [schedule(i, config) for i in range(1, 71)]
    assert factors[9] == pytest.approx(0) and factors[29] == pytest.approx(0) and factors[69] == pytest.approx(0)
    assert factors[10] > 0.9 and factors[30] > 0.9


def test_the_least_rate_holds_in_the_warmup_too():
    config = FinetuneConfig(adam_alpha=1e-3, adam_min_alpha=5e-4, warmup=10)
    assert schedule(1, config) * 1e-3 == pytest.approx(5e-4 + 0.1 * 5e-4)


def test_updates_are_those_of_ggmls_adam():
    torch.manual_seed(0)
    config = FinetuneConfig(adam_alpha=1e-2, adam_decay=0.1)
    matrix = torch.randn(3, 4, requires_grad=True)
    single = torch.randn(1, 1, requires_grad=True)  # one dimension in ggml: no decay
    x = {p: p.detach().double().numpy().copy() for p in (matrix, single)}
    m = {p: np.zeros_like(v) for p, v in x.items()}
    v = {p: np.zeros_like(w) for p, w in x.items()}
    optimizer = AdamW([matrix, single], config)
    for t in range(1, 6):
        for p in (matrix, single):
            p.grad.copy_(torch.randn(p.shape))
            g = p.grad.double().numpy()
            m[p] = 0.9 * m[p] + 0.1 * g
            v[p] = 0.999 * v[p] + 0.001 * g * g
            decay = 1 - 0.1 * 1e-2 if p is matrix else 1.0
            x[p] = x[p] * decay - 1e-2 / (1 - 0.9**t) * m[p] / (np.sqrt(v[p] / (1 - 0.999**t)) + 1e-8)
        optimizer.step(1e-2)
        for p, moments in zip((matrix, single), optimizer.moments(), strict=True):
            assert np.allclose(p.detach().numpy(), x[p], rtol=1e-5, atol=1e-6)
            assert np.allclose(moments[0], m[p], rtol=1e-5) and np.allclose(moments[1], v[p], rtol=1e-5)


def test_clipping_scales_the_whole_gradient():
    gradient = torch.full((5,), 2.0)
    assert clip_gradient(gradient, 1.0) == pytest.approx(math.sqrt(20))
    assert float(gradient.norm()) == pytest.approx(1.0)
    assert clip_gradient(gradient, 5.0) == pytest.approx(1.0)
    assert float(gradient[0]) == pytest.approx(2 / math.sqrt(20))
    assert clip_gradient(gradient, 0.0) == pytest.approx(1.0)
