"""Every gradient of a model whose weights are trained, against plain torch in float64, written out elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llamakit.formats.open import open_model
from llamakit.model import Llama
from llamakit.model.layers import Dropout
from llamakit.model.trained import TrainedEmbedding, TrainedLinear
from llamakit.training.blueprint import build, from_file
from llamakit.training.loss import Rows, backpropagate, evaluate_loss
from tests.tiny import cached_tiny_gguf
from tests.training.test_gradients import plain_loss

VARIANTS: list[dict[str, Any]] = [
    {},
    {"tied": True},
    {"biases": True},
    {"n_head_kv": 1},
    {"n_head_kv": 4, "n_layer": 1},
    {"head_dim": 8, "tied": True, "biases": True},
]


def setup(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Llama, dict[str, Tensor], Tensor, Tensor]:
    """A trained model of a tiny file, its parameters by name, tokens and targets (4, 9)."""
    with open_model(cached_tiny_gguf(**options)) as file:
        model, named = build(from_file(file, {}), torch.device("cpu"), dtype)
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(0, model.config.n_vocab, (2, 4, 9), generator=generator)
    return model.train(), named, tokens, targets


def gradients(
    model: Llama, named: dict[str, Tensor], tokens: Tensor, targets: Tensor, parts: int = 1
) -> tuple[float, dict[str, Tensor]]:
    for parameter in named.values():
        parameter.grad = None
    pieces = zip(tokens.tensor_split(parts), targets.tensor_split(parts), strict=True)
    total = sum(backpropagate(model, Rows(x, y), 1 / tokens.numel()) for x, y in pieces)
    found = {name: parameter.grad for name, parameter in named.items()}
    return total / tokens.numel(), {name: grad.clone() for name, grad in found.items() if grad is not None}


def expected(model: Llama, named: dict[str, Tensor], tokens: Tensor, targets: Tensor) -> tuple[float, dict[str, Any]]:
    weights = {name: p.detach().double().requires_grad_() for name, p in named.items()}
    loss = plain_loss(weights, model.config, {}, tokens, targets)
    loss.backward()
    return float(loss.detach()), {name: weight.grad for name, weight in weights.items()}


def assert_close(mine: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert mine.keys() == theirs.keys()
    for name, grad in theirs.items():
        scale = float(grad.abs().max())
        assert scale > 0, name
        assert float((mine[name].double() - grad).abs().max()) / scale < tolerance, name


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_gradient_is_plain_torchs(options: dict[str, Any]) -> None:
    model, named, tokens, targets = setup(**options)
    loss, mine = gradients(model, named, tokens, targets)
    wanted, theirs = expected(model, named, tokens, targets)
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert_close(mine, theirs, 2e-4)
    model.use_checkpointing = True
    again, recomputed = gradients(model, named, tokens, targets)
    assert again == loss
    assert_same(mine, recomputed)
    assert evaluate_loss(model, Rows(tokens, targets)) / tokens.numel() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_one_large_batch(tied: bool, parts: int) -> None:
    model, named, tokens, targets = setup(tied=tied)
    loss, whole = gradients(model, named, tokens, targets)
    again, accumulated = gradients(model, named, tokens, targets, parts)
    assert again == pytest.approx(loss, rel=1e-6)
    assert_close(accumulated, {name: grad.double() for name, grad in whole.items()}, 1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_added_to_those_that_are_there(checkpointing: bool) -> None:
    """As the optimizer has them: views of one vector, there from the start."""
    model, named, tokens, targets = setup(tied=True, biases=True)
    model.use_checkpointing = checkpointing
    _, once = gradients(model, named, tokens, targets)
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    backpropagate(model, Rows(tokens, targets), 1 / tokens.numel())
    added = {name: p.grad - 1 for name, p in named.items() if p.grad is not None}
    assert_close(added, {name: grad.double() for name, grad in once.items()}, 1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_dropout_masks_are_drawn_by_key_and_are_the_same_when_recomputed(tied: bool) -> None:
    model, named, tokens, targets = setup(tied=tied)
    plain, _ = gradients(model, named, tokens, targets)
    dropout = Dropout(0.3)
    model.drop(dropout)
    losses = []
    for key in (1, 2):
        dropout.key = key
        model.use_checkpointing = False
        loss, mine = gradients(model, named, tokens, targets)
        model.use_checkpointing = True
        again, recomputed = gradients(model, named, tokens, targets)
        assert again == loss
        assert_same(mine, recomputed)
        losses.append(loss)
    assert len({plain, *losses}) == 3
    model.eval()
    assert evaluate_loss(model, Rows(tokens, targets)) / tokens.numel() == pytest.approx(plain, rel=1e-6)


def test_a_gradient_with_dropout_is_the_slope_of_its_loss() -> None:
    """The masks of a key are fixed: a small move along the gradient changes the loss by its square length."""
    model, named, tokens, targets = setup(tied=True)
    dropout = Dropout(0.2)
    dropout.key = 5
    model.drop(dropout)
    _, mine = gradients(model, named, tokens, targets)
    squared = float(sum(grad.double().square().sum() for grad in mine.values()))
    step = 1e-2 / squared**0.5
    moved = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.add_(mine[name], alpha=sign * step)
        moved.append(gradients(model, named, tokens, targets)[0])
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.sub_(mine[name], alpha=sign * step)
    assert (moved[0] - moved[1]) / (2 * step) == pytest.approx(squared, rel=2e-3)


def test_bf16_is_near_float32() -> None:
    model, named, tokens, targets = setup(torch.bfloat16, tied=True, biases=True)
    loss, mine = gradients(model, named, tokens, targets)
    wanted, theirs = expected(model, named, tokens, targets)
    assert loss == pytest.approx(wanted, rel=0.02)
    for name, grad in theirs.items():
        assert mine[name].dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(mine[name].double().flatten(), grad.flatten(), 0) > 0.98, name


def test_the_rounded_weights_are_those_of_now() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 4))
    layer, x = TrainedLinear(weight), torch.randn(2, 4, dtype=torch.bfloat16)
    first = layer(x)
    assert torch.equal(first, x @ weight.detach().bfloat16().T)
    assert layer.rounded(torch.bfloat16) is layer.rounded(torch.bfloat16)
    assert layer.rounded(torch.float32).data_ptr() == weight.data_ptr()
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(layer(x), 2 * first)


def test_rows_that_a_batch_has_not_get_no_gradient() -> None:
    weight = torch.nn.Parameter(torch.randn(5, 4))
    TrainedEmbedding(weight, torch.float32)(torch.tensor([[1, 3, 1]])).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [[0.0] * 4, [2.0] * 4, [0.0] * 4, [1.0] * 4, [0.0] * 4]
