from __future__ import annotations

import numpy as np
import pytest
import torch

from llamakit.formats.floats import from_float32, to_float32
from llamakit.ggml import GGMLType

TORCH = {GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}


def _values() -> np.ndarray:
    """Every kind of float32, every tie of BF16 and many of F16 among them."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    halves = [high | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    halves.append(np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32) ^ 0x1000)
    return np.concatenate(halves).view(np.float32).reshape(7, -1)


@pytest.mark.parametrize("kind", TORCH, ids=lambda kind: kind.name)
def test_as_torch_rounds(kind: GGMLType) -> None:
    values = _values()
    packed = from_float32(values, kind)
    expected = torch.from_numpy(values).to(TORCH[kind])
    back = to_float32(packed, kind)
    assert packed.shape == (7, 2 << 16) and back.shape == values.shape
    assert np.array_equal(back, expected.float().numpy(), equal_nan=True)
    numbers = ~np.isnan(values)
    assert np.array_equal(packed.view(np.int16)[numbers], expected.view(torch.int16).numpy()[numbers])


def test_float32_is_itself() -> None:
    values = _values()
    assert from_float32(values, GGMLType.F32).tobytes() == values.tobytes()
    assert to_float32(values.view(np.uint8), GGMLType.F32).tobytes() == values.tobytes()


def test_other_types() -> None:
    with pytest.raises(ValueError, match="Q8_0"):
        from_float32(np.zeros((1, 32), np.float32), GGMLType.Q8_0)
    with pytest.raises(ValueError, match="Q8_0"):
        to_float32(np.zeros((1, 34), np.uint8), GGMLType.Q8_0)
