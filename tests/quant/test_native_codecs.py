"""Native code against the same in torch, byte for byte: every type, kind of weights and instruction set."""

from __future__ import annotations

import pytest
import torch

from llamakit import native
from llamakit.ggml import BLOCK_SIZES, GGMLType
from llamakit.quant import can_encode, dequantize, first_bad_block, quantize, uses_importance
from tests.quant.test_tensor import QUANTIZED, assert_same_bits, random_rows
from tests.quant.weights import importances, weights

SCALED = [t for t in GGMLType if can_encode(t) and BLOCK_SIZES[t][0] > 1]
ISAS = ("baseline", "avx2", "avx512")

each_isa = pytest.mark.parametrize("isa", ISAS)
scaled_type = pytest.mark.parametrize("ggml_type", SCALED, ids=lambda t: t.name)


@pytest.fixture(autouse=True)
def _needs_native_code(request: pytest.FixtureRequest) -> None:
    isa = request.node.callspec.params.get("isa", ISAS[0])
    if isa not in native.status().isas:
        pytest.skip(f"no native code for {isa}")
    ggml_type = request.node.callspec.params.get("ggml_type")
    with native.using(isa) as library:
        if ggml_type in SCALED and library is not None and not library.can_encode(ggml_type):
            pytest.skip("encoded by torch")


def encoded(isa: str | None, rows: torch.Tensor, ggml_type: GGMLType, imatrix: torch.Tensor | None) -> torch.Tensor:
    with native.using(isa):
        return quantize(rows, ggml_type, imatrix=imatrix)


@scaled_type
def test_bytes_are_those_of_torch(ggml_type: GGMLType) -> None:
    n_in = 512
    sets = weights(3, n_in, seed=11)
    rows = torch.cat([torch.from_numpy(values) for values in sets.values()])
    choices = [None]
    if uses_importance(ggml_type):
        choices += [torch.from_numpy(values) for values in importances(n_in, seed=11).values()]
    for number, imatrix in enumerate(choices):
        expected = encoded(None, rows, ggml_type, imatrix).view(-1, BLOCK_SIZES[ggml_type][1])
        # The bits of a NaN are nobody's promise, nor are those of a block whose scale is none.
        sound = torch.tensor([first_bad_block(block.view(1, -1), ggml_type) is None for block in expected])
        for isa in native.status().isas:
            got = encoded(isa, rows, ggml_type, imatrix).view(expected.shape)
            assert torch.equal(got[sound], expected[sound]), f"{isa}, importance {number}"


@each_isa
@pytest.mark.parametrize("n_rows", [1, 2, 7, 65])
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_show(isa: str, n_rows: int, threads: int) -> None:
    """More rows than a piece of work holds, and a last piece that is shorter."""
    rows, importance = torch.from_numpy(weights(n_rows, 4096, seed=12)["normal"]), torch.rand(4096)
    for ggml_type in (GGMLType.Q8_0, GGMLType.Q4_0, GGMLType.TQ2_0):
        alone = encoded(isa, rows, ggml_type, importance)
        torch.set_num_threads(threads)
        together = encoded(isa, rows, ggml_type, importance)
        torch.set_num_threads(1)
        assert torch.equal(together, alone)


@scaled_type
@each_isa
def test_nothing_is_written_beside_the_rows(ggml_type: GGMLType, isa: str) -> None:
    """An odd address, and guards on both sides."""
    rows = torch.from_numpy(weights(3, 256, seed=13)["heavy-tailed"])
    expected = encoded(isa, rows, ggml_type, None)
    room = torch.full((expected.numel() + 66,), 0xA5, dtype=torch.uint8)
    with native.using(isa) as library:
        assert library is not None
        shape = (rows.shape[0], rows.shape[1])
        library.encode(ggml_type, rows.data_ptr(), None, room.data_ptr() + 33, shape, expected.shape[1], 1)
    assert torch.equal(room[33:-33].view(expected.shape), expected)
    assert room[:33].eq(0xA5).all() and room[-33:].eq(0xA5).all()


@scaled_type
@each_isa
def test_values_that_are_no_numbers_do_no_harm(ggml_type: GGMLType, isa: str) -> None:
    """They are refused before; a library that is called with them all the same must end, with any bytes."""
    rows = torch.from_numpy(weights(1, 1024, seed=14)["normal"])
    rows[0, ::97], rows[0, 5::131], rows[0, 7::151] = torch.nan, torch.inf, -torch.inf
    for imatrix in (None, torch.ones(1024)):
        assert encoded(isa, rows, ggml_type, imatrix).shape[0] == 1


@each_isa
@pytest.mark.parametrize("where", [None, 0, 1, 4095, 4096, 9999])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_first_value_that_is_no_number_is_found(isa: str, where: int | None, value: float) -> None:
    rows = torch.zeros(10000)
    if where is not None:
        rows[where:] = value
    with native.using(isa) as library:
        assert library is not None
        assert library.first_non_finite(rows.data_ptr(), len(rows)) == (len(rows) if where is None else where)


@pytest.mark.parametrize("ggml_type", QUANTIZED, ids=lambda t: t.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decoded_weights_are_those_of_torch(ggml_type: GGMLType, dtype: torch.dtype) -> None:
    """Any bytes at all, so that scales are NaN, infinite and subnormal too."""
    data = torch.from_numpy(random_rows(ggml_type, 3, 128 * 64 // BLOCK_SIZES[ggml_type][0], seed=21))
    with native.using(None):
        expected = dequantize(data, ggml_type, dtype)
    for isa in native.status().isas:
        with native.using(isa):
            assert_same_bits(dequantize(data, ggml_type, dtype), expected)


@each_isa
@pytest.mark.parametrize("ggml_type", QUANTIZED, ids=lambda t: t.name)
def test_nothing_is_decoded_beside_the_blocks(isa: str, ggml_type: GGMLType) -> None:
    """Packed rows at an odd address, guards on both sides of what is written."""
    n_blocks, block = 3, BLOCK_SIZES[ggml_type]
    data = torch.from_numpy(random_rows(ggml_type, 1, n_blocks, seed=22))
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), data.flatten()])
    for dtype, bf16 in ((torch.float32, False), (torch.bfloat16, True)):
        with native.using(isa) as library:
            expected = dequantize(data, ggml_type, dtype)
            room = torch.full((expected.numel() + 32,), 7, dtype=dtype)
            assert library is not None
            out = room.data_ptr() + 16 * room.itemsize
            library.decode(ggml_type, shifted.data_ptr() + 1, out, n_blocks, block, 1, bf16=bf16)
        assert_same_bits(room[16:-16].view(expected.shape), expected)
        assert room[:16].eq(7).all() and room[-16:].eq(7).all()


@each_isa
@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "IQ3_S"])
def test_threads_do_not_show_in_decoded_weights(isa: str, name: str) -> None:
    data = torch.from_numpy(random_rows(GGMLType[name], 67, 4096 // BLOCK_SIZES[GGMLType[name]][0], seed=23))
    with native.using(isa):
        alone = dequantize(data, GGMLType[name])
        torch.set_num_threads(3)
        together = dequantize(data, GGMLType[name])
        torch.set_num_threads(1)
    assert_same_bits(together, alone)
