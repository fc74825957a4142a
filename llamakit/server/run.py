"""A server that listens: from a socket to the last answer."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Callable, Generator, Sequence

import uvicorn

from llamakit.errors import UsageError
from llamakit.server.app import Log, build_app
from llamakit.server.service import Service

#: after a signal, answers may come to their end for so long; then they are ended, and have so long to say so
_FINISH_S, _END_S = 3.5, 1
_HEADER_BYTES = 64 << 10
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that has the address and does not listen yet: a port that is taken shows before anything is loaded.

    Raises UsageError where it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except (OSError, UnicodeError) as error:
        hint = None
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            hint = "another program has it; --port 0 takes any free one"
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"cannot listen on {host}:{port}: {reason}", hint=hint) from error
    return sock


class Server:
    """Serves on one socket, in `run`, until `stop`; that may be called from any thread and by a signal."""

    def __init__(
        self, service: Service, sock: socket.socket, *, keys: Sequence[str] = (), log: Log | None = None,
        ready: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """ready: called in the event loop once requests are answered."""
        self._service, self._socket, self._ready = service, sock, ready
        config = uvicorn.Config(
            build_app(service, keys, log), http="h11", ws="none", lifespan="off", log_config=None,
            log_level="critical", access_log=False, server_header=False, proxy_headers=False,
            h11_max_incomplete_event_size=_HEADER_BYTES, timeout_keep_alive=30,
            timeout_graceful_shutdown=int(_FINISH_S + _END_S),
        )  # fmt: skip
        self._server = _Uvicorn(config)
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self) -> None:
        """Until `stop`, SIGINT or SIGTERM; these two only in the main thread."""
        asyncio.run(self._run())

    def stop(self) -> None:
        """Take no more requests; what runs may come to an end for 3.5 seconds, then it is ended."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._loop.add_signal_handler(number, self._stop)
        self._service.start()
        try:
            await asyncio.gather(self._server.serve(sockets=[self._socket]), self._tell())
        finally:
            await asyncio.get_running_loop().run_in_executor(None, self._service.stop)

    async def _tell(self) -> None:
        while not self._server.started and not self._server.should_exit:
            await asyncio.sleep(0.005)
        if self._ready is not None:
            self._ready()

    def _stop(self) -> None:
        if self._server.should_exit:  # asked again: at once
            self._service.slots.close()
        self._server.should_exit = True
        asyncio.get_running_loop().call_later(_FINISH_S, self._service.slots.close)


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are `Server`'s: uvicorn would raise them again at the end."""
        yield
