"""Questions and answers as training samples: token ids, and which of them a loss is taken on.

A token is trained when it is part of an answer, or is the end token behind it: what the model has to write itself. The
header that the template puts before an answer is what the model is given. Shapes: n tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from llamakit.dataset.chat_records import Problem, Record
from llamakit.dataset.literal import find_literal, literal_answers
from llamakit.dataset.render import Answer, Rendered, render_one, render_records
from llamakit.dataset.schemas import Message
from llamakit.errors import UnsupportedError
from llamakit.tokenizer import Tokenizer
from llamakit.tokenizer.vocabulary import Attr

_PROBE = (Message("user", "Hello?"), Message("assistant", "Hello."))


@dataclass(frozen=True)
class ChatSample:
    """One sample and where it came from.

    tokens: (n,) int32. trained: (n,) bool, whether each token is a target of the loss; never the first one, which
    nothing comes before. whole: a text without answers in it. ended: whether an end token follows every answer that is
    trained. double_bos: a second BOS at the front was taken away. changed: answers that the template wrote in another
    way than they stand in the data; unlike: answers that follow another text here than the one that they are asked
    with; dropped: messages that the template leaves out.
    """

    path: str
    line: int
    schema: str
    tokens: np.ndarray
    trained: np.ndarray
    whole: bool = False
    ended: bool = True
    double_bos: bool = False
    changed: int = 0
    unlike: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Ending:
    """How a template ends an answer: the text behind it, and the end token in there; None where there is none."""

    text: str
    token: int | None


def ending_of(tokenizer: Tokenizer) -> Ending:
    """How the vocabulary's chat template ends answers; ("", None) where a question and an answer cannot be rendered.

    Raises as `render_records` does.
    """
    found = render_one(tokenizer, _PROBE)
    if found is None or not found.answers:
        return Ending("", None)
    rest = found.text[found.answers[-1].end :].rstrip()
    ids = tokenizer.encode(rest, add_special=False)
    return Ending(rest, next((id for id in ids if id in tokenizer.eog_ids), None))


def read_samples(tokenizer: Tokenizer, records: Iterable[Record], train_on: str) -> Iterator[ChatSample | Problem]:
    """The sample of each record, or what is wrong with it; those of texts as their turn comes.

    train_on: "all" tokens, those of the "assistant", or those of the "last" answer. A text whose answers stand between
    the literal marks of a template has a loss on these alone; a text without any on all of it. Raises UnsupportedError
    where messages need a chat template and there is none, FormatError for a template that exceeds its limits.
    """
    ending: Ending | None = None
    for group in _runs(records):
        if not group.messages:
            yield _text_sample(tokenizer, group.record, train_on)
            continue
        if not tokenizer.chat_template:
            raise UnsupportedError(
                "the model has no chat template (tokenizer.chat_template), and the data has messages",
                hint="name the one that it was trained with, or is to learn, such as --chat-template chatml",
            )
        ending = ending or ending_of(tokenizer)
        for record, rendered in render_records(tokenizer, group.messages, train_on):
            if isinstance(rendered, Problem):
                yield rendered
            else:
                yield _sample(tokenizer, record, rendered, train_on, ending.text)


@dataclass(frozen=True)
class _Run:
    record: Record
    messages: Sequence[Record]


def _runs(records: Iterable[Record]) -> Iterator[_Run]:
    """Records with messages in lists of some thousands, texts one by one, in their order."""
    held: list[Record] = []
    for record in records:
        if record.messages:
            held.append(record)
        if held and (not record.messages or len(held) >= 4096):
            yield _Run(held[0], held)
            held = []
        if not record.messages:
            yield _Run(record, ())
    if held:
        yield _Run(held[0], held)


def _text_sample(tokenizer: Tokenizer, record: Record, train_on: str) -> ChatSample | Problem:
    """A text as it stands, with an end token behind it; what literal marks show as answers is told apart."""
    text, answers = record.text, list[Answer]()
    family = find_literal(text)
    if family is not None and train_on != "all":
        spans = literal_answers(text, family)
        if any(not text[begin:end].strip() for begin, end in spans):
            return Problem(record.path, record.line, "empty", f"an answer between its {family.name} marks is empty")
        # Between an answer and its end token only spaces can be: what else follows belongs to the next turn.
        answers = [Answer(begin, end, -1) for begin, end in (spans[-1:] if train_on == "last" else spans)]
    everything = not answers
    if everything and family is not None and train_on != "all":
        return Problem(record.path, record.line, "untrained", f"has {family.name} marks and no answer between them")
    return _sample(tokenizer, record, Rendered(text, tuple(answers)), "all" if everything else train_on, "", whole=True)


def _sample(
    tokenizer: Tokenizer, record: Record, rendered: Rendered, train_on: str, ending: str, *, whole: bool = False
) -> ChatSample | Problem:
    """Tokens and their mask. whole: a text by itself, which an end token follows."""
    text = rendered.text
    bos = "" if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id, special=True).decode("utf-8", "replace")
    try:
        ids, ends = tokenizer.encode_with_ends(text, add_special=not (bos and text.startswith(bos)))
    except UnsupportedError as error:
        return Problem(record.path, record.line, "template", error.reason)
    if whole and tokenizer.eos_id is not None and not (ids and ids[-1] in tokenizer.eog_ids):
        ids, ends = [*ids, tokenizer.eos_id], [*ends, len(text.encode())]
    double = False
    while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_id:
        ids, ends, double = ids[1:], ends[1:], True
    mask, ended = _mask(tokenizer, ids, ends, rendered, ending)
    if train_on == "all":
        mask = np.ones(len(ids), dtype=bool)
    if len(mask):
        mask[0] = False
    if not mask.any():
        return Problem(record.path, record.line, "untrained", "has no token to train on")
    tokens = np.array(ids, dtype=np.int32)
    return ChatSample(
        path=record.path,
        line=record.line,
        schema=record.schema,
        tokens=tokens,
        trained=mask,
        whole=whole and not rendered.answers,
        ended=ended,
        double_bos=double,
        changed=rendered.changed,
        unlike=rendered.unlike,
        dropped=rendered.dropped,
    )


def _mask(
    tokenizer: Tokenizer, ids: Sequence[int], ends: Sequence[int], rendered: Rendered, ending: str
) -> tuple[np.ndarray, bool]:
    """(n,) bool of the answers' tokens, and whether an end token follows each of the answers."""
    mask, ended = np.zeros(len(ids), dtype=bool), True
    finish = np.array(ends, dtype=np.int64)
    start = np.array([0, *ends[:-1]], dtype=np.int64) if ends else finish
    attrs = tokenizer.vocabulary.attrs
    text_token = np.array([not attrs[id] & Attr.CONTROL for id in ids], dtype=bool)
    places = _byte_places(rendered.text, [at for answer in rendered.answers for at in answer[:2]])
    for answer, begin, end in zip(rendered.answers, places[::2], places[1::2], strict=True):
        # A token without bytes is the space that a vocabulary puts behind a special token: the model writes it, too.
        mask |= (start < end) & ((finish > begin) | ((start == begin) & (finish == begin) & text_token))
        reach = len(rendered.text) if answer.reach < 0 else answer.reach
        behind = rendered.text[answer.end : reach]
        if answer.reach < 0:
            n_bytes = end + len(behind[: len(behind) - len(behind.lstrip())].encode())
        else:
            n_bytes = end + len(behind.encode())
        first = int(np.searchsorted(start, end))
        last = _end_token(tokenizer, ids, start, first, n_bytes)
        if last is not None:
            mask[first : last + 1] = True
            continue
        ended = False
        if ending and rendered.text.startswith(ending, answer.end):
            mask |= (start < end + len(ending.encode())) & (finish > end)
    return mask, ended


def _end_token(tokenizer: Tokenizer, ids: Sequence[int], start: np.ndarray, first: int, reach: int) -> int | None:
    """Number of the first end token, from the token `first` on, that begins at byte `reach` at the latest."""
    for number in range(first, len(ids)):
        if start[number] > reach:
            return None
        if ids[number] in tokenizer.eog_ids:
            return number
    return None


def _byte_places(text: str, places: Sequence[int]) -> list[int]:
    """Places in characters, in rising order, as places in UTF-8 bytes."""
    found, at = list[int](), 0
    for before, place in pairwise([0, *places]):
        at += len(text[before:place].encode())
        found.append(at)
    return found
