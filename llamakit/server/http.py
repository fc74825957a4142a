"""From a handler to an answer: bodies with limits, streams, clients that leave, errors in the API's own form."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from llamakit.errors import LlamakitError
from llamakit.server.config import LIMITS
from llamakit.server.fields import ApiError, Body, api_error

#: status of a request whose client left before it was answered, in the log alone
GONE = 499


@dataclass
class Record:
    """What the log says of a request. Times in seconds; tokens of all its texts together."""

    client: str
    method: str
    path: str
    status: int = 0
    seconds: float = 0.0
    model: str = ""
    n_prompt: int = 0
    n_cached: int = 0
    n_generated: int = 0
    waited_s: float = 0.0
    first_token_s: float | None = None
    reasons: list[str] = field(default_factory=list)
    error: str = ""


def record_of(scope: MutableMapping[str, Any]) -> Record:
    """The record of the request that a scope belongs to."""
    return scope["llamakit.record"]


class Stream:
    """An answer in pieces. An error behind the first of them can only be one of them: the pieces' own affair.

    close: called at the end, also where no piece was ever taken.
    """

    def __init__(self, pieces: AsyncGenerator[bytes, None], media_type: str, close: Callable[[], None]) -> None:
        self._pieces, self._media_type, self._close = pieces, media_type, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI wants it."""
        headers = [(b"content-type", self._media_type.encode()), (b"cache-control", b"no-store")]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async with contextlib.aclosing(self._pieces) as pieces:
                async for piece in pieces:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                    await asyncio.sleep(0)  # so that it shows when the client has left, before the next is written
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._close()


Answer = Response | Stream
Handler = Callable[[Request, Body], Awaitable[Answer]]


class Endpoint:
    """A handler as an ASGI application: it gets the body, and is cancelled when the client leaves."""

    def __init__(self, handler: Handler, *, list_name: str | None = None) -> None:
        """list_name: see `Body.parse`."""
        self._handler, self._list_name = handler, list_name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI wants it."""
        request = Request(scope, receive)
        try:
            data = await _read_body(request) if request.method == "POST" else b"{}"
            body = Body.parse(data, list_name=self._list_name)
        except ApiError as error:
            await error_answer(scope, error)(scope, receive, send)
            return
        work = asyncio.ensure_future(self._work(request, body, send))
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not work.done():
                record_of(scope).status = GONE
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work

    async def _work(self, request: Request, body: Body, send: Send) -> None:
        try:
            answer: Answer = await self._handler(request, body)
        except ApiError as error:
            answer = error_answer(request.scope, error)
        except LlamakitError as error:
            answer = error_answer(request.scope, api_error(error))
        await answer(request.scope, request.receive, send)


async def _read_body(request: Request) -> bytes:
    """Raises ApiError for one that is too large or too slow."""
    parts, size = [], 0
    too_large = ApiError(413, f"the body is too large (expected at most {LIMITS.body_bytes} bytes)")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length[:20]) > LIMITS.body_bytes:
        raise too_large
    try:
        async with asyncio.timeout(LIMITS.body_s):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > LIMITS.body_bytes:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {LIMITS.body_s:g} s") from error
    return b"".join(parts)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def error_answer(scope: MutableMapping[str, Any], error: ApiError) -> Response:
    """An error as the API of a path writes it: Ollama's under /api/, OpenAI's elsewhere."""
    record_of(scope).error = error.message
    return JSONResponse(error_value(scope["path"], error), status_code=error.status, headers=error.headers)


def error_value(path: str, error: ApiError) -> dict[str, Any]:
    """The error object that the API of a path has."""
    if path.startswith("/api/"):
        return {"error": error.message}
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def dumped(value: Any) -> bytes:
    """JSON in UTF-8, without spaces."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def server_sent(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + dumped(value) + b"\n\n"
