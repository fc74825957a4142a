"""Models and texts that lie elsewhere: `hf:user/repo[:QUANT]` on the Hugging Face Hub, and https URLs.

Both are kept in the Hub's own cache, so that transformers and llama.cpp share what was downloaded: a repository in
the cache's usual layout, a URL in `llamakit/<sha256 of the URL>/<name>` beside it. Downloads that were cut go on.
"""

from __future__ import annotations

import os
from pathlib import Path

from llamakit.hub.download import Download, OnProgress
from llamakit.hub.repository import fetch_repository
from llamakit.hub.urls import fetch_url

__all__ = ["Download", "OnProgress", "fetch", "is_remote"]


def is_remote(source: str) -> bool:
    """Whether a source is to be fetched: `hf:...` or a URL, and no path that exists."""
    return source.startswith(("hf:", "https://", "http://")) and not os.path.lexists(source)


def fetch(source: str, *, offline: bool = False, on_progress: OnProgress | None = None) -> Path:
    """Bring `hf:user/repo[@revision][:QUANT]`, `hf:user/repo/FILE` or an https URL here and return its local path.

    A repository gives the GGUF of that quantization (llama.cpp's rule: Q4_K_M, then Q8_0, then the first), all parts
    of a split one, or else its folder in Hugging Face's format. offline: only what the cache holds. on_progress: told
    of each file as it comes. Raises UsageError for what the user can change (a name, a login), LlamakitError for the
    network, SaveError for the disk.
    """
    progress = on_progress or (lambda _: None)
    if source.startswith("hf:"):
        return fetch_repository(source, offline, progress)
    return fetch_url(source, offline, progress)
