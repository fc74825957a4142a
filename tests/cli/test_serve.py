"""`llamakit serve`, as a process of its own."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llamakit.cli import compat
from llamakit.errors import UnsupportedError, UsageError
from llamakit.server.config import ServeConfig
from tests.helpers import assert_error, called
from tests.tiny import cached_tiny_gguf
from tests.warm import Process


@contextmanager
def process(*args: str | Path, **env: str) -> Iterator[tuple[Process, str]]:
    """(the process, its address) once it answers."""
    with Process("serve", "-m", cached_tiny_gguf(), "--port", "0", *args, env=env) as started:
        assert started.stderr is not None
        lines = []
        for line in started.stderr:
            lines.append(line)
            if found := re.search(r"listening on (http://\S+)", line):
                break
        assert found, "".join(lines)
        try:
            yield started, found[1]
        finally:
            if started.poll() is None:
                started.kill()


def post(url: str, value: object, **headers: str) -> dict:
    request = urllib.request.Request(url, json.dumps(value).encode(), {"content-type": "application/json", **headers})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


@pytest.mark.prove
def test_a_signal_ends_it_within_six_seconds(record_property: Callable[[str, object], None]) -> None:
    with process() as (started, _url):
        asked = time.monotonic()
        started.send_signal(signal.SIGTERM)
        assert started.wait(120) == 0
        seconds = time.monotonic() - asked
    record_property("seconds from SIGTERM to the end of serve", round(seconds, 2))
    assert seconds < 6


def test_it_serves_logs_and_ends_with_a_signal(tmp_path: Path) -> None:
    log, key = tmp_path / "log.jsonl", "sesame-of-the-test"
    with process("--log-file", log, "--alias", "mine", "-np", "2", LLAMAKIT_API_KEY=key) as (started, url):
        bearer = {"authorization": f"Bearer {key}"}
        answer = post(f"{url}/v1/completions", {"model": "mine", "prompt": "The", "max_tokens": 3}, **bearer)
        written = answer["usage"]["completion_tokens"]
        assert 1 <= written <= 3  # an end token may come before
        started.send_signal(signal.SIGTERM)
        assert started.wait(120) == 0
        assert started.stderr is not None
        said = started.stderr.read()
    assert "POST /v1/completions 200" in said and "Traceback" not in said
    (record,) = [json.loads(line) for line in log.read_text().splitlines()]
    assert record["status"] == 200 and record["n_generated"] == written and record["model"] == "mine"
    assert key not in said and key not in log.read_text()


def test_a_busy_port_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        result = called(capfd, "serve", "-m", cached_tiny_gguf(), "--port", str(port))
    assert_error(result, 2, f"cannot listen on 127.0.0.1:{port}", "--port 0")
    assert "loading" not in result.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com"])
def test_other_addresses_need_a_key(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.delenv("LLAMAKIT_API_KEY", raising=False)
    result = called(capfd, "serve", "-m", "nothing.gguf", "--host", host)
    assert_error(result, 2, f"--host {host} can be reached from elsewhere", "--api-key-file")


def test_mistakes_show_before_anything_is_loaded(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    empty = tmp_path / "keys"
    empty.write_text("\n\n")
    for args, message in (
        (["--api-key-file", str(empty)], "has no key"),
        (["--api-key-file", str(tmp_path / "none")], "none"),
        (["--port", "70000"], "--port is 70000"),
        (["--parallel", "0"], "--parallel is 0"),
        (["--timeout", "0"], "--timeout is 0"),
        (["--cors-origin", "app.example"], "--cors-origin is app.example"),
        (["--host", "no.such.name.invalid"], "--host no.such.name.invalid"),
    ):
        result = called(capfd, "serve", "-m", "nothing.gguf", *args)
        assert_error(result, 2, message)
        assert "loading" not in result.stderr


def test_an_address_that_this_machine_has_not(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("key\n")
    result = called(capfd, "serve", "-m", "nothing.gguf", "--host", "192.0.2.1", "--api-key-file", str(keys))
    assert_error(result, 2, "cannot listen on 192.0.2.1:8080")


def test_llama_servers_spellings() -> None:
    rewritten, notes = compat.rewrite(
        ["serve", "--model", "m.gguf", "-c", "512", "-a", "x", "-to", "9", "-ngl", "0", "-fa", "on", "--metrics", "-cb",
         "--jinja", "-t", "2", "-b", "512", "--lora-scaled", "a.gguf", "0.5"]
    )  # fmt: skip
    assert rewritten == [
        "serve", "-m", "m.gguf", "--ctx", "512", "--alias", "x", "--timeout", "9", "--device", "cpu", "--threads", "2",
        "--lora-scaled", "a.gguf:0.5",
    ]  # fmt: skip
    assert [text.partition(" ")[0] for _, text in notes] == ["-ngl", "-fa", "--metrics", "-cb", "--jinja", "-b"]
    with pytest.raises(UnsupportedError, match="--api-key"):
        compat.rewrite(["serve", "--api-key", "secret"])


def test_the_configuration_refuses_what_cannot_be() -> None:
    assert ServeConfig().host == "127.0.0.1"
    for wrong in ({"port": -1}, {"parallel": 300}, {"ctx": -1}, {"queue": -1}, {"timeout": -1.0}):
        with pytest.raises(UsageError, match=f"--{next(iter(wrong))}"):
            ServeConfig(**wrong)
