"""PyTorch's files: the right data or one line, and never a byte of somebody else's code."""

from __future__ import annotations

import io
import random
import re
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llamakit
from llamakit.errors import FormatError, LlamakitError, UnsupportedError, UsageError
from llamakit.formats.torch_file import TorchFile
from tests.formats.torch_payloads import archive, payloads, storage, tensor

SOUND = tensor(storage(), 0, (2, 3), (3, 1))
SIX = {"0": np.arange(6, dtype="<f4").tobytes()}


def save(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def raw_of(values: torch.Tensor) -> bytes:
    return values.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_view_reads_as_torch_sees_it(tmp_path: Path) -> None:
    base = torch.randn(8, 6)
    views = {
        "whole": base, "parameter": torch.nn.Parameter(base), "transposed": base.t(), "part": base[2:5, 1:4],
        "rows": base[3:], "column": base[:, 2], "diagonal": base.diagonal(), "expanded": base[1:2].expand(4, 6),
        "three axes": torch.randn(2, 3, 4).transpose(0, 2), "empty": torch.zeros(0, 4), "f16": base.half(),
        "bf16": base.bfloat16().t(), "f64": base.double(), "i64": torch.arange(5), "steps": base[::3],
    }  # fmt: skip
    with TorchFile(save(tmp_path / "x.pt", views)) as file:
        assert list(file.tensors) == list(views)
        for name, view in views.items():
            info = file.tensors[name]
            assert info.shape == tuple(view.shape)
            assert file.read(name).tobytes() == raw_of(view)
            if len(info.shape) == 2 and info.n_rows > 2:
                assert file.read(name, 1, 3).tobytes() == raw_of(view[1:3]), name
                assert file.read(name, 2, 2).shape == (0, info.row_bytes)


def test_names_numbers_and_values(tmp_path: Path) -> None:
    saved = {
        "model": {"a.weight": torch.ones(2)}, "best": torch.tensor(1.5, dtype=torch.bfloat16), "n": torch.tensor(7),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2), "step": torch.tensor(3.0)}}, "groups": [{"lr": 0.1}]},
        "nothing": None, "flag": True, "name": "x", "f8": torch.zeros(2).to(torch.float8_e4m3fn),
    }  # fmt: skip
    with TorchFile(save(tmp_path / "x.pt", saved)) as file:
        assert list(file.tensors) == ["model/a.weight", "optimizer/state/0/exp_avg"]
        assert file.other_dtypes == {"f8": "FLOAT8_E4M3FN"}
        assert file.values == {
            "model": {}, "best": 1.5, "n": 7, "optimizer": {"state": {0: {"step": 3.0}}, "groups": [{"lr": 0.1}]},
            "nothing": None, "flag": True, "name": "x",
        }  # fmt: skip
        with pytest.raises(UnsupportedError, match="FLOAT8_E4M3FN"):
            file.read("f8")
        with pytest.raises(ValueError, match=r"rows 0\.\.2"):
            file.read("model/a.weight", 0, 2)
        with pytest.raises(KeyError):
            file.read("model")
    with pytest.raises(ValueError, match="closed"):
        file.read("model/a.weight")
    both = {"a/b": torch.ones(2), "a": {"b": torch.zeros(2)}}
    with pytest.raises(FormatError, match="two tensors have the name 'a/b'"):
        TorchFile(save(tmp_path / "y.pt", both))


def test_tensors_of_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(archive(tensor(storage(location="cuda:1"), 0, (2, 3), (3, 1)), SIX))
    with TorchFile(path) as file:
        assert file.read("a").tobytes() == SIX["0"]


def test_memory_holds_the_rows_that_are_read(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"a": torch.zeros(1 << 13, 1 << 10), "b": torch.zeros(4)})
    TorchFile(path).close()  # PyTorch's own modules are loaded by now
    tracemalloc.start()
    with TorchFile(path) as file:
        assert file.read("a", 5, 7).shape == (2, 4096)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


CANARY = Path("canary")
NAMES = list(payloads(CANARY))


def test_there_are_enough_of_them() -> None:
    assert len(NAMES) >= 30


@pytest.mark.parametrize("name", NAMES)
def test_no_pickle_runs_code(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    canary, path = tmp_path / "canary", tmp_path / "x.pt"
    path.write_bytes(payloads(canary)[name]())
    with pytest.raises((FormatError, UnsupportedError)) as caught:
        TorchFile(path).read("a")
    assert not canary.exists() and caught.value.exit_code == 2
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert "Traceback" not in "".join(capsys.readouterr())


def test_the_package_never_loads_a_pickle_in_another_way() -> None:
    wrong = re.compile(r"pickle\.(load|loads|Unpickler)\b|weights_only\s*=\s*(?!True)|(?<![\w.])(eval|exec)\(|"
                       r"add_safe_globals|safe_globals\(")  # fmt: skip
    for path in sorted(Path(llamakit.__file__).parent.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        assert not wrong.search(source), path
        assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^)]*\)", source)), path


def _compressed() -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", bytes(10_000_000))
    return raw.getvalue()


def _claimed(size: int) -> bytes:
    """A storage whose size in the directory is a lie."""
    raw = bytearray(archive(SOUND, SIX))
    at = raw.rindex(b"PK\1\2", 0, raw.rindex(b"x/data/0"))
    raw[at + 20 : at + 28] = struct.pack("<II", size, size)
    return bytes(raw)


ARCHIVES: dict[str, tuple[bytes, type[LlamakitError], str]] = {
    "a deflate bomb": (_compressed(), UnsupportedError, "compressed"),
    "the old format": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", UnsupportedError, "old format"),
    "no archive": (b"GGUF" * 10, FormatError, "no PyTorch file"),
    "nothing": (b"", FormatError, "no PyTorch file"),
    "an absolute name": (archive(SOUND, SIX, {"/etc/x": b""}), FormatError, "no name"),
    "a name that climbs": (archive(SOUND, SIX, {"x/../../y": b""}), FormatError, "no name"),
    "a backslash": (archive(SOUND, SIX, {"x\\..\\y": b""}), FormatError, "no name"),
    "two folders": (archive(SOUND, SIX, {"y/z": b""}), FormatError, "in one folder"),
    "two pickles": (archive(SOUND, SIX, {"y/data.pkl": SOUND}), FormatError, "twice"),
    "no folder": (archive(SOUND, SIX, root=""), FormatError, "twice"),
    "big-endian": (archive(SOUND, SIX).replace(b"little", b"big   "), FormatError, "little-endian|Bad CRC"),
    "TorchScript": (archive(SOUND, SIX, {"x/constants.pkl": b""}), UnsupportedError, "TorchScript"),
    "a size beyond the file": (_claimed(1 << 30), FormatError, "larger than the file"),
    "a size below the tensor": (_claimed(8), FormatError, "8 in the archive"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_that_are_refused(tmp_path: Path, name: str) -> None:
    raw, error, reason = ARCHIVES[name]
    (tmp_path / "x.pt").write_bytes(raw)
    with pytest.raises((error, UnsupportedError), match=reason):
        TorchFile(tmp_path / "x.pt")


def test_a_directory_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be taken into memory before a single entry is looked at."""
    monkeypatch.setattr("llamakit.formats.torch_file._MAX_DIRECTORY_BYTES", 100)
    (tmp_path / "x.pt").write_bytes(archive(SOUND, SIX))
    with pytest.raises(FormatError, match=r"a directory of [0-9]+ bytes"):
        TorchFile(tmp_path / "x.pt")


def test_a_pickle_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(archive(SOUND + bytes((64 << 20) + 1), SIX))
    with pytest.raises(FormatError, match="its pickle has"):
        TorchFile(path)


def test_truncated_files_and_mutants(tmp_path: Path) -> None:
    path, sound, rng = tmp_path / "x.pt", archive(SOUND, SIX), random.Random(0)
    for n in range(1, len(sound), 17):
        path.write_bytes(sound[:n])
        with pytest.raises(FormatError):
            TorchFile(path)
    for _ in range(150):
        mutant = bytearray(sound)
        for _ in range(rng.choice((1, 1, 3))):
            mutant[rng.randrange(len(mutant))] = rng.randrange(256)
        path.write_bytes(mutant)
        try:
            with TorchFile(path) as file:
                for name in file.tensors:
                    file.read(name)
        except LlamakitError as error:
            assert error.exit_code == 2 and "\n" not in str(error)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        TorchFile(tmp_path / "x")
    with pytest.raises(UsageError, match="is a directory"):
        TorchFile(tmp_path)
