"""llama2.c's run.c: its two loops, step for step, over any engine and vocabulary. Its sampler: llama2c_rng.py.

Its own models give its own text: the same tokens are fed, in the same order and with the same random numbers. A
vocabulary other than llama2.c's ends where its own end tokens say so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, starmap, takewhile

import numpy as np

from llamakit.errors import LlamakitError, UsageError
from llamakit.formats.llama2c_vocab import EOS
from llamakit.inference.engine import Context, Engine
from llamakit.inference.llama2c_rng import Xorshift, sample
from llamakit.inference.samplers import Logits
from llamakit.tokenizer import Tokenizer
from llamakit.tokenizer.llama2c import Llama2cTokenizer

_INT32, _MASK = 1 << 31, 2**64 - 1
_TEMPLATE, _SYSTEM = "[INST] {user} [/INST]", "<<SYS>>\n{system}\n<</SYS>>\n\n{user}"
#: run.c's questions
ASK_SYSTEM, ASK_USER, ANSWER = "Enter system prompt (optional): ", "User: ", "Assistant: "


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """run.c's settings. What it cannot use it replaces, and so is it here: see `settled`."""

    temperature: float = 1.0
    """0 takes the likeliest token; less than 0 is 0."""
    top_p: float = 0.9
    """0 and 1 are off; outside of them it is 0.9."""
    steps: int = 256
    """Tokens in the context at most; 0, less, and more than it holds is as many as it holds."""
    seed: int = 0
    """0 is the time in seconds."""

    def settled(self, n_ctx: int) -> RunConfig:
        """In the numbers that run.c computes with: float32, an int as the seed of 64 bits, steps that fit."""
        with np.errstate(over="ignore"):
            temperature, top_p = (float(np.float32(value)) for value in (self.temperature, self.top_p))
        seed = (self.seed + _INT32) % (2 * _INT32) - _INT32
        return RunConfig(
            temperature=max(0.0, temperature),
            top_p=top_p if 0 <= top_p <= 1 else float(np.float32(0.9)),
            steps=self.steps if 0 < self.steps <= n_ctx else n_ctx,
            seed=(seed or int(time.time())) & _MASK,
        )


class Speed:
    """Tokens a second, from the end of the first step, which may be slower than the others."""

    def __init__(self) -> None:
        self.n_steps = 0
        self._started = self._ended = 0.0

    def count(self, n_steps: int) -> None:
        """So many steps more are done."""
        self._ended = time.perf_counter()
        self._started = self._started or self._ended
        self.n_steps += n_steps

    @property
    def tok_per_s(self) -> float:
        """Steps a second, without the first."""
        return (self.n_steps - 1) / max(self._ended - self._started, 1e-9)


def complete(engine: Engine, tokenizer: Tokenizer, prompt: str, config: RunConfig, speed: Speed) -> Iterator[bytes]:
    """What run.c prints for a prompt, piece by piece, the prompt's own first. Ends at BOS (and where another
    vocabulary has an end), or when config.steps tokens are in the context.

    speed: counts the steps. Raises UsageError for nothing to start from, LlamakitError for logits that are not finite.
    """
    settled = config.settled(engine.config.n_ctx)
    draw, text = _Draw(settled), _Text(tokenizer)
    ids, stops = text.encode(prompt), tokenizer.eog_ids | {tokenizer.bos_id}
    context = engine.context(settled.steps)
    # What the prompt forces is known before it is computed; it may be longer than all the steps.
    forced = list(takewhile(lambda id: id not in stops, ids[1 : settled.steps + 1]))
    if ids[0] != tokenizer.bos_id:  # a vocabulary whose texts begin without one
        yield text.piece(None, ids[0])
    yield from starmap(text.piece, pairwise([ids[0], *forced]))
    if len(forced) < min(len(ids) - 1, settled.steps):
        return  # the prompt itself holds an end
    logits = _prefill(engine, context, ids[: settled.steps], speed)
    token = ids[len(forced)]
    for i in range(settled.steps - len(forced)):
        if i:
            logits = engine.feed(context, [token])
            speed.count(1)
        following = draw(logits)
        if following in stops:
            return
        yield text.piece(token, following)
        token = following


def chat(
    engine: Engine,
    tokenizer: Tokenizer,
    config: RunConfig,
    *,
    user: str | None,
    system: str | None,
    ask: Callable[[str], str | None],
) -> Iterator[bytes]:
    """run.c's chat in Llama 2's format, piece by piece, until config.steps tokens are in the context.

    user, system: the first message and the system prompt, None where they are asked for. ask: shows a question and
    gives the answer, None at the end of the input: then the last message is said again, as run.c does. Every token of
    a message draws a random number, and each answer ends at EOS. Raises as `complete` does.
    """
    settled = config.settled(engine.config.n_ctx)
    draw, text = _Draw(settled), _Text(tokenizer)
    context = engine.context(settled.steps)
    ends = {EOS} if text.is_llama2c else tokenizer.eog_ids
    ids, at, following, is_users_turn = [], 0, EOS, True
    for position in range(settled.steps):
        if is_users_turn:
            if position == 0 and system is None:
                system = ask(ASK_SYSTEM)
            if position > 0 or user is None:
                said = ask(ASK_USER)
                user = (user or "") if said is None else said
            message = _SYSTEM.format(system=system, user=user) if position == 0 and system else user
            ids, at, is_users_turn = text.encode(_TEMPLATE.format(user=message)), 0, False
            yield ANSWER.encode()
        token = ids[at] if at < len(ids) else following
        at += 1
        is_users_turn = token in ends
        following = draw(engine.feed(context, [token]))
        if following in ends:
            yield b"\n"
        elif at >= len(ids):
            yield text.piece(token, following)
    yield b"\n"


def _prefill(engine: Engine, context: Context, ids: Sequence[int], speed: Speed) -> Logits:
    """Feed a prompt: its first token alone, so that the time of the others can be told."""
    logits = engine.feed(context, ids[:1])
    speed.count(1)
    if len(ids) > 1:
        logits = engine.feed(context, ids[1:])
        speed.count(len(ids) - 1)
    return logits


class _Draw:
    """run.c's sampler and its state."""

    def __init__(self, settled: RunConfig) -> None:
        self._config, self._random = settled, Xorshift(settled.seed)

    def __call__(self, logits: Logits) -> int:
        if not np.isfinite(logits).all():
            raise LlamakitError("the model computed a logit that is no finite number", hint="its weights are damaged")
        return sample(logits, self._config.temperature, self._config.top_p, self._random)


class _Text:
    """Text to ids and ids to what is printed of them, by the rules of run.c as far as the vocabulary has them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.is_llama2c = isinstance(tokenizer, Llama2cTokenizer)
        self._spaced = self.is_llama2c or tokenizer.vocabulary.add_space_prefix

    def encode(self, text: str) -> list[int]:
        """BOS and the text, in which no special token is looked for; without BOS where the vocabulary wants none and
        there is a text. Raises UsageError for an empty one without BOS."""
        ids = self._tokenizer.encode(text, parse_special=False)
        if not ids and self._tokenizer.bos_id is None:
            raise UsageError("the prompt is empty, and this model has no BOS token to start from", hint="give one: -i")
        return ids or [self._tokenizer.bos_id or 0]

    def piece(self, previous: int | None, id: int) -> bytes:
        """What a token adds: without the space that encoding put first, and nothing for a lone byte that does not
        print. Of characters in bytes, run.c prints none; they are kept for another vocabulary."""
        piece = self._tokenizer.piece(id, special=self.is_llama2c)
        if self._spaced and previous in (None, self._tokenizer.bos_id):
            piece = piece.removeprefix(b" ")
        prints = piece not in _UNPRINTED and (piece not in _UPPER_HALF or not self.is_llama2c)
        return piece if prints else b""


_UNPRINTED = frozenset(bytes([b]) for b in range(128) if not (32 <= b < 127 or 9 <= b < 14))
_UPPER_HALF = frozenset(bytes([b]) for b in range(128, 256))
