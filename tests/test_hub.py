"""hf: sources and URLs, against a server on loopback that answers as the Hub does where huggingface_hub asks."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamakit import hub
from llamakit.errors import LlamakitError, UsageError
from llamakit.hub import fetch, is_remote, repository, urls
from tests.helpers import ROOT, cli
from tests.tiny import cached_tiny_gguf

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
    "u/peft": {"README.md": b"x", "adapter_config.json": b"{}", "adapter_model.safetensors": b"a", "optimizer.pt": b"o"},
    "u/cut": {"m-Q8_0.gguf": bytes(range(256)) * 40},
    "u/wrong": {"m-Q8_0.gguf": b"twelve bytes"},
    "u/gated": {"m-Q8_0.gguf": b"secret"},
    "u/busy": {"m-Q8_0.gguf": b"never"},
    "u/evil": {"../../evil-Q4_K_M.gguf": b"x"},
}  # fmt: skip
BODY = bytes(range(256)) * 400
TOKEN = "hf_" + "x" * 30


class Handler(BaseHTTPRequestHandler):
    server: Any

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] in (["api", "models"], ["api", "datasets"]):
            self.info("/".join(parts[2:4]))
        elif parts[0] == "api":
            self.answer(404, b"", {})  # what huggingface_hub asks for on its own account
        elif len(parts) > 4 and "resolve" in parts[2:4]:
            at = parts.index("resolve")
            self.resolve("/".join(parts[at - 2 : at]), "/".join(parts[at + 2 :]))
        elif parts[0] == "cdn":
            self.blob("/".join(parts[1:3]), "/".join(parts[3:]))
        else:
            self.plain(parts)

    def info(self, repo: str) -> None:
        if repo == "u/none":
            self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})  # so that private names stay private
        elif repo == "u/private":
            self.answer(403, b"", {})
        elif repo == "u/down":
            self.answer(503, b"", {})
        elif "/revision/main" not in self.path:
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            siblings = [{"rfilename": name} for name in self.files(repo)]
            self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode(), {})

    def resolve(self, repo: str, name: str) -> None:
        """As the Hub: small files by itself, large ones by another host, which is to see no token."""
        data = self.files(repo).get(name)
        if data is None:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        elif repo in ("u/gated", "u/busy"):
            code = {"X-Error-Code": "GatedRepo"} if repo == "u/gated" else {}
            self.answer(401 if repo == "u/gated" else 503, b"", code)
        else:
            etag = f'"{hashlib.sha256(repo.encode() + name.encode()).hexdigest()}"'
            headers = {"ETag": etag, "X-Repo-Commit": COMMIT}
            if not name.endswith((".gguf", ".safetensors")):
                self.answer(200, data, headers)
                return
            size = len(data) + (repo == "u/wrong")
            place = f"http://localhost:{self.server.server_address[1]}/cdn/{repo}/{name}"
            linked = {"X-Linked-Size": str(size), "X-Linked-Etag": etag, "Location": place}
            self.answer(302, b"", headers | linked)

    def blob(self, repo: str, name: str) -> None:
        data = self.files(repo)[name]
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        if start:
            self.answer(206, data[start:], {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"})
        else:
            first = [path for path, _ in self.server.asked].count(self.path) == 1
            self.answer(200, data, {}, 1000 if repo == "u/cut" and first else None)

    def files(self, repo: str) -> dict[str, bytes]:
        return {"tiny-F32.gguf": cached_tiny_gguf().read_bytes()} if repo == "u/tiny" else REPOS[repo]

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


@contextmanager
def serving() -> Iterator[Any]:
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
def server() -> Iterator[Any]:
    with serving() as made:
        yield made


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(urls, "_cache_root", lambda: tmp_path)
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
    request = urllib.request.Request("https://example.invalid/x")
    with pytest.raises(UsageError, match="from https to http"):
        urls._Redirects().redirect_request(request, io.BytesIO(), 302, "", {}, "http://127.0.0.1/x")


def test_a_name_stays_in_its_folder(server: Any, cache: Path) -> None:
    path = fetch(f"{server.url}/ok/..%2f..%2fevil.gguf")
    assert path.name == "_.._evil.gguf" and path.parent.parent == cache / "llamakit"


@dataclass
class Hub:
    """A Hub on loopback, and a process of a user who has set it as theirs."""

    server: Any
    home: Path
    worker: subprocess.Popen[str]

    def fetch(self, source: str, offline: bool = False) -> dict[str, Any]:
        """What became of a fetch: see hub_worker.py."""
        self.server.asked.clear()
        assert self.worker.stdin and self.worker.stdout
        self.worker.stdin.write(json.dumps({"source": source, "offline": offline}) + "\n")
        self.worker.stdin.flush()
        line = self.worker.stdout.readline()
        assert line, "the fetch hung or crashed"
        return json.loads(line)

    @property
    def asked(self) -> list[str]:
        return [path for path, _ in self.server.asked if "/agent-harnesses" not in path]


def environment(url: str, home: Path) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()
    }
    ours = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "PYTHONPATH": str(ROOT), "NO_PROXY": "*"}
    return kept | ours


@contextmanager
def working(url: str, home: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.hub_worker"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(url, home), cwd=ROOT, **pipes) as worker:
        yield worker
        assert worker.stdin
        worker.stdin.close()


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub", reason="hf: sources need huggingface_hub")
    home = tmp_path_factory.mktemp("hub")
    with serving() as server, working(server.url, home) as worker:
        yield Hub(server, home, worker)


@pytest.mark.parametrize(("source", "name", "data"), [
    ("hf:u/quants", "a-q4_k_m.gguf", b"q4km"),
    ("hf:u/quants:q8_0", "a-Q8_0.gguf", b"q8"),
    ("hf:u/quants@main:IQ2_M", "a-IQ2_M.gguf", b"iq2"),
    ("hf:u/quants/a-Q8_0.gguf", "a-Q8_0.gguf", b"q8"),
    ("hf:u/first", "b-F16.gguf", b"f16"),
    ("hf:u/split", "m-Q4_K_M-00001-of-00003.gguf", b"part1"),
    ("hf:datasets/u/text/README.md", "README.md", b"x"),
])  # fmt: skip
def test_a_file_of_a_repository(endpoint: Hub, source: str, name: str, data: bytes) -> None:
    found = endpoint.fetch(source)
    path = Path(found["path"])
    assert (path.name, path.read_bytes()) == (name, data)
    assert path.is_relative_to(endpoint.home / "hub")
    if "split" in source:
        assert [part.read_bytes() for part in sorted(path.parent.iterdir())] == [b"part1", b"part2", b"part3"]
    assert all("Authorization" not in headers for asked, headers in endpoint.server.asked if asked.startswith("/cdn"))
    assert endpoint.fetch(source, offline=True) == {"path": str(path), "reports": [], "slept": 0} and not endpoint.asked
    again = endpoint.fetch(source)
    assert again["path"] == str(path) and not again["reports"]


@pytest.mark.parametrize(("source", "names"), [
    ("hf:u/folder", {"config.json", "tokenizer.json", "model.safetensors"}),
    ("hf:u/peft", {"adapter_config.json", "adapter_model.safetensors"}),
])  # fmt: skip
def test_a_folder_has_what_a_model_needs(endpoint: Hub, source: str, names: set[str]) -> None:
    folder = Path(endpoint.fetch(source)["path"])
    assert {path.name for path in folder.iterdir()} == names
    assert endpoint.fetch(source, offline=True)["path"] == str(folder)


def test_a_cut_connection_is_tried_again(endpoint: Hub) -> None:
    found = endpoint.fetch("hf:u/cut")
    assert Path(found["path"]).read_bytes() == REPOS["u/cut"]["m-Q8_0.gguf"]
    assert found["reports"][0] == ["m-Q8_0.gguf", 0, 10240] and found["reports"][-1] == ["m-Q8_0.gguf", 10240, 10240]
    assert found["slept"] == 1 and endpoint.asked.count("/cdn/u/cut/m-Q8_0.gguf") == 2


@pytest.mark.parametrize(("source", "error", "message"), [
    ("hf:u/none", "UsageError", "no such repository"),
    ("hf:u/private", "UsageError", "access is refused (HTTP 403)"),
    ("hf:u/gated", "UsageError", "gated"),
    ("hf:u/quants@v9", "UsageError", "no revision v9"),
    ("hf:u/text", "UsageError", "holds no GGUF"),
    ("hf:u/evil", "UsageError", "outside itself"),
    ("hf:u/quants/../x.gguf", "UsageError", "outside itself"),
    ("hf:u/quants:Q9", "UsageError", "is Q9"),
    ("hf:u/quants/no.gguf", "UsageError", "no such file"),
    ("hf:x", "UsageError", "is no repository"),
    ("hf:u/down", "LlamakitError", "the server answers HTTP 503"),
    ("hf:u/busy", "LlamakitError", "cannot be reached"),
    ("hf:u/wrong", "LlamakitError", "its size is wrong"),
])  # fmt: skip
def test_what_a_repository_refuses(endpoint: Hub, source: str, error: str, message: str) -> None:
    found = endpoint.fetch(source)
    assert found["error"] == error and message in found["message"]
    assert TOKEN not in found["message"] and endpoint.server.url not in found["message"]
    assert found["slept"] < 30
    assert not [path for path in endpoint.home.rglob("*") if "evil" in path.name or path.name.endswith(".incomplete")]


def test_offline_names_what_is_missing(endpoint: Hub) -> None:
    found = endpoint.fetch("hf:u/tiny", offline=True)
    assert "u/tiny (revision main) is not in the cache" in found["message"]
    part = Path(endpoint.fetch("hf:u/split")["path"]).with_name("m-Q4_K_M-00002-of-00003.gguf")
    part.unlink()
    found = endpoint.fetch("hf:u/split", offline=True)
    assert "m-Q4_K_M-00002-of-00003.gguf is not in the cache" in found["message"] and not endpoint.asked


def test_without_a_network_it_ends_at_once(endpoint: Hub, server: Any) -> None:
    url = server.url
    server.shutdown()
    server.server_close()
    with working(url, endpoint.home) as worker:
        found = Hub(server, endpoint.home, worker).fetch("hf:u/quants")
    assert "the Hub cannot be reached" in found["message"] and "--offline" in found["hint"] and found["slept"] == 0


@pytest.mark.slow
def test_a_command_takes_a_repository(endpoint: Hub, tmp_path: Path) -> None:
    env = environment(endpoint.server.url, endpoint.home)
    result = cli("convert", "-hf", "u/tiny", "-o", tmp_path / "m.gguf", "--no-verify", env=env)
    assert result.returncode == 0, result.stderr
    assert "downloading tiny-F32.gguf" in result.stderr and (tmp_path / "m.gguf").is_file()


def test_a_transfer_by_xet_is_reported_once() -> None:
    library = pytest.importorskip("huggingface_hub", reason="hf: sources need huggingface_hub")
    reporting = pytest.importorskip("huggingface_hub.utils._xet_progress_reporting")
    if not hasattr(reporting, "XetDownloadProgressReporter"):
        pytest.skip("another generation of huggingface_hub")
    seen: list[hub.Download] = []
    meter = repository._meter(library, "m.gguf", seen.append)
    options = {"reconstruction_desc": "m", "total": 100, "log_level": 50, "tqdm_class": meter}
    with reporting.XetDownloadProgressReporter(**options) as reporter:
        for n in (40, 100):
            rates = {"total_bytes_completion_rate": 1.0, "total_transfer_bytes_completion_rate": None}
            counts = {"total_bytes_completed": n, "total_transfer_bytes_completed": n // 2, "total_bytes": 100}
            reporter.update_progress(SimpleNamespace(**counts, **rates))
    assert seen == [hub.Download("m.gguf", n, 100) for n in (0, 40, 100)]
