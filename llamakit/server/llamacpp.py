"""What llama-server has besides: /health, /props, /slots, /tokenize, /detokenize, /apply-template, /lora-adapters."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from llamakit.server.config import LIMITS
from llamakit.server.fields import ApiError, Body
from llamakit.server.http import Answer
from llamakit.server.sampling import settings_of
from llamakit.server.service import Service, messages_of


class LlamaCpp:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, request: Request, body: Body) -> Answer:
        """GET /health."""
        return JSONResponse({"status": "ok"})

    async def props(self, request: Request, body: Body) -> Answer:
        """GET /props."""
        service, tokenizer = self._service, self._service.tokenizer
        return JSONResponse(
            {
                "default_generation_settings": {
                    "n_ctx": service.slots.n_ctx,
                    "params": settings_of(service.sampling),
                },
                "total_slots": service.slots.n_slots,
                "model_alias": service.names[0],
                "model_ftype": service.file_type,
                "model_path": service.file.path.name,
                "chat_template": tokenizer.chat_template or "",
                "bos_token": self._token(tokenizer.bos_id),
                "eos_token": self._token(tokenizer.eos_id),
                "modalities": {"vision": False, "audio": False},
                "build_info": f"llamakit {service.version}",
            }
        )

    async def slots(self, request: Request, body: Body) -> Answer:
        """GET /slots; with ?fail_on_no_slot=1 it fails with 503 where none is free."""
        slots = self._service.slots
        states = slots.states()
        if request.query_params.get("fail_on_no_slot") and all(state.is_running for state in states):
            raise ApiError(503, "no slot is free", type="unavailable_error", code="no_slot")
        return JSONResponse(
            [
                {
                    "id": id,
                    "n_ctx": slots.n_ctx,
                    "speculative": False,
                    "is_processing": state.is_running,
                    "n_prompt_tokens": state.n_prompt,
                    "next_token": [{"has_next_token": state.is_running, "n_decoded": state.n_generated}],
                }
                for id, state in enumerate(states)
            ]
        )

    def _token(self, id: int | None) -> str:
        return "" if id is None else self._service.tokenizer.piece(id, special=True).decode("utf-8", "replace")

    async def tokenize(self, request: Request, body: Body) -> Answer:
        """POST /tokenize."""
        text, tokenizer = body.text("content"), self._service.tokenizer
        special, parse = body.flag("add_special"), body.flag("parse_special", True)
        ids = await self._service.in_thread(lambda: tokenizer.encode(text, add_special=special, parse_special=parse))
        if not body.flag("with_pieces"):
            return JSONResponse({"tokens": ids})
        return JSONResponse({"tokens": [{"id": id, "piece": _piece(tokenizer.piece(id, special=True))} for id in ids]})

    async def detokenize(self, request: Request, body: Body) -> Answer:
        """POST /detokenize."""
        ids, tokenizer = body.get("tokens"), self._service.tokenizer
        n_vocab = tokenizer.n_vocab
        if ids is None:
            ids = []
        if not isinstance(ids, list) or not all(type(id) is int and 0 <= id < n_vocab for id in ids):
            body.refuse("tokens", f"a list of token ids from 0 to {n_vocab - 1}")
        return JSONResponse({"content": tokenizer.decode(ids, special=True)})

    async def apply_template(self, request: Request, body: Body) -> Answer:
        """POST /apply-template."""
        messages = messages_of(body)
        return JSONResponse({"prompt": await self._service.in_thread(lambda: self._service.rendered(messages))})

    async def adapters(self, request: Request, body: Body) -> Answer:
        """GET /lora-adapters."""
        scales = self._service.scales
        return JSONResponse([{"id": i, "name": n, "path": n, "scale": scales[n]} for i, n in enumerate(scales)])

    async def set_adapters(self, request: Request, body: Body) -> Answer:
        """POST /lora-adapters: scales for all requests from now on; those that are not named become 0."""
        names = list(self._service.scales)
        new: dict[str, float] = dict.fromkeys(names, 0.0)
        for item in body.objects("adapters", most=len(names)):
            id = item.integer("id", 0, len(names) - 1)
            if id is None:
                raise ApiError(400, "an adapter's id is missing", param="id")
            new[names[id]] = item.number("scale", -LIMITS.scale, LIMITS.scale, default=1.0) or 0.0
        self._service.scales.update(new)
        return JSONResponse({"success": True})


def _piece(piece: bytes) -> Any:
    """A text, or the bytes where they are none."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)
