"""What both kinds of sources share: reports of progress, names of split models, the words of refusals."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llamakit.errors import LlamakitError, SaveError, UsageError

#: gguf-split's and transformers' names of parts
SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.[A-Za-z]+)")


@dataclass(frozen=True)
class Download:
    """How far one file is: its name, bytes there, bytes in all (None: the server did not say)."""

    name: str
    n_done: int
    n_total: int | None


OnProgress = Callable[[Download], None]


def split_parts(name: str) -> list[str]:
    """Every part of a split GGUF, by gguf-split's naming; the name alone otherwise."""
    split = SPLIT.fullmatch(name)
    if split is None or split[4].lower() != ".gguf" or not 1 <= int(split[3]) <= 9999:
        return [name]
    return [f"{split[1]}-{i:05d}-of-{split[3]}{split[4]}" for i in range(1, int(split[3]) + 1)]


def refused(status: int, place: str, login: str | None) -> LlamakitError:
    """The error for a server's status. login: how to get access, where there is a way."""
    if status in (401, 403):
        return UsageError(f"access is refused (HTTP {status})", path=place, hint=login)
    if status in (404, 410):
        return UsageError(f"there is no such file (HTTP {status})", path=place, hint="check the address")
    return LlamakitError(f"the server answers HTTP {status}", path=place, hint="try again later")


def disk_error(error: OSError, place: str | Path) -> SaveError:
    """The error for a write that failed."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return SaveError(f"cannot save: {error.strerror}", path=place, hint="free some space" if full else None)
