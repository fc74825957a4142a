"""The application: which path is whose, and what happens to every request before and after."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.resources import files

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamakit.server.completion import Completion
from llamakit.server.fields import ApiError, Body
from llamakit.server.guard import Guard
from llamakit.server.http import Answer, Endpoint, Handler, Record, error_answer, record_of
from llamakit.server.llamacpp import LlamaCpp
from llamakit.server.ollama import Ollama
from llamakit.server.openai import OpenAI
from llamakit.server.service import Service

Log = Callable[[Record], None]

#: the page loads nothing from anywhere, and nobody may put it in a frame
_PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def build_app(service: Service, keys: Sequence[str] = (), log: Log | None = None) -> ASGIApp:
    """The ASGI application of a service. keys: of which a request must have one; log: gets the record of each."""
    return _Front(_router(service), Guard(service.config, keys), service, log)


def _router(service: Service) -> Router:
    openai, ollama, llamacpp = OpenAI(service), Ollama(service), LlamaCpp(service)
    completion = Completion(service).completion

    async def page(request: Request, body: Body) -> Answer:
        return Response(_page(), media_type="text/html", headers=_PAGE_HEADERS)

    async def metrics(request: Request, body: Body) -> Answer:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    get: dict[str, Handler] = {
        "/": page,
        "/health": llamacpp.health,
        "/v1/health": llamacpp.health,
        "/metrics": metrics,
        "/props": llamacpp.props,
        "/slots": llamacpp.slots,
        "/lora-adapters": llamacpp.adapters,
        "/models": openai.models,
        "/v1/models": openai.models,
        "/v1/models/{name:path}": openai.model,
        "/api/tags": ollama.tags,
        "/api/ps": ollama.running,
        "/api/version": ollama.version,
    }
    post: dict[str, Handler] = {
        "/chat/completions": openai.chat,
        "/v1/chat/completions": openai.chat,
        "/v1/completions": openai.completions,
        "/completion": completion,
        "/completions": completion,
        "/api/chat": ollama.chat,
        "/api/generate": ollama.generate,
        "/api/show": ollama.show,
        "/tokenize": llamacpp.tokenize,
        "/detokenize": llamacpp.detokenize,
        "/apply-template": llamacpp.apply_template,
    }
    routes = [Route(path, Endpoint(handler), methods=["GET"]) for path, handler in get.items()]
    routes += [Route(path, Endpoint(handler), methods=["POST"]) for path, handler in post.items()]
    # llama-server takes a bare list here.
    set_adapters = Endpoint(llamacpp.set_adapters, list_name="adapters")
    routes.append(Route("/lora-adapters", set_adapters, methods=["POST"]))
    return Router(routes, redirect_slashes=False)


def _page() -> str:
    return (files("llamakit.server") / "page.html").read_text(encoding="utf-8")


class _Front:
    """Around everything: the checks, the headers of every answer, the log, and the last word on errors."""

    def __init__(self, app: ASGIApp, guard: Guard, service: Service, log: Log | None) -> None:
        self._app, self._guard, self._service, self._log = app, guard, service, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI wants it."""
        if scope["type"] != "http":
            raise RuntimeError(f"nothing speaks {scope['type']} here")
        client = scope.get("client")
        record = Record(client[0] if client else "", scope["method"], scope["path"])
        scope["llamakit.record"] = record
        scope["app"] = self  # the router then raises what it would else answer in plain text
        headers = Request(scope).headers
        extra = {"x-content-type-options": "nosniff", **self._guard.cors(scope["method"], headers)}
        raw = [(name.encode(), value.encode("latin-1", "replace")) for name, value in extra.items()]
        started = time.monotonic()

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", []), *raw]
            await send(message)

        try:
            await self._answer(scope, receive, send_on)
        finally:
            record.seconds = time.monotonic() - started
            self._service.metrics.add(record, getattr(scope.get("route"), "path", "other"))
            if self._log is not None:
                self._log(record)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._guard.check(scope["method"], scope["path"], Request(scope).headers)
            if scope["method"] == "OPTIONS":
                await Response(status_code=204)(scope, receive, send)
                return
            await self._app(scope, receive, send)
        except ApiError as error:
            await error_answer(scope, error)(scope, receive, send)
        except HTTPException as error:
            missing = f"{scope['method']} {scope['path'][:100]} is not there" if error.status_code == 404 else ""
            other = ApiError(error.status_code, missing or error.detail, code="not_found", headers=error.headers)
            await error_answer(scope, other)(scope, receive, send)
        except Exception as error:  # a mistake of ours: the client gets no traceback, and the server goes on
            reason = f"internal error: {type(error).__name__}"
            answer = error_answer(scope, ApiError(500, reason, type="server_error"))
            record_of(scope).error = f"{reason}: {' '.join(str(error).split())[:300]}"
            if not record_of(scope).status:  # else the answer has begun: it just ends
                await answer(scope, receive, send)
