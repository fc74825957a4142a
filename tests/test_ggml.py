"""The numbers of the specification against the gguf package's."""

from __future__ import annotations

import gguf
import pytest
from gguf.constants import GGML_QUANT_SIZES

from llamakit.ggml import BLOCK_SIZES, FILE_TYPES, GGMLType, row_bytes

# ggml-common.h: two float16 and 32 int8; gguf counts two float32. No file stores Q8_1, it is for activations.
DIFFERENT = {"Q8_1": (32, 36)}


@pytest.mark.parametrize("theirs", list(GGML_QUANT_SIZES), ids=lambda t: t.name)
def test_types_and_blocks_are_ggufs(theirs: gguf.GGMLQuantizationType) -> None:
    ours = GGMLType(theirs.value)
    assert ours.name == theirs.name
    assert BLOCK_SIZES[ours] == DIFFERENT.get(ours.name, GGML_QUANT_SIZES[theirs])


def test_every_type_has_a_block() -> None:
    assert set(BLOCK_SIZES) == set(GGMLType)


def test_file_types_are_ggufs() -> None:
    for theirs in gguf.LlamaFileType:
        if theirs.value in FILE_TYPES:
            assert theirs.name.removeprefix("MOSTLY_").removeprefix("ALL_") == FILE_TYPES[theirs.value]


def test_row_bytes() -> None:
    assert row_bytes(64, GGMLType.Q4_1) == 40
    assert row_bytes(0, GGMLType.Q6_K) == 0
