"""Bytes of a file at an offset: the one way in which every reader of this room touches the disk.

Reads are positioned (`pread`), never mapped: a mapped file that somebody truncates kills the process with
SIGBUS, a short read is an error that can be told.
"""

from __future__ import annotations

import os
import stat
import weakref
from pathlib import Path

import numpy as np

from llamakit.errors import FormatError, UsageError

#: how a pointer begins, and how long it may be (Git LFS, docs/spec.md)
_LFS, _MAX_POINTER_BYTES = b"version https://git-lfs.github.com/spec/v1\n", 1024


class FileSource:
    """An open regular file of a known size. Closed by `close()`, by `with`, or with the object.

    Raises UsageError when the path cannot be opened or is no regular file, FormatError for a Git LFS pointer.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            # O_NONBLOCK: opening a FIFO must not wait for somebody to write into it.
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UsageError(f"cannot be opened: {reason}", path=path) from error
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            kind = "is a directory" if stat.S_ISDIR(status.st_mode) else "is not a regular file"
            raise UsageError(f"{kind}, a model file is needed", path=path)
        self.size = status.st_size
        self._fd = fd
        self._finalizer = weakref.finalize(self, os.close, fd)
        if self.size < _MAX_POINTER_BYTES and os.pread(fd, len(_LFS), 0) == _LFS:
            self.close()
            raise FormatError(
                "is a Git LFS pointer: the file that it stands for is not here",
                path=path,
                hint="fetch it with: git lfs pull",
            )

    def close(self) -> None:
        """Give the file back to the system; reading afterwards is an error. May be called twice."""
        self._finalizer()

    def __enter__(self) -> FileSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, offset: int, n_bytes: int) -> np.ndarray:
        """A fresh, writable uint8 array (n_bytes,) of what stands at `offset`.

        Raises FormatError when the file ends before, or the system cannot read it.
        """
        if not self._finalizer.alive:
            raise ValueError(f"{self.path} has been closed")
        array = np.empty(n_bytes, np.uint8)
        view, done = array.data, 0
        while done < n_bytes:
            try:
                n = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise FormatError(f"cannot be read: {error.strerror}", path=self.path, offset=offset) from error
            if n == 0:
                raise FormatError(
                    f"the file ends inside what is being read (expected {n_bytes} bytes, got {done})",
                    path=self.path,
                    offset=offset,
                    hint="it was cut off or changed after it was opened; get it again",
                )
            done += n
        return array
