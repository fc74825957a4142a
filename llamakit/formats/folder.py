"""Files of a model folder that somebody else packed: each by its bare name, each really in the folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from llamakit.errors import FormatError
from llamakit.files import escape_control

#: the Hub's cache: models--USER--NAME/snapshots/REVISION/FILE links to ../../blobs/HASH
_SNAPSHOT = re.compile(r"(.*/(?:models|datasets)--[^/]+)/snapshots/[^/]+")


def member(directory: Path, name: object) -> Path:
    """The path of a file that a folder's index, say, names. What it is, is for who opens it to check.

    Raises FormatError for a name that is no bare file name, and for a link that leaves the folder; the links of the
    Hub's cache, from a snapshot to the blobs of the same repository, are followed.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        shown = escape_control(repr(name)[:100])
        raise FormatError(f"{shown} is no name of a file in this folder", path=directory)
    path = directory / name
    if path.is_symlink():
        home = os.path.realpath(directory)
        snapshot = _SNAPSHOT.fullmatch(home)
        target = os.path.realpath(path)
        if os.path.dirname(target) != home and not (snapshot and os.path.dirname(target) == f"{snapshot[1]}/blobs"):
            raise FormatError(
                "is a link that leaves the folder, which is not followed",
                path=path,
                hint="put the file itself into the folder",
            )
    return path


def folder_name(directory: Path) -> str:
    """What the model in a folder is called: the folder's name, or the repository's in the Hub's cache."""
    home = os.path.realpath(directory)
    snapshot = _SNAPSHOT.fullmatch(home)
    return os.path.basename(snapshot[1]).rpartition("--")[2] if snapshot else os.path.basename(home)
