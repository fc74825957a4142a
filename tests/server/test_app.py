"""Requests from outside: clients that leave, full queues, limits, signals, what is counted."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from llamakit.server import run
from llamakit.server.config import LIMITS
from tests.helpers import ROOT
from tests.server.serving import WAIT_S, Served, serving, tiny_chat_model

CHAT = "/v1/chat/completions"
#: no end token can come: the tests decide when it ends
ENDLESS = {"messages": [{"role": "user", "content": "Go on."}], "ignore_eos": True}
#: a context that takes minutes to fill, so that on no machine an endless answer ends before its test has looked
LONG = 8192


class Slow:
    """An engine whose steps take a while, as a larger model's do."""

    def __init__(self, engine, step_s: float = 0.02) -> None:
        self._engine, self.config, self.step_s = engine, engine.config, step_s
        self.context, self.set_adapters = engine.context, engine.set_adapters

    def feed_batch(self, feeds):
        time.sleep(self.step_s)
        return self._engine.feed_batch(feeds)


def until(holds: Callable[[], bool]) -> float:
    """Seconds until it holds; a machine that is busy with other things may need many."""
    started = time.monotonic()
    while not holds():
        assert time.monotonic() - started < WAIT_S, "it never came"
        time.sleep(0.002)
    return time.monotonic() - started


@pytest.fixture(scope="module")
def slow():
    with serving(path=tiny_chat_model(n_ctx=LONG), n_ctx=LONG, engine=Slow, parallel=2, queue=1) as running:
        yield running


def _ask(served: Served, **more: object) -> bytes:
    body = json.dumps({**ENDLESS, **more}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(slow: Served, stream: bool) -> None:
    assert len(seconds_until_a_slot_is_free(slow, stream)) == 5


@pytest.mark.prove
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot_in_a_quarter_of_a_second(
    slow: Served, stream: bool, record_property
) -> None:
    seconds = max(seconds_until_a_slot_is_free(slow, stream))
    record_property("longest time until the slot of a client that left was free, s", round(seconds, 3))
    assert seconds < 0.25


def seconds_until_a_slot_is_free(slow: Served, stream: bool) -> list[float]:
    """What each of five clients that leave in the middle takes."""
    until(lambda: slow.slots.n_running == 0)
    taken, before = [], slow.slots.totals.n_cancelled
    for _ in range(5):
        with slow.connect() as sock:
            sock.sendall(_ask(slow, stream=stream))
            until(lambda: slow.slots.n_running == 1)
            if stream:
                assert sock.recv(10)
        taken.append(until(lambda: slow.slots.n_running == 0))
    assert slow.slots.totals.n_cancelled == before + 5
    return taken


def test_a_full_queue_is_a_503_with_retry_after(slow: Served) -> None:
    until(lambda: slow.slots.n_running == 0)
    socks = [slow.connect() for _ in range(3)]
    try:
        for n, sock in enumerate(socks, 1):
            sock.sendall(_ask(slow, stream=True))
            # One that waits for its slot fills the queue: the next is sent when all that can run do.
            until(lambda n=n: (slow.slots.n_running, slow.slots.n_waiting) == (min(n, 2), max(0, n - 2)))
        answer = slow.post(CHAT, ENDLESS)
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "queue_full"
        metrics = slow.get("/metrics").text
        assert "llamakit_requests_running 2" in metrics and "llamakit_requests_waiting 1" in metrics
    finally:
        for sock in socks:
            sock.close()
    until(lambda: slow.slots.n_running == 0)


def test_a_crowd_is_sent_away_before_its_prompts_are_read(slow: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow.service, "_n_preparing", 3)
    read: list[object] = []
    monkeypatch.setattr(slow.service, "chat_ids", read.append)
    assert slow.post(CHAT, ENDLESS).status_code == 503 and not read


def test_time_is_limited() -> None:
    with serving(engine=Slow, timeout=0.3) as served:
        answer = served.post(CHAT, ENDLESS)
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        with httpx.stream("POST", served.url + CHAT, json={**ENDLESS, "stream": True}, timeout=WAIT_S) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        with httpx.stream(
            "POST", served.url + "/api/chat", json={**ENDLESS, "options": ENDLESS}, timeout=WAIT_S
        ) as stream:
            assert "error" in json.loads([line for line in stream.iter_lines() if line][-1])


@pytest.mark.parametrize("stream", [False, True])
def test_stopping_ends_what_runs(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_END_S", WAIT_S)
    seconds_until_what_runs_is_ended(stream, monkeypatch)


@pytest.mark.prove
@pytest.mark.parametrize("stream", [False, True])
def test_stopping_ends_what_runs_within_two_seconds(
    stream: bool, monkeypatch: pytest.MonkeyPatch, record_property
) -> None:
    seconds = seconds_until_what_runs_is_ended(stream, monkeypatch)
    record_property("time until an endless answer is ended by stopping, s", round(seconds, 2))
    assert seconds < 2


def seconds_until_what_runs_is_ended(stream: bool, monkeypatch: pytest.MonkeyPatch) -> float:
    """From stopping the server on, which gives a text 0.3 s to end by itself."""
    monkeypatch.setattr(run, "_FINISH_S", 0.3)
    with serving(path=tiny_chat_model(n_ctx=LONG), n_ctx=LONG, engine=Slow) as served, ThreadPoolExecutor() as pool:
        asked = pool.submit(served.post, CHAT, {**ENDLESS, "stream": stream})
        until(lambda: served.slots.totals.n_generated > 0)
        started = time.monotonic()
        served.server.stop()
        answer = asked.result(WAIT_S)
        seconds = time.monotonic() - started
        assert "shutting down" in answer.text and answer.status_code == (200 if stream else 503)
    return seconds


def test_stopping_lets_a_short_answer_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_FINISH_S", WAIT_S)
    with serving(engine=Slow) as served, ThreadPoolExecutor() as pool:
        asked = pool.submit(served.post, CHAT, {**ENDLESS, "max_tokens": 30})
        until(lambda: served.slots.n_running == 1)
        served.server.stop()
        assert asked.result(WAIT_S).json()["usage"]["completion_tokens"] == 30


def test_bodies_have_limits(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert served.post(CHAT, {"x": "y" * LIMITS.body_bytes}).status_code == 413

    def parts():
        for _ in range(9):
            yield b" " * (1 << 20)

    headers = {"content-type": "application/json"}
    assert httpx.post(served.url + CHAT, content=parts(), headers=headers, timeout=WAIT_S).status_code == 413
    for content in (b"", b"{", b"[1]", b'{"a": NaN}', b"[" * 10000, b'{"a":' * 150 + b"1" + b"}" * 150, b"\xff\xfe"):
        answer = httpx.post(served.url + CHAT, content=content, headers=headers, timeout=WAIT_S)
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error", content[:20]


def test_paths_and_methods_that_there_are_not(served: Served) -> None:
    for answer, status in ((served.get("/nothing"), 404), (served.get(CHAT), 405), (served.post("/health", {}), 405)):
        assert answer.status_code == status and answer.json()["error"]["message"]


def test_a_mistake_of_ours_is_a_500_without_a_traceback(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise ValueError("a secret of the inside")

    monkeypatch.setattr(served.service.metrics, "text", broken)
    answer = served.get("/metrics")
    assert answer.status_code == 500 and answer.json()["error"]["message"] == "internal error: ValueError"
    assert "a secret" in served.logged("/metrics")[-1].error


def test_what_is_counted_and_logged() -> None:
    body = {"messages": [{"role": "user", "content": "Count me."}], "max_tokens": 3, "temperature": 0}
    with serving() as served:
        served.post(CHAT, body)
        served.post(CHAT, body)
        record = served.logged(CHAT, 2)[-1]
        text = served.get("/metrics").text
    assert (record.method, record.path, record.status, record.n_generated) == ("POST", CHAT, 200, 3)
    assert record.n_cached == record.n_prompt - 1 and record.reasons == ["length"] and record.model == "tiny"
    assert record.first_token_s is not None and 0 < record.first_token_s <= record.seconds
    assert f'llamakit_http_requests_total{{path="{CHAT}",status="200"}}' in text
    assert "llamakit_first_token_seconds_count" in text
    for line in text.splitlines():  # the text format, as a scraper reads it
        assert line.startswith("# ") or float(line.rpartition(" ")[2]) >= 0


def test_idle_connections_keep_nobody_waiting(served: Served) -> None:
    assert len(seconds_beside_idle_connections(served)) == 10


@pytest.mark.prove
def test_idle_connections_leave_an_answer_under_a_tenth_of_a_second(served: Served, record_property) -> None:
    seconds = statistics.median(seconds_beside_idle_connections(served))
    record_property("/health beside 200 idle connections, s", round(seconds, 4))
    assert seconds < 0.1


def seconds_beside_idle_connections(served: Served) -> list[float]:
    """What each of ten answers of /health takes while 200 connections stay open, half of them in the middle of a head."""
    socks = [served.connect() for _ in range(200)]
    try:
        for sock in socks[::2]:
            sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le")
        seconds = []
        for _ in range(10):
            started = time.monotonic()
            with served.connect() as sock:
                sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                assert sock.recv(100).startswith(b"HTTP/1.1 200")
            seconds.append(time.monotonic() - started)
    finally:
        for sock in socks:
            sock.close()
    return seconds


def test_the_page_loads_nothing_from_elsewhere(served: Served) -> None:
    answer = served.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    for foreign in ("http://", "https://", "src=", "@import"):
        assert foreign not in answer.text


def answers_of(served: Served, n_clients: int, n_each: int) -> tuple[int, int]:
    """n_clients at once ask n_each greedy questions each: (how many differ from the serial answer, how many failed).

    A 503 is asked again, as a client should.
    """
    questions = [f"Tell me of the {word} and the {other}." for word in ["river", "crown", "boat"] for other in "abcd"]
    body = {"temperature": 0, "max_tokens": 12}
    paths = "/v1/completions", "/v1/chat/completions"

    def ask(client: httpx.Client, number: int) -> str | None:
        question, path = questions[number % len(questions)], paths[number % 2]
        asked = (
            {"prompt": question}
            if path.endswith("v1/completions")
            else {"messages": [{"role": "user", "content": question}]}
        )
        for _ in range(2000):
            answer = client.post(path, json={**body, **asked})
            if answer.status_code != 503:
                break
            time.sleep(0.05)
        if answer.status_code != 200:
            return None
        choice = answer.json()["choices"][0]
        return choice["text"] if "text" in choice else choice["message"]["content"]

    with httpx.Client(base_url=served.url, timeout=WAIT_S) as client:
        serial = [ask(client, number) for number in range(2 * len(questions))]
    assert None not in serial
    found = [0, 0]
    lock = threading.Lock()

    def work(first: int) -> None:
        with httpx.Client(base_url=served.url, timeout=WAIT_S) as client:
            for number in range(first, first + n_each):
                text = ask(client, number)
                with lock:
                    found[0] += text is not None and text != serial[number % len(serial)]
                    found[1] += text is None

    with ThreadPoolExecutor(n_clients) as pool:
        list(pool.map(work, range(n_clients)))
    return found[0], found[1]


def test_neighbours_do_not_change_an_answer(served: Served) -> None:
    assert answers_of(served, n_clients=8, n_each=6) == (0, 0)


@pytest.mark.prove
@pytest.mark.timeout(1800)
def test_32_clients_of_500_requests_get_the_serial_answers(record_property) -> None:
    with serving(parallel=8, queue=16) as served:
        differ, failed = answers_of(served, n_clients=32, n_each=500)
        record_property("greedy answers of 32 x 500 that differ from the serial ones", differ)
        assert (differ, failed) == (0, 0)


def soak(seconds: float, pause_s: float) -> float:
    """MB that the process grew by after a warm-up, while eight clients ask with pauses; raises where a slot is stuck."""
    from benchmarks.common import status_bytes

    with serving(parallel=4, queue=8) as served, ThreadPoolExecutor(8) as pool:
        end = [time.monotonic() + seconds / 4]

        def work(first: int) -> None:
            number = first
            with httpx.Client(base_url=served.url, timeout=WAIT_S) as client:
                while time.monotonic() < end[0]:
                    number += 8
                    time.sleep(pause_s)
                    body = {"prompt": f"Number {number} of {first}", "max_tokens": number % 30, "seed": number}
                    if number % 5:
                        client.post("/v1/completions", json=body)
                    else:  # and leave in the middle
                        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
                            next(stream.iter_lines(), None)

        list(pool.map(work, range(8)))
        before = status_bytes("VmRSS")
        end[0] = time.monotonic() + 3 * seconds / 4
        list(pool.map(work, range(8)))
        grown = (status_bytes("VmRSS") - before) / 1e6
        until(lambda: served.slots.n_waiting == served.slots.n_running == 0)
        return grown


def soaked(seconds: float, pause_s: float = 0) -> float:
    """`soak` in a process that has done nothing else: what other tests left to be freed is not the server's."""
    script = f"from tests.server.test_app import soak; print(soak({seconds}, {pause_s}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GOMP_SPINCOUNT": "20000"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_stays_as_it_is_for_two_minutes() -> None:
    assert soaked(120, pause_s=0.6) < 15  # some 1,500 requests; the pauses leave the processor to other tests


@pytest.mark.prove
@pytest.mark.timeout(2400)
def test_memory_stays_as_it_is_for_half_an_hour(record_property) -> None:
    grown = soaked(1800, pause_s=0.05)
    record_property("MB that a server grew by in half an hour", round(grown, 1))
    assert grown < 15
