"""hf: sources and URLs, against a server on loopback that answers as the Hub does where huggingface_hub asks."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llamakit import hub
from llamakit.errors import LlamakitError, UsageError
from llamakit.hub import fetch, is_remote

COMMIT = "c0ffee" + "0" * 34
MODEL = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": b"w",
    "evil.py": b"x",
    "pytorch_model.bin": b"p",
}
REPOS: dict[str, dict[str, bytes]] = {
    "u/quants": {"a-IQ2_M.gguf": b"iq2", "a-q4_k_m.gguf": b"q4km", "a-Q8_0.gguf": b"q8", "mmproj-Q4_K_M.gguf": b"no"},
    "u/first": {"b-F16.gguf": b"f16", "c-F32.gguf": b"f32"},
    "u/split": {f"m-Q4_K_M-0000{i}-of-00003.gguf": b"part%d" % i for i in (1, 2, 3)},
    "u/folder": MODEL,
    "u/text": {"README.md": b"x"},
    "u/evil": {"../../evil-Q4_K_M.gguf": b"x"},
}  # fmt: skip
BODY = bytes(range(256)) * 400


class Handler(BaseHTTPRequestHandler):
    server: Any

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.info("/".join(parts[2:4]))
        elif len(parts) > 4 and parts[2] == "resolve":
            self.resolve("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self.plain(parts)

    def info(self, repo: str) -> None:
        if repo == "u/gated":
            self.answer(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        elif repo not in REPOS:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        else:
            siblings = [{"rfilename": name} for name in REPOS[repo]]
            self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode(), {})

    def resolve(self, repo: str, name: str) -> None:
        data = REPOS.get(repo, {}).get(name)
        if data is None:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            etag = f'"{hashlib.sha256(repo.encode() + name.encode()).hexdigest()}"'
            self.answer(200, data, {"ETag": etag, "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(data))})

    def plain(self, parts: list[str]) -> None:
        kind = parts[0]
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        if kind == "missing":
            self.answer(404, b"", {})
        elif kind in ("loop", "away"):
            self.answer(302, b"", {"Location": "/loop" if kind == "loop" else "http://elsewhere.invalid/x"})
        elif self.headers.get("If-None-Match") == '"v1"':
            self.answer(304, b"", {})
        elif start and self.headers.get("If-Range") == '"v1"' and kind != "changed":
            headers = {"ETag": '"v1"', "Content-Range": f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"}
            self.answer(206, BODY[start:], headers)
        else:
            cut = 1000 if kind in ("cut", "short") else None
            self.answer(200, BODY, {} if kind == "short" else {"ETag": '"v1"'}, cut)

    def answer(self, status: int, data: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET" and status != 304:
            self.wfile.write(data[:cut])


@pytest.fixture
def server() -> Iterator[Any]:
    """The server; `url`, and `asked`: what came in."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        found: Any = made
        found.asked, found.url = [], f"http://127.0.0.1:{made.server_address[1]}"
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield found
        made.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hub, "_cache_root", lambda: tmp_path)
    return tmp_path


def test_what_is_remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_remote("hf:u/r") and is_remote("https://h/x") and is_remote("http://127.0.0.1/x")
    assert not is_remote("model.gguf") and not is_remote("")
    (tmp_path / "hf:u").mkdir()
    (tmp_path / "hf:u/r").touch()
    assert not is_remote("hf:u/r")


def test_a_url_is_fetched_once_and_then_asked_about(server: Any, cache: Path) -> None:
    seen: list[hub.Download] = []
    path = fetch(f"{server.url}/ok/m.gguf?sig=secret", on_progress=seen.append)
    assert path.read_bytes() == BODY and path.name == "m.gguf" and path.is_relative_to(cache)
    assert seen[-1] == hub.Download("m.gguf", len(BODY), len(BODY))
    assert fetch(f"{server.url}/ok/m.gguf?sig=secret") == path
    assert server.asked[-1][1]["If-None-Match"] == '"v1"'
    n_asked = len(server.asked)
    assert fetch(f"{server.url}/ok/m.gguf?sig=secret", offline=True) == path and len(server.asked) == n_asked


def test_a_cut_download_goes_on(server: Any, cache: Path) -> None:
    assert fetch(f"{server.url}/cut/m.gguf").read_bytes() == BODY
    assert [headers.get("Range") for _, headers in server.asked] == [None, "bytes=1000-"]


@pytest.mark.parametrize(("path", "error", "message"), [
    ("short/m.gguf", LlamakitError, "the connection was cut"),
    ("missing/m.gguf?token=secret", UsageError, "no such file"),
    ("loop", LlamakitError, "redirects without end"),
    ("away", UsageError, "only https"),
])  # fmt: skip
def test_what_fails(server: Any, cache: Path, path: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        fetch(f"{server.url}/{path}")
    assert "secret" not in str(caught.value)
    assert not [file for file in cache.rglob("*.gguf") if not file.name.startswith(".")]


def test_what_is_refused_without_asking(cache: Path) -> None:
    for url in ("http://example.invalid/x", "https://u:secret@example.invalid/x", "https:///x", "https://h/a b"):
        with pytest.raises(UsageError) as caught:
            fetch(url)
        assert "secret" not in str(caught.value)
    with pytest.raises(UsageError, match="not in the cache"):
        fetch("https://example.invalid/x", offline=True)
    request = hub.urllib.request.Request("https://example.invalid/x")
    with pytest.raises(UsageError, match="from https to http"):
        hub._Redirects().redirect_request(request, io.BytesIO(), 302, "", {}, "http://127.0.0.1/x")


def test_a_name_stays_in_its_folder(server: Any, cache: Path) -> None:
    path = fetch(f"{server.url}/ok/..%2f..%2fevil.gguf")
    assert path.name == "_.._evil.gguf" and path.parent.parent == cache / "llamakit"


@pytest.fixture
def endpoint(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    library = pytest.importorskip("huggingface_hub", reason="hf: sources need huggingface_hub")
    from huggingface_hub import constants, file_download, hf_api

    real = library.hf_hub_download
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf_api.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(library, "HfApi", lambda: hf_api.HfApi(endpoint=server.url, token=False))
    options = {"endpoint": server.url, "cache_dir": str(tmp_path / "hub"), "token": False}
    monkeypatch.setattr(library, "hf_hub_download", lambda *a, **k: real(*a, **k, **options))
    assert file_download
    return server


@pytest.mark.parametrize(("source", "name", "data"), [
    ("hf:u/quants", "a-q4_k_m.gguf", b"q4km"),
    ("hf:u/quants:q8_0", "a-Q8_0.gguf", b"q8"),
    ("hf:u/quants@main:IQ2_M", "a-IQ2_M.gguf", b"iq2"),
    ("hf:u/quants/a-Q8_0.gguf", "a-Q8_0.gguf", b"q8"),
    ("hf:u/first", "b-F16.gguf", b"f16"),
    ("hf:u/split", "m-Q4_K_M-00001-of-00003.gguf", b"part1"),
])  # fmt: skip
def test_gguf_of_a_repository(endpoint: Any, source: str, name: str, data: bytes) -> None:
    path = fetch(source)
    assert (path.name, path.read_bytes()) == (name, data)
    if "split" in source:
        assert len(list(path.parent.iterdir())) == 3
    n_asked = len(endpoint.asked)
    assert fetch(source, offline=True) == path and len(endpoint.asked) == n_asked


def test_a_folder_has_what_a_model_needs(endpoint: Any) -> None:
    folder = fetch("hf:u/folder")
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert fetch("hf:u/folder", offline=True) == folder


@pytest.mark.parametrize(("source", "message"), [
    ("hf:u/none", "no such repository"), ("hf:u/gated", "gated"), ("hf:u/text", "holds no GGUF"),
    ("hf:u/evil", "outside itself"), ("hf:u/quants:Q9", "is Q9"), ("hf:u/quants/no.gguf", "no such file"), ("hf:x", "is no repository"),
])  # fmt: skip
def test_what_a_repository_refuses(endpoint: Any, source: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fetch(source)


def test_offline_names_what_is_missing(endpoint: Any) -> None:
    with pytest.raises(UsageError, match=r"u/quants .* is not in the cache"):
        fetch("hf:u/quants", offline=True)
    fetch("hf:u/split").unlink()
    with pytest.raises(UsageError, match=r"not in the cache|holds no GGUF"):
        fetch("hf:u/split", offline=True)
    assert not [path for path, _ in endpoint.asked if "quants" in path]
