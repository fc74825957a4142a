"""Texts become ids in several processes, and come back in the order in which they went."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Protocol, TypeVar

import numpy as np

from llamakit.dataset.encode_worker import ANSWER, HEAD, Part, encode_parts, read_exactly
from llamakit.errors import LlamakitError, UnsupportedError
from llamakit.tokenizer import Tokenizer

_PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from llamakit.dataset import encode_worker; "
_PROGRAM += "encode_worker.answer(sys.argv[2], sys.stdin.buffer, sys.stdout.buffer)"


class HasParts(Protocol):
    """A unit of work."""

    @property
    def parts(self) -> Sequence[Part]:
        """The texts in it."""
        ...


Unit = TypeVar("Unit", bound=HasParts)


def encoded(
    units: Iterable[Unit], tokenizer: Tokenizer, vocabulary: Path, workers: int
) -> Iterator[tuple[Unit, list[np.ndarray]]]:
    """Each unit with the ids of its texts, (n,) uint32 each, in the order of the units, whatever the number of workers.

    tokenizer: used here where workers is 1; vocabulary: a GGUF file from which each process loads the same. No more
    units are taken than keep the workers busy. Raises what the tokenizer raises, LlamakitError where a process ended.
    """
    if workers == 1:
        yield from ((unit, encode_parts(tokenizer, unit.parts)) for unit in units)
        return
    free: queue.SimpleQueue[_Process] = queue.SimpleQueue()
    processes: list[_Process] = []
    running: deque[tuple[Unit, Future[list[np.ndarray]]]] = deque()

    def run(unit: Unit) -> list[np.ndarray]:
        process = free.get()
        try:
            return process.encode(unit.parts)
        finally:
            free.put(process)

    # Threads only wait for their process. They end with it: a process that was ended answers nobody.
    pool = ThreadPoolExecutor(workers)
    try:
        for _ in range(workers):
            processes.append(_Process(vocabulary))
            free.put(processes[-1])
        for unit in units:
            running.append((unit, pool.submit(run, unit)))
            if len(running) > 2 * workers:
                first, future = running.popleft()
                yield first, future.result()
        while running:
            first, future = running.popleft()
            yield first, future.result()
    finally:
        for _, future in running:
            future.cancel()
        for process in processes:
            process.end()
        pool.shutdown(cancel_futures=True)


class _Process:
    """One process; asked by one thread at a time."""

    def __init__(self, vocabulary: Path) -> None:
        command = [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), str(vocabulary)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            reason = f"a process that tokenizes cannot be started: {error.strerror}"
            raise LlamakitError(reason, hint="--workers 1 needs none") from error

    def encode(self, parts: Sequence[Part]) -> list[np.ndarray]:
        texts = [text.encode() for text, _ in parts]
        sizes = np.array([len(text) for text in texts], "<u4")
        stdin, stdout = self._streams()
        try:
            stdin.write(HEAD.pack(len(texts), int(sizes.sum())) + sizes.tobytes())
            stdin.write(bytes(continued for _, continued in parts))
            stdin.writelines(texts)
            stdin.flush()
            n = self._number(stdout)
            if n < 0:
                raise UnsupportedError(read_exactly(stdout, self._number(stdout)).decode("utf-8", "replace"))
            counts = np.frombuffer(self._read(stdout, 4 * len(texts)), "<u4")
            ids = np.frombuffer(self._read(stdout, 4 * n), "<u4")
        except (OSError, ValueError) as error:
            raise self._died() from error
        return np.split(ids, np.cumsum(counts)[:-1]) if len(counts) else []

    def _streams(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self._process.stdin is not None and self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    def _number(self, stdout: IO[bytes]) -> int:
        return ANSWER.unpack(self._read(stdout, ANSWER.size))[0]

    def _read(self, stdout: IO[bytes], n: int) -> bytes:
        data = read_exactly(stdout, n)
        if len(data) < n:
            raise self._died()
        return data

    def _died(self) -> LlamakitError:
        return LlamakitError(
            "a process that tokenizes ended by itself", hint="was it killed, or out of memory? --workers 1 needs less"
        )

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in self._streams():
            with contextlib.suppress(OSError):  # what was still to be sent has nobody to go to
                stream.close()
