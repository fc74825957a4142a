"""Who may ask."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from llamakit.server.config import ServeConfig
from llamakit.server.fields import ApiError
from llamakit.server.guard import Guard, is_loopback
from tests.server.serving import WAIT_S, Served, serving

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}


@pytest.mark.parametrize(
    ("host", "is_allowed"),
    [
        ("localhost", True), ("localhost:1", True), ("127.0.0.1:8080", True), ("[::1]:8080", True), ("127.9.9.9", True),
        ("LOCALHOST:80", True), ("app.example", True), ("", False), ("evil.com", False), ("localhost.evil.com", False),
        ("notlocalhost", False), ("127.0.0.1.evil.com", False), ("192.168.0.4:8080", False), ("[::2]", False),
        ("0.0.0.0:8080", False), ("2130706433", False),
    ],
)  # fmt: skip
def test_names_of_this_machine_alone(host: str, is_allowed: bool) -> None:
    guard = Guard(ServeConfig(cors_origin=("https://app.example",)), [])
    if is_allowed:
        guard.check("GET", "/v1/models", {"host": host})
    else:
        with pytest.raises(ApiError) as caught:
            guard.check("GET", "/v1/models", {"host": host})
        assert caught.value.status == 403


def test_where_a_key_is_required_the_machine_may_have_any_name() -> None:
    Guard(ServeConfig(host="0.0.0.0"), ["key"]).check(
        "GET", "/v1/models", {"host": "gpu.lan:8080", "authorization": "Bearer key"}
    )


@pytest.mark.parametrize(
    "origin",
    ["https://evil.com", "http://localhost.evil.com", "http://notlocalhost", "http://localhost:9", "null", "file://",
     "http://localhost", "http://127.0.0.1", ""],
)  # fmt: skip
def test_foreign_pages_get_nothing(served: Served, origin: str) -> None:
    for answer in (
        served.post(CHAT, BODY, headers={"origin": origin}),
        served.get("/v1/models", headers={"origin": origin}),
        httpx.options(
            served.url + CHAT, headers={"origin": origin, "access-control-request-method": "POST"}, timeout=WAIT_S
        ),
    ):
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
        assert answer.json()["error"]["code"] == "foreign_origin"


def test_its_own_page_may(served: Served) -> None:
    answer = served.post(CHAT, BODY, headers={"origin": served.url})
    assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers


def test_a_foreign_host_is_refused(served: Served) -> None:
    answer = served.get("/v1/models", headers={"host": "rebound.example"})
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "foreign_host"


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", "application/x-www-form-urlencoded", ""])
def test_json_alone_is_taken(served: Served, kind: str) -> None:
    data = b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}'
    answer = httpx.post(served.url + CHAT, content=data, headers={"content-type": kind}, timeout=WAIT_S)
    assert answer.status_code == 415


def test_curls_form_is_taken_where_ollamas_manual_has_it_but_from_no_browser(served: Served) -> None:
    data, form = b'{"prompt": "a", "stream": false}', {"content-type": "application/x-www-form-urlencoded"}
    url = served.url + "/api/generate"
    assert httpx.post(url, content=data, headers=form, timeout=WAIT_S).status_code == 200
    for browser in ({"origin": served.url}, {"sec-fetch-site": "cross-site"}):
        assert httpx.post(url, content=data, headers=form | browser, timeout=WAIT_S).status_code == 415
    assert httpx.post(url, content=data, headers={"content-type": "text/plain"}, timeout=WAIT_S).status_code == 415


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    with serving(keys=["first key", "Zweiter-Schlüssel"], cors_origin=("https://app.example",)) as running:
        yield running


def test_a_key_is_needed_but_for_health_and_the_page(locked: Served) -> None:
    for path in ("/v1/models", "/metrics", "/props", "/api/tags", "/lora-adapters"):
        answer = locked.get(path)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", path
    assert locked.post(CHAT, BODY).json()["error"]["type"] == "authentication_error"
    assert locked.get("/health").status_code == locked.get("/").status_code == 200


@pytest.mark.parametrize("value", ["Bearer", "Bearer wrong", "first key", "Basic first key", "Bearer first key2"])
def test_other_keys_are_refused(locked: Served, value: str) -> None:
    assert locked.get("/v1/models", headers={"authorization": value}).status_code == 401


def test_keys_open_in_both_headers_and_never_stand_in_the_log(locked: Served) -> None:
    assert locked.get("/v1/models", headers={"authorization": "Bearer first key"}).status_code == 200
    assert locked.get("/v1/models", headers={"x-api-key": "first key"}).status_code == 200
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        assert client.with_options(api_key="first key").models.list().data
    assert "first key" not in repr(locked.records) and "wrong" not in repr(locked.records)


def test_a_page_of_an_allowed_origin_may_and_is_told_so(locked: Served) -> None:
    origin = {"origin": "https://app.example", "access-control-request-headers": "authorization,content-type"}
    asked = httpx.options(locked.url + CHAT, headers=origin, timeout=WAIT_S)
    assert asked.status_code == 204
    assert asked.headers["access-control-allow-origin"] == "https://app.example"
    assert asked.headers["access-control-allow-headers"] == "authorization,content-type"
    answer = locked.post(CHAT, BODY, headers=origin | {"authorization": "Bearer first key"})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://app.example"
    assert locked.get("/v1/models", headers={"origin": "https://evil.com"}).status_code == 403


def test_loopback() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "example.com", "10.0.0.1", "")))
