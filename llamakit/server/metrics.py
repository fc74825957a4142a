"""Counters of what was served, as Prometheus reads them (text format 0.0.4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llamakit.inference.slots import Slots

if TYPE_CHECKING:
    from llamakit.server.http import Record

#: upper bounds of the histograms, in seconds
_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class _Histogram:
    def __init__(self) -> None:
        self.counts, self.sum, self.n = [0] * len(_BOUNDS), 0.0, 0

    def add(self, value: float) -> None:
        self.sum, self.n = self.sum + value, self.n + 1
        for i, bound in enumerate(_BOUNDS):
            self.counts[i] += value <= bound


class Metrics:
    """What `/metrics` shows. Paths are counted as the routes that they are, so that strangers cannot add lines."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds, self._first_token = _Histogram(), _Histogram()

    def add(self, record: Record, route: str) -> None:
        """Count a request that was answered."""
        self._requests[route, record.status] += 1
        self._seconds.add(record.seconds)
        if record.first_token_s is not None:
            self._first_token.add(record.first_token_s)

    def text(self) -> str:
        """All of them."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        slots, totals = self._slots, self._slots.totals
        yield from _metric("requests_running", "gauge", "Texts that are written", slots.n_running)
        yield from _metric("requests_waiting", "gauge", "Texts that wait for a slot", slots.n_waiting)
        yield from _metric("slots", "gauge", "Texts that can be written at once", slots.n_slots)
        yield from _metric("context_tokens_used", "gauge", "Tokens that the slots in use hold", slots.n_ctx_used)
        yield from _metric("prompt_tokens_total", "counter", "Tokens of all prompts", totals.n_prompt)
        yield from _metric("prompt_tokens_cached_total", "counter", "Those that a slot held already", totals.n_cached)
        yield from _metric("generated_tokens_total", "counter", "Tokens written", totals.n_generated)
        yield from _metric("steps_total", "counter", "Forward passes", totals.n_steps)
        yield from _metric("step_seconds_total", "counter", "Seconds that they took", round(totals.step_s, 6))
        yield from _metric("cancelled_total", "counter", "Texts that nobody waited for any more", totals.n_cancelled)
        yield from _head("http_requests_total", "counter", "Requests answered")
        for (route, status), n in sorted(self._requests.items()):
            yield f'llamakit_http_requests_total{{path="{route}",status="{status}"}} {n}'
        yield from _histogram("request_seconds", "Seconds from a request to its whole answer", self._seconds)
        yield from _histogram("first_token_seconds", "Seconds from a request to its first token", self._first_token)


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP llamakit_{name} {text}."
    yield f"# TYPE llamakit_{name} {kind}"


def _metric(name: str, kind: str, text: str, value: float) -> Iterator[str]:
    yield from _head(name, kind, text)
    yield f"llamakit_{name} {value}"


def _histogram(name: str, text: str, histogram: _Histogram) -> Iterator[str]:
    yield from _head(name, "histogram", text)
    for bound, n in zip(_BOUNDS, histogram.counts, strict=True):
        yield f'llamakit_{name}_bucket{{le="{bound:g}"}} {n}'
    yield f'llamakit_{name}_bucket{{le="+Inf"}} {histogram.n}'
    yield f"llamakit_{name}_sum {round(histogram.sum, 6)}"
    yield f"llamakit_{name}_count {histogram.n}"
