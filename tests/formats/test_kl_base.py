"""llama-perplexity's file of log-probabilities: what is written is read, and what is broken is refused."""

import struct

import numpy as np
import pytest

from llamakit.errors import FormatError, SaveError, UsageError
from llamakit.formats.kl_base import KLBaseFile, kl_base_writer, n_scored, row_words

N_CTX, N_VOCAB = 8, 5
TOKENS = np.arange(2 * N_CTX, dtype=np.int32).reshape(2, N_CTX) % N_VOCAB


def rows(seed):
    made = np.random.default_rng(seed).integers(0, 65536, (n_scored(N_CTX), row_words(N_VOCAB))).astype("<u2")
    made[:, :4] = np.array([0.001, -12.5], "<f4").view("<u2")
    return made


@pytest.fixture
def path(tmp_path):
    with kl_base_writer(tmp_path / "base.kl", TOKENS, N_VOCAB) as write:
        write(rows(0))
        write(rows(1)[:1])
        write(rows(1)[1:])
    return tmp_path / "base.kl"


def test_the_layout(path):
    data = path.read_bytes()
    assert data[:20] == b"_logits_" + struct.pack("<3i", 8, 5, 2)
    assert data[20:84] == struct.pack("<16i", *TOKENS.ravel())
    # 3 positions a chunk, of 2 float32 and 5 steps padded to 6
    assert len(data) == 84 + 2 * 3 * (8 + 12)


def test_what_is_written_is_read(path):
    file = KLBaseFile(path)
    assert (file.n_ctx, file.n_vocab, file.n_chunk) == (8, 5, 2)
    assert np.array_equal(file.tokens, TOKENS)
    assert np.array_equal(file.rows(0), rows(0)) and np.array_equal(file.rows(1), rows(1))


def test_a_file_is_there_once_it_is_whole(tmp_path):
    target = tmp_path / "base.kl"
    target.write_bytes(b"before")
    with pytest.raises(ZeroDivisionError), kl_base_writer(target, TOKENS, N_VOCAB) as write:
        write(rows(0))
        raise ZeroDivisionError
    assert target.read_bytes() == b"before" and [p.name for p in tmp_path.iterdir()] == ["base.kl"]
    with pytest.raises(SaveError), kl_base_writer(tmp_path / "none/base.kl", TOKENS, N_VOCAB):
        pass


@pytest.mark.parametrize(
    ("offset", "new", "reason"),
    [
        (0, b"GGUF", "is no file of log-probabilities"),
        (8, struct.pack("<i", -8), "n_ctx is -8 (expected 4 or more)"),
        (8, struct.pack("<I", 2**31), "n_ctx is -2147483648"),
        (8, struct.pack("<i", 16), "bytes (expected"),
        (12, struct.pack("<i", 0), "n_vocab is 0"),
        (12, struct.pack("<i", 2**31 - 1), "bytes (expected"),
        (16, struct.pack("<i", 0), "n_chunk is 0"),
        (16, struct.pack("<i", 2**31 - 1), "bytes (expected"),
        (20, struct.pack("<i", 5), "has tokens outside its vocabulary of 5"),
        (20, struct.pack("<i", -1), "has tokens outside its vocabulary of 5"),
    ],
)
def test_hostile_headers(path, offset, new, reason):
    data = bytearray(path.read_bytes())
    data[offset : offset + len(new)] = new
    path.write_bytes(data)
    with pytest.raises(FormatError) as error:
        KLBaseFile(path)
    assert reason in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("size", [0, 7, 8, 19, 20, 83, 84, 203, 205])
def test_files_that_are_cut_or_too_long(path, size):
    path.write_bytes((path.read_bytes() + b"\0\0")[:size])
    with pytest.raises(FormatError):
        KLBaseFile(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 4])
def test_scales_that_are_no_numbers(path, value, place):
    data = bytearray(path.read_bytes())
    at = 84 + 60 + 20 + place  # second row of the second chunk
    data[at : at + 4] = np.float32(value).tobytes()
    path.write_bytes(data)
    file = KLBaseFile(path)
    file.rows(0)
    with pytest.raises(FormatError, match="chunk 2 has a scale or minimum that is no number"):
        file.rows(1)


def test_no_file(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        KLBaseFile(tmp_path / "none")
    with pytest.raises(UsageError, match="cannot be read"):
        KLBaseFile(tmp_path)
