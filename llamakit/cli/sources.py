"""Sources named on a command line: a path as it is; `hf:user/repo[:QUANT]` and URLs fetched, with progress."""

from __future__ import annotations

from pathlib import Path
from typing import overload

from llamakit import hub
from llamakit.cli import render


@overload
def local(source: str | Path, *, offline: bool) -> Path: ...
@overload
def local(source: None, *, offline: bool) -> None: ...
def local(source: str | Path | None, *, offline: bool) -> Path | None:
    """The path of a source on this machine. offline: what is not here is not fetched. Raises as `hub.fetch` does."""
    if source is None or not hub.is_remote(str(source)):
        return None if source is None else Path(source)
    with _View() as view:
        return hub.fetch(str(source), offline=offline, on_progress=view.show)


class _View:
    """A bar for each file on a terminal, a line for each elsewhere; silent while the cache answers."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._bar: render.Progress | None = None

    def __enter__(self) -> _View:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)

    def show(self, download: hub.Download) -> None:
        """Take a report of `hub.fetch`."""
        if download.name != self._name:
            self.__exit__()
            self._name = download.name
            size = "" if download.n_total is None else f" ({render.human_bytes(download.n_total)})"
            render.log(f"downloading {download.name}{size}")
            total = None if download.n_total is None else round(download.n_total / 1e6)
            self._bar = render.Progress("downloading (MB)", total).__enter__()
        if self._bar is not None:
            self._bar.update(round(download.n_done / 1e6))
