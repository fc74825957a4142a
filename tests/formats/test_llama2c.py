"""llama2.c files of the three versions, tied or not, and the sizes that they must have."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from llamakit.errors import FormatError
from llamakit.formats.llama2c import Llama2cFile, rope_base_of
from tests.formats.files import llama2c_file, llama2c_weights, quantized


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [0, 1, 2])
def test_every_tensor(tmp_path: Path, version: int, tied: bool) -> None:
    weights = llama2c_weights()
    with Llama2cFile(llama2c_file(tmp_path / "m.bin", version, tied)) as file:
        assert file.version == version
        assert set(file.tensors) == {n for n in weights if not tied or n != "output.weight"}
        for name, info in file.tensors.items():
            expected = weights[name]
            if version == 2 and expected.ndim == 2:
                expected = quantized(expected)[2]
            assert info.shape == expected.shape
            assert file.read(name).view("<f4").reshape(info.shape).tobytes() == expected.tobytes()
            half = file.read(name, info.n_rows // 2)
            assert half.tobytes() == file.read(name)[info.n_rows // 2 :].tobytes()


def test_metadata(tmp_path: Path) -> None:
    m = Llama2cFile(llama2c_file(tmp_path / "m.bin")).metadata
    assert (m["general.architecture"], m["llama.block_count"], m["llama.vocab_size"]) == ("llama", 2, 10)
    assert (m["llama.attention.head_count"], m["llama.attention.head_count_kv"]) == (2, 1)
    assert (m["llama.rope.dimension_count"], m["llama.context_length"]) == (4, 6)
    assert (m["llama.embedding_length"], m["llama.feed_forward_length"]) == (8, 12)
    assert (m["llama.attention.layer_norm_rms_epsilon"], m["llama.rope.freq_base"]) == (1e-5, 10000.0)


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("extra", [-1, 1])
def test_one_byte_off(tmp_path: Path, version: int, extra: int) -> None:
    path = llama2c_file(tmp_path / "m.bin", version)
    whole = path.read_bytes()
    path.write_bytes(whole[:extra] if extra < 0 else whole + b"\0")
    with pytest.raises(FormatError, match=rf"expected {len(whole)} bytes, got {len(whole) + extra}"):
        Llama2cFile(path)


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (4, 3, "unknown version 3"),
        (8, 0, "dim cannot be 0"),
        (8, -8, "dim cannot be -8"),
        (16, 1 << 30, "n_layers cannot be"),
        (20, 3, "dim 8 does not divide into 3 heads"),
        (24, 5, r"n_kv_heads cannot be 5 \(expected 1 to 2\)"),
        (28, 0, "vocab_size cannot be 0"),
        (28, -(2**31), "vocab_size cannot be"),
        (32, -1, "max_seq_len cannot be -1"),
        (37, 0, "group size 0"),
        (37, 3, "group size 3 does not divide"),
    ],
)
def test_impossible_headers(tmp_path: Path, at: int, value: int, reason: str) -> None:
    path = llama2c_file(tmp_path / "m.bin", 2)
    raw = bytearray(path.read_bytes())
    struct.pack_into("<i", raw, at, value)
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=f"@0: broken llama2.c header: {reason}"):
        Llama2cFile(path)


def test_without_a_header(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    for raw in (b"", bytes(28), np.ones(7, "<i4").tobytes()[:27], b"24ka" + bytes(20)):
        path.write_bytes(raw)
        with pytest.raises(FormatError, match="no sensible header"):
            Llama2cFile(path)


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    with Llama2cFile(llama2c_file(tmp_path / "m.bin")) as file:
        with pytest.raises(ValueError, match="which has 10"):
            file.read("token_embd.weight", 3, 11)
        with pytest.raises(KeyError):
            file.read("output.weight")


def rope_row(base: float, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Position 1 of llama2.c's tables (model.py, precompute_freqs_cis), rounded to float32 once."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    angles = (base ** -exponents.astype(np.float64)).astype(np.float32).astype(np.float64)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@pytest.mark.parametrize("head_dim", [4, 6, 48, 128])
@pytest.mark.parametrize("base", [10000.0, 500000.0, 1e6, 1e7, 81920.0, 26000.5, 1234567.0, 100.0, 1.0])
def test_the_base_of_a_rotary_table(head_dim: int, base: float) -> None:
    assert rope_base_of(*rope_row(base, head_dim)) == base


def test_tables_that_tell_no_base() -> None:
    cos, sin = rope_row(10000.0, 16)
    assert rope_base_of(cos, sin) == 10000.0
    scaled = (np.arccos(cos.astype(np.float64)) / 4) ** 1.1
    for row in (
        (cos[:1], sin[:1]),  # one angle, always 1
        (np.zeros_like(cos), np.zeros_like(sin)),
        (np.full_like(cos, np.nan), np.full_like(sin, np.nan)),
        (np.full_like(cos, np.inf), sin),
        (np.zeros_like(cos), np.full_like(sin, 1e-40)),
        (np.cos(scaled).astype(np.float32), np.sin(scaled).astype(np.float32)),
    ):
        assert rope_base_of(*row) is None
