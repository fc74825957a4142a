"""OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from llamakit.errors import LlamakitError
from llamakit.inference.config import GenerateConfig
from llamakit.inference.continuation import Done, Token
from llamakit.server.config import LIMITS
from llamakit.server.fields import ApiError, Body, api_error
from llamakit.server.http import Answer, Stream, dumped, error_value, record_of, server_sent
from llamakit.server.sampling import sampling_of, with_format
from llamakit.server.service import (
    Running,
    Service,
    logprob_entries,
    messages_of,
    refuse_unsupported,
    seeded,
    timings_of,
)

_UNSUPPORTED = {"tools": "tools", "functions": "functions", "audio": "audio answers", "suffix": "suffixes"}
#: stands for a text in an event; no model's name holds it
_HOLE = "\0text\0"
_FINISH = {"end": "stop", "stop": "stop", "length": "length", "context": "length"}


def user_of(request: Request, body: Body) -> str:
    """Whose request it is, for the turns: who its `user` names, at the address that it came from."""
    host = request.client.host if request.client else ""
    name = body.get("user")
    return f"{host}/{name[:100]}" if isinstance(name, str) else host


class OpenAI:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def models(self, request: Request, body: Body) -> Answer:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._service.model_names]})

    async def model(self, request: Request, body: Body) -> Answer:
        """GET /v1/models/{name}."""
        name = request.path_params["name"]
        self._service.model(name)
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        service = self._service
        meta = {
            "n_vocab": service.tokenizer.n_vocab,
            "n_ctx": service.slots.n_ctx,
            "n_ctx_train": service.file.metadata.get("llama.context_length"),
            "n_embd": service.file.metadata.get("llama.embedding_length"),
            "n_params": service.n_weights,
            "ftype": service.file_type,
        }
        return {
            "id": name, "object": "model", "created": int(service.started), "owned_by": "llamakit", "meta": meta,
        }  # fmt: skip

    async def chat(self, request: Request, body: Body) -> Answer:
        """POST /v1/chat/completions."""
        refuse_unsupported(body, _UNSUPPORTED)
        messages = messages_of(body)
        config, n = self._config(body, body.integer("max_completion_tokens", 0, self._service.slots.n_ctx))
        top = body.integer("top_logprobs", 0, LIMITS.logprobs)
        if body.flag("logprobs"):
            config = replace(config, logprobs=top or 0)
        elif top:
            body.refuse("top_logprobs", "logprobs to be true beside it")

        def make() -> list[tuple[Sequence[int], GenerateConfig]]:
            ids = self._service.chat_ids(messages)
            return [(ids, seeded(config, i)) for i in range(n)]

        record = record_of(request.scope)
        running = await self._service.begin(make, body, user_of(request, body), record)
        answer = _Answer(
            self._service, running, record.model, is_chat=True, logprobs=config.logprobs is not None, per_prompt=n
        )
        return await _answered(answer, body, request.url.path)

    async def completions(self, request: Request, body: Body) -> Answer:
        """POST /v1/completions."""
        refuse_unsupported(body, _UNSUPPORTED)
        prompts = prompts_of(body)
        config, n = self._config(body, None)
        logprobs = body.integer("logprobs", 0, LIMITS.logprobs) if body.get("logprobs") is not True else 0
        config = replace(config, logprobs=None if body.get("logprobs") is False else logprobs)
        if (body.integer("best_of", 1, LIMITS.choices) or n) != n:
            body.refuse("best_of", "as many as n")

        def make() -> list[tuple[str | Sequence[int], GenerateConfig]]:
            return [(prompt, seeded(config, i)) for prompt in prompts for i in range(n)]

        record = record_of(request.scope)
        running = await self._service.begin(make, body, user_of(request, body), record)
        echo = [self._echoed(task.ids) if body.flag("echo") else "" for task in running.tasks]
        answer = _Answer(
            self._service, running, record.model, is_chat=False, logprobs=config.logprobs is not None, per_prompt=n,
            echo=echo,
        )  # fmt: skip
        return await _answered(answer, body, request.url.path)

    def _echoed(self, ids: Sequence[int]) -> str:
        """The text of a prompt."""
        return self._service.tokenizer.decode(ids)

    def _config(self, body: Body, most: int | None) -> tuple[GenerateConfig, int]:
        """What a body asks for, and how many texts. most: max_tokens under its newer name."""
        service = self._service
        config = sampling_of(body, service.sampling, service.tokenizer, service.slots.n_ctx)
        for name in ("max_tokens", "n_predict"):
            if most is None:
                most = body.integer(name, -1, service.slots.n_ctx)
        config = replace(with_format(config, _schema(body)), n_predict=-1 if most is None else most)
        return config, body.integer("n", 1, LIMITS.choices) or 1


def _schema(body: Body) -> Mapping[str, Any] | None:
    """What `response_format` asks for."""
    wanted = body.object("response_format")
    if wanted is None:
        return None
    match wanted.needed_text("type"):
        case "text":
            return None
        case "json_object":
            schema = wanted.object("schema")  # as in llama-server
            return {"type": "object"} if schema is None else schema.values
        case "json_schema":
            holder = wanted.object("json_schema")
            schema = None if holder is None else holder.object("schema")
            if schema is None:
                raise ApiError(400, "response_format.json_schema.schema is missing", param="response_format")
            return schema.values
    return wanted.refuse("type", "text, json_object or json_schema")


def prompts_of(body: Body) -> list[str | list[int]]:
    """The prompts of a body: a text, ids, or a list of either. Raises ApiError for what is none of them."""
    value = body.get("prompt")
    if value is None:
        raise ApiError(400, "prompt is missing (expected a text, or a list of texts or token ids)", param="prompt")
    if isinstance(value, str):
        return [body.text("prompt")]
    if _is_ids(value):
        return [value]
    if isinstance(value, list) and 0 < len(value) <= LIMITS.prompts:
        if all(isinstance(item, str) for item in value):
            return list(body.texts("prompt", LIMITS.prompts, LIMITS.body_bytes))
        if all(_is_ids(item) for item in value):
            return list(value)
    return body.refuse("prompt", f"a text, token ids, or a list of at most {LIMITS.prompts} of them")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int and 0 <= item < 2**31 for item in value)


class _Answer:
    """Collects the texts of a request, or streams them, in one of the two shapes."""

    def __init__(
        self, service: Service, running: Running, model: str, *, is_chat: bool, logprobs: bool,
        per_prompt: int, echo: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self._per_prompt = per_prompt
        self.running, self._service, self._is_chat, self._logprobs = running, service, is_chat, logprobs
        n = len(running.tasks)
        self._echo = list(echo) or [""] * n
        self._dones: list[Done | None] = [None] * n
        self._offsets = [len(text) for text in self._echo]  # where the next token's text begins
        kind = ("chat.completion", "chat.completion.chunk") if is_chat else ("text_completion", "text_completion")
        self._kinds = kind
        self._frames: dict[int, tuple[bytes, bytes]] = {}
        self._head = {
            "id": ("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"llamakit-{service.version}",
        }

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        texts = [[text] for text in self._echo]
        tokens: list[list[Token]] = [[] for _ in self._echo]
        async for index, report in self.running.texts():
            texts[index].append(report.text)
            if isinstance(report, Done):
                self._dones[index] = report
            else:
                tokens[index].append(report)
        choices = []
        for index, (pieces, own, done) in enumerate(zip(texts, tokens, self._dones, strict=True)):
            assert done is not None, "all have ended"
            text = "".join(pieces)
            held: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self._is_chat else {}
            held = held or {"text": text}
            logprobs = self._logprobs_of(index, own) if self._logprobs else None
            choices.append({"index": index, **held, "logprobs": logprobs, "finish_reason": _FINISH[done.reason]})
        return self._value(0, choices, usage=self._usage(), timings=self._timings())

    async def pieces(self, *, usage: bool, path: str) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events. An error in between is the last of them."""
        try:
            for index, text in enumerate(self._echo):
                if self._is_chat:
                    yield self._event(index, {"role": "assistant", "content": ""}, [])
                elif text:
                    yield self._event(index, text, [])
            async for index, report in self.running.texts():
                if isinstance(report, Done):
                    self._dones[index] = report
                    if report.text:
                        yield self._event(index, self._delta(report.text), [])
                    yield self._event(index, {} if self._is_chat else "", [], _FINISH[report.reason])
                elif self._logprobs:
                    yield self._event(index, self._delta(report.text), [report])
                elif report.text:
                    yield self._framed(index, report.text)
            if usage:
                yield server_sent(self._value(1, [], usage=self._usage(), timings=self._timings()))
            yield b"data: [DONE]\n\n"
        except (ApiError, LlamakitError) as error:
            yield server_sent(error_value(path, error if isinstance(error, ApiError) else api_error(error)))

    def _framed(self, index: int, text: str) -> bytes:
        """The event of a piece of text: all of them are alike but for that."""
        if index not in self._frames:
            before, _, after = self._event(index, self._delta(_HOLE), []).partition(dumped(_HOLE))
            self._frames[index] = before, after
        before, after = self._frames[index]
        return before + dumped(text) + after

    def _delta(self, text: str) -> Any:
        return {"content": text} if self._is_chat else text

    def _event(self, index: int, held: Any, tokens: Sequence[Token], finish: str | None = None) -> bytes:
        logprobs = self._logprobs_of(index, tokens) if tokens and self._logprobs else None
        name = "delta" if self._is_chat else "text"
        choice = {"index": index, name: held, "logprobs": logprobs, "finish_reason": finish}
        return server_sent(self._value(1, [choice]))

    def _value(self, kind: int, choices: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        return {"object": self._kinds[kind], **self._head, "choices": choices, **more}

    def _logprobs_of(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        entries = logprob_entries(self._service.tokenizer, tokens)
        if self._is_chat:
            return {"content": entries, "refusal": None}
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token.text)
        return {
            "tokens": [_key(e) for e in entries],
            "token_logprobs": [e["logprob"] for e in entries],
            "top_logprobs": [{_key(top): top["logprob"] for top in e["top_logprobs"]} for e in entries],
            "text_offset": offsets,
        }

    def _usage(self) -> dict[str, Any]:
        """Tokens of all texts; a prompt counts once, however many texts continue it."""
        dones = [done for done in self._dones if done is not None]
        n_generated = sum(done.n_generated for done in dones)
        prompts = [len(task.ids) for task in self.running.tasks[:: self._per_prompt]]
        computed = [done.n_prompt for done in dones[:: self._per_prompt]]
        n_prompt = sum(prompts)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_generated,
            "total_tokens": n_prompt + n_generated,
            "prompt_tokens_details": {"cached_tokens": n_prompt - sum(computed)},
        }

    def _timings(self) -> dict[str, Any]:
        """llama-server's, of the first text."""
        done = self._dones[0]
        assert done is not None, "it has ended"
        return timings_of(done, len(self.running.tasks[0].ids))


def _key(entry: Mapping[str, Any]) -> str:
    """The text of a token, or its bytes where they are none: two of those may not look alike."""
    data = bytes(entry["bytes"])
    return entry["token"] if data == entry["token"].encode() else "bytes:" + "".join(f"\\x{b:02x}" for b in data)


async def _answered(answer: _Answer, body: Body, path: str) -> Answer:
    options = body.object("stream_options")
    try:
        if body.flag("stream"):
            usage = options is not None and options.flag("include_usage")
            return Stream(answer.pieces(usage=usage, path=path), "text/event-stream", answer.running.cancel)
        return JSONResponse(await answer.whole())
    except BaseException:
        answer.running.cancel()
        raise
