"""What `serve` can be asked for. Torch-free: the command line takes its defaults from here."""

from __future__ import annotations

import os
from dataclasses import dataclass

from llamakit.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Where to listen, for how many at once, and what a request may ask for. Raises UsageError naming the flag."""

    host: str = "127.0.0.1"
    """Address to listen on; any other than this machine's own (loopback) requires an API key."""
    port: int = 8080
    """Port to listen on; 0 takes any free one."""
    parallel: int = 4
    """Texts that are written at once, each in a slot of its own."""
    ctx: int = 0
    """Context of a slot in tokens, prompt and answer together; 0 takes the model's, at most 8192."""
    queue: int = 64
    """Requests that may wait for a slot; more get 503."""
    timeout: float = 600.0
    """Seconds that a request may take at most, waiting included."""
    alias: str = ""
    """Name of the model in the APIs; several with commas between them. Empty takes the file's."""
    api_key_file: str | os.PathLike[str] | None = None
    """File with the keys that a request must have one of, one a line."""
    cors_origin: tuple[str, ...] = ()
    """Origins, such as https://app.example, whose web pages may use the server; * is all of them."""
    log_file: str | os.PathLike[str] | None = None
    """Where a JSON line is written for each request."""

    def __post_init__(self) -> None:
        _require(0 <= self.port <= 65535, "--port", self.port, "0 to 65535")
        _require(1 <= self.parallel <= 256, "--parallel", self.parallel, "1 to 256")
        _require(self.ctx >= 0, "--ctx", self.ctx, "0 or more")
        _require(self.queue >= 0, "--queue", self.queue, "0 or more")
        _require(0 < self.timeout <= 86400, "--timeout", self.timeout, "a number of seconds above 0, at most 86400")
        for origin in self.cors_origin:
            scheme, _, rest = origin.partition("://")
            sane = origin == "*" or (scheme and rest and "/" not in rest)
            _require(bool(sane), "--cors-origin", origin, "an origin such as https://app.example, or *")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may hold; more is refused with 400 or 413."""

    body_bytes: int = 8 << 20
    body_s: float = 30.0
    choices: int = 8
    prompts: int = 32
    stops: int = 16
    stop_characters: int = 1024
    logprobs: int = 20
    messages: int = 4096
    biases: int = 4096
    fields: int = 64
    scale: float = 1000.0


LIMITS = Limits()


def _require(holds: bool, flag: str, value: object, expected: str) -> None:
    if not holds:
        raise UsageError(f"{flag} is {value} (expected {expected})")
