from __future__ import annotations

import struct
from pathlib import Path

import pytest

from llamakit.errors import FormatError, UsageError
from llamakit.tokenizer import load_llama2c_tokenizer
from llamakit.tokenizer.llama2c import Llama2cTokenizer
from tests.tokenizer.vocabularies import shared

BASE = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{b:02X}>" for b in range(256))]
PIECES = [(" ", -1.0), ("a", -2.0), ("b", -3.0), (" a", -4.0), ("ab", -5.0), ("é", -6.0), ("bb", -1e11)]


def write(path: Path, tokens: list[str] | None = None, tail: bytes = b"") -> Path:
    tokens = tokens or BASE + [p for p, _ in PIECES]
    scores = [0.0] * 259 + [s for _, s in PIECES]
    data = b"".join(struct.pack("<fI", s, len(t.encode())) + t.encode() for t, s in zip(tokens, scores, strict=False))
    path.write_bytes(struct.pack("<I", max(len(t.encode()) for t in tokens)) + data + tail)
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> Llama2cTokenizer:
    return load_llama2c_tokenizer(write(tmp_path / "tokenizer.bin"), 266)


def pieces(tokenizer: Llama2cTokenizer, text: str) -> list[str]:
    return [tokenizer.vocabulary.tokens[i] for i in tokenizer.encode(text)[1:]]


def test_facts(tokenizer: Llama2cTokenizer) -> None:
    assert (tokenizer.n_vocab, tokenizer.bos_id, tokenizer.eos_id, tokenizer.eog_ids) == (266, 1, 2, {1})


def test_encoding_is_run_c_s(tokenizer: Llama2cTokenizer) -> None:
    assert tokenizer.encode("") == [1] and tokenizer.encode("", add_special=False) == []
    assert pieces(tokenizer, "ab") == [" a", "b"]
    assert pieces(tokenizer, "ab ab") == [" a", "b", " a", "b"]
    assert pieces(tokenizer, "bb") == [" ", "b", "b"]  # a score below run.c's lowest never merges
    assert pieces(tokenizer, "é中") == [" ", "é", "<0xE4>", "<0xB8>", "<0xAD>"]
    assert pieces(tokenizer, "<s>")[:2] == [" ", "<0x3C>"]


def test_decoding_is_run_c_s(tokenizer: Llama2cTokenizer) -> None:
    for text in ("ab", "é中 a", " a", "\n"):
        ids = tokenizer.encode(text)
        stream = tokenizer.stream()
        assert tokenizer.decode(ids) == text == "".join(map(stream.push, ids)) + stream.finish()
    assert tokenizer.decode(tokenizer.encode("a")[1:]) == " a"
    assert tokenizer.decode([1, 260], special=True) == "\n<s>\na"


def test_a_token_that_grows_out_of_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "t.bin", [*BASE, " ", "a", "<0x01>a", "z", "ab", "b", "c"])
    tokenizer = load_llama2c_tokenizer(path, 266)
    assert pieces(tokenizer, "\x01a") == [" ", "<0x01>a"]


@pytest.mark.parametrize(
    ("tokens", "tail", "n_vocab", "reason"),
    [
        (None, b"", 267, "ends in token 266 of 267"),
        (None, b"", 265, "goes on after token 264"),
        (None, b"x", 266, "goes on after token 265 (1 bytes more)"),
        (None, b"", 32000, "too few for 32000 tokens"),
        (BASE[:100], b"", 100, "has 100 tokens (expected at least 259: the bytes)"),
        ([*BASE[:9], "x", *BASE[10:], " "], b"", 260, "token 9 is 'x' (expected '<0x06>')"),
        (BASE, b"", 259, "has no token for the space"),
    ],
)
def test_broken_files(tmp_path: Path, tokens: list[str] | None, tail: bytes, n_vocab: int, reason: str) -> None:
    path = write(tmp_path / "t.bin", tokens, tail)
    with pytest.raises(FormatError) as error:
        load_llama2c_tokenizer(path, n_vocab)
    assert reason in str(error.value) and str(error.value).startswith(str(path))


def test_lengths_and_scores(tmp_path: Path) -> None:
    path = write(tmp_path / "t.bin")
    data = path.read_bytes()
    path.write_bytes(data[:8] + struct.pack("<I", 1 << 31) + data[12:])
    with pytest.raises(FormatError, match="token 0 has 2147483648 bytes"):
        load_llama2c_tokenizer(path, 266)
    path.write_bytes(data[:4] + struct.pack("<f", float("nan")) + data[8:])
    with pytest.raises(FormatError, match="score of token 0"):
        load_llama2c_tokenizer(path, 266)
    with pytest.raises(UsageError, match="cannot be opened"):
        load_llama2c_tokenizer(tmp_path / "nonesuch", 266)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", [1]),
        ("I believe the meaning of life is", [1, 306, 4658, 278, 6593, 310, 2834, 338]),
        (
            "Simply put, the theory of relativity states that ",
            [1, 3439, 17632, 1925, 29892, 278, 6368, 310, 14215, 537, 5922, 393, 29871],
        ),
        (
            "A brief message congratulating the team on the launch:\n\n        Hi everyone,\n\n        I just ",
            [1, 319, 11473, 2643, 378, 629, 271, 18099, 278, 3815, 373, 278, 6826, 29901, 13, 13, 4706, 6324, 14332,
             29892, 13, 13, 4706, 306, 925, 29871],
        ),
        (
            "Translate English to French:\n\n        sea otter => loutre de mer\n        peppermint => menthe poivrée\n"
            "        plush girafe => girafe peluche\n        cheese =>",
            [1, 4103, 9632, 4223, 304, 5176, 29901, 13, 13, 4706, 7205, 4932, 357, 1149, 301, 449, 276, 316, 2778, 13,
             4706, 1236, 407, 837, 524, 1149, 6042, 354, 772, 440, 29878, 1318, 13, 4706, 715, 1878, 330, 3055, 1725,
             1149, 330, 3055, 1725, 4639, 28754, 13, 4706, 923, 968, 1149],
        ),
    ],
)  # fmt: skip
def test_the_encodings_of_llama2_c_s_own_test(text: str, ids: list[int]) -> None:
    tokenizer = load_llama2c_tokenizer(shared("models/llama2-tokenizer.bin"), 32000)
    assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text


def test_the_small_vocabulary() -> None:
    tokenizer = load_llama2c_tokenizer(shared("models/tok512.bin"), 512)
    ids = tokenizer.encode("Once upon a time, é")
    assert ids[:4] == [1, 403, 407, 261] and tokenizer.decode(ids) == "Once upon a time, é"
