"""A server on a tiny model, in this process, on a port of its own: what every test of the server talks to."""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from llamakit.formats.adapter import Adapter
from llamakit.inference.config import GenerateConfig
from llamakit.inference.slots import Slots
from llamakit.server.config import ServeConfig
from llamakit.server.http import Record
from llamakit.server.run import Server, bound_socket
from llamakit.server.service import Service
from tests.tiny import cached_tiny_gguf

#: how long a test waits for what must come: a machine that is busy with other things may need long
WAIT_S = 120
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Served:
    """A server that runs. records: what its log got."""

    url: str
    service: Service
    records: deque[Record]
    server: Server

    @property
    def slots(self) -> Slots:
        return self.service.slots

    def post(self, path: str, value: Any, **more: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=value, timeout=WAIT_S, verify=False, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=WAIT_S, verify=False, **more)

    def logged(self, path: str, n: int = 1) -> list[Record]:
        """The records of a path, once there are n of them: an answer arrives a moment before it is written down."""
        end = time.monotonic() + WAIT_S
        while len(found := [record for record in list(self.records) if record.path == path]) < n:
            assert time.monotonic() < end, f"{len(found)} of {n} answers to {path} were written down"
            time.sleep(0.01)
        return found

    def connect(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=WAIT_S)


def tiny_chat_model(**options: Any) -> Path:
    return cached_tiny_gguf(tokenizer="bpe", chat_template=TEMPLATE, **options)


def make_service(
    path: Path | None = None,
    *,
    adapters: Mapping[str, Adapter] | None = None,
    n_ctx: int = 256,
    engine: Any = None,
    **config: Any,
) -> Service:
    """A service on a file, by default a tiny model with a chat template. engine: wraps the engine."""
    from llamakit.cli.loading import load

    loaded = load(path or tiny_chat_model(), silent=True, threads=1)
    wanted = ServeConfig(**{"parallel": 4, "alias": "tiny", **config})
    slots = Slots(
        engine(loaded.engine) if engine else loaded.engine, loaded.tokenizer, n_slots=wanted.parallel, n_ctx=n_ctx,
        max_waiting=wanted.queue, adapters=adapters,
    )  # fmt: skip
    return Service(
        slots=slots, tokenizer=loaded.tokenizer, file=loaded.file, config=wanted, names=tuple(wanted.alias.split(",")),
        scales=dict.fromkeys(adapters or {}, 1.0), version="0.1.0", sampling=GenerateConfig(),
    )  # fmt: skip


@contextmanager
def serving(service: Service | None = None, *, keys: Sequence[str] = (), **options: Any) -> Iterator[Served]:
    """A server for as long as the block lasts; options: of `make_service`."""
    service = service or make_service(**options)
    records: deque[Record] = deque(maxlen=500)
    ready = threading.Event()
    with bound_socket("127.0.0.1", 0) as sock:
        server = Server(service, sock, keys=keys, log=records.append, ready=ready.set)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            assert ready.wait(WAIT_S)
            yield Served(url, service, records, server)
        finally:
            server.stop()
            thread.join(WAIT_S)
    assert not thread.is_alive()
