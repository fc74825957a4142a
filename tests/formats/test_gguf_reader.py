"""What the strict reader takes, what it refuses, and how fast it refuses it."""

from __future__ import annotations

import gc
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from llamakit.errors import FormatError, LlamakitError, UnsupportedError, UsageError
from llamakit.formats.gguf import GGUFFile, StringArray
from llamakit.formats.gguf import GGUFValueType as V
from llamakit.ggml import GGMLType
from tests.fuzz.raw import KV, Raw, Tensor, array, sound, string, text, u32


def _opened(tmp_path: Path, raw: Raw | bytes) -> GGUFFile:
    path = tmp_path / "x.gguf"
    path.write_bytes(raw if isinstance(raw, bytes) else raw.pack())
    return GGUFFile(path)


def test_values_and_tensors(tmp_path: Path) -> None:
    with _opened(tmp_path, sound()) as file:
        m = file.metadata
        assert (file.version, file.alignment, file.data_offset % 32) == (3, 32, 0)
        assert m["general.architecture"] == "llama"
        assert m["flag"] is True
        assert (m["small"], m["wide"], m["double"], m["llama.rope.freq_base"]) == (-2, 2**63, 0.5, 10000.0)
        assert m["tokenizer.ggml.scores"].tolist() == [0, -1, -2, -3]
        assert len(m["none"]) == 0
        assert file.metadata_types["wide"] == (V.UINT64, None)
        assert file.metadata_types["tokenizer.ggml.tokens"] == (V.ARRAY, V.STRING)
        assert [(t.name, t.shape, t.type) for t in file.tensors.values()] == [
            ("token_embd.weight", (4, 32), GGMLType.Q4_1),
            ("output_norm.weight", (5,), GGMLType.F32),
            ("blk.0.attn_q.weight", (3, 2), GGMLType.F16),
        ]
        assert file.read("token_embd.weight", 1, 3).tobytes() == bytes(range(20, 60))
        assert file.read("output_norm.weight").view("<f4").tolist() == [[0, 1, 2, 3, 4]]
        rows = file.read("blk.0.attn_q.weight")
        rows[:] = 0  # fresh and writable
        assert file.read("blk.0.attn_q.weight").tobytes() == bytes(range(12))
        with pytest.raises(KeyError):
            file.read("nope")
        with pytest.raises(ValueError, match=r"rows 0\.\.5"):
            file.read("token_embd.weight", 0, 5)


def test_string_arrays_are_sequences_and_keep_their_bytes(tmp_path: Path) -> None:
    tokens = _opened(tmp_path, sound()).metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, StringArray)
    assert list(tokens) == ["<unk>", "a", "\u2581b", "\udcff"] == [tokens[i] for i in range(4)]
    assert tokens == list(tokens)
    assert tokens[-1].encode("utf-8", "surrogateescape") == b"\xff" == tokens.raw(-1)
    assert tokens[1:3] == ["a", "\u2581b"]
    assert "a" in tokens
    with pytest.raises(IndexError):
        tokens[4]


def test_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    path = tmp_path / "g.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_array("words", ["eins", "zwei", "\u00fc"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_float64("d", 0.1)
    rng = np.random.default_rng(0)
    for name, kind in (("a", "Q4_0"), ("b", "F16"), ("c", "Q8_0")):
        packed = gguf.quants.quantize(rng.standard_normal((3, 64), np.float32), gguf.GGMLQuantizationType[kind])
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = gguf.GGUFReader(path)
    with GGUFFile(path) as file:
        assert file.metadata["words"] == ["eins", "zwei", "\u00fc"]
        assert file.metadata["numbers"].tolist() == [1, -2, 3]
        assert file.metadata["d"] == 0.1
        for tensor in theirs.tensors:
            info = file.tensors[tensor.name]
            assert (info.offset, info.type.name) == (tensor.data_offset, tensor.tensor_type.name)
            assert info.shape == tuple(reversed(tensor.shape.tolist()))
            assert file.read(tensor.name).tobytes() == tensor.data.tobytes()


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions(tmp_path: Path, version: int) -> None:
    raw = sound()
    raw.version = version
    assert _opened(tmp_path, raw).version == version


def test_zero_dims_and_scalars_are_accepted(tmp_path: Path) -> None:
    raw = Raw(tensors=[Tensor(b"zero", [32, 0], 2, 0), Tensor(b"scalar", [], 0, 0)], data=bytes(32))
    file = _opened(tmp_path, raw)
    assert file.tensors["zero"].shape == (0, 32)
    assert file.read("zero").shape == (0, 18)
    assert file.tensors["scalar"].shape == ()
    assert file.read("scalar").shape == (1, 4)


def test_odd_keys_and_bools_are_accepted(tmp_path: Path) -> None:
    file = _opened(tmp_path, Raw(kvs=[u32(b"GGUF.version", 9), KV(b"b", V.BOOL, b"\2")]))
    assert file.metadata["GGUF.version"] == 9
    assert file.metadata["b"] is True


def test_alignment_and_last_tensor_without_padding(tmp_path: Path) -> None:
    tensors = [Tensor(b"a", [1], 0, 0), Tensor(b"b", [1], 0, 64)]
    raw = Raw(kvs=[u32(b"general.alignment", 64)], tensors=tensors, data=bytes(64) + b"abcd", alignment=64)
    file = _opened(tmp_path, raw)
    assert file.alignment == 64
    assert file.read("b").tobytes() == b"abcd"


def _with(change: Callable[[Raw], object]) -> Raw:
    raw = sound()
    change(raw)
    return raw


def _kv(kind: int, payload: bytes) -> Raw:
    return Raw(kvs=[KV(b"k", kind, payload)])


def _tensors(*tensors: Tensor, data: int = 4096) -> Raw:
    return Raw(tensors=list(tensors), data=bytes(data))


BROKEN: dict[str, tuple[Raw | bytes, str]] = {
    "empty": (b"", r"@0: truncated header \(expected 24 bytes, got 0\)"),
    "magic alone": (b"GGUF", r"truncated header \(expected 24 bytes, got 4\)"),
    "half a header": (b"GGUF\3\0\0\0" + bytes(4), r"truncated header \(expected 24 bytes, got 12\)"),
    "magic": (_with(lambda r: setattr(r, "magic", b"GGML")), "is not a GGUF file"),
    "version 1": (_with(lambda r: setattr(r, "version", 1)), "version 1, which is no longer supported"),
    "version 4": (_with(lambda r: setattr(r, "version", 4)), r"expected 2 or 3, got 4"),
    "version 0": (_with(lambda r: setattr(r, "version", 0)), r"expected 2 or 3, got 0"),
    "big-endian": (_with(lambda r: setattr(r, "version", 3 << 24)), "big-endian"),
    "n_kv": (_with(lambda r: setattr(r, "n_kv", 2**40)), "cannot fit into the file"),
    "n_tensors": (_with(lambda r: setattr(r, "n_tensors", 2**30)), "cannot fit into the file"),
    "n_tensors < 0": (_with(lambda r: setattr(r, "n_tensors", -1)), "cannot fit into the file"),
    "one kv too many": (_with(lambda r: setattr(r, "n_kv", 12)), "."),
    "one tensor too many": (_with(lambda r: setattr(r, "n_tensors", 4)), "."),
    "string 2^62": (_kv(V.STRING, text(b"x", 2**62)), r"truncated value of 'k' \(expected 4611686018427387904"),
    "string 2^64-8": (_kv(V.STRING, text(b"x", 2**64 - 8)), "truncated value of 'k'"),
    "key 2^63": (Raw(kvs=[KV(b"k", 4, bytes(4), key_length=2**63)]), "truncated metadata key"),
    "key too long": (Raw(kvs=[u32(b"k" * 65537, 1)]), "metadata key is too long"),
    "value too long": (_kv(V.STRING, text(bytes(2**24 + 1))), "value of 'k' is too long"),
    "49-byte bomb": (_kv(V.ARRAY, array(V.UINT8, b"", 2**30)).pack()[:49], "elements of value of 'k' cannot fit"),
    "array n wraps": (_kv(V.ARRAY, array(V.UINT64, bytes(64), 2**61)), "cannot fit into the rest of the header"),
    "string array bomb": (_kv(V.ARRAY, array(V.STRING, b"", 2**30)), "cannot fit into the rest of the header"),
    "string in array": (_kv(V.ARRAY, array(V.STRING, text(b"a") + text(b"b", 2**62), 2)), "truncated value of 'k'"),
    "last string's length": (_kv(V.ARRAY, array(V.STRING, text(b"a" * 20) + b"\0", 2)).pack()[:82], "truncated"),
    "array of arrays": (_kv(V.ARRAY, array(V.ARRAY, b"", 1) * 5000), "is an array of arrays"),
    "array of type 13": (_kv(V.ARRAY, array(13, bytes(8), 1)), "unknown type"),
    "value of type 99": (_kv(99, bytes(8)), r"unknown type \(expected 0 to 12, got 99\)"),
    "duplicate key": (Raw(kvs=[u32(b"k", 1), u32(b"k", 1)]), "duplicate metadata key 'k'"),
    "empty key": (Raw(kvs=[u32(b"", 1)]), "empty metadata key"),
    "key not UTF-8": (Raw(kvs=[u32(b"a\xff\x1b", 1)]), r"metadata key 'a\\xff\\x1b' is not UTF-8"),
    "key with NUL": (Raw(kvs=[u32(b"a\0b", 1)]), r"'a\\x00b' contains a NUL"),
    "half a scalar": (_kv(V.UINT32, bytes(2)).pack()[:39], r"truncated value of 'k' \(expected 4 bytes, got 2\)"),
    "no scalar": (_kv(V.UINT64, bytes(8)).pack()[:37], "expected at least 14 bytes, got 13"),
    "alignment 0": (Raw(kvs=[u32(b"general.alignment", 0)]), r"power of two .*got 0"),
    "alignment 3": (Raw(kvs=[u32(b"general.alignment", 3)]), r"power of two .*got 3"),
    "alignment 2^31": (Raw(kvs=[u32(b"general.alignment", 2**31)]), "power of two"),
    "alignment u64": (Raw(kvs=[KV(b"general.alignment", V.UINT64, struct.pack("<Q", 32))]), "wrong type.*UINT64"),
    "alignment array": (Raw(kvs=[KV(b"general.alignment", V.ARRAY, array(4, bytes(4), 1))]), "wrong type"),
    "5 dims": (_tensors(Tensor(b"t", [1] * 5)), r"too many dimensions \(expected at most 4, got 5\)"),
    "2^32-1 dims": (_tensors(Tensor(b"t", [1], n_dims=2**32 - 1)), "too many dimensions"),
    "negative dim": (_tensors(Tensor(b"t", [-2, 2])), "negative dimension"),
    "dims wrap": (_tensors(Tensor(b"t", [4194305, 4194305, 211106198978564])), "is too large"),
    "dims past the end": (_tensors(Tensor(b"t", [1 << 40])), "needs bytes"),
    "zero dim hides 2^63": (_tensors(Tensor(b"t", [0, 1 << 32, 1 << 32])), "is too large"),
    "row of half a block": (_tensors(Tensor(b"t", [48, 2], 2)), r"no whole blocks of Q4_0 \(expected a multiple of 32"),
    "removed type": (_tensors(Tensor(b"t", [32], 4)), "Q4_2, which was removed"),
    "type 999": (_tensors(Tensor(b"t", [32], 999)), r"unknown type \(999\)"),
    "duplicate tensor": (_tensors(Tensor(b"t", [8]), Tensor(b"t", [8], 0, 32)), "duplicate tensor 't'"),
    "name of 64 bytes": (_tensors(Tensor(b"t" * 64, [8])), r"tensor name is too long \(expected at most 63 bytes, got 64"),
    "name not UTF-8": (_tensors(Tensor(b"\xc3(", [8])), "tensor name .* is not UTF-8"),
    "misaligned": (_tensors(Tensor(b"a", [8]), Tensor(b"b", [8], 0, 36)), r"expected data offset 32, got 36"),
    "overlap": (_tensors(Tensor(b"a", [8]), Tensor(b"b", [8], 0, 0)), "does not follow the one before it"),
    "gap": (_tensors(Tensor(b"a", [8]), Tensor(b"b", [8], 0, 64)), "does not follow the one before it"),
    "out of order": (_tensors(Tensor(b"a", [8], 0, 32), Tensor(b"b", [8], 0, 0)), "does not follow"),
    "offset wraps": (_tensors(Tensor(b"a", [8], 0, 2**64 - 64)), "does not follow"),
    "data past the end": (_tensors(Tensor(b"t", [8]), data=16), r"tensor 't' needs bytes 64..96, the file has 80"),
    "no data": (_tensors(Tensor(b"t", [8]), data=0), "tensor 't' needs bytes 64..96, the file has 64"),
    "split": (Raw(kvs=[KV(b"split.count", V.UINT16, b"\3\0")]), "one of 3 parts of a split GGUF file"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_refuses(tmp_path: Path, case: str) -> None:
    raw, reason = BROKEN[case]
    packed = raw if isinstance(raw, bytes) else raw.pack()
    (tmp_path / "x.gguf").write_bytes(packed)
    tracemalloc.start()
    try:
        with pytest.raises((FormatError, UnsupportedError), match=reason) as caught:
            GGUFFile(tmp_path / "x.gguf")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16e6 + 4 * len(packed)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "x.gguf"))


def test_the_bomb_is_49_bytes() -> None:
    raw = BROKEN["49-byte bomb"][0]
    assert isinstance(raw, bytes)
    assert len(raw) == 49


def test_names_are_escaped_when_shown(tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        _opened(tmp_path, _tensors(Tensor("\x1b[2J\u202e".encode(), [8], 999)))
    assert r"\x1b[2J\u202e" in str(caught.value)


def test_only_regular_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        GGUFFile(tmp_path / "missing.gguf")
    with pytest.raises(UsageError, match="is a directory"):
        GGUFFile(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="is not a regular file"):
        GGUFFile(tmp_path / "fifo")
    with pytest.raises(UsageError, match="cannot be opened"):
        GGUFFile(tmp_path / "a\0b")


def test_truncated_after_opening(tmp_path: Path) -> None:
    with _opened(tmp_path, sound()) as file:
        os.truncate(file.path, file.data_offset + 40)
        assert file.read("token_embd.weight", 0, 2).shape == (2, 20)
        with pytest.raises(FormatError, match=r"expected 80 bytes, got 40"):
            file.read("token_embd.weight")


@pytest.mark.slow
def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    gc.collect()  # what other tests left is not counted
    before = len(os.listdir("/proc/self/fd"))
    file = _opened(tmp_path, sound())
    file.close()
    file.close()
    with pytest.raises(ValueError, match="has been closed"):
        file.read("output_norm.weight")
    _opened(tmp_path, sound())  # closed with the object, without a ResourceWarning
    with pytest.raises(LlamakitError):
        _opened(tmp_path, b"GGUF")
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_large_vocabulary_is_not_decoded(tmp_path: Path) -> None:
    n = 100_000
    words = b"".join(text(b"w%d" % i) for i in range(n))
    file = _opened(tmp_path, Raw(kvs=[KV(b"tokens", V.ARRAY, array(V.STRING, words, n)), string(b"z", b"end")]))
    tokens = file.metadata["tokens"]
    assert (len(tokens), tokens[0], tokens[n - 1], file.metadata["z"]) == (n, "w0", "w99999", "end")


def test_a_huge_sparse_file_is_opened_by_its_header(tmp_path: Path) -> None:
    raw = Raw(tensors=[Tensor(b"t", [1 << 20, 1700], 0, 0)])
    path = tmp_path / "sparse.gguf"
    path.write_bytes(raw.pack())
    os.truncate(path, path.stat().st_size + 4 * 1700 * (1 << 20))
    tracemalloc.start()
    with GGUFFile(path) as file:
        assert tracemalloc.get_traced_memory()[1] < 10e6
        assert file.n_bytes > 7e9
        assert not file.read("t", 1699, 1700).any()
    tracemalloc.stop()


def test_counts_in_a_huge_sparse_file_are_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gguf"
    path.write_bytes(_kv(V.ARRAY, array(V.STRING, b"", 1 << 29)).pack())
    os.truncate(path, 7 << 30)
    tracemalloc.start()
    with pytest.raises(FormatError):
        GGUFFile(path)
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()
