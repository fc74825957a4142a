"""https sources: kept in the cache with what tells whether they are still the same, and continued when cut."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from llamakit.errors import LlamakitError, SaveError, UsageError
from llamakit.files import RunLock, escape_control
from llamakit.hub.download import Download, OnProgress, disk_error, refused, split_parts

_CHUNK = 1 << 20
_MAX_CUTS = 5  # a connection that breaks more often without an end is reported
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def fetch_url(url: str, offline: bool, progress: OnProgress) -> Path:
    """Bring an https URL here, every part of a split model; the path of what it names. Raises as `hub.fetch` does."""
    _check_url(url)
    parts = urllib.parse.urlsplit(url)
    folder = _cache_root() / "llamakit" / hashlib.sha256(url.encode()).hexdigest()
    paths = []
    for part in split_parts(parts.path):  # the parts of a split model lie side by side
        target = folder / _file_name(part)
        paths.append(target)
        if not offline:
            _Fetch(urllib.parse.urlunsplit(parts._replace(path=part)), target, progress).run()
        elif not target.is_file():
            raise UsageError("is not in the cache", path=_shown(url), hint="run once without --offline")
    return paths[0]


def _cache_root() -> Path:
    """The Hub's cache, where huggingface_hub has it; its usual place without that package."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return Path.home() / ".cache" / "huggingface" / "hub"
    return Path(constants.HF_HUB_CACHE)


def _file_name(path: str) -> str:
    """The last part of a URL's path as the name of a file: no separators, no leading dot, nothing unprintable."""
    name = urllib.parse.unquote(path.rstrip("/").rpartition("/")[2])
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".-")[-150:] or "download"


def _shown(url: str) -> str:
    """A URL without what may be secret in it: user, password, query."""
    parts = urllib.parse.urlsplit(url)
    return escape_control(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")


def _check_url(url: str) -> None:
    """Raise UsageError for a URL that is not encrypted, or that carries credentials."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname or ""
    except ValueError as error:
        raise UsageError(f"is no URL: {error}") from error
    if not host or any(ord(c) <= 32 or ord(c) >= 127 for c in url):
        raise UsageError("is no URL", path=escape_control(url.partition("?")[0]))
    if parts.username is not None or parts.password is not None:
        raise UsageError("a URL with a password is not taken", path=_shown(url))
    if parts.scheme != "https" and not (parts.scheme == "http" and host in _LOOPBACK):
        raise UsageError("only https is taken: http can be changed on its way", path=_shown(url))


class _Redirects(urllib.request.HTTPRedirectHandler):
    """urllib's, each target held to the same rule as the first address; its own limit ends a loop."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        with contextlib.ExitStack() as on_refusal:
            on_refusal.callback(fp.close)
            self._check(req, newurl)
            on_refusal.pop_all()
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    @staticmethod
    def _check(req: Any, newurl: str) -> None:
        _check_url(newurl)
        if req.type == "https" and not newurl.startswith("https:"):
            raise UsageError("the server leads from https to http", path=_shown(req.full_url))


class _Fetch:
    """One file by URL: revalidated when it is here, continued when part of it is, whole before it has its name."""

    def __init__(self, url: str, target: Path, progress: OnProgress) -> None:
        self.url, self.target, self.progress = url, target, progress
        self.partial = target.with_name(f".{target.name}.part")
        local = urllib.parse.urlsplit(url).hostname in _LOOPBACK
        proxy = [urllib.request.ProxyHandler({})] if local else []
        self.opener = urllib.request.build_opener(_Redirects, *proxy)

    def run(self) -> None:
        """Raises UsageError, LlamakitError, SaveError."""
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, self.target.parent) from error
        with RunLock([self.target]):
            for _ in range(_MAX_CUTS):
                if self._attempt():
                    return
        hint = "run it again: it goes on from there where the server can"
        raise LlamakitError("the connection was cut", path=_shown(self.url), hint=hint)

    def _attempt(self) -> bool:
        """One request; False: it was cut, and the next one goes on."""
        try:
            with self.opener.open(urllib.request.Request(self.url, headers=self._headers()), timeout=30) as response:
                return self._receive(response)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 304 and self.target.is_file():
                return True
            if error.code == 416 and self.partial.is_file():
                self._discard()
                return False
            if error.code in (301, 302, 303, 307, 308):
                raise LlamakitError("the server redirects without end", path=_shown(self.url)) from error
            raise refused(error.code, _shown(self.url), None) from error
        except (OSError, http.client.HTTPException) as error:
            hint = "check the connection; --offline takes what the cache holds"
            reason = escape_control(str(getattr(error, "reason", None) or type(error).__name__))[:120]
            raise LlamakitError(f"cannot be reached: {reason}", path=_shown(self.url), hint=hint) from error

    def _headers(self) -> dict[str, str]:
        """Go on from what is here while the file is still the same (RFC 9110: Range with If-Range), or ask if it is."""
        headers = {"User-Agent": "llamakit", "Accept-Encoding": "identity"}
        state = self._state(self.partial)
        validator = state.get("etag") or state.get("modified")
        if self.partial.is_file() and validator and not validator.startswith("W/"):
            return headers | {"Range": f"bytes={self.partial.stat().st_size}-", "If-Range": validator}
        state = self._state(self.target)
        if self.target.is_file():
            headers |= {"If-None-Match": state["etag"]} if state.get("etag") else {}
            headers |= {"If-Modified-Since": state["modified"]} if state.get("modified") else {}
        return headers

    def _receive(self, response: Any) -> bool:
        start = self._start(response)
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if length.isascii() and length.isdigit() else None
        self._check_space(total, start)
        n_done = start
        try:
            with self.partial.open("ab") as file:
                file.truncate(start)
                self._report(n_done, total)
                while chunk := self._read(response):
                    file.write(chunk)
                    n_done += len(chunk)
                    self._report(n_done, total)
                file.flush()
                os.fsync(file.fileno())
            if total is not None and n_done != total:
                return False
            os.replace(self.partial, self.target)
            os.replace(self._state_path(self.partial), self._state_path(self.target))
        except OSError as error:
            raise disk_error(error, self.target) from error
        return True

    def _read(self, response: Any) -> bytes:
        """The next bytes; none where the connection ends, early or not: the size tells."""
        try:
            return response.read1(_CHUNK)
        except http.client.IncompleteRead as error:
            raise LlamakitError("the connection was cut", path=_shown(self.url), hint="run it again") from error
        except OSError:
            return b""

    def _start(self, response: Any) -> int:
        """The offset at which this answer begins; the beginning of a new file is noted with its validators."""
        if response.status == 206:
            found = re.fullmatch(r"bytes (\d{1,18})-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            if found and int(found[1]) == self.partial.stat().st_size:
                return int(found[1])
            self._discard()
            raise LlamakitError(
                "the server sent another part than asked for", path=_shown(self.url), hint="run it again"
            )
        state = {"etag": response.headers.get("ETag"), "modified": response.headers.get("Last-Modified")}
        self._discard()
        try:
            self._state_path(self.partial).write_text(json.dumps(state), encoding="utf-8")
        except OSError as error:
            raise disk_error(error, self.target) from error
        return 0

    def _state(self, path: Path) -> dict[str, str]:
        """Validators that came with a file: etag, modified; nothing where they are not known."""
        with contextlib.suppress(OSError, ValueError):
            state = json.loads(self._state_path(path).read_text(encoding="utf-8"))
            if isinstance(state, dict):
                return {k: v for k, v in state.items() if isinstance(v, str) and v.isprintable()}
        return {}

    @staticmethod
    def _state_path(path: Path) -> Path:
        return path.with_name(f".{path.name.lstrip('.')}.json")

    def _discard(self) -> None:
        self.partial.unlink(missing_ok=True)

    def _report(self, n_done: int, total: int | None) -> None:
        self.progress(Download(self.target.name, n_done, total))

    def _check_space(self, total: int | None, start: int) -> None:
        free = shutil.disk_usage(self.target.parent).free
        if total is not None and total - start > free:
            reason = f"the disk has {free / 1e9:.1f} GB left, the download needs {(total - start) / 1e9:.1f} GB"
            raise SaveError(reason, path=self.target.parent, hint="free some space, or set HF_HOME to another disk")
