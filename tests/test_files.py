"""Folders, and files that belong together, appear whole or not at all."""

import errno
import os
import threading

import pytest

from llamakit.errors import SaveError, UsageError
from llamakit.files import atomic_directory, atomic_files, read_whole


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


def _write_set(path, text):
    with atomic_files(path) as folder:
        for name in "abc":
            (folder / name).write_text(text + name)


def test_files_of_a_set_come_together(tmp_path):
    (tmp_path / "c").write_text("old")
    (tmp_path / "other").write_text("mine")
    _write_set(tmp_path / "set", "new ")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "a": "new a", "b": "new b", "c": "new c", "other": "mine",
    }  # fmt: skip


@pytest.mark.parametrize("failing", range(5))
def test_a_rename_that_fails_leaves_the_old_files(tmp_path, monkeypatch, failing):
    """Two old files leave, three new ones come: whichever rename fails, all is as before."""
    for name in "ac":
        (tmp_path / name).write_text(f"old {name}")
    rename, calls = os.rename, []

    def fails(source, target):
        calls.append(source)
        if len(calls) == failing + 1:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(SaveError, match="Input/output error"):
        _write_set(tmp_path / "set", "new ")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "old a", "c": "old c"}


def test_at_no_time_do_old_and_new_files_make_a_set(tmp_path, monkeypatch):
    """The first file, without which nobody finds the others, is there only while all belong together."""
    _write_set(tmp_path / "set", "old ")
    rename, seen = os.rename, []

    def look(source, target):
        rename(source, target)
        there = {p.name: p.read_text()[:3] for p in tmp_path.iterdir() if p.is_file()}
        seen.append("a" in there)
        assert "a" not in there or len(set(there.values())) == 1

    monkeypatch.setattr(os, "rename", look)
    _write_set(tmp_path / "set", "new ")
    assert seen == [False] * 5 + [True]


def test_a_device_is_not_read_to_an_end_that_it_has_not(tmp_path):
    with pytest.raises(UsageError, match="no file that can be read whole"):
        read_whole("/dev/zero")
    with pytest.raises(UsageError, match="Is a directory"):
        read_whole(tmp_path)
    (tmp_path / "a").write_bytes(b"a\xff")
    assert read_whole(tmp_path / "a") == b"a\xff"
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"text",))
    writer.start()
    assert read_whole(tmp_path / "pipe") == b"text"
    writer.join()
