"""Many prompts at once over one engine: who gets a slot, what that holds already, what a step computes.

One thread drives it (`run`, or `step` after step); any thread prepares, submits and cancels. A step computes one token
of every text that is being written, and a share of each prompt that is still being read, so that nobody waits for
somebody else's long prompt. In native code a text is to the last bit what it would be alone; torch rounds otherwise
when more is computed at once.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llamakit.errors import LlamakitError, UsageError
from llamakit.formats.adapter import Adapter
from llamakit.inference.completion import checked_prompt, new_sampler
from llamakit.inference.config import GenerateConfig
from llamakit.inference.continuation import Continuation, Done, Token
from llamakit.inference.engine import Context, Engine, Logits
from llamakit.inference.grammar import check_grammar
from llamakit.inference.sampling import Sampler
from llamakit.inference.waiting import FairQueue
from llamakit.tokenizer import Tokenizer

#: adapters by name, each with its scale, none of them 0; the order does not matter
Scales = tuple[tuple[str, float], ...]

#: a step should take no longer, so that a cancelled text frees its slot at once and nobody's text stands still
_STEP_S = 0.1
#: prompt tokens of a step: at first, at least, at most
_FIRST_SHARE, _LEAST_SHARE, _MOST_SHARE = 64, 16, 256
#: how long the texts of one set of adapters are written before it is another set's turn
_TURN_S = 0.1
#: so many tokens in common are worth a copy, or to wait until they are computed
_WORTH_A_COPY = 32


@dataclass(frozen=True)
class Started:
    """The first report: the prompt has a slot. n_cached: of its n_prompt tokens, those that need not be computed."""

    n_prompt: int
    n_cached: int
    waited_s: float


@dataclass(frozen=True)
class Failed:
    """The last report of a text that comes to no end: an error of its own, its time is over, or all is closed."""

    cause: Literal["error", "timeout", "closed"]
    error: LlamakitError


Report = Started | Token | Done | Failed


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A prompt that can be submitted, once. Made by `Slots.prepare`."""

    ids: list[int]
    config: GenerateConfig
    adapters: Scales
    user: str
    timeout_s: float | None
    sampler: Sampler


class Ticket:
    """A prompt that was submitted: what `Slots.cancel` takes."""

    def __init__(self, task: Task, deliver: Callable[[Report], None]) -> None:
        self.task, self.deliver = task, deliver
        self.submitted = time.monotonic()
        self.is_cancelled = False

    @property
    def is_late(self) -> bool:
        """Whether its time is over."""
        return self.task.timeout_s is not None and time.monotonic() - self.submitted > self.task.timeout_s


@dataclass
class Totals:
    """What was computed since the start; only the driving thread changes it."""

    n_prompt: int = 0
    n_cached: int = 0
    n_generated: int = 0
    n_steps: int = 0
    n_cancelled: int = 0
    step_s: float = 0.0


@dataclass(frozen=True)
class SlotState:
    """What a slot does: tokens of its prompt, and of its text so far; 0 where it is free."""

    is_running: bool
    n_prompt: int = 0
    n_generated: int = 0


class _Slot:
    """A context, and what it holds: the first n_past of `ids`, computed with the adapters `scales`."""

    def __init__(self, context: Context) -> None:
        self.context, self.ids, self.scales = context, list[int](), Scales()
        self.ticket: Ticket | None = None
        self.continuation: Continuation | None = None
        self.released = 0

    @property
    def held(self) -> list[int]:
        return self.ids[: self.context.n_past]

    @property
    def running(self) -> Continuation:
        assert self.continuation is not None, "the slot is free"
        return self.continuation


class Slots:
    """n_slots contexts of n_ctx tokens each. adapters: those that a task may name."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        n_slots: int,
        n_ctx: int,
        max_waiting: int,
        adapters: Mapping[str, Adapter] | None = None,
    ) -> None:
        self.n_ctx, self.adapters = n_ctx, dict(adapters or {})
        self.totals = Totals()
        self._engine, self._tokenizer, self._max_waiting = engine, tokenizer, max_waiting
        self._slots = [_Slot(engine.context(n_ctx)) for _ in range(n_slots)]
        self._waiting: FairQueue[Ticket] = FairQueue()
        self._changed = threading.Condition()
        self._is_closed = False
        self._scales: Scales | None = None  # of what the engine has on; None: whatever it came with
        self._turn_ends, self._turns = 0.0, dict[Scales, int]()
        self._s_per_token = 0.0

    @property
    def n_slots(self) -> int:
        """How many texts are written at once."""
        return len(self._slots)

    @property
    def n_running(self) -> int:
        """Slots in use."""
        return sum(slot.ticket is not None for slot in self._slots)

    @property
    def n_waiting(self) -> int:
        """Prompts that wait for a slot."""
        return len(self._waiting)

    @property
    def n_ctx_used(self) -> int:
        """Tokens that the slots in use hold."""
        return sum(slot.context.n_past for slot in self._slots if slot.ticket is not None)

    def states(self) -> list[SlotState]:
        """What every slot does at this moment, in order."""
        running = [slot.continuation for slot in self._slots]
        return [SlotState(False) if c is None else SlotState(True, len(c.prompt), c.n_generated) for c in running]

    def prepare(
        self,
        prompt: str | Sequence[int],
        config: GenerateConfig,
        *,
        adapters: Mapping[str, float] | None = None,
        user: str = "",
        timeout_s: float | None = None,
    ) -> Task:
        """Check a prompt and what it asks for. It may take a while (long texts, grammars), and needs no certain thread.

        Raises UsageError for a prompt that is longer than n_ctx or for an adapter that there is not, and what
        `grammar.check_grammar` and the sampler raise.
        """
        config = replace(config, ctx=self.n_ctx, context_shift=False)
        unknown = next((name for name in adapters or {} if name not in self.adapters), None)
        if unknown is not None:
            raise UsageError(f"there is no adapter {unknown!r}", hint=f"known: {', '.join(self.adapters) or 'none'}")
        check_grammar(config, name="the grammar" if config.grammar else "the schema")
        ids = checked_prompt(self._engine, self._tokenizer, prompt, config)
        return Task(
            ids=ids, config=config, sampler=new_sampler(self._tokenizer, ids, config), user=user, timeout_s=timeout_s,
            adapters=tuple(sorted((name, float(scale)) for name, scale in (adapters or {}).items() if scale)),
        )  # fmt: skip

    def submit(self, task: Task, deliver: Callable[[Report], None]) -> Ticket | None:
        """Put a task in the queue; None where that is full or closed.

        deliver gets Started, each Token, and Done or Failed, on the driving thread; nothing once it is cancelled. It
        must neither raise nor block.
        """
        with self._changed:
            if self._is_closed or len(self._waiting) >= self._max_waiting + self.n_slots - self.n_running:
                return None
            ticket = Ticket(task, deliver)
            self._waiting.add(task.user, ticket)
            self._changed.notify()
            return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Stop a text, and free its slot after the step that is being computed. Nothing happens where it has ended."""
        with self._changed:
            ticket.is_cancelled = True
            self._waiting.remove(ticket.task.user, ticket)
            self._changed.notify()

    def close(self) -> None:
        """Take nothing more, and end everything with Failed; `run` then returns."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def run(self) -> None:
        """Step while there is work, wait where there is none, until `close`."""
        while True:
            if self.step():
                continue
            with self._changed:
                while not self._waiting and not self._is_closed:
                    self._changed.wait()
                if self._is_closed and not self._waiting:
                    return

    def step(self) -> bool:
        """One forward pass for those whose turn it is, and what comes of it; False where there is nothing to do."""
        self._drop()
        self._admit()
        busy = [slot for slot in self._slots if slot.ticket is not None]
        if not busy:
            return False
        group = self._group(busy)
        try:
            self._put_on(group[0].scales)
            self._compute(self._shares(group))
        except Exception as error:  # one mistake must not end the service: it ends what it happened to
            for slot in group:
                if slot.ticket is not None:
                    slot.context.truncate(0)
                    self._fail(slot, "error", _as_ours(error))
        return True

    def _drop(self) -> None:
        """What was cancelled, what is late; everything once it is closed."""
        with self._changed:
            late = [ticket for ticket in self._waiting if ticket.is_late or self._is_closed]
            for ticket in late:
                self._waiting.remove(ticket.task.user, ticket)
        for ticket in late:
            ticket.deliver(self._ended(ticket))
        for slot in self._slots:
            ticket = slot.ticket
            if ticket is not None and ticket.is_cancelled:
                self.totals.n_cancelled += 1
                self._release(slot)
            elif ticket is not None and (ticket.is_late or self._is_closed):
                ticket.deliver(self._ended(ticket))
                self._release(slot)

    def _ended(self, ticket: Ticket) -> Failed:
        if ticket.is_late:
            return Failed("timeout", LlamakitError(f"not done after {ticket.task.timeout_s:g} s, waiting included"))
        return Failed("closed", LlamakitError("the server is shutting down"))

    def _admit(self) -> None:
        """Give free slots to those who wait."""
        while True:
            free = [slot for slot in self._slots if slot.ticket is None]
            ticket = self._next() if free else None
            if ticket is None:
                return
            slot, n_cached = self._place(free, ticket.task)
            slot.ticket = ticket
            self._start(slot, ticket, n_cached)

    def _next(self) -> Ticket | None:
        """Whose turn it is, taken out of the queue."""
        running = Counter(slot.ticket.task.user for slot in self._slots if slot.ticket is not None)
        with self._changed:
            claims = (ticket for _, ticket in self._waiting.in_order(running))
            ticket = next((ticket for ticket in claims if not self._comes_soon(ticket.task)), None)
            if ticket is not None:
                self._waiting.remove(ticket.task.user, ticket)
        return ticket

    def _comes_soon(self, task: Task) -> bool:
        """Whether another prompt is being read that begins alike: its keys and values can then be copied."""
        for slot in self._slots:
            if slot.continuation is not None and len(slot.continuation.pending) > 1 and slot.scales == task.adapters:
                n = n_common(slot.ids, task.ids)
                if n >= slot.context.n_past + _WORTH_A_COPY:
                    return True
        return False

    def _place(self, free: Sequence[_Slot], task: Task) -> tuple[_Slot, int]:
        """The slot for a task, and how many of its tokens that holds: its context has no others.

        One that holds the beginning of the prompt goes on with it, unless most of what it holds would be lost: then
        the beginning is copied to the one that was free for longest.
        """
        most, best = 0, free[0]
        for slot in self._slots:
            n = n_common(slot.held, task.ids) if slot.scales == task.adapters else 0
            if n > most:
                most, best = n, slot
        oldest = min(free, key=lambda slot: slot.released)
        if most and best in free and (best is oldest or 2 * most >= best.context.n_past):
            oldest = best
        elif most >= _WORTH_A_COPY:
            oldest.context.copy(best.context, most)
        else:
            most = 0
        most = min(most, len(task.ids) - 1)  # the last token is computed: its logits are wanted
        oldest.context.truncate(most)
        oldest.ids, oldest.scales = list(task.ids), task.adapters
        return oldest, most

    def _start(self, slot: _Slot, ticket: Ticket, n_cached: int) -> None:
        task = ticket.task
        try:
            slot.continuation = Continuation(self._tokenizer, slot.context, task.ids, task.config, task.sampler)
        except Exception as error:  # as in step
            self._fail(slot, "error", _as_ours(error))
            return
        self.totals.n_prompt += len(task.ids)
        self.totals.n_cached += n_cached
        ticket.deliver(Started(len(task.ids), n_cached, time.monotonic() - ticket.submitted))
        if slot.running.reason is not None:  # nothing is to be generated
            ticket.deliver(slot.running.done())
            self._release(slot)

    def _group(self, busy: Sequence[_Slot]) -> list[_Slot]:
        """The slots of one set of adapters: that which is on while its turn lasts, else that which waited longest."""
        known = {slot.scales for slot in busy}
        now = time.monotonic()
        if self._scales not in known or (len(known) > 1 and now >= self._turn_ends):
            self._turns = {scales: turn for scales, turn in self._turns.items() if scales in known}
            chosen = min(sorted(known), key=lambda scales: self._turns.get(scales, -1))
            self._turn_ends = now + _TURN_S
        else:
            chosen = self._scales
        assert chosen is not None, "one of those that are there"
        self._turns[chosen] = self.totals.n_steps
        return [slot for slot in busy if slot.scales == chosen]

    def _put_on(self, scales: Scales) -> None:
        if scales != self._scales:
            self._scales = None
            self._engine.set_adapters([(self.adapters[name], scale) for name, scale in scales])
            self._scales = scales

    def _shares(self, group: Sequence[_Slot]) -> list[tuple[_Slot, int]]:
        """How many of its pending tokens each slot has computed in a step: short prompts first, in equal shares."""
        writing = [slot for slot in group if len(slot.running.pending) == 1]
        reading = sorted(
            (slot for slot in group if len(slot.running.pending) > 1), key=lambda slot: len(slot.running.pending)
        )
        shares = [(slot, 1) for slot in writing]
        left = max(self._room() - len(writing), len(reading) * _LEAST_SHARE)
        for i, slot in enumerate(reading):
            share = min(len(slot.running.pending), left // (len(reading) - i))
            shares.append((slot, share))
            left -= share
        return shares

    def _room(self) -> int:
        """Tokens that a step may compute."""
        if not self._s_per_token:
            return _FIRST_SHARE
        return max(_LEAST_SHARE, min(_MOST_SHARE, int(_STEP_S / self._s_per_token)))

    def _compute(self, shares: Sequence[tuple[_Slot, int]]) -> None:
        started = time.perf_counter()
        batch = self._engine.feed_batch([(slot.context, slot.running.pending[:n]) for slot, n in shares])
        step_s = time.perf_counter() - started
        n_tokens = sum(n for _, n in shares)
        if n_tokens >= _LEAST_SHARE and len(shares) < n_tokens:
            self._s_per_token = step_s / n_tokens  # the last is the best guess
        self.totals.n_steps += 1
        self.totals.step_s += step_s
        for (slot, n), logits in zip(shares, batch, strict=True):
            running = slot.running
            running.pending = running.pending[n:]
            if slot.context.n_past <= len(running.prompt):
                running.prefill_s += step_s
            else:
                running.decode_s += step_s
            if not running.pending:
                self._take(slot, logits)

    def _take(self, slot: _Slot, logits: Logits) -> None:
        """The next token of a slot."""
        ticket, running = slot.ticket, slot.running
        assert ticket is not None, "it is running"
        if ticket.is_cancelled:
            return
        started = time.perf_counter()
        try:
            token = running.take(logits)
        except Exception as error:  # as in step, but only this text is at fault
            self._fail(slot, "error", _as_ours(error))
            return
        running.decode_s += time.perf_counter() - started
        if token is not None:
            slot.ids.append(token.id)
            self.totals.n_generated += 1
            ticket.deliver(token)
        if running.reason is not None:
            ticket.deliver(running.done())
            self._release(slot)

    def _fail(self, slot: _Slot, cause: Literal["error", "timeout", "closed"], error: LlamakitError) -> None:
        if slot.ticket is not None and not slot.ticket.is_cancelled:
            slot.ticket.deliver(Failed(cause, error))
        self._release(slot)

    def _release(self, slot: _Slot) -> None:
        slot.ids = slot.held
        slot.ticket = slot.continuation = None
        slot.released = self.totals.n_steps + 1


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    n, at, width = min(len(a), len(b)), 0, 256
    while at < n and a[at : at + width] == b[at : at + width]:
        at += width
    return next((i for i in range(at, min(at + width, n)) if a[i] != b[i]), min(at + width, n)) if at < n else n


def _as_ours(error: Exception) -> LlamakitError:
    """An error of ours as it is, another one in one line."""
    if isinstance(error, LlamakitError):
        return error
    return LlamakitError(f"internal error: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
