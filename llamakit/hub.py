"""Models and texts that lie elsewhere: `hf:user/repo[:QUANT]` on the Hugging Face Hub, and https URLs.

Both are kept in the Hub's own cache, so that transformers and llama.cpp share what was downloaded: a repository in
the cache's usual layout, a URL in `llamakit/<sha256 of the URL>/<name>` beside it. Downloads that were cut go on.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamakit.errors import LlamakitError, SaveError, UsageError
from llamakit.files import RunLock, escape_control

_CHUNK = 1 << 20
_MAX_CUTS = 5  # a connection that breaks more often without an end is reported
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HF = re.compile(r"(?://)?(datasets/)?([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?(?:/([^:]+)|:([\w.-]+))?")
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.[A-Za-z]+)")
# A folder that `open_model` reads: configuration, vocabulary, templates; the weights are chosen apart.
_FOLDER = re.compile(
    r"config\.json|generation_config\.json|tokenizer.*\.(json|model)|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.json|merges\.txt|chat_template\.(jinja|json)|additional_chat_templates/[\w.-]+\.jinja"
    r"|adapter_config\.json"
)
_SAFETENSORS = re.compile(r"(model(-\d+-of-\d+)?|adapter_model)\.safetensors|model\.safetensors\.index\.json")
_PICKLED = re.compile(r"(pytorch_model(-\d+-of-\d+)?|adapter_model)\.bin|pytorch_model\.bin\.index\.json")


@dataclass(frozen=True)
class Download:
    """How far one file is: its name, bytes there, bytes in all (None: the server did not say)."""

    name: str
    n_done: int
    n_total: int | None


OnProgress = Callable[[Download], None]


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
        return _fetch_hf(source, offline, progress)
    return _fetch_url(source, offline, progress)


# --- the Hub -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Repo:
    source: str
    id: str
    is_dataset: bool
    revision: str
    file: str | None
    quant: str | None

    @property
    def type(self) -> str:
        return "dataset" if self.is_dataset else "model"


def _parse(source: str) -> _Repo:
    found = _HF.fullmatch(source.removeprefix("hf:"))
    if found is None:
        raise UsageError(
            f"{escape_control(source)} is no repository (expected hf:user/repo[:QUANT] or hf:user/repo/FILE)"
        )
    dataset, repo, revision, file, quant = found.groups()
    if dataset and not file:
        raise UsageError("a data set needs a file", path=source, hint=f"for example hf:datasets/{repo}/train.txt")
    return _Repo(source, repo, bool(dataset), revision or "main", file, quant)


def _library() -> Any:
    """huggingface_hub, its own log silenced: what matters becomes an error of ours, and progress goes to the caller."""
    try:
        import huggingface_hub
        from huggingface_hub.utils import logging as hub_log
    except ImportError as error:
        hint = "pip install '.[hf]' in llamakit's folder, or pip install huggingface_hub"
        raise UsageError("hf: sources need the package huggingface_hub", hint=hint) from error
    hub_log.set_verbosity(50)  # CRITICAL
    return huggingface_hub


def _fetch_hf(source: str, offline: bool, progress: OnProgress) -> Path:
    repo = _parse(source)
    library = _library()
    offline = offline or library.constants.HF_HUB_OFFLINE
    with _hub_errors(repo, library):
        listed = _cached_files(repo, library) if offline else _listed_files(repo, library)
        chosen = _choose(repo, listed)
        if offline:
            _require_cached(repo, chosen, listed)
        paths = [_download(repo, library, name, offline, progress) for name in chosen]
    if len(chosen) > 1 and not chosen[0].lower().endswith(".gguf"):
        return _common_folder(repo, chosen, paths)
    return paths[0]


def _listed_files(repo: _Repo, library: Any) -> list[str]:
    info = library.HfApi().repo_info(repo.id, revision=repo.revision, repo_type=repo.type)
    return sorted(sibling.rfilename for sibling in info.siblings or ())


def _cached_files(repo: _Repo, library: Any) -> list[str]:
    """What the cache holds of a revision (layout: the Hub's documentation, "Understand caching")."""
    folder = Path(library.constants.HF_HUB_CACHE) / f"{repo.type}s--{repo.id.replace('/', '--')}"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        reference = folder / "refs" / repo.revision
        commit = reference.read_text(encoding="ascii").strip() if reference.is_file() else repo.revision
        snapshot = folder / "snapshots" / commit
        if snapshot.is_dir() and snapshot.resolve().is_relative_to(folder.resolve()):
            return sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())
    raise UsageError(
        f"{repo.id} (revision {repo.revision}) is not in the cache", path=repo.source, hint="run once without --offline"
    )


def _choose(repo: _Repo, files: Sequence[str]) -> list[str]:
    """The files of a repository that the source means, the one to open first."""
    if repo.file is not None:
        chosen = _parts(repo.file)
    else:
        gguf = _choose_gguf(repo, files)
        chosen = _parts(gguf) if gguf else _choose_folder(repo, files)
    for name in chosen:
        if name.startswith("/") or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise UsageError(f"the repository names a file outside itself: {escape_control(name)}", path=repo.source)
    return chosen


def _choose_gguf(repo: _Repo, files: Sequence[str]) -> str | None:
    models = [name for name in files if name.lower().endswith(".gguf") and _is_model_file(name)]
    for quant in [repo.quant] if repo.quant else ["Q4_K_M", "Q8_0"]:
        wanted = re.compile(re.escape(quant) + "[.-]", re.IGNORECASE)
        found = next((name for name in models if wanted.search(name)), None)
        if found:
            return found
    if repo.quant:
        there = ", ".join(escape_control(name) for name in models[:12]) or "none"
        raise UsageError(f"no GGUF file of {repo.id} is {repo.quant}", path=repo.source, hint=f"there are: {there}")
    return next(iter(models), None)


def _is_model_file(name: str) -> bool:
    """No projector or importance matrix, and of a split model the first part."""
    base = name.rpartition("/")[2].lower()
    split = _SPLIT.fullmatch(name)
    return not any(word in base for word in ("mmproj", "imatrix")) and (split is None or int(split[2]) == 1)


def _parts(name: str) -> list[str]:
    """Every part of a split GGUF, by gguf-split's naming; the name alone otherwise."""
    split = _SPLIT.fullmatch(name)
    if split is None or split[4].lower() != ".gguf" or not 1 <= int(split[3]) <= 9999:
        return [name]
    return [f"{split[1]}-{i:05d}-of-{split[3]}{split[4]}" for i in range(1, int(split[3]) + 1)]


def _choose_folder(repo: _Repo, files: Sequence[str]) -> list[str]:
    weights = [name for name in files if _SAFETENSORS.fullmatch(name)]
    weights = weights or [name for name in files if _PICKLED.fullmatch(name)]
    described = [name for name in files if name in ("config.json", "adapter_config.json")]
    if not weights or not described:
        hint = "name one of its files: hf:user/repo/FILE"
        raise UsageError(
            f"{repo.id} holds no GGUF file and no model in transformers' format", path=repo.source, hint=hint
        )
    return [*described, *(n for n in files if _FOLDER.fullmatch(n) and n not in described), *weights]


def _require_cached(repo: _Repo, chosen: Sequence[str], cached: Sequence[str]) -> None:
    """Raise UsageError naming the first file that the cache lacks, shards that others speak of included."""
    wanted = list(chosen)
    for name in chosen:
        split = _SPLIT.fullmatch(name)
        if split and int(split[3]) <= 9999:
            wanted += [f"{split[1]}-{i:05d}-of-{split[3]}{split[4]}" for i in range(1, int(split[3]) + 1)]
    missing = next((name for name in wanted if name not in cached), None)
    if missing:
        reason = f"{escape_control(missing)} is not in the cache"
        raise UsageError(reason, path=repo.source, hint="run once without --offline")


def _download(repo: _Repo, library: Any, name: str, offline: bool, progress: OnProgress) -> Path:
    class Meter:
        """What huggingface_hub takes for a tqdm bar."""

        def __init__(self, *_: object, total: float | None = None, initial: float = 0, **__: object) -> None:
            self.total, self.n = total, initial
            self.update(0)

        def __enter__(self) -> Meter:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            progress(Download(escape_control(name), int(self.n), None if self.total is None else int(self.total)))

        def close(self) -> None:
            pass

    options: dict[str, Any] = {"revision": repo.revision, "repo_type": repo.type, "local_files_only": offline}
    return Path(library.hf_hub_download(repo.id, name, tqdm_class=Meter, **options))


def _common_folder(repo: _Repo, names: Sequence[str], paths: Sequence[Path]) -> Path:
    folders = {path.parents[name.count("/")] for name, path in zip(names, paths, strict=True)}
    if len(folders) > 1:
        raise LlamakitError("the repository changed during the download", path=repo.source, hint="run it once more")
    return folders.pop()


@contextlib.contextmanager
def _hub_errors(repo: _Repo, library: Any) -> Iterator[None]:
    """huggingface_hub's exceptions in our words; a URL or a token never enters a message."""
    errors = library.errors
    network: type[Exception] = errors.HfHubHTTPError.__bases__[0]  # httpx's, whichever generation is installed
    login, place = "hf auth login, or set HF_TOKEN", repo.source
    try:
        yield
    except errors.GatedRepoError as error:
        hint = f"accept its terms on the page of {repo.id}, then: {login}"
        raise UsageError("the repository is gated: its owners ask for an agreement", path=place, hint=hint) from error
    except errors.RepositoryNotFoundError as error:
        hint = f"check the name; for a private one: {login}"
        raise UsageError("there is no such repository, or it is private", path=place, hint=hint) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"there is no revision {repo.revision}", path=place) from error
    except errors.RemoteEntryNotFoundError as error:
        raise UsageError(f"there is no such file in {repo.id}", path=place, hint="check the name") from error
    except errors.HFValidationError as error:
        raise UsageError("is no name of a repository", path=place) from error
    except errors.HfHubHTTPError as error:
        raise _refused(error.response.status_code, place, login) from error
    except (network, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        hint = "check the connection; --offline takes what the cache holds"
        raise LlamakitError("the Hub cannot be reached", path=place, hint=hint) from error
    except OSError as error:
        if error.errno:
            raise _disk_error(error, place) from error
        hint = "run it once more: what is here already is kept"
        raise LlamakitError("the download is incomplete: its size is wrong", path=place, hint=hint) from error


def _refused(status: int, place: str, login: str | None) -> LlamakitError:
    if status in (401, 403):
        return UsageError(f"access is refused (HTTP {status})", path=place, hint=login)
    if status in (404, 410):
        return UsageError(f"there is no such file (HTTP {status})", path=place, hint="check the address")
    return LlamakitError(f"the server answers HTTP {status}", path=place, hint="try again later")


def _disk_error(error: OSError, place: str | Path) -> SaveError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return SaveError(f"cannot save: {error.strerror}", path=place, hint="free some space" if full else None)


# --- URLs ----------------------------------------------------------------------------------------------------------


def _fetch_url(url: str, offline: bool, progress: OnProgress) -> Path:
    _check_url(url)
    parts = urllib.parse.urlsplit(url)
    folder = _cache_root() / "llamakit" / hashlib.sha256(url.encode()).hexdigest()
    paths = []
    for part in _parts(parts.path):  # the parts of a split model lie side by side
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
        with contextlib.ExitStack() as refused:
            refused.callback(fp.close)
            self._check(req, newurl)
            refused.pop_all()
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
            raise _disk_error(error, self.target.parent) from error
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
            raise _refused(error.code, _shown(self.url), None) from error
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
            raise _disk_error(error, self.target) from error
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
            raise _disk_error(error, self.target) from error
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
