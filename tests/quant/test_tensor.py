"""Every decoder against gguf.quants, bit for bit; pieces, layouts, roundings and refusals of dequantize."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from torch.utils._python_dispatch import TorchDispatchMode

from llamakit.errors import MismatchError, UnsupportedError
from llamakit.ggml import BLOCK_SIZES, GGMLType, row_bytes
from llamakit.quant import QTensor, can_decode, dequantize
from llamakit.quant import tensor as module

UNDECODED = {GGMLType[name] for name in ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "Q1_0", "Q2_0")}
DECODED = [t for t in GGMLType if t not in UNDECODED]
QUANTIZED = [t for t in DECODED if BLOCK_SIZES[t][0] > 1]
QUANTIZABLE = [GGMLType[n] for n in ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")]

every_type = pytest.mark.parametrize("ggml_type", DECODED, ids=lambda t: t.name)
quantized_type = pytest.mark.parametrize("ggml_type", QUANTIZED, ids=lambda t: t.name)


def random_rows(ggml_type: GGMLType, n_rows: int, n_blocks: int, seed: int = 0) -> np.ndarray:
    """Any bytes at all: scales may be NaN, infinite, negative or subnormal."""
    shape = n_rows, n_blocks * BLOCK_SIZES[ggml_type][1]
    return np.random.default_rng([seed, ggml_type]).integers(0, 256, shape, dtype=np.uint8)


def oracle(data: np.ndarray, ggml_type: GGMLType) -> torch.Tensor:
    with np.errstate(all="ignore"):
        decoded = quants.dequantize(np.ascontiguousarray(data), gguf.GGMLQuantizationType(int(ggml_type)))
    return torch.from_numpy(np.array(decoded, dtype=np.float32))


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits, signed zeros too; any NaN equals any NaN."""
    word = torch.int32 if expected.dtype == torch.float32 else torch.int16
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert torch.equal(got.isnan(), expected.isnan())
    known = ~expected.isnan()
    assert torch.equal(got[known].view(word), expected[known].view(word))


def test_every_type_is_decoded_or_known_not_to_be() -> None:
    assert {t for t in GGMLType if can_decode(t)} == set(DECODED)


@every_type
@pytest.mark.parametrize(("n_rows", "n_blocks"), [(1, 1), (3, 5), (5, 2)])
def test_random_bytes_equal_the_oracle(ggml_type: GGMLType, n_rows: int, n_blocks: int) -> None:
    data = random_rows(ggml_type, n_rows, n_blocks)
    assert_same_bits(dequantize(torch.from_numpy(data), ggml_type), oracle(data, ggml_type))


@quantized_type
def test_many_random_blocks_equal_the_oracle(ggml_type: GGMLType) -> None:
    """Enough blocks to meet every exponent of a scale, and most rows of a grid."""
    data = random_rows(ggml_type, 4, 128 * 64 // BLOCK_SIZES[ggml_type][0], seed=1)
    assert_same_bits(dequantize(torch.from_numpy(data), ggml_type), oracle(data, ggml_type))


@pytest.mark.parametrize("ggml_type", QUANTIZABLE, ids=lambda t: t.name)
def test_quantized_normal_weights_come_back(ggml_type: GGMLType) -> None:
    weights = np.random.default_rng(2).standard_normal((7, 512), dtype=np.float32)
    data = quants.quantize(weights, gguf.GGMLQuantizationType(int(ggml_type))).view(np.uint8)
    decoded = dequantize(torch.from_numpy(data), ggml_type)
    assert_same_bits(decoded, oracle(data, ggml_type))
    assert torch.corrcoef(torch.stack([decoded.flatten(), torch.from_numpy(weights).flatten()]))[0, 1] > 0.6


@every_type
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_dtypes_are_rounded_once(ggml_type: GGMLType, dtype: torch.dtype) -> None:
    data = random_rows(ggml_type, 3, 4, seed=3)
    expected = oracle(data, ggml_type).to(dtype)
    assert_same_bits(dequantize(torch.from_numpy(data), ggml_type, dtype), expected)
    out = torch.empty_like(expected)
    assert dequantize(torch.from_numpy(data), ggml_type, out=out) is out
    assert_same_bits(out, expected)


@quantized_type
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pieces_do_not_show(ggml_type: GGMLType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.from_numpy(random_rows(ggml_type, 5, 3, seed=4))
    whole = dequantize(data, ggml_type, dtype)
    for blocks_at_once in (1, 2, 7, 15):
        monkeypatch.setattr(module, "_CHUNK_CPU", blocks_at_once * BLOCK_SIZES[ggml_type][0])
        assert_same_bits(dequantize(data, ggml_type, dtype), whole)


class Allocations(TorchDispatchMode):
    """The largest storage, in bytes, that an operator returned, but for the one to leave out."""

    def __init__(self, but: torch.Tensor) -> None:
        super().__init__()
        self.largest, self.but = 0, {but.untyped_storage().data_ptr()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.but:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q3_K", "Q4_K", "Q6_K", "IQ3_S"])
def test_temporaries_do_not_grow_with_the_matrix(name: str) -> None:
    data = torch.from_numpy(random_rows(GGMLType[name], 64, 2**15 // BLOCK_SIZES[GGMLType[name]][0]))
    out = torch.empty(64, 2**15, dtype=torch.bfloat16)
    with Allocations(but=out) as seen:
        seen.but.add(data.untyped_storage().data_ptr())
        dequantize(data, GGMLType[name], out=out)
    assert seen.largest <= 3 << 20


@every_type
def test_strided_and_unaligned_data(ggml_type: GGMLType) -> None:
    data = random_rows(ggml_type, 6, 4, seed=5)
    expected = oracle(data, ggml_type)
    n_bytes = data.shape[1]
    wide = torch.zeros(6, n_bytes + 3, dtype=torch.uint8)
    wide[:, 1 : 1 + n_bytes] = torch.from_numpy(data)
    assert_same_bits(dequantize(wide[:, 1 : 1 + n_bytes], ggml_type), expected)
    assert_same_bits(dequantize(wide[::2, 1 : 1 + n_bytes], ggml_type), expected[::2])
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), torch.from_numpy(data).flatten()])[1:].view(6, n_bytes)
    assert_same_bits(dequantize(shifted, ggml_type), expected)
    assert_same_bits(dequantize(torch.from_numpy(data)[1:], ggml_type), expected[1:])


@pytest.mark.parametrize("ggml_type", [GGMLType.F16, GGMLType.Q4_0, GGMLType.Q6_K], ids=lambda t: t.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_out_may_be_strided(ggml_type: GGMLType, dtype: torch.dtype) -> None:
    data = torch.from_numpy(random_rows(ggml_type, 6, 256 // min(256, BLOCK_SIZES[ggml_type][0]), seed=6))
    expected = dequantize(data, ggml_type, dtype)
    columns = torch.empty(expected.shape[1], 6, dtype=dtype).T
    assert_same_bits(dequantize(data, ggml_type, out=columns), expected)
    assert_same_bits(columns, expected)


def test_no_rows_give_no_rows() -> None:
    assert dequantize(torch.empty(0, 36, dtype=torch.uint8), GGMLType.Q4_0).shape == (0, 64)
    assert dequantize(torch.empty(2, 0, dtype=torch.uint8), GGMLType.Q4_0).shape == (2, 0)


@pytest.mark.parametrize("ggml_type", sorted(UNDECODED), ids=lambda t: t.name)
def test_types_without_a_decoder_are_named(ggml_type: GGMLType) -> None:
    with pytest.raises(UnsupportedError, match=rf"^tensor type {ggml_type.name} has no decoder$"):
        dequantize(torch.zeros(1, row_bytes(256, ggml_type), dtype=torch.uint8), ggml_type)


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(MismatchError, match="a packed row of 35 bytes is not made of whole Q4_0 blocks of 18 bytes"):
        dequantize(torch.zeros(2, 35, dtype=torch.uint8), GGMLType.Q4_0)
    for data in (torch.zeros(36, dtype=torch.uint8), torch.zeros(2, 36)):
        with pytest.raises(MismatchError, match=r"expected 2 axes of torch\.uint8"):
            dequantize(data, GGMLType.Q4_0)


@pytest.mark.parametrize("out", [torch.empty(2, 32), torch.empty(2, 64, dtype=torch.int32)], ids=["shape", "dtype"])
def test_an_out_that_does_not_fit_is_refused(out: torch.Tensor) -> None:
    with pytest.raises(MismatchError, match=r"^out is \(2, \d+\) .* \(expected a floating \(2, 64\) on cpu\)$"):
        dequantize(torch.zeros(2, 36, dtype=torch.uint8), GGMLType.Q4_0, out=out)


def test_a_tensor_keeps_its_shape() -> None:
    data = torch.from_numpy(random_rows(GGMLType.Q8_0, 6, 2))
    packed = QTensor(data, GGMLType.Q8_0, (2, 3, 64))
    assert_same_bits(packed.dequantize(torch.bfloat16), dequantize(data, GGMLType.Q8_0, torch.bfloat16).view(2, 3, 64))
    assert QTensor(data[:1], GGMLType.Q8_0, (64,)).dequantize().shape == (64,)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_type
def test_cuda_equals_the_oracle(ggml_type: GGMLType) -> None:
    data = random_rows(ggml_type, 5, 7, seed=7)
    assert_same_bits(dequantize(torch.from_numpy(data).cuda(), ggml_type).cpu(), oracle(data, ggml_type))
