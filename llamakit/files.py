"""Writing files so that nothing good is ever lost: atomic replacement, a run lock, printable names."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shlex
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from llamakit.errors import LlamakitError, SaveError, UsageError

# C0, DEL, C1, and the marks that reorder text on a terminal: none may reach it from a file's metadata.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_control(text: str) -> str:
    """Text as it may be printed: control and direction characters become \\xNN or \\uNNNN."""
    return _UNPRINTABLE.sub(lambda m: f"\\x{ord(m[0]):02x}" if ord(m[0]) < 256 else f"\\u{ord(m[0]):04x}", text)


_ESCAPE = re.compile(rb"\\(?:([nrt'\"\\])|x([0-9a-fA-F]{2}))")
_PLAIN = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}


def process_escapes(text: str) -> str:
    r"""Text with \n \r \t \' \" \\ and \xNN (a byte of UTF-8) as what they stand for; anything else stays as it is.

    Raises UsageError for bytes that are not UTF-8.
    """
    try:
        data = text.encode()
        return _ESCAPE.sub(lambda m: bytes([int(m[2], 16)]) if m[2] else _PLAIN.get(m[1], m[1]), data).decode()
    except (UnicodeEncodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the text is not UTF-8: {error.reason}") from error


def _fsync_path(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def _save_error(path: Path, error: OSError) -> SaveError:
    hint = "free some space, or write to another disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
    return SaveError(f"cannot save: {error.strerror or error}; what was there before is intact", path=path, hint=hint)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], verify: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """A temporary path beside `path`, to be written by the caller; it replaces `path` only once it is whole.

    On leaving: fsync, `verify(temporary)`, rename over `path`, fsync of the directory. On any error the
    temporary file is removed and `path` stays as it was. Raises SaveError for what the disk refuses.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        yield temporary
        _fsync_path(temporary)
        if verify is not None:
            verify(temporary)
        os.replace(temporary, path)
        _fsync_path(path.parent)
    except BrokenPipeError:  # what was printed meanwhile, not the disk
        raise
    except OSError as error:
        raise _save_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(
    path: str | os.PathLike[str], verify: Callable[[Path], None] | None = None, *, replacing: Collection[str] = ()
) -> Iterator[Path]:
    """A temporary directory beside `path`, to be filled by the caller; it becomes `path` only once it is whole.

    An empty directory may stand there already, or one with no other files than those named in `replacing`, which the
    new one is exchanged for. On leaving: fsync of every file, `verify(temporary)`, rename, fsync of the parent. On any
    error the temporary directory is removed and `path` stays as it was. Raises UsageError where `path` is a file or
    another directory that is not empty, SaveError for what the disk refuses.
    """
    path = Path(path)
    refuse_occupied(path, replacing)
    path = Path(os.path.realpath(path)) if path.is_symlink() else path  # a link to an empty folder stays one
    temporary = _temporary(path)
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            _fsync_path(file)
        _fsync_path(temporary)
        if verify is not None:
            verify(temporary)
        if replacing and path.is_dir():
            _exchange(temporary, path)
        else:
            os.rename(temporary, path)
        _fsync_path(path.parent)
    except BrokenPipeError:  # what was printed meanwhile, not the disk
        raise
    except OSError as error:
        raise _save_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_files(path: str | os.PathLike[str], verify: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """A temporary directory beside `path`, to be filled by the caller with files that belong together; they go into the
    directory of `path`, replacing those of their names, only once all of them are whole.

    On leaving: fsync of every file, `verify(temporary)`, renames, fsync of the directory. On any error what was there
    before stays. The first file in the order of names leaves first and comes last: a process that is killed meanwhile
    leaves a set without it, never one mixed of old and new. Raises SaveError for what the disk refuses.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            _fsync_path(file)
        _fsync_path(temporary)
        if verify is not None:
            verify(temporary)
        _move_in(temporary, path.parent)
        _fsync_path(path.parent)
    except BrokenPipeError:  # what was printed meanwhile, not the disk
        raise
    except OSError as error:
        raise _save_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_in(source: Path, directory: Path) -> None:
    """Move every file of `source` into `directory`, or leave `directory` as it is."""
    names = sorted(os.listdir(source))
    for name in names:
        if (directory / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, f"{name} is a directory")
    old, moved = source / ".old", list[str]()
    old.mkdir()
    try:
        for name in names:
            if os.path.lexists(directory / name):
                os.rename(directory / name, old / name)
        for name in reversed(names):
            os.rename(source / name, directory / name)
            moved.append(name)
    except BaseException:
        for name in moved:
            os.unlink(directory / name)
        for name in os.listdir(old):
            os.rename(old / name, directory / name)
        raise


def refuse_occupied(path: Path, replacing: Collection[str] = ()) -> None:
    """A folder is written anew or not at all: mixing two models' files would give neither.

    replacing: files of an older one that may stand there. Raises UsageError.
    """
    if path.is_dir():
        if not {entry.name for entry in path.iterdir()} <= set(replacing):
            raise UsageError("is not empty", path=path, hint="name a new folder, or remove this one first")
    elif os.path.lexists(path):
        raise UsageError("is a file, a folder is to be written", path=path)


def _exchange(new: Path, old: Path) -> None:
    """Swap the names of two directories in one step (renameat2); in three where the file system cannot."""
    import ctypes

    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE (linux/fs.h)
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is not None and rename(at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), exchange) == 0:
        return
    aside = new.with_name(f"{new.name}-old")
    os.rename(old, aside)
    os.rename(new, old)
    os.rename(aside, new)


def remove_directory(path: Path, only: Collection[str]) -> None:
    """Remove a directory that has no other files than those named; at no time is a part of it under its name."""
    if {entry.name for entry in path.iterdir()} <= set(only):
        temporary = _temporary(path)
        os.rename(path, temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def replace_with_link(source: Path, target: Path) -> None:
    """Make `target` another name of `source`'s content, replacing it atomically; a copy where links cannot be.

    Of a directory it is a symbolic link, relative, which needs `source` to stay. Raises SaveError.
    """
    temporary = _temporary(target)
    try:
        temporary.unlink(missing_ok=True)
        try:
            if source.is_dir():
                os.symlink(os.path.relpath(source, target.parent), temporary)
            else:
                os.link(source, temporary)
        except OSError:
            if source.is_dir():
                raise
            shutil.copyfile(source, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)
        _fsync_path(target.parent)
    except OSError as error:
        raise _save_error(target, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_stale_temporaries(directory: Path, names: re.Pattern[str]) -> None:
    """Remove what killed runs left in a directory: temporaries, for names that match whole, of ended processes."""
    for stale in directory.glob(".*.tmp-*"):
        name, _, pid = stale.name[1:].rpartition(".tmp-")
        if names.fullmatch(name) and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            if stale.is_dir() and not stale.is_symlink():
                shutil.rmtree(stale, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    stale.unlink()


def as_argument(path: str | os.PathLike[str]) -> str:
    """A path that no command takes for an option."""
    return f"./{os.fspath(path)}" if os.fspath(path).startswith("-") else os.fspath(path)


def is_same_file(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> bool:
    """Whether two paths lead to one file or directory; False where one of them leads nowhere."""
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False


def check_writable(path: str | os.PathLike[str], *, folder: Collection[str] | None = None) -> None:
    """Raise UsageError now if `path` could not be written later: no such directory, no permission, full disk.

    folder: a folder of these files, or a link to one, is to be written, not a file.
    """
    path = Path(path)
    if folder is not None:
        if not (path.is_symlink() and path.is_dir()):
            refuse_occupied(path, folder)
    elif path.is_dir():
        raise UsageError("is a directory, a file name is needed", path=path)
    probe = path.with_name(f".{path.name}.probe-{os.getpid()}")
    try:
        with probe.open("wb") as file:
            file.write(b"\0")
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        hint = None if path.parent.is_dir() else f"create it with: mkdir -p {shlex.quote(str(path.parent))}"
        raise UsageError(
            f"the output directory cannot be written: {error.strerror}", path=path.parent, hint=hint
        ) from error


class RunLock:
    """Keeps a second run off the same outputs: one advisory lock file beside each, held while the process lives.

    The kernel drops the lock of a killed process, so a stale lock file is taken over without a question.
    """

    def __init__(self, outputs: Sequence[str | os.PathLike[str]]) -> None:
        self._paths = sorted({Path(o).with_name(f".{Path(o).name}.lock") for o in outputs})
        self._fds: list[tuple[Path, int]] = []

    def __enter__(self) -> RunLock:
        for path in self._paths:
            self._fds.append((path, self._acquire(path)))
        return self

    def _acquire(self, path: Path) -> int:
        while True:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                self._release()
                raise UsageError(f"cannot create the run lock: {error.strerror}", path=path) from error
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.read(fd, 32).decode("ascii", "replace").strip()
                os.close(fd)
                self._release()
                raise UsageError(
                    f"another run (process {holder or 'unknown'}) is writing the same outputs",
                    path=path,
                    hint="wait for it to end, or give this run other output names",
                ) from error
            # The holder may have unlinked the file between our open and our lock: then the name is free again.
            if path.exists() and os.stat(path).st_ino == os.fstat(fd).st_ino:
                os.truncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                return fd
            os.close(fd)

    def _release(self) -> None:
        for path, fd in self._fds:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(fd)
        self._fds = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()


def available_memory_bytes() -> int | None:
    """Memory that could be taken without swapping (MemAvailable, and the cgroup's limit), None where unknown."""
    available: list[int] = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        available.append(max(0, limit - used))
    return min(available, default=None)


def read_text(path: str | os.PathLike[str]) -> str:
    """A whole UTF-8 text. Raises LlamakitError naming the byte at fault, or what the system said."""
    data = read_whole(path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, data, error) from error


def read_whole(path: str | os.PathLike[str]) -> bytes:
    """All bytes of a file, or of a pipe until it ends. Raises UsageError where it cannot be read or is a device, which
    may never end."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
                raise UsageError("is no file that can be read whole", path=path)
            return file.read()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot be read: {getattr(error, 'strerror', None) or error}", path=path) from error


def _not_utf8(path: str | os.PathLike[str], data: bytes, error: UnicodeDecodeError) -> LlamakitError:
    line = data.count(b"\n", 0, error.start) + 1
    return UsageError(
        f"is not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start})",
        path=path,
        line=line,
        hint="convert it first, for example: iconv -f ISO-8859-1 -t UTF-8",
    )
