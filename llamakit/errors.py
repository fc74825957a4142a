"""Every error that a user can cause, and the exit code that each gives.

LlamakitError             1  something failed
├── LostRankError         1  another process of the same run is gone
├── UsageError            2  an option or a combination of options that cannot be
├── FormatError           2  a file that is broken or hostile
├── UnsupportedError      2  a file or a request that is sound, but not for llamakit
├── DataError             2  a training text that cannot be used
├── MismatchError         2  two things that do not belong together (adapter and base, checkpoint and text)
├── SaveError             3  a result could not be saved; what was there before is intact
├── DivergedError         4  training stopped on non-finite losses; the last good checkpoint is intact
└── MemoryError_          5  not enough memory; the message names the options that need less

An interrupted run (Ctrl-C, SIGTERM) ends with 130 or 143 after saving; that is no error.
"""

from __future__ import annotations

import os

EXIT_OK, EXIT_FAILURE, EXIT_USAGE, EXIT_SAVE, EXIT_DIVERGED, EXIT_MEMORY = 0, 1, 2, 3, 4, 5
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143


class LlamakitError(Exception):
    """One line for the user: `PATH[@offset|:line]: reason`, and a hint for the next step where there is one.

    path: the file at fault; offset: byte position in it; line: line number in it, from 1.
    """

    exit_code = EXIT_FAILURE

    def __init__(
        self,
        reason: str,
        *,
        path: str | os.PathLike[str] | None = None,
        offset: int | None = None,
        line: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason, self.path, self.offset, self.line, self.hint = reason, path, offset, line, hint

    def __str__(self) -> str:
        if self.path is None:
            return self.reason
        place = f"@{self.offset}" if self.offset is not None else f":{self.line}" if self.line is not None else ""
        return f"{os.fspath(self.path)}{place}: {self.reason}"


class LostRankError(LlamakitError):
    """Another process of the same training run is gone: it failed, or something ended it."""


class UsageError(LlamakitError):
    """An option, or a combination of options, that cannot be."""

    exit_code = EXIT_USAGE


class FormatError(LlamakitError):
    """A broken, truncated or hostile file."""

    exit_code = EXIT_USAGE


class UnsupportedError(LlamakitError):
    """A sound file or request that llamakit does not handle."""

    exit_code = EXIT_USAGE


class DataError(LlamakitError):
    """A training text that cannot be used."""

    exit_code = EXIT_USAGE


class MismatchError(LlamakitError):
    """Two things that do not belong together, such as an adapter and another model; names both values."""

    exit_code = EXIT_USAGE


class SaveError(LlamakitError):
    """A result could not be saved; the files that were there before are intact."""

    exit_code = EXIT_SAVE


class DivergedError(LlamakitError):
    """Training stopped on non-finite losses; the last good checkpoint is intact."""

    exit_code = EXIT_DIVERGED


class MemoryError_(LlamakitError):
    """Out of memory; the hint names the options that need less."""

    exit_code = EXIT_MEMORY
