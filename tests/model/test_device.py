"""What is computed where, and in what precision."""

from __future__ import annotations

import time

import pytest
import torch

from llamakit.model import device as device_module
from llamakit.model.device import faster_dtype, training_dtype

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def measured_again():
    """What another test has measured does not count, nor what this one pretends."""
    faster_dtype.cache_clear()
    yield
    faster_dtype.cache_clear()


@pytest.mark.parametrize("slow", [torch.bfloat16, torch.float32])
def test_auto_trains_in_what_the_processor_multiplies_faster(
    slow: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "has_fast_bf16", lambda _device: True)
    linear = torch.nn.functional.linear

    def timed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        end = time.thread_time() + (0.1 if a.dtype == slow else 0)
        while time.thread_time() < end:
            pass
        return linear(a, b)

    monkeypatch.setattr(torch.nn.functional, "linear", timed)
    assert {training_dtype("auto", CPU), slow} == {torch.bfloat16, torch.float32}
    assert training_dtype("bf16", CPU) == torch.bfloat16 and training_dtype("f32", CPU) == torch.float32


def test_bf16_that_is_emulated_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "has_fast_bf16", lambda _device: False)
    monkeypatch.setattr(torch.nn.functional, "linear", None)
    assert training_dtype("auto", CPU) == torch.float32
