"""Folders appear whole or not at all."""

import errno

import pytest

from llamakit.errors import SaveError, UsageError
from llamakit.files import atomic_directory


def test_a_folder_appears_once_it_is_whole(tmp_path):
    target = tmp_path / "out"
    with atomic_directory(target, lambda made: None) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("a")
        assert not target.exists()
    assert (target / "sub" / "a.txt").read_text() == "a"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_may_stand_there(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("a")
    assert (tmp_path / "out" / "a.txt").exists()


@pytest.mark.parametrize("error", [ValueError("no"), OSError(errno.ENOSPC, "No space left on device")])
def test_an_error_leaves_nothing(tmp_path, error):
    with pytest.raises(ValueError if isinstance(error, ValueError) else SaveError), atomic_directory(tmp_path / "out") as folder:  # fmt: skip
        (folder / "a.txt").write_text("a")
        raise error
    assert not list(tmp_path.iterdir())


def test_what_does_not_verify_leaves_nothing(tmp_path):
    def verify(folder):
        raise SaveError(f"{(folder / 'a.txt').read_text()} is wrong")

    with pytest.raises(SaveError, match="a is wrong"), atomic_directory(tmp_path / "out", verify) as folder:
        (folder / "a.txt").write_text("a")
    assert not list(tmp_path.iterdir())


def test_what_stands_there_is_never_mixed_with(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, reason in (("full", "is not empty"), ("file", "is a file")):
        with pytest.raises(UsageError, match=reason), atomic_directory(tmp_path / name):
            pass
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "mine"
