"""llama-server's own way to ask for a text: POST /completion, and what its answer says beside it.

The fields are those of llama.cpp's tools/server/README.md. A text ends with `stop: true` and a `stop_type`: eos, limit
or word; there is no [DONE].
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from llamakit.errors import LlamakitError
from llamakit.inference.config import GenerateConfig
from llamakit.inference.continuation import Done, Token
from llamakit.server.config import LIMITS
from llamakit.server.fields import ApiError, Body, api_error
from llamakit.server.http import Answer, Stream, error_value, record_of, server_sent
from llamakit.server.openai import prompts_of, user_of
from llamakit.server.sampling import sampling_of, settings_of
from llamakit.server.service import Running, Service, entry, refuse_unsupported, timings_of

_UNSUPPORTED = {
    "image_data": "images", "post_sampling_probs": "probabilities after sampling", "n_indent": "indents",
    "t_max_predict_ms": "time limits of a request",
}  # fmt: skip
_STOP_TYPES = {"end": "eos", "stop": "word", "length": "limit", "context": "limit"}


class Completion:
    """The handler."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def completion(self, request: Request, body: Body) -> Answer:
        """POST /completion."""
        refuse_unsupported(body, _UNSUPPORTED)
        service = self._service
        prompts = prompts_of(body)
        # All slots give the same text: which one is asked for does not matter.
        body.integer("id_slot", -1, service.slots.n_slots - 1)
        config = sampling_of(body, service.sampling, service.tokenizer, service.slots.n_ctx)
        n_predict = body.integer("n_predict", -1, service.slots.n_ctx)
        if n_predict is None:
            n_predict = body.integer("max_tokens", -1, service.slots.n_ctx, default=-1)
        n_probs = body.integer("n_probs", 0, LIMITS.logprobs)
        config = replace(config, n_predict=n_predict, logprobs=n_probs or None)
        fields = body.texts("response_fields", LIMITS.fields, LIMITS.stop_characters)

        def make() -> list[tuple[str | Sequence[int], GenerateConfig]]:
            return [(prompt, config) for prompt in prompts]

        record = record_of(request.scope)
        running = await service.begin(make, body, user_of(request, body), record)
        texts = [_Text(service, index, task.ids, config, record.model) for index, task in enumerate(running.tasks)]
        try:
            if body.flag("stream"):
                pieces = _pieces(running, texts, fields, request.url.path)
                return Stream(pieces, "text/event-stream", running.cancel)
            async for index, report in running.texts():
                texts[index].add(report)
            with_tokens = body.flag("return_tokens")
            values = [_chosen(text.end(with_tokens=with_tokens), fields) for text in texts]
            return JSONResponse(values if isinstance(body.get("prompt"), list) and len(values) > 1 else values[0])
        except BaseException:
            running.cancel()
            raise


class _Text:
    """One text as it grows."""

    def __init__(
        self, service: Service, index: int, ids: Sequence[int], config: GenerateConfig, model: str
    ) -> None:  # fmt: skip
        self._service, self._index, self._ids, self._config, self._model = service, index, ids, config, model
        self._content, self._tokens, self._done = "", list[Token](), None

    def add(self, report: Token | Done) -> None:
        """Count one more report."""
        self._content += report.text
        if isinstance(report, Token):
            self._tokens.append(report)
        else:
            self._done: Done | None = report

    def piece(self, token: Token) -> dict[str, Any]:
        """What a stream says of a token that was just added."""
        value = {
            "index": self._index, "content": token.text, "tokens": [token.id], "stop": False, "id_slot": -1,
            "tokens_predicted": len(self._tokens), "tokens_evaluated": len(self._ids),
        }  # fmt: skip
        return value | self._probabilities([token])

    def end(self, *, with_tokens: bool = False, content: str | None = None) -> dict[str, Any]:
        """The last word on a text. content: another one than the whole, where pieces were sent."""
        done, tokenizer = self._done, self._service.tokenizer
        assert done is not None, "it has ended"
        value = {
            "index": self._index,
            "content": self._content if content is None else content,
            "tokens": [token.id for token in self._tokens] if with_tokens else [],
            "id_slot": -1,
            "stop": True,
            "model": self._model,
            "tokens_predicted": done.n_generated,
            "tokens_evaluated": len(self._ids),
            "generation_settings": settings_of(self._config) | {"seed": done.seed},
            "prompt": tokenizer.decode(self._ids, special=True),
            "has_new_line": "\n" in self._content,
            "truncated": False,
            "stop_type": _STOP_TYPES[done.reason],
            "stopping_word": done.stop or "",
            "tokens_cached": len(self._ids) + max(0, done.n_generated - 1),
            "timings": timings_of(done, len(self._ids)),
        }
        return value | (self._probabilities(self._tokens) if content is None else {})

    def _probabilities(self, tokens: Sequence[Token]) -> dict[str, Any]:
        if self._config.logprobs is None:
            return {}
        return {"completion_probabilities": [self._likely(token) for token in tokens]}

    def _likely(self, token: Token) -> dict[str, Any]:
        return self._entry(token.id, token.logprob) | {
            "top_logprobs": [self._entry(id, logprob) for id, logprob in token.top]
        }

    def _entry(self, id: int, logprob: float | None) -> dict[str, Any]:
        return {"id": id} | entry(self._service.tokenizer, id, logprob)


def _chosen(value: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """`response_fields`: of a last word the fields named, `generation_settings/seed` one within another; all for none.

    As in llama-server each stands under the whole of its name, and one that there is not is left out.
    """
    found: dict[str, Any] = {}
    for name in fields:
        *outer, last = name.split("/")
        inner: Any = value
        for key in outer:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict) and last in inner:
            found[name] = inner[last]
    return found if fields else value


async def _pieces(
    running: Running, texts: Sequence[_Text], fields: Sequence[str], path: str
) -> AsyncGenerator[bytes, None]:
    """Server-sent events, one for each token, and one for each end. An error in between is the last of them."""
    try:
        async for index, report in running.texts():
            text = texts[index]
            text.add(report)
            is_last = isinstance(report, Done)
            yield server_sent(_chosen(text.end(content=report.text), fields) if is_last else text.piece(report))
    except (ApiError, LlamakitError) as error:
        yield server_sent(error_value(path, error if isinstance(error, ApiError) else api_error(error)))
