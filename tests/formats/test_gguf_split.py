"""Split files: cut as llama-gguf-split cuts, read as one, and refused when the parts do not belong together."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamakit.errors import FormatError, LlamakitError, SaveError, UnsupportedError, UsageError
from llamakit.formats.gguf import (
    GGUFFile,
    SplitGGUF,
    TensorData,
    Typed,
    copied_tensor,
    open_gguf,
    typed_metadata,
    write_gguf,
    write_gguf_split,
)
from llamakit.formats.gguf import GGUFValueType as V
from llamakit.formats.gguf_split import parse_size, part_path
from llamakit.formats.open import open_model
from llamakit.formats.stamps import base_stamps
from llamakit.formats.vocabulary import vocabulary_only
from llamakit.ggml import GGMLType
from tests.fuzz.raw import KV, Raw, Tensor, sound
from tests.tiny import cached_tiny_gguf


def _matrices(n: int, rows: int) -> list[TensorData]:
    """n F32 matrices of 24 columns, each a row longer than the one before."""
    shapes = [(rows + i, 24) for i in range(n)]
    data = [np.arange(rows * columns, dtype=np.float32) for rows, columns in shapes]
    return [
        TensorData(f"blk.{i}.t.weight", s, GGMLType.F32, d) for i, (s, d) in enumerate(zip(shapes, data, strict=True))
    ]


def _source(path: Path, name: str) -> Path:
    """One of the files that were given to llama-gguf-split."""
    if name == "sound":
        path.write_bytes(sound().pack())
        return path
    n, rows, extra = {"many": (131, 2, ("on", True)), "large": (9, 3000, ("flags", np.array([True, False])))}.get(
        name, (0, 0, None)
    )
    metadata = {"general.architecture": "llama"} | ({"words": ["a", "b"], extra[0]: extra[1]} if extra else {})
    write_gguf(path, metadata=metadata, tensors=_matrices(n, rows))
    return path


def _split(source: Path, target: Path, **options: Any) -> list[Path]:
    with open_gguf(source) as file:
        tensors = [copied_tensor(file, name) for name in file.tensors]
        return write_gguf_split(target, metadata=typed_metadata(file), tensors=iter(tensors), **options)


#: (file, options, parts, sha256 of all parts one after the other as llama-gguf-split (2026) writes them)
SPLITS: list[tuple[str, dict[str, Any], int, str]] = [
    ("sound", {}, 1, "bb30ad9960fce4587657f3d0f0f4cfa0"),
    ("sound", {"max_tensors": 1}, 3, "dbbfddec2eb12b814cefca28ce82d549"),
    ("sound", {"max_tensors": 2, "no_tensor_first_split": True}, 3, "4f2530cf98018f409a4a12f7413bf2d7"),
    ("many", {}, 2, "073bc11aaaea097c8e5fc30cd6d9682e"),
    ("many", {"no_tensor_first_split": True}, 3, "90814ed05cd130958b26c79567f26cb2"),
    ("many", {"max_tensors": 64}, 3, "7ef70284e8a6c9c083864274f13bfd45"),
    ("large", {"max_bytes": 1000000}, 3, "8ade4064cd66c49ecabe22b85d7dcda3"),
    ("large", {"max_bytes": 1000000, "no_tensor_first_split": True}, 4, "a3b4a727e5f3985a17b2e1e1b94ae934"),
    ("large", {"max_bytes": 2000000000}, 1, "85239ee6160e2579578170480dea2140"),
    ("none", {}, 1, "85dd946cff2a4440b71662f9b6c88cca"),
    ("none", {"no_tensor_first_split": True}, 2, "c4f0d56d92e5b1c2c6ead34751a44a5f"),
]


@pytest.mark.parametrize(("name", "options", "n_parts", "expected"), SPLITS)
def test_parts_are_those_of_llama_cpp(
    tmp_path: Path, name: str, options: dict[str, Any], n_parts: int, expected: str
) -> None:
    source = _source(tmp_path / "whole.gguf", name)
    parts = _split(source, tmp_path / "m.gguf", **options)
    assert [p.name for p in parts] == [f"m-{i:05d}-of-{n_parts:05d}.gguf" for i in range(1, n_parts + 1)]
    assert hashlib.sha256(b"".join(p.read_bytes() for p in parts)).hexdigest().startswith(expected)
    assert len(list(tmp_path.iterdir())) == n_parts + 1
    with open_gguf(parts[-1]) as file:
        assert isinstance(file, SplitGGUF)
        write_gguf(
            tmp_path / "back.gguf",
            metadata=typed_metadata(file),
            tensors=[copied_tensor(file, n) for n in file.tensors],
        )
    assert (tmp_path / "back.gguf").read_bytes() == source.read_bytes()


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Three parts of 30, 30 and 10 matrices, in a folder of their own."""
    (tmp_path / "set").mkdir()
    return write_gguf_split(
        tmp_path / "set" / "m.gguf", metadata={"k": Typed(7, V.UINT16)}, tensors=_matrices(70, 2), max_tensors=30
    )


def test_any_part_opens_the_whole(parts: list[Path]) -> None:
    for number, path in enumerate(parts, 1):
        with open_model(path) as file:
            assert isinstance(file, SplitGGUF)
            assert (file.part, file.parts, file.path) == (number, tuple(parts), parts[0])
            assert dict(file.metadata) == {"k": 7}
            assert typed_metadata(file) == {"k": Typed(7, V.UINT16)}
            assert file.n_bytes == sum(p.stat().st_size for p in parts)
            assert list(file.tensors) == [f"blk.{i}.t.weight" for i in range(70)]
            for i in (0, 29, 30, 69):
                row = file.read(f"blk.{i}.t.weight", 1, 2).view("<f4")
                assert row.tolist() == [list(range(24, 48))]
            with pytest.raises(KeyError):
                file.read("nope")
        with pytest.raises(ValueError, match="closed"):
            file.read("blk.0.t.weight")


def test_one_part_alone(parts: list[Path]) -> None:
    with pytest.raises(UnsupportedError, match="is one of 3 parts of a split GGUF file"):
        GGUFFile(parts[1])
    with GGUFFile(parts[1], part=True) as file:
        assert dict(file.metadata) == {"split.no": 1, "split.tensors.count": 70, "split.count": 3}
        assert len(file.tensors) == 30


def test_a_single_part_and_a_joined_file(tmp_path: Path) -> None:
    (only,) = write_gguf_split(tmp_path / "m.gguf", metadata={"k": 1}, tensors=_matrices(2, 2))
    only.rename(tmp_path / "other.gguf")  # there is no other part to be found by the name
    with open_gguf(tmp_path / "other.gguf") as file:
        assert isinstance(file, SplitGGUF) and dict(file.metadata) == {"k": 1}
    joined = {"split.no": Typed(0, V.UINT16), "split.count": Typed(0, V.UINT16)}
    write_gguf(tmp_path / "joined.gguf", metadata=joined, tensors=_matrices(2, 2))
    with open_gguf(tmp_path / "joined.gguf") as file:
        assert isinstance(file, GGUFFile)


def test_a_set_of_other_tools_with_the_alignment_of_the_first_part_alone(tmp_path: Path) -> None:
    metadata = {"general.alignment": 64, "split.no": Typed(3, V.UINT16)}  # of an older split: dropped
    parts = write_gguf_split(tmp_path / "m", metadata=metadata, tensors=_matrices(3, 2), max_tensors=2)
    with SplitGGUF(parts[0]) as file:
        assert (file.alignment, dict(file.metadata), len(file.tensors)) == (64, {"general.alignment": 64}, 3)


def test_stamps_and_vocabulary_are_those_of_the_whole(tmp_path: Path) -> None:
    whole = cached_tiny_gguf(type="Q8_0")
    parts = _split(whole, tmp_path / "m.gguf", max_tensors=5)
    assert len(parts) == 5
    with open_model(whole) as a, open_model(parts[2]) as b:
        assert base_stamps(a) == base_stamps(b)
    assert list(vocabulary_only(parts[1])["tokenizer.ggml.tokens"]) == list(
        vocabulary_only(whole)["tokenizer.ggml.tokens"]
    )


def test_parts_behind_links_are_followed(tmp_path: Path, parts: list[Path]) -> None:
    for path in parts:  # as in the Hub's cache
        path.rename(tmp_path / f"blob{path.name[:7]}")
        path.symlink_to(tmp_path / f"blob{path.name[:7]}")
    with SplitGGUF(parts[2]) as file:
        assert len(file.tensors) == 70


# --- sets that lie ----------------------------------------------------------------------------------------------------


def _part(no: int, count: int, total: int, *names: str, types: str = "HHi", skip: str = "") -> bytes:
    kinds = {"H": V.UINT16, "i": V.INT32, "I": V.UINT32, "?": V.BOOL}
    values = zip((b"split.no", b"split.count", b"split.tensors.count"), types, (no, count, total), strict=True)
    kvs = [KV(key, kinds[t], struct.pack(f"<{t}", n)) for key, t, n in values if key.decode() != skip]
    tensors = [Tensor(name.encode(), [8], 0, 32 * i) for i, name in enumerate(names)]
    return Raw(kvs=kvs, tensors=tensors, data=bytes(32 * len(names))).pack()


def _special(kind: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink(missing_ok=True)
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind:
            path.symlink_to(kind)

    return make


Content = bytes | Callable[[Path], None]
#: case -> (contents of the parts as they are on disk, the part that is given, the part at fault, the reason)
HOSTILE: dict[str, tuple[list[Content], int, int, str]] = {
    "missing": ([_part(0, 3, 3, "a"), _special(""), _part(2, 3, 3, "c")], 2, 1, "is missing, the model has 3 parts"),
    "first missing": ([_special(""), _part(1, 2, 2, "b")], 1, 0, "is missing, the model has 2 parts"),
    "swapped": ([_part(1, 2, 2, "b"), _part(0, 2, 2, "a")], 0, 0, "is part 2 of 2, so its name should end in -00002-of"),
    "others swapped": ([_part(0, 3, 3, "a"), _part(2, 3, 3, "c"), _part(1, 3, 3, "b")], 0, 1, "is not of this set"),
    "part 1 twice": ([_part(0, 2, 2, "a"), _part(0, 2, 2, "b")], 0, 1, r"expected part 2 of 2 .* as m-00001-of-00002"),
    "other count in part 2": ([_part(0, 2, 2, "a"), _part(1, 3, 2, "b")], 0, 1, "got part 2 of 3"),
    "other total in part 2": ([_part(0, 2, 2, "a"), _part(1, 2, 9, "b")], 0, 1, "got part 2 of 2 with 9 tensors"),
    "another set": ([_part(0, 2, 2, "a"), sound().pack()], 0, 1, r"no part of a split GGUF file \(split.no is missing"),
    "count of the name": ([_part(0, 3, 2, "a"), _part(1, 3, 2, "b")], 0, 0, "its name should end in -00001-of-00003"),
    "huge count": ([_part(0, 65535, 2, "a")], 0, 0, "its name should end in -00001-of-65535.gguf"),
    "no beyond count": ([_part(2, 2, 2, "a"), _part(1, 2, 2, "b")], 0, 0, "cannot be part 3 of 2"),
    "negative total": ([_part(0, 2, -1, "a"), _part(1, 2, -1, "b")], 0, 0, r"with -1 tensors in all \(it has 1 itself\)"),
    "total too small": ([_part(0, 2, 3, "a", "b"), _part(1, 2, 3, "c", "d")], 0, 0, "expected 3 tensors in all parts, got 4"),
    "total too large": ([_part(0, 2, 2**31 - 1, "a"), _part(1, 2, 2**31 - 1, "b")], 0, 0, "expected 2147483647 tensors"),
    "duplicate tensor": ([_part(0, 2, 2, "a"), _part(1, 2, 2, "a")], 0, 1, "has the tensor 'a', which is in m-00001-of"),
    "count as u32": ([_part(0, 2, 2, "a", types="HIi"), b""], 0, 0, r"split.count has the wrong type \(expected UINT16"),
    "number as bool": ([_part(0, 2, 2, "a", types="?Hi"), b""], 0, 0, "split.no has the wrong type"),
    "no total": ([_part(0, 2, 2, "a", skip="split.tensors.count"), b""], 0, 0, "split.tensors.count is missing"),
    "truncated part": ([_part(0, 2, 2, "a"), _part(1, 2, 2, "b")[:60]], 0, 1, "cannot fit|truncated"),
    "tensor cut off": ([_part(0, 2, 2, "a"), _part(1, 2, 2, "b")[:-8]], 0, 1, "needs bytes"),
    "not a GGUF": ([_part(0, 2, 2, "a"), b"root:x:0:0:root:/root:/bin/bash\n"], 0, 1, "is not a GGUF file"),
    "empty part": ([_part(0, 2, 2, "a"), b""], 0, 1, "truncated header"),
    "link to a device": ([_part(0, 2, 2, "a"), _special("/dev/zero")], 0, 1, "is not a regular file"),
    "link to nothing": ([_part(0, 2, 2, "a"), _special("nowhere")], 0, 1, "cannot be opened: No such file"),
    "link in a circle": ([_part(0, 2, 2, "a"), _special("m-00002-of-00002.gguf")], 0, 1, "cannot be opened"),
    "fifo": ([_part(0, 2, 2, "a"), _special("fifo")], 0, 1, "is not a regular file"),
    "folder": ([_part(0, 2, 2, "a"), _special("folder")], 0, 1, "is a directory"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_refuses(tmp_path: Path, case: str) -> None:
    contents, given, at_fault, reason = HOSTILE[case]
    paths = [part_path(tmp_path / "m", no, len(contents)) for no in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
    open_files = len(os.listdir("/proc/self/fd"))
    with pytest.raises((FormatError, UsageError), match=reason) as caught:
        open_model(paths[given])
    assert caught.value.path is not None and Path(caught.value.path).name == paths[at_fault].name
    assert "\n" not in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_huge_count_with_the_right_name_ends_at_the_first_missing_part(tmp_path: Path) -> None:
    path = part_path(tmp_path / "m", 0, 65535)
    path.write_bytes(_part(0, 65535, 1, "a"))
    with pytest.raises(UsageError, match="is missing, the model has 65535 parts") as caught:
        SplitGGUF(path)
    assert Path(str(caught.value.path)).name == "m-00002-of-65535.gguf"


def test_names_from_a_file_are_escaped(tmp_path: Path) -> None:
    for no in (0, 1):
        part_path(tmp_path / "m\x1b", no, 2).write_bytes(_part(no, 2, 2, "\x1b[2J"))
    with pytest.raises(FormatError, match="which is in") as caught:
        SplitGGUF(part_path(tmp_path / "m\x1b", 0, 2))
    assert "\x1b" not in caught.value.reason


# --- writing ----------------------------------------------------------------------------------------------------------


def test_tensors_are_asked_for_in_turn(tmp_path: Path) -> None:
    asked: list[str] = []

    def lazy(tensor: TensorData) -> TensorData:
        def slices() -> Iterator[np.ndarray]:
            asked.append(tensor.name)
            assert isinstance(tensor.data, np.ndarray)
            yield from np.array_split(tensor.data, 3)

        return tensor._replace(data=slices)

    tensors = _matrices(4, 2)
    write_gguf_split(tmp_path / "a.gguf", metadata={}, tensors=map(lazy, tensors), max_tensors=3)
    assert asked == [t.name for t in tensors]
    write_gguf_split(tmp_path / "b.gguf", metadata={}, tensors=tensors, max_tensors=3)
    for no in (0, 1):
        assert part_path(tmp_path / "a", no, 2).read_bytes() == part_path(tmp_path / "b", no, 2).read_bytes()


def test_a_larger_tensor_has_a_part_of_its_own(tmp_path: Path) -> None:
    tensors = [TensorData(n, (size,), GGMLType.F32, np.zeros(size, "<f4")) for n, size in (("a", 1), ("b", 50), ("c", 1), ("d", 2), ("e", 3))]  # fmt: skip
    parts = write_gguf_split(tmp_path / "m.gguf", metadata={}, tensors=tensors, max_bytes=64)
    names = []
    for path in parts:
        with GGUFFile(path, part=True) as file:
            names.append("".join(file.tensors))
    assert names == ["a", "b", "cd", "e"]
    with pytest.raises(UsageError, match="the first tensor, 'b', needs 224 bytes"):
        write_gguf_split(
            tmp_path / "n.gguf", metadata={}, tensors=tensors[1:], max_bytes=64, no_tensor_first_split=True
        )
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_tensors": 0}, "cannot be limited to 0 tensors"),
        ({"max_bytes": -5}, "cannot be limited to -5 bytes"),
        ({"max_tensors": 1, "max_bytes": 1}, "not by both"),
    ],
)
def test_limits_that_cannot_be(tmp_path: Path, options: dict[str, int], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        write_gguf_split(tmp_path / "m.gguf", metadata={}, tensors=_matrices(2, 2), **options)  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())


def test_more_parts_than_can_be_counted(tmp_path: Path) -> None:
    nothing = np.empty(0, np.float32)
    tensors = [TensorData(str(i), (0,), GGMLType.F32, nothing) for i in range(65536)]
    with pytest.raises(UsageError, match="65536 parts, a split file has at most 65535"):
        write_gguf_split(tmp_path / "m.gguf", metadata={}, tensors=tensors, max_tensors=1)


def test_an_error_leaves_the_old_set(tmp_path: Path, parts: list[Path]) -> None:
    old = {p.name: p.read_bytes() for p in parts}
    target = parts[0].parent / "m.gguf"

    def fails() -> np.ndarray:
        raise FormatError("the base has been cut off")

    def refuse(file: SplitGGUF) -> None:
        assert len(file.tensors) == 70 and len(file.parts) == 3 and file.path.parent != target.parent
        assert file.read("blk.69.t.weight").nbytes == 71 * 96
        raise FormatError("not what I wanted")

    broken = [*_matrices(69, 2), TensorData("t", (2,), GGMLType.F32, fails)]
    short = [*_matrices(69, 2), TensorData("t", (2,), GGMLType.F32, np.zeros(1, "<f4"))]
    for tensors, error, verify in (
        (broken, FormatError, None), (_matrices(70, 2), FormatError, refuse), (short, ValueError, None),
        (_matrices(1, 2) * 2, ValueError, None),
    ):  # fmt: skip
        with pytest.raises(error):
            write_gguf_split(target, metadata={}, tensors=tensors, max_tensors=30, verify=verify)
    assert {p.name: p.read_bytes() for p in target.parent.iterdir()} == old
    write_gguf_split(target, metadata={"k": 2}, tensors=_matrices(70, 3), max_tensors=30)
    with SplitGGUF(parts[1]) as file:
        assert file.metadata["k"] == 2 and file.tensors["blk.69.t.weight"].shape == (72, 24)
    assert {p.name for p in target.parent.iterdir()} == old.keys()


def test_what_the_disk_refuses(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="No such file or directory"):
        write_gguf_split(tmp_path / "no" / "m.gguf", metadata={}, tensors=[])
    part_path(tmp_path / "m", 1, 2).mkdir()
    with pytest.raises(SaveError, match=r"m-00002-of-00002\.gguf is a directory"):
        write_gguf_split(tmp_path / "m.gguf", metadata={}, tensors=_matrices(2, 2), max_tensors=1)
    assert [p.name for p in tmp_path.iterdir()] == ["m-00002-of-00002.gguf"]


def test_a_full_disk_names_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, **_: Any) -> None:
        raise SaveError("cannot save: No space left on device", path=path)

    monkeypatch.setattr("llamakit.formats.gguf_split.written_tensors", full)
    with pytest.raises(SaveError, match="No space left") as caught:
        write_gguf_split(tmp_path / "m.gguf", metadata={}, tensors=[])
    assert caught.value.path == tmp_path / "m-00001-of-00001.gguf"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "n_bytes"), [("300M", 300_000_000), ("2G", 2_000_000_000), ("1M", 1_000_000)])
def test_sizes(text: str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "2", "G", "0G", "-1G", "1.5G", "2g", "2GB", "2 G", "2K", "\u0662G", "9" * 5000 + "G", "2G\n", "1\x1bG"])  # fmt: skip
def test_no_sizes(text: str) -> None:
    with pytest.raises(LlamakitError, match="is no size of a part") as caught:
        parse_size(text)
    assert isinstance(caught.value, UsageError) and "\x1b" not in str(caught.value)
