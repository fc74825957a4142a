"""Mutants of every binary format: a LlamakitError of one line, or success; never a hang, never much memory."""

from __future__ import annotations

import resource
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from llamakit.errors import LlamakitError
from llamakit.files import escape_control
from llamakit.formats.adapter import read_adapter
from llamakit.formats.gguf import GGUFFile
from llamakit.formats.open import open_model
from llamakit.formats.stamps import base_stamps
from tests.formats.files import ggla_file, llama2c_file
from tests.fuzz.mutate import mutant, scrambled
from tests.fuzz.raw import sound


def _use(path: Path) -> bool:
    """Open, look at everything, read everything; True when it was accepted."""
    accepted = False
    for reader in (open_model, read_adapter):
        try:
            opened = reader(path)
            accepted = True
            if hasattr(opened, "read"):
                for key in opened.metadata:
                    repr(opened.metadata[key])
                for name, info in opened.tensors.items():
                    assert opened.read(name).shape == (info.n_rows, info.row_bytes)
                base_stamps(opened)
                opened.close()
        except LlamakitError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            assert escape_control(str(error)) == str(error)
    return accepted


def _campaign(path: Path, numbers: range) -> int:
    accepted = 0
    for number in numbers:
        path.write_bytes(mutant(number))
        start = time.process_time()
        accepted += _use(path)
        assert time.process_time() - start < 1, number  # a hang, not a benchmark: the median is under 1 ms
    return accepted


def test_the_seed_file_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "sound.gguf"
    path.write_bytes(sound().pack())
    with GGUFFile(path) as file:
        assert len(file.tensors) == 3
    assert mutant(7) == mutant(7)


def test_mutants_of_gguf(tmp_path: Path) -> None:
    accepted = _campaign(tmp_path / "m.gguf", range(300))
    assert 0 < accepted < 150  # neither all refused at the magic, nor hardly broken


@pytest.mark.parametrize(("make", "head_bytes"), [(llama2c_file, 32), (ggla_file, 120)])
def test_mutants_of_other_formats(tmp_path: Path, make, head_bytes: int) -> None:
    path = tmp_path / "m.bin"
    whole = make(path).read_bytes()
    for number in range(100):
        path.write_bytes(scrambled(whole, number, head_bytes))
        _use(path)


@pytest.mark.prove
@pytest.mark.timeout(1500)
def test_three_thousand_mutants(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _campaign(tmp_path / "m.gguf", range(300, 3300))
    for make, head_bytes in ((llama2c_file, 32), (ggla_file, 120)):
        whole = make(tmp_path / "m.bin").read_bytes()
        for number in range(100, 3100):
            (tmp_path / "m.bin").write_bytes(scrambled(whole, number, head_bytes))
            _use(tmp_path / "m.bin")
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown_bytes < 200e6


def test_byte_by_byte_truncation(tmp_path: Path) -> None:
    whole, path = sound().pack(), tmp_path / "cut.gguf"  # the last bytes are padding, which nobody misses
    last = max(i for i in range(len(whole)) if whole[i]) + 1
    for n in range(0, last, 3):
        path.write_bytes(whole[:n])
        with pytest.raises(LlamakitError):
            open_model(path)
    assert struct.unpack_from("<I", whole, 4)[0] == 3
    assert np.frombuffer(whole[-32:-20], np.uint8).tolist() == list(range(12))
