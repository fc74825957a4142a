"""Who may ask: names of this machine, pages of this server, holders of a key.

A web page anywhere can make a browser send requests to this machine. Its own origin stands in them, and under a name
that was made to mean this machine (DNS rebinding) it stands in Host: both are looked at, for all requests.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from llamakit.server.config import ServeConfig
from llamakit.server.fields import ApiError

#: what needs no key: whether the server is there, and the page, which has no secrets and asks for the key
_PUBLIC = frozenset({"/", "/health", "/v1/health"})
_LONGEST_AGE_S = 600


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own, reached by nobody else."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """The checks of every request. keys: of which one must be there; none: nobody is asked for one."""

    def __init__(self, config: ServeConfig, keys: Sequence[str]) -> None:
        self._origins = frozenset(config.cors_origin)
        self._keys = [key.encode() for key in keys]
        # Elsewhere than on loopback the machine has names that nobody here knows; there a key is required.
        self._hosts_matter = is_loopback(config.host)
        self._hosts = {urlsplit(origin).hostname for origin in self._origins if origin != "*"}

    def check(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Raise ApiError for a request that may not be."""
        self._check_host(headers.get("host", ""))
        self._check_origin(headers)
        if method == "POST":
            _check_type(path, headers)
        if method != "OPTIONS" and path not in _PUBLIC:
            self._check_key(headers)

    def cors(self, method: str, headers: Mapping[str, str]) -> dict[str, str]:
        """The headers that let a page of an allowed origin read the answer, and what a preflight asks for."""
        origin = headers.get("origin")
        if origin is None or not ({origin, "*"} & self._origins):
            return {}
        allowed = {"access-control-allow-origin": origin, "vary": "origin"}
        if method == "OPTIONS":
            allowed |= {
                "access-control-allow-methods": "GET, POST",
                "access-control-allow-headers": headers.get("access-control-request-headers", "")[:500],
                "access-control-max-age": str(_LONGEST_AGE_S),
            }
        return allowed

    def _check_host(self, host: str) -> None:
        if not self._hosts_matter:
            return
        name = _hostname(host)
        if not is_loopback(name) and name not in self._hosts:
            message = f"the server does not answer to the name {name[:100]!r}: it is for programs on this machine"
            raise ApiError(403, message, type="permission_error", code="foreign_host")

    def _check_origin(self, headers: Mapping[str, str]) -> None:
        origin = headers.get("origin")
        if origin is None or {origin, "*"} & self._origins:
            return
        scheme, _, place = origin.partition("://")
        if scheme in ("http", "https") and place.lower() == headers.get("host", "").lower():
            return
        message = f"web pages of {origin[:100]} may not use this server (--cors-origin allows them)"
        raise ApiError(403, message, type="permission_error", code="foreign_origin")

    def _check_key(self, headers: Mapping[str, str]) -> None:
        if not self._keys:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # Every key is compared, each in a time that tells nothing of it.
        if not sum(hmac.compare_digest(given.encode(), key) for key in self._keys):
            headers_ = {"www-authenticate": "Bearer"}
            message = "a valid API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, message, type="authentication_error", code="invalid_api_key", headers=headers_)


def _hostname(host: str) -> str:
    """`localhost:8080` -> localhost, `[::1]:8080` -> [::1]."""
    if host.startswith("["):
        return host.partition("]")[0].lower() + "]"
    return host.partition(":")[0].lower()


def _check_type(path: str, headers: Mapping[str, str]) -> None:
    """JSON alone: a page of another origin cannot send it without asking first.

    `curl -d` calls its data a form, and Ollama's manual relies on that: under /api/ one is taken from what is no
    browser, which would say where its request comes from.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return
    is_browser = "origin" in headers or "sec-fetch-site" in headers
    if path.startswith("/api/") and kind in ("", "application/x-www-form-urlencoded") and not is_browser:
        return
    raise ApiError(415, f"the content type is {kind[:100]!r} (expected application/json)", code="not_json")
