"""The strict reader and the writer, with the safetensors library as the judge of both."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from llamakit.errors import FormatError, LlamakitError, SaveError, UnsupportedError, UsageError
from llamakit.formats.base import TensorData
from llamakit.formats.safetensors import SafetensorsFile, write_safetensors
from llamakit.ggml import GGMLType

_F32 = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
_ONE = '{"a":' + _F32 + "}"


def packed(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: str, shape: str, start: int, stop: int) -> str:
    return f'{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{stop}]}}}}'


def accepted_by_us(path: Path) -> bool:
    try:
        SafetensorsFile(path).close()
    except LlamakitError as error:
        assert "\n" not in str(error)
        return False
    return True


def accepted_by_the_library(raw: bytes) -> bool:
    safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")
    try:
        safetensors.deserialize(raw)
    except safetensors.SafetensorError:
        return False
    return True


SOUND = {
    "plain": packed(_ONE, b"1234"),
    "nothing": packed("{}"),
    "spaces after": packed(_ONE + " \n\t  ", b"1234"),
    "another key": packed(_ONE[:-2] + ',"z":[1.5,null]}}', b"1234"),
    "notes": packed('{"__metadata__":{"format":"pt"}}'),
    "no notes": packed('{"__metadata__":null}'),
    "scalar": packed(entry("F32", "[]", 0, 4), b"1234"),
    "no elements": packed(entry("F32", "[0,18446744073709551615]", 0, 0)),
    "no name": packed('{"":' + _F32 + "}", b"1234"),
    "other script": packed('{"\\ud83d\\ude00\\u0000":' + _F32 + "}", b"1234"),
    "half bytes": packed(entry("F4", "[2]", 0, 1), b"1"),
    "empty between": packed(_ONE[:-1] + ',"b":{"dtype":"U8","shape":[0],"data_offsets":[4,4]}}', b"1234"),
    **{d: packed(entry(d, "[8]", 0, n), b"1" * n) for d, n in {
        "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F6_E2M3": 6, "I16": 16, "U16": 16,
        "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
    }.items()},
}  # fmt: skip

#: what both refuse, and where ours says why
BROKEN = {
    "empty file": (b"", "no room for a header"),
    "seven bytes": (b"1234567", "no room for a header"),
    "length beyond the file": (packed("{}", length=3), "a header of 3 bytes"),
    "huge length": (packed("{}", length=2**64 - 1), "a header of 18446744073709551615"),
    "cut": (packed(_ONE, b"123"), "of the wrong size"),
    "trailing byte": (packed(_ONE, b"12345"), "of the wrong size"),
    "a list": (packed("[]"), "does not start with"),
    "no header": (packed(""), "does not start with"),
    "two headers": (packed(_ONE + "{}", b"1234"), "no sound JSON"),
    "NUL padding": (packed(_ONE + "\0\0", b"1234"), "no sound JSON"),
    "cut header": (packed(_ONE[:-1], b"1234"), "no sound JSON"),
    "no UTF-8": (packed(b'{"\xff":' + _F32.encode() + b"}", b"1234"), "no sound JSON"),
    "NaN": (packed(_ONE[:-2] + ',"z":NaN}}', b"1234"), "NaN is no number"),
    "huge number": (packed(_ONE[:-2] + ',"z":1e400}}', b"1234"), "out of range"),
    "nested": (packed(_ONE[:-2] + ',"z":' + "[" * 100_000 + "]" * 100_000 + "}}", b"1234"), "too deeply nested"),
    "half a surrogate pair": (packed('{"\\ud800":' + _F32 + "}", b"1234"), "no sound JSON"),
    "control character": (packed('{"a\n":' + _F32 + "}", b"1234"), "no sound JSON"),
    "notes that are no texts": (packed('{"__metadata__":{"a":1}}'), "__metadata__"),
    "no object": (packed('{"a":null}'), "is no object"),
    "no dtype": (packed('{"a":{"shape":[1],"data_offsets":[0,4]}}', b"1234"), "unknown dtype"),
    "small letters": (packed(entry("f32", "[1]", 0, 4), b"1234"), "unknown dtype 'f32'"),
    "float": (packed(entry("F32", "[1.0]", 0, 4), b"1234"), "no lists of whole numbers"),
    "bool": (packed(entry("U8", "[true]", 0, 1), b"1"), "no lists of whole numbers"),
    "negative": (packed(entry("F32", "[-1]", 0, 4), b"1234"), "no lists of whole numbers"),
    "minus zero": (packed(entry("F32", "[-0]", 0, 0)), "out of range"),
    "three offsets": (packed('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,1]}}', b"1"), "no lists of whole"),
    "backwards": (packed(entry("F32", "[1]", 4, 0), b"1234"), "has -4 bytes"),
    "another size": (packed(entry("F32", "[2]", 0, 4), b"1234"), r"has 4 bytes \(expected 8\)"),
    "half a byte": (packed(entry("F4", "[3]", 0, 2), b"12"), r"has 2 bytes \(expected 1.5\)"),
    "overflow": (packed(entry("U8", "[18446744073709551615,18446744073709551615,0]", 0, 0)), "impossible shape"),
    "a hole": (packed(entry("F32", "[1]", 4, 8), b"12345678"), r"starts at 4 \(expected 0\)"),
    "overlap": (packed(_ONE[:-1] + ',"b":' + _F32 + "}", b"1234"), r"starts at 0 \(expected 4\)"),
}  # fmt: skip

#: what the library takes and we do not
STRICTER = {
    "name twice": (packed(_ONE[:-1] + ',"a":' + _F32 + "}", b"1234"), "'a' stands there twice"),
    "space before": (packed(" " + _ONE, b"1234"), "does not start with"),
    "entry as a list": (packed('{"a":["F32",[1],[0,4]]}', b"1234"), "is no object"),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_bytes(SOUND[name])
    assert accepted_by_the_library(SOUND[name])
    assert accepted_by_us(tmp_path / "x")


@pytest.mark.parametrize("name", BROKEN | STRICTER)
def test_broken_files(tmp_path: Path, name: str) -> None:
    raw, reason = (BROKEN | STRICTER)[name]
    (tmp_path / "x").write_bytes(raw)
    assert accepted_by_the_library(raw) == (name in STRICTER)
    with pytest.raises(FormatError, match=reason) as caught:
        SafetensorsFile(tmp_path / "x")
    assert "\n" not in str(caught.value)


def test_mutants_are_judged_as_the_library_does(tmp_path: Path) -> None:
    """Where they differ, it is towards refusing, and for one of the reasons above."""
    rng = random.Random(0)
    names = ('"b":{"dtype":"F16","shape":[2,1],"data_offsets":[4,8]}', '"__metadata__":{"format":"pt"}')
    seed = packed(_ONE[:-1] + "," + ",".join(names) + "}", b"12345678")
    alphabet = b'0123456789{}[],:"-. eFabnul\\\x00\xff'
    verdicts = {True: 0, False: 0}
    for _ in range(800):
        raw = bytearray(seed)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            place = rng.randrange(len(raw))
            raw[place : place + rng.randrange(2)] = bytes([rng.choice(alphabet)]) * rng.randrange(2)
        if rng.random() < 0.8:  # a right length lets the header itself be judged
            raw[:8] = struct.pack("<Q", max(0, len(raw) - 16))
        (tmp_path / "x").write_bytes(raw)
        ours, theirs = accepted_by_us(tmp_path / "x"), accepted_by_the_library(bytes(raw))
        assert ours == theirs or (theirs and not ours and _stricter(tmp_path / "x")), bytes(raw)
        verdicts[ours] += 1
    assert min(verdicts.values()) > 50


def _stricter(path: Path) -> bool:
    with pytest.raises(FormatError) as caught:
        SafetensorsFile(path)
    return any(reason in str(caught.value) for _, reason in STRICTER.values()) or "twice" in str(caught.value)


def _random_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "z": rng.normal(size=(3, 5)).astype("<f4"),
        "model.ä\n\x7f/\"'": rng.normal(size=(4,)).astype("<f2"),
        "b": rng.normal(size=(2, 2, 2)).astype("<f2"),
        "a": rng.normal(size=(0, 7)).astype("<f4"),
        "scalar": np.array(1.5, "<f4"),
    }


def _data(tensors: dict[str, np.ndarray]) -> list[TensorData]:
    return [TensorData(n, a.shape, GGMLType.F32 if a.itemsize == 4 else GGMLType.F16, a) for n, a in tensors.items()]


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_the_same_bytes_as_the_library(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    tensors = _random_tensors()
    write_safetensors(tmp_path / "ours", tensors=_data(tensors), metadata=metadata)
    assert (tmp_path / "ours").read_bytes() == numpy.save(tensors, metadata)


def test_bf16_as_torch_writes_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    st = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    tensors = {"w": torch.randn(4, 6).bfloat16(), "n": torch.randn(3), "h": torch.randn(5).half()}
    types = {"w": GGMLType.BF16, "n": GGMLType.F32, "h": GGMLType.F16}
    ours = [TensorData(n, tuple(t.shape), types[n], t.view(torch.uint8).numpy()) for n, t in tensors.items()]
    write_safetensors(tmp_path / "ours", tensors=ours)
    assert (tmp_path / "ours").read_bytes() == st.save(tensors)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tensors = _random_tensors()
    parts = [t._replace(data=lambda a=t.data: iter([a[:1], a[1:]]) if a.ndim else a) for t in _data(tensors)]
    write_safetensors(tmp_path / "x", tensors=parts, metadata={"format": "pt"})
    with SafetensorsFile(tmp_path / "x") as file:
        assert dict(file.metadata) == {"format": "pt"}
        assert file.tensors.keys() == tensors.keys()
        for name, array in tensors.items():
            info = file.tensors[name]
            assert (info.shape, info.type.name) == (array.shape, {4: "F32", 2: "F16"}[array.itemsize])
            assert file.read(name).tobytes() == array.tobytes()
        assert file.read("z", 1, 2).tobytes() == tensors["z"][1:2].tobytes()
        assert file.read("z", 2, 2).shape == (0, 20)
        with pytest.raises(ValueError, match="which has 3"):
            file.read("z", 1, 4)
        with pytest.raises(KeyError):
            file.read("missing")
    with pytest.raises(ValueError, match="closed"):
        file.read("z")


def test_types_that_gguf_does_not_have(tmp_path: Path) -> None:
    header = {"q": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]},
              "i": {"dtype": "I32", "shape": [1], "data_offsets": [2, 6]}}  # fmt: skip
    (tmp_path / "x").write_bytes(packed(json.dumps(header), b"123456"))
    with SafetensorsFile(tmp_path / "x") as file:
        assert list(file.tensors) == ["i"]
        assert dict(file.other_dtypes) == {"q": "F8_E4M3"}
        assert file.read("i").tobytes() == b"3456"
        with pytest.raises(UnsupportedError, match="tensor q has dtype F8_E4M3"):
            file.read("q")


def test_what_cannot_be_written(tmp_path: Path) -> None:
    one = np.zeros((2, 32), "<f4")
    good = TensorData("a", (2, 32), GGMLType.F32, one)
    for tensors, reason in (
        ([good._replace(type=GGMLType.Q8_0)], "is Q8_0"),
        ([good, good], "two tensors have the name 'a'"),
        ([good._replace(shape=(3, 32))], "needs 384 bytes, 256 were given"),
    ):
        with pytest.raises(ValueError, match=reason):
            write_safetensors(tmp_path / "x", tensors=tensors)
    with pytest.raises(SaveError):
        write_safetensors(tmp_path / "no" / "x", tensors=[good])
    with pytest.raises(UsageError, match="No such file"):
        SafetensorsFile(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
