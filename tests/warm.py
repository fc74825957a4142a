"""Processes of `llamakit` that start at once: copies of one that has loaded torch, which takes two seconds of processor
time each time.

What is under test is a process of its own all the same: its files, its signals, its exit code, its end. What the
interpreter does before `main` is not: tests/cli/test_main.py and tests/test_imports.py start it from nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
#: the longest that a request can be
_REQUEST_BYTES = 1 << 17
PIPE, DEVNULL = subprocess.PIPE, subprocess.DEVNULL


class Process:
    """A running `llamakit ARGS`, used as subprocess.Popen is: pid, stdin, stdout, stderr, returncode."""

    def __init__(
        self,
        *args: str | os.PathLike[str],
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[Any] = DEVNULL,
        stdout: int | IO[Any] = PIPE,
        stderr: int | IO[Any] = PIPE,
        text: bool = True,
        largest_file: int | None = None,
        terminal: int | None = None,
    ) -> None:
        """env: on top of this process's. largest_file: in bytes, as on a disk that is full then.

        terminal: the file descriptor of one that the process gets as its own, for all three streams.
        """
        self.args, self.returncode = args, None
        self._status, status = os.pipe()
        ours: list[Any] = [None] * 3
        theirs: list[int] = []
        for i, (stream, mode) in enumerate(((stdin, "r"), (stdout, "w"), (stderr, "w"))):
            if terminal is not None:
                theirs.append(os.dup(terminal))
            elif stream == PIPE:
                ends = os.pipe()
                theirs.append(ends[mode == "w"])
                ours[i] = open(ends[mode == "r"], ("r" if mode == "w" else "w") + ("" if text else "b"))  # noqa: SIM115
            elif stream == DEVNULL:
                theirs.append(os.open(os.devnull, os.O_RDWR))
            else:
                theirs.append(os.dup(stream if isinstance(stream, int) else stream.fileno()))
        self.stdin, self.stdout, self.stderr = ours
        request = {
            "args": [os.fspath(arg) for arg in args], "cwd": os.fspath(cwd or os.getcwd()),
            "env": {**os.environ, **(env or {})}, "largest_file": largest_file, "terminal": terminal is not None,
        }  # fmt: skip
        data = json.dumps(request).encode()
        assert len(data) < _REQUEST_BYTES
        socket.send_fds(_server(), [data], [status, *theirs])
        for fd in (status, *theirs):
            os.close(fd)
        self.pid = int.from_bytes(os.read(self._status, 4), "little")
        assert self.pid, "the process that is copied has ended"

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(list(map(str, self.args)), timeout or 0)
        return code

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int.from_bytes(os.read(self._status, 4), "little", signed=True)
            os.close(self._status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, input: Any = None, timeout: float | None = None) -> tuple[Any, Any]:
        """All of what is still to be read of its output and errors, once it has ended."""
        with ThreadPoolExecutor(3) as pool:
            reading = [pool.submit(stream.read) for stream in (self.stdout, self.stderr) if stream is not None]
            if self.stdin is not None:
                with contextlib.suppress(BrokenPipeError), self.stdin:
                    self.stdin.write(input or ("" if "b" not in self.stdin.mode else b""))
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            read = iter([done.result() for done in reading])
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        return tuple(None if stream is None else next(read) for stream in (self.stdout, self.stderr))  # type: ignore

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self.wait(250)


@cache
def _server() -> socket.socket:
    """The socket of the process that is copied, which ends when it is closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for side in (ours, theirs):
        side.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _REQUEST_BYTES)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.warm", str(theirs.fileno())]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()], stdin=DEVNULL)
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def _serve(sock: socket.socket) -> dict[str, Any]:
    """Copy this process for each request; returns the request in the copies, and ends where nobody can ask any more."""
    woken, waking = os.pipe()
    os.set_blocking(waking, False)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(waking)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    status_of: dict[int, int] = {}
    while True:
        ready = select.select([sock, woken], [], [])[0]
        if sock in ready:
            data, fds, _, _ = socket.recv_fds(sock, _REQUEST_BYTES, 4)
            if not data:
                raise SystemExit
            status, *streams = fds
            pid = os.fork()
            if pid == 0:
                sock.close()
                signal.set_wakeup_fd(-1)
                for fd in (woken, waking, status, *status_of.values()):
                    os.close(fd)
                return {**json.loads(data), "streams": streams}
            status_of[pid] = status
            for fd in streams:
                os.close(fd)
            os.write(status, pid.to_bytes(4, "little"))
        with contextlib.suppress(BlockingIOError):
            os.read(woken, 4096)
        while status_of:
            pid, state = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            status = status_of.pop(pid)
            with contextlib.suppress(BrokenPipeError):
                os.write(status, os.waitstatus_to_exitcode(state).to_bytes(4, "little", signed=True))
            os.close(status)


def _become(request: dict[str, Any]) -> None:
    """Be the process that was asked for, as the interpreter would set it up."""
    for number, fd in enumerate(request["streams"]):
        os.dup2(fd, number)
        os.close(fd)
    if request["terminal"]:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["largest_file"] is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"],) * 2)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    form: dict[str, Any] = {"encoding": encoding or "utf-8", "errors": errors or "strict", "closefd": False}
    sys.stdin, sys.stdout = open(0, **form), open(1, "w", **form)  # noqa: SIM115
    sys.stderr = open(2, "w", **{**form, "errors": "backslashreplace"}, buffering=1)  # noqa: SIM115
    sys.argv = ["llamakit", *request["args"]]


def _end(code: int) -> None:
    """What the interpreter does at its end, but for freeing all of torch's objects, which takes half a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        print(f"Exception ignored while flushing sys.stdout: {error!r}", file=sys.stderr)
        code = 120
    os._exit(code)


if __name__ == "__main__":
    import gc
    import importlib
    import pkgutil
    import runpy

    import llamakit

    for module in pkgutil.walk_packages(llamakit.__path__, "llamakit."):
        if not module.name.startswith(("llamakit.__main__", "llamakit.server")):
            with contextlib.suppress(ImportError):  # of an extra that is not installed
                importlib.import_module(module.name)
    gc.collect()
    gc.freeze()
    _become(_serve(socket.socket(fileno=int(sys.argv[1]))))
    try:
        runpy.run_module("llamakit", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        _end(int(ended.code or 0))
