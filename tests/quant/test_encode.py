"""Every encoder against ggml and gguf.quants, byte for byte; errors, pieces, refusals."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st

from llamakit import native
from llamakit.errors import MismatchError, UnsupportedError
from llamakit.ggml import BLOCK_SIZES, GGMLType, row_bytes
from llamakit.quant import can_decode, can_encode, dequantize, encode, first_bad_block, quantize, uses_importance
from llamakit.quant.encode_search import nearest, root
from tests.oracle import ggml_quantize
from tests.quant.test_tensor import Allocations
from tests.quant.weights import importances, weights

NAMES = [
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
    "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4",
]  # fmt: skip
ENCODED = [GGMLType[name] for name in NAMES]
WEIGHTED = [t for t in ENCODED if t.name[0] in "QI" and t != GGMLType.Q8_0]
IN_GGUF = [GGMLType[n] for n in ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")]
SCALED = [t for t in ENCODED if BLOCK_SIZES[t][0] > 1]

#: the first 16 digits of sha256 of what ggml_quantize_chunk makes of all of `weights` but the huge ones, two rows of 512
#: each, without and with the importance "with zeros"
GOLDEN = {
    "F32": ("de3f38963afbeb86", "de3f38963afbeb86"),
    "F16": ("46bfb6b1315bcddd", "46bfb6b1315bcddd"),
    "BF16": ("8552388926f6d29c", "8552388926f6d29c"),
    "Q4_0": ("ed44aae4dc549728", "e19a3da9daa078c1"),
    "Q4_1": ("e1fcc7af5f35bdf1", "73dc962ab5512dec"),
    "Q5_0": ("b28512d323327cfb", "01c0d4e4f9fd0dc0"),
    "Q5_1": ("2f3c6da45f3978e7", "cded1d79f25a6d34"),
    "Q8_0": ("76e1aa4af57bb9f6", "76e1aa4af57bb9f6"),
    "Q2_K": ("6b330bdb04d4581e", "3dbe72b6d668475c"),
    "Q3_K": ("53660a70b3776455", "1c693a11b92aee89"),
    "Q4_K": ("e16c456c5e443e75", "49680f08cc35145a"),
    "Q5_K": ("a728e283ad25f7b2", "3ef11ae4126538bd"),
    "Q6_K": ("e41d422584099c3f", "fa8f2e6434a64590"),
    "IQ4_NL": ("ec65e3a494343ea6", "bd040917d1c52f82"),
    "IQ4_XS": ("2b6115f0c46d4d35", "2eb79f5598503294"),
    "TQ1_0": ("19bafe749d76073e", "19bafe749d76073e"),
    "TQ2_0": ("1a472c6141d2e138", "1a472c6141d2e138"),
    "MXFP4": ("410324100f82267b", "410324100f82267b"),
}

every_type = pytest.mark.parametrize("ggml_type", ENCODED, ids=lambda t: t.name)
scaled_type = pytest.mark.parametrize("ggml_type", SCALED, ids=lambda t: t.name)


def oracle(rows: np.ndarray, ggml_type: GGMLType, imatrix: np.ndarray | None = None) -> np.ndarray:
    return ggml_quantize(rows, ggml_type, row_bytes(rows.shape[1], ggml_type), imatrix)


def encoded(rows: np.ndarray, ggml_type: GGMLType, imatrix: np.ndarray | None = None) -> np.ndarray:
    importance = None if imatrix is None else torch.from_numpy(imatrix)
    return quantize(torch.from_numpy(rows), ggml_type, imatrix=importance).numpy()


@pytest.fixture(params=["torch", "native"])
def path(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways to the same bytes, where there is native code."""
    isas = native.status().isas
    if request.param == "native" and not isas:
        pytest.skip("no native code")
    with native.using(isas[-1] if request.param == "native" else None):
        yield


def golden_input() -> tuple[np.ndarray, np.ndarray]:
    rows = [rows for name, rows in weights(2, 512).items() if name != "huge"]
    return np.concatenate(rows), importances(512)["with zeros"]


def digest(packed: np.ndarray) -> str:
    return hashlib.sha256(packed.tobytes()).hexdigest()[:16]


def test_the_types_are_those_of_llama_quantize() -> None:
    assert {t for t in GGMLType if can_encode(t)} == set(ENCODED)
    assert {t for t in GGMLType if uses_importance(t)} == set(WEIGHTED)
    assert all(can_decode(t) for t in ENCODED)


@pytest.mark.usefixtures("path")
@every_type
def test_bytes_are_those_that_ggml_made(ggml_type: GGMLType) -> None:
    rows, importance = golden_input()
    without, with_importance = GOLDEN[ggml_type.name]
    assert digest(encoded(rows, ggml_type)) == without
    assert digest(encoded(rows, ggml_type, importance)) == with_importance


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("ggml_type", IN_GGUF, ids=lambda t: t.name)
def test_bytes_are_those_of_the_gguf_package(ggml_type: GGMLType) -> None:
    """But for the sign of a scale or minimum of zero, where it differs from ggml: hence no minus zeros."""
    kind = gguf.GGMLQuantizationType(int(ggml_type))
    for name, rows in weights(3, 512, seed=1).items():
        if name not in ("huge", "large", "about 1e-38", "subnormal", "the smallest"):
            with np.errstate(all="ignore"):
                rows = rows + np.float32(0)
                expected = quants.quantize(rows, kind).view(np.uint8)
            np.testing.assert_array_equal(encoded(rows, ggml_type), expected, err_msg=name)


@pytest.mark.usefixtures("path")
@pytest.mark.interop
@every_type
def test_bytes_are_those_of_ggml(ggml_type: GGMLType) -> None:
    sets = weights(3, 1024, seed=2)
    rows = np.concatenate(list(sets.values()))
    for imatrix_name, imatrix in {"none": None, **importances(1024, seed=2)}.items():
        if imatrix is None or uses_importance(ggml_type):
            got, expected = encoded(rows, ggml_type, imatrix), oracle(rows, ggml_type, imatrix)
            for number, name in enumerate(sets):
                part = slice(3 * number, 3 * number + 3)
                finite = _finite_blocks(expected[part], ggml_type)
                blocks = [packed[part].reshape(len(finite), -1)[finite] for packed in (got, expected)]
                np.testing.assert_array_equal(*blocks, err_msg=f"{name}, importance: {imatrix_name}")


def _finite_blocks(packed: np.ndarray, ggml_type: GGMLType) -> np.ndarray:
    """Which blocks have finite scales: the bits of a NaN are nobody's promise."""
    blocks = torch.from_numpy(packed).view(-1, 1, BLOCK_SIZES[ggml_type][1])
    if BLOCK_SIZES[ggml_type][0] == 1 or first_bad_block(blocks[:, 0], ggml_type) is None:
        return np.ones(len(blocks), dtype=bool)
    return np.array([first_bad_block(block, ggml_type) is None for block in blocks])


@pytest.mark.usefixtures("path")
@pytest.mark.interop
@pytest.mark.parametrize("ggml_type", WEIGHTED, ids=lambda t: t.name)
def test_bytes_are_those_of_ggml_for_many_weights(ggml_type: GGMLType) -> None:
    """More than one piece, and rows that end in the middle of one."""
    rows = np.random.default_rng(3).standard_normal((450, 768), dtype=np.float32)
    assert rows.size > encode._CHUNK_CPU
    np.testing.assert_array_equal(encoded(rows, ggml_type), oracle(rows, ggml_type))
    imatrix = importances(768)["uniform"]
    np.testing.assert_array_equal(encoded(rows, ggml_type, imatrix), oracle(rows, ggml_type, imatrix))


def rms_error(ggml_type: GGMLType) -> float:
    """The measure of llama.cpp's test-quantize-fns: the root of the sum of squares, over the count."""
    rows = (0.1 + 2 * torch.cos(torch.arange(4096, dtype=torch.float64))).float().view(1, -1)
    error = dequantize(quantize(rows, ggml_type), ggml_type) - rows
    return float(error.double().square().sum().sqrt()) / 4096


@scaled_type
def test_errors_are_within_the_bounds_of_llama_cpp(ggml_type: GGMLType) -> None:
    ternary = GGMLType.TQ1_0, GGMLType.TQ2_0
    bound = {GGMLType.Q2_K: 0.0075, GGMLType.Q3_K: 0.004}.get(ggml_type, 0.01 if ggml_type in ternary else 0.002)
    assert rms_error(ggml_type) < bound


def test_more_bits_give_smaller_errors() -> None:
    order = ["Q2_K", "Q3_K", "Q4_0", "Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0"]
    errors = [rms_error(GGMLType[name]) for name in order]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("ggml_type", WEIGHTED, ids=lambda t: t.name)
def test_an_importance_makes_the_weighted_error_smaller(ggml_type: GGMLType) -> None:
    rows = torch.from_numpy(weights(16, 512, seed=4)["heavy-tailed"])
    importance = torch.from_numpy(importances(512, seed=4)["with zeros"]) ** 4

    def weighted_error(packed: torch.Tensor) -> float:
        return float((importance * (dequantize(packed, ggml_type) - rows).square()).sum())

    assert weighted_error(quantize(rows, ggml_type, imatrix=importance)) < weighted_error(quantize(rows, ggml_type))


@pytest.mark.parametrize("ggml_type", [t for t in IN_GGUF if "_1" not in t.name], ids=lambda t: t.name)
def test_decoded_weights_are_encoded_to_the_same_bytes(ggml_type: GGMLType) -> None:
    for name in ("normal", "heavy-tailed", "sparse", "ties", "outliers"):
        packed = quantize(torch.from_numpy(weights(4, 512, seed=5)[name]), ggml_type)
        assert torch.equal(quantize(dequantize(packed, ggml_type), ggml_type), packed), name


@every_type
def test_zeros_stay_zeros(ggml_type: GGMLType) -> None:
    packed = quantize(torch.zeros(2, 512), ggml_type, imatrix=torch.ones(512))
    assert not dequantize(packed, ggml_type).any()


@pytest.mark.usefixtures("path")
@scaled_type
def test_pieces_and_strides_do_not_show(ggml_type: GGMLType, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, importance = (
        torch.from_numpy(weights(5, 768, seed=6)["normal"]),
        torch.from_numpy(importances(768)["uniform"]),
    )
    whole = quantize(rows, ggml_type, imatrix=importance)
    assert whole.shape == (5, row_bytes(768, ggml_type)) and whole.dtype == torch.uint8
    wide = torch.zeros(5, 1000)
    wide[:, 100:868] = rows
    assert torch.equal(quantize(wide[:, 100:868], ggml_type, imatrix=importance), whole)
    assert torch.equal(quantize(rows[2:4], ggml_type, imatrix=importance), whole[2:4])
    monkeypatch.setattr(encode, "_CHUNK_CPU", 17 * 32)  # 17 blocks or 2, and one at the end
    assert torch.equal(quantize(rows, ggml_type, imatrix=importance), whole)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q3_K", "Q4_K", "IQ4_XS"])
def test_temporaries_do_not_grow_with_the_matrix(name: str) -> None:
    rows = torch.zeros(512, 2**10)
    with Allocations(but=rows) as seen:
        quantize(rows, GGMLType[name], imatrix=torch.ones(2**10))
    assert seen.largest <= 4 << 20


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=32, max_size=32),
    st.sampled_from([t for t in SCALED if BLOCK_SIZES[t][0] == 32]),
)
def test_any_block_of_32_comes_back_within_its_steps(values: list[float], ggml_type: GGMLType) -> None:
    """No weight is further off than half a step of its type, float16's share included; none overflows unseen."""
    rows = torch.tensor([values])
    packed = quantize(rows, ggml_type)
    if first_bad_block(packed, ggml_type) is None:
        reach = {"Q4_0": 1 / 8, "Q4_1": 1 / 8, "Q5_0": 1 / 16, "Q5_1": 1 / 16, "Q8_0": 1 / 250, "MXFP4": 1 / 3}
        bound = float(rows.abs().max()) * reach.get(ggml_type.name, 1 / 3) + 1e-6
        assert float((dequantize(packed, ggml_type) - rows).abs().max()) <= bound


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([t for t in SCALED if BLOCK_SIZES[t][0] == 256]), st.booleans())
def test_blocks_do_not_depend_on_their_neighbours(seed: int, ggml_type: GGMLType, weighted: bool) -> None:
    generator = np.random.default_rng(seed)
    scale = np.ldexp(np.float32(1), generator.integers(-30, 10, (4, 16, 1)))
    rows = torch.from_numpy((generator.standard_normal((4, 16, 16)) * scale).astype(np.float32)).view(4, 256)
    importance = torch.from_numpy(importances(256, seed % 7)["with zeros"]) if weighted else None
    whole = quantize(rows, ggml_type, imatrix=importance)
    for number in range(4):
        assert torch.equal(quantize(rows[number : number + 1], ggml_type, imatrix=importance)[0], whole[number])


def test_no_rows_give_no_rows() -> None:
    assert quantize(torch.empty(0, 256), GGMLType.Q4_K).shape == (0, 144)
    assert quantize(torch.empty(3, 0), GGMLType.Q4_K).shape == (3, 0)


@pytest.mark.parametrize("name", ["IQ1_S", "IQ2_XXS", "IQ3_S", "NVFP4", "I32"])
def test_types_without_an_encoder_are_named(name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"^tensor type {name} has no encoder$"):
        quantize(torch.zeros(1, 256), GGMLType[name])


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(MismatchError, match="a row of 288 weights is not made of whole Q4_K blocks of 256 weights"):
        quantize(torch.zeros(1, 288), GGMLType.Q4_K)
    for rows in (torch.zeros(256), torch.zeros(1, 256, dtype=torch.float16)):
        with pytest.raises(MismatchError, match=r"expected 2 axes of torch\.float32"):
            quantize(rows, GGMLType.Q4_K)
    with pytest.raises(MismatchError, match=r"^the imatrix is \(32,\) torch\.float32 \(expected \(64,\) torch"):
        quantize(torch.zeros(1, 64), GGMLType.Q4_0, imatrix=torch.zeros(32))


def test_square_roots_are_correctly_rounded() -> None:
    """All mantissas of both parities of the exponent; torch.sqrt of float32 alone is not."""
    x = torch.arange(0x3F800000, 0x40800000, 61, dtype=torch.int32).view(torch.float32)
    assert torch.equal(root(x), torch.from_numpy(np.sqrt(x.numpy())))


def test_nearest_rounds_half_to_even_and_is_defined_everywhere() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 4194303.0, -4194303.5, torch.nan, torch.inf, -torch.inf])
    assert nearest(x).tolist() == [0, 2, 2, 0, -2, 4194303, -4194304, 0, -4194304, -4194304]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_type
def test_cuda_gives_the_same_bytes(ggml_type: GGMLType) -> None:
    rows, importance = (torch.from_numpy(values) for values in golden_input())
    for imatrix in (None, importance):
        got = quantize(rows.cuda(), ggml_type, imatrix=None if imatrix is None else imatrix.cuda())
        assert torch.equal(got.cpu(), quantize(rows, ggml_type, imatrix=imatrix))
