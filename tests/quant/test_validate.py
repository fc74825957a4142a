"""What must not get into a file."""

from __future__ import annotations

import pytest
import torch

from llamakit.errors import UnsupportedError
from llamakit.ggml import BLOCK_SIZES, GGMLType
from llamakit.quant import can_encode, first_bad_block, first_non_finite, quantize
from llamakit.quant import validate as module

ENCODED = [t for t in GGMLType if can_encode(t)]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_first_value_that_is_no_number_is_found(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 16)
    rows = torch.zeros(7, 8)
    assert first_non_finite(rows) is None
    rows[5, 3] = rows[5, 6] = rows[6, 0] = value
    assert first_non_finite(rows) == (5, 3)
    assert first_non_finite(torch.empty(0, 8)) is None and first_non_finite(torch.empty(3, 0)) is None


@pytest.mark.parametrize("ggml_type", ENCODED, ids=lambda t: t.name)
def test_the_first_block_whose_scale_overflowed_is_found(ggml_type: GGMLType) -> None:
    rows = torch.ones(3, 512)
    assert first_bad_block(quantize(rows, ggml_type), ggml_type) is None
    # MXFP4's exponents reach as far as float32's; what they lack is at the other end.
    rows[1, 256:] = {"MXFP4": 1.2e-38, "F32": torch.inf, "BF16": torch.inf}.get(ggml_type.name, 1e9)
    rows[2] = rows[1, 256]
    assert first_bad_block(quantize(rows, ggml_type), ggml_type) == (1, 256 // BLOCK_SIZES[ggml_type][0])


def test_types_that_are_not_made_are_named() -> None:
    with pytest.raises(UnsupportedError, match=r"^tensor type IQ2_S has no encoder$"):
        first_bad_block(torch.zeros(1, 82, dtype=torch.uint8), GGMLType.IQ2_S)
