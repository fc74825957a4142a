"""Conversations as the text that a chat template writes, and where in it the answers are, for any Jinja template.

No template is parsed, and none is guessed. It renders the conversation, and once more with a mark on either side of
every message: when the second text without its marks is the first, the marks say where each message went, whatever the
template strips, folds into another turn or leaves out. What the template asks an answer with, the conversation before
it with the generation prompt, settles which spaces before an answer belong to its header. Where the marks change what
the template writes, fewer are tried; where none prove anything, there is no answer but an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llamakit.dataset.chat_records import Problem, Record
from llamakit.dataset.schemas import Message
from llamakit.errors import FormatError
from llamakit.tokenizer import Tokenizer
from llamakit.tokenizer.chat import render_chats

# Conversations that are rendered in one process: few at first, so that a template that never ends is found soon.
_FIRST_BATCH, _LARGEST_BATCH = 8, 512
# So many single conversations that exceed the limits, and it is the template that does.
_MOST_TIMEOUTS = 3
#: planes of Unicode whose characters mean nothing: the first that a conversation does not use gives the marks
_MARKS = (0xF0000, 0x100000)
_MOST_MESSAGES = 30_000

#: (messages, add_generation_prompt), as `render_chats` takes them
_Request = tuple[list[dict[str, str]], bool]


class Answer(NamedTuple):
    """Where an answer is, in characters of the text: begin, the end of its own text, and how far behind it the end
    token that belongs to it may be; -1: nothing but spaces may lie between them."""

    begin: int
    end: int
    reach: int


@dataclass(frozen=True)
class Rendered:
    """A conversation as its template writes it, and the answers in it that were asked for, in their order.

    changed: how many of them the template wrote in another way than they stand in the data (an earlier turn's
    reasoning that it drops, say), spaces at their ends not counted. unlike: how many follow another text than what the
    template asks for them with; a system message that it moves to the last question, say. dropped: how many messages
    of others it does not write at all.
    """

    text: str
    answers: tuple[Answer, ...]
    changed: int = 0
    unlike: int = 0
    dropped: int = 0


def wanted_answers(messages: Sequence[Message], train_on: str) -> list[int]:
    """Numbers of the messages that are learnt from: the assistant's with a weight, or the last of them.

    Of train_on "all" it is the same: what else is learnt from needs no alignment.
    """
    answers = [i for i, message in enumerate(messages) if message.role == "assistant" and message.trained]
    return answers[-1:] if train_on == "last" else answers


def render_records(
    tokenizer: Tokenizer, records: Iterable[Record], train_on: str
) -> Iterator[tuple[Record, Rendered | Problem]]:
    """Every record with messages as its template writes it, or what is wrong with it.

    Raises UnsupportedError where the vocabulary has no template, FormatError for one that exceeds its limits whatever
    it is given.
    """
    timeouts, size, pending = 0, _FIRST_BATCH, list[Record]()
    for record in records:
        pending.append(record)
        if len(pending) >= size:
            timeouts = yield from _batch(tokenizer, pending, train_on, timeouts)
            pending, size = [], min(4 * size, _LARGEST_BATCH)
    yield from _batch(tokenizer, pending, train_on, timeouts)


def _batch(
    tokenizer: Tokenizer, records: list[Record], train_on: str, timeouts: int
) -> Iterator[tuple[Record, Rendered | Problem]]:
    """A few records in one process; when they exceed its limits, each half of them in one of its own."""
    if not records:
        return timeouts
    jobs = [_Job(record.messages, wanted_answers(record.messages, train_on)) for record in records]
    try:
        _ask(tokenizer, jobs)
    except FormatError as error:
        if len(records) > 1:
            middle = len(records) // 2
            timeouts = yield from _batch(tokenizer, records[:middle], train_on, timeouts)
            return (yield from _batch(tokenizer, records[middle:], train_on, timeouts))
        if timeouts + 1 >= _MOST_TIMEOUTS:
            error.path, error.line = records[0].path, records[0].line
            raise
        yield records[0], Problem(records[0].path, records[0].line, "template", error.reason)
        return timeouts + 1
    for record, job in zip(records, jobs, strict=True):
        result = job.result()
        if isinstance(result, str):
            result = Problem(record.path, record.line, "template", result)
        yield record, result
    return timeouts


def render_one(tokenizer: Tokenizer, messages: Sequence[Message]) -> Rendered | None:
    """One conversation with all of its answers; None where the template refuses it or they cannot be found.

    Raises as `render_records` does.
    """
    job = _Job(messages, wanted_answers(messages, "assistant"))
    _ask(tokenizer, [job])
    result = job.result()
    return None if isinstance(result, str) else result


def _ask(tokenizer: Tokenizer, jobs: list[_Job]) -> None:
    """Have the questions of all jobs answered, then the further ones of those that need them."""
    for more in (False, True):
        asked = [(job, job.more() if more else job.first()) for job in jobs if not more or job.needs_more()]
        if asked:
            answers = iter(render_chats(tokenizer, [request for _, requests in asked for request in requests]))
            for job, requests in asked:
                job.answers += [next(answers) for _ in requests]


class _Job:
    """One conversation: what the template is asked about it, and what follows from its answers."""

    def __init__(self, messages: Sequence[Message], wanted: list[int]) -> None:
        self.messages, self.wanted = messages, wanted
        self.answers: list[str | FormatError] = []
        contents = "".join(message.content for message in messages)
        self.base = next((base for base in _MARKS if not any(base <= ord(c) < base + 0xFFFE for c in contents)), 0)

    def first(self) -> list[_Request]:
        """The conversation as it is, marked, and what each answer is asked with."""
        plain = _as_template_takes(self.messages)
        if not self.wanted:
            return [(plain, False)]
        prompts: list[_Request] = [(plain[:i], True) for i in self.wanted]
        return [(plain, False), (self._marked(range(len(self.messages)), "both"), False), *prompts]

    def needs_more(self) -> bool:
        """Whether the marks of all messages proved nothing."""
        return bool(self.wanted) and isinstance(self.answers[0], str) and self._positions(1) is None

    def more(self) -> list[_Request]:
        """Marked at the answers alone, then at their ends alone."""
        return [(self._marked(self.wanted, "both"), False), (self._marked(self.wanted, "end"), False)]

    def _marked(self, numbers: Iterable[int], where: str) -> list[dict[str, str]]:
        """The messages with marks within the spaces at their ends, which a template may strip."""
        messages, chosen = [], set(numbers)
        for i, message in enumerate(self.messages):
            content = message.content
            core = content.strip()
            if i in chosen and core:
                at = content.index(core)
                begin = chr(self.base + 2 * i) if where == "both" else ""
                content = f"{content[:at]}{begin}{core}{chr(self.base + 2 * i + 1)}{content[at + len(core) :]}"
            messages.append(Message(message.role, content))
        return _as_template_takes(messages)

    def _positions(self, number: int) -> dict[int, list[int]] | None:
        """Mark -> where it stands in the plain text; None where the marks changed more than themselves."""
        plain, marked = self.answers[0], self.answers[number]
        if not isinstance(plain, str) or not isinstance(marked, str):
            return None
        found: dict[int, list[int]] = {}
        parts = re.split(f"([{chr(self.base)}-{chr(self.base + 2 * len(self.messages))}])", marked)
        at = 0
        for text, mark in zip(parts[::2], [*parts[1::2], ""], strict=True):
            at += len(text)
            if mark:
                found.setdefault(ord(mark) - self.base, []).append(at)
        return found if "".join(parts[::2]) == plain else None

    def result(self) -> Rendered | str:
        """The text with its answers, or the reason why there is none."""
        text = self.answers[0]
        if not isinstance(text, str):
            return text.reason
        if not self.wanted:
            return Rendered(text, ())
        if not self.base or len(self.messages) > _MOST_MESSAGES:
            return "the answers cannot be marked: it uses every private character, or has too many messages"
        n_prompts = 2 + len(self.wanted)
        tries = (1, *range(n_prompts, len(self.answers)))
        reason = "the chat template writes other things than the messages: where the answers are cannot be proven"
        for number in tries:
            places = self._positions(number)
            if places is not None:
                found = self._located(text, places)
                if isinstance(found, Rendered):
                    return found
                reason = found
        return reason

    def _located(self, text: str, places: dict[int, list[int]]) -> Rendered | str:
        answers, changed, unlike = [], 0, 0
        gaps = self._gaps(text, places)
        for number, i in enumerate(self.wanted):
            ends = places.get(2 * i + 1, [])
            which = f"answer {number + 1} of {len(self.wanted)}"
            if len(ends) != 1:
                return f"the chat template writes {which} {len(ends)} times (expected once)"
            begins, end = places.get(2 * i, []), ends[0]
            core, asked = self.messages[i].content.strip(), self._asked(text, number, end)
            begin = _begin(text, begins, end, asked, core)
            if begin is not None and asked is None and len(gaps) == 1 and text.endswith(min(gaps), 0, begin):
                begin -= len(min(gaps))
            if begin is None or begin >= end:
                return f"where {which} begins in what the chat template writes cannot be proven"
            following = places.get(2 * i + 2, [])
            last = i + 1 == len(self.messages)
            reach = len(text) if last else following[0] if len(following) == 1 and following[0] >= end else -1
            answers.append(Answer(begin, end, reach))
            changed += len(begins) != 1 and text[begin:end].strip() != core
            unlike += asked is None
        # With marks at some messages alone, the others' are not missing.
        marked = {mark // 2 for mark in places}
        others = [i for i, message in enumerate(self.messages) if message.content.strip() and i not in self.wanted]
        dropped = sum(i not in marked for i in others) if marked - set(self.wanted) or not others else 0
        return Rendered(text, tuple(answers), changed, unlike, dropped)

    def _asked(self, text: str, number: int, end: int) -> int | None:
        """How much of the text an answer is asked with; None where it is asked with another."""
        prompt = self.answers[2 + number]
        return len(prompt) if isinstance(prompt, str) and text.startswith(prompt) and len(prompt) <= end else None

    def _gaps(self, text: str, places: dict[int, list[int]]) -> set[str]:
        """The spaces between what an answer is asked with and its own first letter, where nothing but spaces is."""
        gaps = set()
        for number, i in enumerate(self.wanted):
            begins = places.get(2 * i, [])
            asked = self._asked(text, number, len(text))
            if asked is not None and len(begins) == 1 and asked <= begins[0] and not text[asked : begins[0]].strip():
                spaces = self.messages[i].content[
                    : len(self.messages[i].content) - len(self.messages[i].content.lstrip())
                ]
                gaps.add(text[asked : begins[0]].removesuffix(spaces))
        return gaps


def _begin(text: str, marks: list[int], end: int, asked: int | None, core: str) -> int | None:
    """Where an answer begins: behind what the model is asked with, as far as that and the mark agree."""
    if len(marks) == 1:
        # A generation prompt that ends before the header does is no place to begin: the header is the template's.
        if asked is not None and (asked >= marks[0] or not text[asked : marks[0]].strip()):
            return asked
        return marks[0]
    # The mark is gone with what the template drops from the front of an answer: the rest must be the answer's own end.
    if asked is not None and text[asked:end].strip() and core.endswith(text[asked:end].strip()):
        return asked
    return None


def _as_template_takes(messages: Iterable[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]
