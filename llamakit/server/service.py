"""What all APIs share: the model under its names, prompts from messages, texts from the slots."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from llamakit.errors import FormatError
from llamakit.formats.base import ModelFile
from llamakit.ggml import FILE_TYPES
from llamakit.inference.config import GenerateConfig
from llamakit.inference.continuation import Done, Token
from llamakit.inference.conversation import Message, fold_system
from llamakit.inference.slots import Failed, Report, Slots, Started, Task, Ticket
from llamakit.server.config import LIMITS, ServeConfig
from llamakit.server.fields import ApiError, Body, api_error
from llamakit.server.http import Record
from llamakit.server.metrics import Metrics
from llamakit.tokenizer import Tokenizer
from llamakit.tokenizer.chat import Renderer, encode_rendered, render_chats

_T = TypeVar("_T")
#: a client that finds the queue full is asked to come back after so many seconds
_RETRY_S = 1
_BASE = "base"


@dataclass(kw_only=True)
class Service:
    """A model that serves. names: the model's, the first of them shown; scales: of the adapters, by name, where a
    request does not say otherwise. version: of llamakit. sampling: what a request's own fields change."""

    slots: Slots
    tokenizer: Tokenizer
    file: ModelFile
    config: ServeConfig
    names: tuple[str, ...]
    scales: dict[str, float]
    version: str
    sampling: GenerateConfig = field(default_factory=GenerateConfig)

    def __post_init__(self) -> None:
        self.started = time.time()
        self.metrics = Metrics(self.slots)
        self._renderer = Renderer()
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="llamakit-prepare")
        self._driver = threading.Thread(target=self.slots.run, name="llamakit-slots", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._outbox: deque[tuple[Running, int, Report]] = deque()
        self._is_scheduled = False
        self._n_preparing = 0

    def start(self) -> None:
        """Begin to compute; in the event loop that will answer."""
        self._loop = asyncio.get_running_loop()
        self._driver.start()

    def stop(self) -> None:
        """End everything, and wait for the step that is being computed."""
        self.slots.close()
        if self._driver.is_alive():
            self._driver.join(timeout=30)
        self._pool.shutdown(cancel_futures=True)
        self._renderer.close()

    @property
    def n_weights(self) -> int:
        """Of the model, those of its tables included."""
        return sum(info.n_elements for info in self.file.tensors.values())

    @property
    def file_type(self) -> str:
        """llama.cpp's name for the types of the file, empty where it does not say."""
        number = self.file.metadata.get("general.file_type")
        return FILE_TYPES.get(number, "") if isinstance(number, int) else ""

    @property
    def model_names(self) -> list[str]:
        """Every name that a request may have: the model as it is served, without adapters, and with one of them."""
        variants = [f"{self.names[0]}:{variant}" for variant in (_BASE, *self.scales)] if self.scales else []
        return [*self.names, *variants]

    def model(self, name: str) -> dict[str, float]:
        """The scales of the adapters that a model's name means. Raises ApiError for a name that there is not."""
        plain = name.removesuffix(":latest")
        if not plain or plain in self.names:
            return dict(self.scales)
        head, _, variant = plain.rpartition(":")
        if head in self.names and self.scales and variant == _BASE:
            return {}
        if head in self.names and variant in self.scales:
            return {variant: self.scales[variant] or 1.0}
        known = ", ".join(self.model_names)
        raise ApiError(404, f"model {name[:100]!r} not found (known: {known})", param="model", code="model_not_found")

    def adapters(self, body: Body) -> dict[str, float]:
        """What `lora` of a body names, [{"name" or "id", "scale"}], or else what `model` means."""
        if "lora" not in body:
            return self.model(body.text("model"))
        self.model(body.text("model"))
        names = list(self.scales)
        scales: dict[str, float] = {}
        for item in body.objects("lora", most=len(names)):
            if "name" in item:
                name = item.needed_text("name")
            else:
                name = names[item.integer("id", 0, len(names) - 1, default=0) or 0]
            if name not in self.scales:
                item.refuse("name", f"one of {', '.join(names)}")
            scales[name] = item.number("scale", -LIMITS.scale, LIMITS.scale, default=1.0) or 0.0
        return scales

    async def in_thread(self, work: Callable[[], _T]) -> _T:
        """Do what takes a while without keeping others waiting."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def rendered(self, messages: Sequence[Message]) -> str:
        """The prompt for messages, by the model's template; a system message that it does not take goes into the first
        user's. Raises ApiError where there is no template, or where it refuses them."""
        if not self.tokenizer.chat_template:
            raise ApiError(400, "this model has no chat template (the server's --chat-template NAME sets one)")
        plain = list(messages)
        if plain[0]["role"] != "system" or len(plain) == 1:
            return _text(render_chats(self.tokenizer, [(plain, True)], renderer=self._renderer)[0])
        folded = fold_system(plain)
        both = render_chats(self.tokenizer, [(plain, True), (folded, True)], renderer=self._renderer)
        if isinstance(both[0], str) and plain[0]["content"].strip() in both[0]:
            return both[0]
        return _text(both[1] if isinstance(both[1], str) else both[0])

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """`rendered`, as ids."""
        return encode_rendered(self.tokenizer, self.rendered(messages))

    async def begin(
        self, make: Callable[[], Sequence[tuple[str | Sequence[int], GenerateConfig]]], body: Body, user: str,
        record: Record,
    ) -> Running:  # fmt: skip
        """Put prompts in the queue. make: gives them with what each asks for; it may take a while.

        Raises ApiError for a model or an adapter that there is not, 503 where the queue is full; what `make` and
        `Slots.prepare` raise.
        """
        adapters = self.adapters(body)
        record.model = body.text("model") or self.names[0]

        def prepare() -> list[Task]:
            return [
                self.slots.prepare(prompt, config, adapters=adapters, user=user, timeout_s=self.config.timeout)
                for prompt, config in make()
            ]

        # A crowd is sent away before its prompts are read, not after.
        if self._n_preparing >= self.slots.n_slots + self.config.queue:
            raise _queue_is_full()
        self._n_preparing += 1
        try:
            running = Running(self, await self.in_thread(prepare), record)
        finally:
            self._n_preparing -= 1
        running.submit()
        return running

    def deliver(self, running: Running, index: int, report: Report) -> None:
        """Bring a report of the driving thread to the event loop: all of a step with one call."""
        self._outbox.append((running, index, report))
        if not self._is_scheduled and self._loop is not None and not self._loop.is_closed():
            self._is_scheduled = True
            self._loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        self._is_scheduled = False
        while self._outbox:
            running, index, report = self._outbox.popleft()
            running.reports.put_nowait((index, report))


class Running:
    """The texts of one request on their way."""

    def __init__(self, service: Service, tasks: Sequence[Task], record: Record) -> None:
        self.reports: asyncio.Queue[tuple[int, Report]] = asyncio.Queue()
        self.tasks = tasks
        self._service, self._record, self._tickets = service, record, list[Ticket]()
        self._submitted = time.monotonic()

    def submit(self) -> None:
        """All of them or none. Raises ApiError where the queue is full."""
        for index, task in enumerate(self.tasks):
            ticket = self._service.slots.submit(task, _deliverer(self._service, self, index))
            if ticket is None:
                self.cancel()
                raise _queue_is_full()
            self._tickets.append(ticket)

    def cancel(self) -> None:
        """Free the slots."""
        for ticket in self._tickets:
            self._service.slots.cancel(ticket)

    async def texts(self) -> AsyncGenerator[tuple[int, Token | Done], None]:
        """(number of the text, its next token or its end), until all have ended. Whoever stops taking them frees the
        slots. Raises ApiError for the first that fails."""
        left = len(self.tasks)
        try:
            while left:
                index, report = await self.reports.get()
                if isinstance(report, Failed):
                    raise _failure(report)
                if isinstance(report, Started):
                    self._note_start(report)
                    continue
                if isinstance(report, Done):
                    left -= 1
                    self._record.reasons.append(report.reason)
                else:
                    self._note_token()
                yield index, report
        finally:
            self.cancel()

    def _note_start(self, report: Started) -> None:
        self._record.n_prompt += report.n_prompt
        self._record.n_cached += report.n_cached
        self._record.waited_s = max(self._record.waited_s, report.waited_s)

    def _note_token(self) -> None:
        self._record.n_generated += 1
        if self._record.first_token_s is None:
            self._record.first_token_s = time.monotonic() - self._submitted


def _queue_is_full() -> ApiError:
    headers = {"retry-after": str(_RETRY_S)}
    message = "all slots are busy and the queue is full; come back later"
    return ApiError(503, message, type="unavailable_error", code="queue_full", headers=headers)


def _deliverer(service: Service, running: Running, index: int) -> Callable[[Report], None]:
    return lambda report: service.deliver(running, index, report)


def _failure(report: Failed) -> ApiError:
    if report.cause == "timeout":
        return ApiError(504, report.error.reason, type="timeout_error", code="timeout")
    if report.cause == "closed":
        return ApiError(503, report.error.reason, type="unavailable_error", code="shutting_down")
    return api_error(report.error)


def _text(answer: str | FormatError) -> str:
    if isinstance(answer, FormatError):
        raise ApiError(400, f"the messages do not fit the model's template: {answer.reason}", param="messages")
    return answer


def messages_of(body: Body) -> list[Message]:
    """The messages of a chat, their contents as text. Raises ApiError for what is none, images and the like."""
    found: list[Message] = []
    for item in body.objects("messages", LIMITS.messages):
        role = item.needed_text("role")
        role = "system" if role == "developer" else role
        if role not in ("system", "user", "assistant", "tool"):
            item.refuse("role", "system, developer, user, assistant or tool")
        if item.get("tool_calls") or item.get("function_call"):
            raise ApiError(400, "tool calls are not supported", param="messages")
        if item.get("images"):
            raise ApiError(400, "images are not supported: the model reads text alone", param="messages")
        found.append({"role": role, "content": _content(item)})
    if not found:
        raise ApiError(400, "messages is missing or empty (expected a list of role and content)", param="messages")
    return found


def _content(item: Body) -> str:
    """A text, or OpenAI's list of parts, which must all be texts."""
    if not isinstance(item.get("content"), list):
        return item.text("content")
    texts = []
    for part in item.objects("content", LIMITS.messages):
        if part.text("type", "text") not in ("text", "input_text", "refusal"):
            part.refuse("type", "text: the model reads text alone")
        texts.append(part.text("text"))
    return "".join(texts)


def refuse_unsupported(body: Body, names: Mapping[str, str]) -> None:
    """Raise ApiError for a field that changes the answer and is not understood. names: field -> what it is."""
    for name, what in names.items():
        if body.get(name):
            raise ApiError(400, f"{what} are not supported", param=name, code="unsupported_parameter")


def seeded(config: GenerateConfig, number: int) -> GenerateConfig:
    """The configuration of the number-th text of a request: seeds count up."""
    return config if config.seed < 0 else replace(config, seed=(config.seed + number) % 2**32)


def timings_of(done: Done, n_prompt: int) -> dict[str, Any]:
    """What llama-server says of a text's time, in milliseconds and tokens per second. n_prompt: with those in cache."""
    prompt_ms, predicted_ms = 1000 * done.prefill_s, 1000 * done.decode_s
    return {
        "cache_n": n_prompt - done.n_prompt,
        "prompt_n": done.n_prompt,
        "prompt_ms": round(prompt_ms, 3),
        "prompt_per_token_ms": round(prompt_ms / max(1, done.n_prompt), 3),
        "prompt_per_second": round(done.prefill_tok_per_s, 3),
        "predicted_n": done.n_generated,
        "predicted_ms": round(predicted_ms, 3),
        "predicted_per_token_ms": round(predicted_ms / max(1, done.n_decoded), 3),
        "predicted_per_second": round(done.decode_tok_per_s, 3),
        "seed": done.seed,
    }


def entry(tokenizer: Tokenizer, id: int, logprob: float | None) -> dict[str, Any]:
    """A token and its log-probability, as OpenAI and Ollama write them."""
    piece = tokenizer.piece(id, special=True)
    return {"token": piece.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(piece)}


def logprob_entries(tokenizer: Tokenizer, tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """OpenAI's entries of `logprobs.content`."""
    return [
        entry(tokenizer, token.id, token.logprob)
        | {"top_logprobs": [entry(tokenizer, id, logprob) for id, logprob in token.top]}
        for token in tokens
    ]
