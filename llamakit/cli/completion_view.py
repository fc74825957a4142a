"""What `generate` says of a continuation: its end, the chain of samplers, log-probabilities, JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llamakit.cli import render
from llamakit.files import escape_control

if TYPE_CHECKING:
    from llamakit.inference.config import GenerateConfig
    from llamakit.inference.continuation import Done, Token
    from llamakit.tokenizer import Tokenizer

_ENDINGS = {"end": "an end token", "length": "-n", "context": "a full context"}


def log_chain(config: GenerateConfig, tokenizer: Tokenizer) -> None:
    """The chain of samplers on stderr, as llama.cpp prints it."""
    from llamakit.inference.sampling import shown_chain

    banned = config.ignore_eos and bool(tokenizer.eog_ids)
    render.log(f"sampler chain: {shown_chain(config, banned=banned)}")


def ending(done: Done) -> str:
    """What a text ended by, in a user's words."""
    return f"the text {done.stop!r}" if done.stop is not None else _ENDINGS[done.reason]


def log_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> None:
    """A line on stderr for each token: its log-probability, it, and the likeliest ones in its place."""
    if not tokens:
        return
    render.log("log-probabilities, and the likeliest tokens:" if tokens[0].top else "log-probabilities:")
    rows = [
        [_cell(tokenizer, token.id, token.logprob), *(_cell(tokenizer, *top) for top in token.top)] for token in tokens
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        own, *others = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        render.log("  ".join([own, "|", *others] if others else [own]).rstrip())


def _cell(tokenizer: Tokenizer, id: int, logprob: float | None) -> str:
    return f'{logprob:9.4f} "{escape_control(_text(tokenizer, id))}"'


def _text(tokenizer: Tokenizer, id: int) -> str:
    return tokenizer.piece(id, special=True).decode("utf-8", "replace")


def continuation_json(
    tokenizer: Tokenizer, tokens: Sequence[Token], text: str, done: Done | None, *, logprobs: bool
) -> dict[str, Any]:
    """What JSON says of a continuation, an interrupted one (done is None) too."""
    value: dict[str, Any] = {
        "text": text,
        "tokens": [token.id for token in tokens],
        "stop_reason": done.reason if done else "interrupted",
    }
    if done and done.stop is not None:
        value["stop"] = done.stop
    if done:
        value["seed"] = done.seed
    if logprobs:
        value["logprobs"] = {"content": list(_entries(tokenizer, tokens))}
    return value


def _entries(tokenizer: Tokenizer, tokens: Sequence[Token]) -> Iterator[dict[str, Any]]:
    """OpenAI's entries of `logprobs.content`, with the id beside them."""
    for token in tokens:
        own = _entry(tokenizer, token.id, token.logprob)
        yield own | {"top_logprobs": [_entry(tokenizer, id, logprob) for id, logprob in token.top]}


def _entry(tokenizer: Tokenizer, id: int, logprob: float | None) -> dict[str, Any]:
    piece = tokenizer.piece(id, special=True)
    return {"id": id, "token": _text(tokenizer, id), "bytes": list(piece), "logprob": logprob}
