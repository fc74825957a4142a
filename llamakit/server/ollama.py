"""Ollama's API: /api/generate, /api/chat, /api/tags, /api/show, /api/ps, /api/version."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from llamakit.errors import LlamakitError
from llamakit.formats.open import size_on_disk
from llamakit.formats.stamps import base_stamps
from llamakit.inference.config import GenerateConfig
from llamakit.inference.continuation import Done, Token
from llamakit.server.config import LIMITS
from llamakit.server.fields import ApiError, Body, api_error
from llamakit.server.http import Answer, Stream, dumped, error_value, record_of
from llamakit.server.openai import user_of
from llamakit.server.sampling import sampling_of, with_format
from llamakit.server.service import Running, Service, logprob_entries, messages_of, refuse_unsupported

_REASONS = {"end": "stop", "stop": "stop", "length": "length", "context": "length"}
_UNSUPPORTED = {
    "tools": "tools", "images": "images", "suffix": "suffixes", "template": "templates of a request's own",
    "think": "thoughts",
}  # fmt: skip


class Ollama:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._digest = base_stamps(service.file).file
        self._size = size_on_disk(service.file.path)

    async def version(self, request: Request, body: Body) -> Answer:
        """GET /api/version."""
        return JSONResponse({"version": self._service.version})

    async def tags(self, request: Request, body: Body) -> Answer:
        """GET /api/tags."""
        return JSONResponse({"models": [self._listed(name) for name in self._service.model_names]})

    async def running(self, request: Request, body: Body) -> Answer:
        """GET /api/ps."""
        more = {"expires_at": _time(time.time() + 365 * 86400), "size_vram": 0}
        return JSONResponse({"models": [self._listed(self._service.names[0]) | more]})

    async def show(self, request: Request, body: Body) -> Answer:
        """POST /api/show."""
        name = body.text("model") or body.text("name")
        self._service.model(name)
        metadata = self._service.file.metadata
        known = {key: value for key, value in metadata.items() if isinstance(value, str | int | float | bool)}
        return JSONResponse(
            {
                "modelfile": f"FROM {self._service.names[0]}\n",
                "parameters": "",
                "template": self._service.tokenizer.chat_template or "",
                "details": self._details(),
                "model_info": {key: value for key, value in known.items() if key != "tokenizer.chat_template"},
                "capabilities": ["completion"],
                "modified_at": _time(self._service.started),
            }
        )

    def _listed(self, name: str) -> dict[str, Any]:
        name = name if ":" in name else f"{name}:latest"
        return {
            "name": name,
            "model": name,
            "modified_at": _time(self._service.started),
            "size": self._size,
            "digest": self._digest,
            "details": self._details(),
        }

    def _details(self) -> dict[str, Any]:
        family = str(self._service.file.metadata.get("general.architecture", ""))
        n_weights = self._service.n_weights
        return {
            "parent_model": "",
            "format": "gguf",
            "family": family,
            "families": [family],
            "parameter_size": f"{n_weights / 1e9:.1f}B" if n_weights >= 1e9 else f"{n_weights / 1e6:.2f}M",
            "quantization_level": self._service.file_type,
        }

    async def chat(self, request: Request, body: Body) -> Answer:
        """POST /api/chat."""
        refuse_unsupported(body, _UNSUPPORTED)
        if body.get("messages") in (None, []):
            return self._loaded(body, is_chat=True)
        messages = messages_of(body)
        return await self._answer(request, body, lambda: self._service.chat_ids(messages), is_chat=True)

    async def generate(self, request: Request, body: Body) -> Answer:
        """POST /api/generate."""
        refuse_unsupported(body, _UNSUPPORTED)
        prompt, system, raw = body.text("prompt"), body.text("system"), body.flag("raw")
        if not prompt:
            return self._loaded(body, is_chat=False)
        before = self._context(body)

        def ids() -> list[int]:
            if raw or not self._service.tokenizer.chat_template:
                return before + self._service.tokenizer.encode(prompt, add_special=not before)
            head = [{"role": "system", "content": system}] if system else []
            own = self._service.chat_ids([*head, {"role": "user", "content": prompt}])
            bos = self._service.tokenizer.bos_id
            return before + (own[1:] if before and bos is not None and own[:1] == [bos] else own)

        return await self._answer(request, body, ids, is_chat=False)

    def _context(self, body: Body) -> list[int]:
        """The ids of the conversation so far, as an earlier answer gave them."""
        ids = body.get("context")
        if ids is None:
            return []
        n_vocab = self._service.tokenizer.n_vocab
        if not isinstance(ids, list) or not all(type(id) is int and 0 <= id < n_vocab for id in ids):
            body.refuse("context", f"a list of token ids from 0 to {n_vocab - 1}")
        return ids

    def _loaded(self, body: Body, *, is_chat: bool) -> Answer:
        """Without a prompt Ollama loads the model: it is."""
        name = body.text("model") or self._service.names[0]
        self._service.model(name)
        return JSONResponse(self._piece(name, "", is_chat) | {"done": True, "done_reason": "load"})

    def _config(self, body: Body) -> GenerateConfig:
        options = body.object("options") or Body({}, "options.")
        service = self._service
        config = sampling_of(options, service.sampling, service.tokenizer, service.slots.n_ctx)
        n_predict = options.integer("num_predict", -2, service.slots.n_ctx, default=-1)
        logprobs = body.integer("top_logprobs", 0, LIMITS.logprobs) or 0
        config = replace(
            config, n_predict=-1 if n_predict is None or n_predict < 0 else n_predict,
            logprobs=logprobs if body.flag("logprobs") else None,
        )  # fmt: skip
        return with_format(config, _schema(body))

    async def _answer(self, request: Request, body: Body, ids: Callable[[], Sequence[int]], *, is_chat: bool) -> Answer:
        started = time.perf_counter()
        config, record = self._config(body), record_of(request.scope)
        running = await self._service.begin(lambda: [(ids(), config)], body, user_of(request, body), record)
        pieces = self._pieces(running, record.model, is_chat, started, config.logprobs is not None)
        try:
            if body.flag("stream", default=True):
                lines = _lines(pieces, request.url.path)
                return Stream(lines, "application/x-ndjson", running.cancel)
            texts, logprobs, last = [], [], dict[str, Any]()
            async for last in pieces:
                texts.append(last["message"]["content"] if is_chat else last["response"])
                logprobs += last.get("logprobs", [])
            last |= self._piece(record.model, "".join(texts), is_chat) | {"done": True}
            return JSONResponse(last | ({"logprobs": logprobs} if logprobs else {}))
        except BaseException:
            running.cancel()
            raise

    def _piece(self, model: str, text: str, is_chat: bool) -> dict[str, Any]:
        held: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if is_chat else {"response": text}
        return {"model": model, "created_at": _time(time.time()), **held, "done": False}

    async def _pieces(
        self, running: Running, model: str, is_chat: bool, started: float, logprobs: bool
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The objects of a stream, the last with the timings."""
        ids = list(running.tasks[0].ids)
        async for _, report in running.texts():
            if isinstance(report, Token):
                ids.append(report.id)
                if report.text or logprobs:
                    piece = self._piece(model, report.text, is_chat)
                    if logprobs:
                        piece["logprobs"] = logprob_entries(self._service.tokenizer, [report])
                    yield piece
            else:
                last = self._piece(model, report.text, is_chat) | _timings(report, len(running.tasks[0].ids), started)
                yield last if is_chat else last | {"context": ids}


async def _lines(pieces: AsyncGenerator[dict[str, Any], None], path: str) -> AsyncGenerator[bytes, None]:
    """One JSON object a line; an error is the last of them."""
    try:
        async for piece in pieces:
            yield dumped(piece) + b"\n"
    except (ApiError, LlamakitError) as error:
        yield dumped(error_value(path, error if isinstance(error, ApiError) else api_error(error))) + b"\n"


def _timings(done: Done, n_prompt: int, started: float) -> dict[str, Any]:
    """Nanoseconds and tokens. Ollama counts the whole prompt, also what was computed before."""
    return {
        "done": True,
        "done_reason": _REASONS[done.reason],
        "total_duration": int(1e9 * (time.perf_counter() - started)),
        "load_duration": 0,
        "prompt_eval_count": n_prompt,
        "prompt_eval_duration": int(1e9 * done.prefill_s),
        "eval_count": done.n_generated,
        "eval_duration": int(1e9 * done.decode_s),
    }


def _schema(body: Body) -> Mapping[str, Any] | None:
    """What `format` asks for: "json", or a schema."""
    wanted = body.get("format")
    if wanted in (None, ""):
        return None
    if wanted == "json":
        return {"type": "object"}
    schema = body.object("format")
    return None if schema is None else schema.values


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
