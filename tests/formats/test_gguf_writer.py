"""Round trips, determinism, and what is left behind when a write fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from llamakit.errors import FormatError, SaveError
from llamakit.formats.gguf import GGUFFile, TensorData, Typed, copied_tensor, typed_metadata, write_gguf
from llamakit.formats.gguf import GGUFValueType as V
from llamakit.ggml import GGMLType
from tests.fuzz.raw import sound

METADATA = {
    "general.architecture": "llama",
    "n": 3,
    "x": 1e-5,
    "on": True,
    "words": ["a", "\u00fc", "\udcff"],
    "array": np.array([1.5, -2], np.float32),
    "flags": np.array([True, False]),
    "wide": Typed(2**63, V.UINT64),
    "none": Typed([], V.ARRAY, V.STRING),
}


def _tensors() -> list[TensorData]:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((3, 5), np.float32)
    packed = gguf.quants.quantize(rng.standard_normal((4, 64), np.float32), gguf.GGMLQuantizationType.Q4_1)

    def slices() -> Iterator[np.ndarray]:
        yield packed[:1]
        yield packed[1:]

    return [
        TensorData("m", (3, 5), GGMLType.F32, matrix),
        TensorData("q", (4, 64), GGMLType.Q4_1, slices),
        TensorData("h", (7,), GGMLType.F16, lambda: np.arange(7, dtype=np.float16)),
        TensorData("empty", (0, 32), GGMLType.F32, np.empty((0, 32), np.float32)),
        TensorData("t", (5, 3), GGMLType.F32, matrix.T),  # not contiguous
    ]


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    write_gguf(path, metadata=METADATA, tensors=_tensors())
    with GGUFFile(path) as file:
        assert list(file.metadata) == list(METADATA)
        assert file.metadata["words"] == METADATA["words"]
        assert file.metadata["x"] == np.float32(1e-5)
        assert file.metadata["flags"].tolist() == [True, False]
        assert file.metadata_types["n"] == (V.UINT32, None)
        assert file.metadata_types["x"] == (V.FLOAT32, None)
        assert file.metadata_types["array"] == (V.ARRAY, V.FLOAT32)
        assert file.metadata_types["none"] == (V.ARRAY, V.STRING)
        assert file.read("t").view("<f4").tolist() == file.read("m").view("<f4").T.tolist()
        assert file.read("h").view("<f2").tolist() == [list(range(7))]
        assert list(file.tensors) == ["m", "q", "h", "empty", "t"]
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


def test_the_gguf_package_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    metadata = {k: v for k, v in METADATA.items() if k != "none"} | {"words": ["a", "\u00fc"]}
    tensors = [t for t in _tensors() if t.name != "empty"]
    write_gguf(path, metadata=metadata | {"general.alignment": 64}, tensors=tensors)
    reader = gguf.GGUFReader(path)
    assert reader.get_field("words").contents() == ["a", "\u00fc"]
    assert reader.get_field("wide").contents() == 2**63
    assert reader.alignment == 64
    with GGUFFile(path) as file:
        for tensor in reader.tensors:
            assert tensor.data_offset % 64 == 0
            assert file.tensors[tensor.name].offset == tensor.data_offset
            assert file.read(tensor.name).tobytes() == tensor.data.tobytes()


def test_a_copy_is_the_same_file(tmp_path: Path) -> None:
    raw, path = sound(), tmp_path / "in.gguf"
    path.write_bytes(raw.pack())
    with GGUFFile(path) as file:
        write_gguf(
            tmp_path / "out.gguf",
            metadata=typed_metadata(file),
            tensors=[copied_tensor(file, name) for name in file.tensors],
        )
    written = (tmp_path / "out.gguf").read_bytes()
    # The padding between tensors is not ours to keep: it is zero in both.
    assert written == raw.pack()


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / name, metadata=METADATA, tensors=_tensors())
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    path.write_bytes(b"old")

    def fails() -> np.ndarray:
        raise FormatError("the base has been cut off")

    with pytest.raises(FormatError, match="cut off"):
        write_gguf(path, metadata={}, tensors=[TensorData("t", (2,), GGMLType.F32, fails)])

    def refuse(file: GGUFFile) -> None:
        assert list(file.tensors) == ["m", "q", "h", "empty", "t"]
        raise FormatError("not what I wanted")

    with pytest.raises(FormatError, match="not what I wanted"):
        write_gguf(path, metadata={}, tensors=_tensors(), verify=refuse)
    with pytest.raises(ValueError, match="needs 8 bytes, 12 were given"):
        write_gguf(path, metadata={}, tensors=[TensorData("t", (2,), GGMLType.F32, np.zeros(3, np.float32))])
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


def test_what_the_disk_refuses_is_a_save_error(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="No such file or directory") as caught:
        write_gguf(tmp_path / "no" / "out.gguf", metadata={}, tensors=[])
    assert caught.value.exit_code == 3


def test_a_full_disk_is_a_save_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.gguf"
    path.write_bytes(b"old")
    # /dev/full takes what fits into the buffer and fails when it is flushed: the error comes from close().
    monkeypatch.setattr("llamakit.files._temporary", lambda _: Path("/dev/full"))
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    with pytest.raises(SaveError, match="No space left on device") as caught:
        write_gguf(path, metadata=METADATA, tensors=_tensors())
    assert caught.value.hint is not None
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("metadata", "tensors", "error"),
    [
        ({"": 1}, [], "empty metadata key"),
        ({"n": -1}, [], "-1 does not fit into UINT32"),
        ({"n": Typed([1], V.ARRAY)}, [], "needs the type of its elements"),
        ({"n": object()}, [], "no GGUF type for object"),
        ({}, [TensorData("t" * 64, (1,), GGMLType.F32, np.zeros(1))], "must have 1 to 63 bytes"),
        ({}, [TensorData("t", (1,) * 5, GGMLType.F32, np.zeros(1))], "cannot have the shape"),
        ({}, [TensorData("t", (33,), GGMLType.Q8_0, np.zeros(1))], "no whole blocks"),
        ({}, [TensorData("t", (0,), GGMLType.F32, np.zeros(0))] * 2, "the same name"),
    ],
)
def test_what_no_gguf_file_can_hold(tmp_path: Path, metadata: dict, tensors: list, error: str) -> None:
    with pytest.raises((ValueError, TypeError), match=error):
        write_gguf(tmp_path / "out.gguf", metadata=metadata, tensors=tensors)
    assert not list(tmp_path.iterdir())
