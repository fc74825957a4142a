"""One prompt on its way: from logits to the next token, until something ends it. What computes is the caller's affair.

Shapes: V n_vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llamakit.inference.config import GenerateConfig
from llamakit.inference.engine import Context, Logits
from llamakit.inference.sampling import Sampler, likeliest, log_probabilities
from llamakit.inference.stops import Stops
from llamakit.tokenizer import Tokenizer

StopReason = Literal["end", "stop", "length", "context"]


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token.

    text: what it adds to the text; empty while a UTF-8 character is still open, or what may be a stop.
    logprob: its natural log-probability before any sampler; top: the likeliest tokens with theirs, in falling order;
    both where the configuration asks for it.
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Done:
    """The last report of a generation.

    reason: "end" for an end-of-generation token (which is not reported as a Token) and for the end of a grammar, "stop"
    for a text that ends it, then in `stop`, "length" for n_predict, "context" for a full context. text: what was still
    open, an unfinished UTF-8 character as U+FFFD, or the beginning of a stop; else empty. seed: of the sampler, also
    where a random one was asked for. decode_s: computing and sampling after the prompt; the time that the caller takes
    between two tokens does not count. n_decoded: tokens computed in it. n_prompt: prompt tokens computed, which leaves
    out what the context held already.
    """

    reason: StopReason
    text: str
    seed: int
    n_prompt: int
    n_generated: int
    n_decoded: int
    prefill_s: float
    decode_s: float
    stop: str | None = None

    @property
    def prefill_tok_per_s(self) -> float:
        """Prompt tokens per second."""
        return self.n_prompt / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tok_per_s(self) -> float:
        """Tokens per second after the prompt."""
        return self.n_decoded / self.decode_s if self.decode_s else 0.0


class Continuation:
    """A prompt in its context, token by token: the caller computes `pending` there, and hands the logits to `take`.

    prompt: all its ids. pending: tokens that the context lacks, of the prompt or the one just taken. reason: why it has
    ended, None before.
    """

    def __init__(
        self, tokenizer: Tokenizer, context: Context, ids: Sequence[int], config: GenerateConfig, sampler: Sampler
    ) -> None:
        """ids: the whole prompt, at least one id, at most context.n_ctx; the context holds the first of them."""
        context.truncate(len(ids) - 1)  # the logits are those after the last id: it is always computed
        self.context, self.prompt, self.pending = context, ids, list(ids[context.n_past :])
        self.prefill_s = self.decode_s = 0.0
        self._tokenizer, self._config, self._sampler = tokenizer, config, sampler
        self._stream = tokenizer.stream()
        prompt = "".join([self._stream.push(id) for id in ids])  # so that the first piece is what follows this prompt
        self._stops = None
        if config.stop or config.reverse_prompt:
            self._stops = Stops(tokenizer, config.stop, config.reverse_prompt, prompt)
        self._n_keep = n_keep(config.keep, len(ids), add_bos=tokenizer.add_bos)
        self._shifts = config.context_shift and config.n_predict != -2
        self._n_prompt, self._n_generated = len(self.pending), 0
        self._stop: str | None = None
        self._has_end_token = False
        self.reason: StopReason | None = None if config.n_predict else "length"

    @property
    def n_generated(self) -> int:
        """Tokens taken so far."""
        return self._n_generated

    def take(self, logits: Logits) -> Token | None:
        """The next token for logits (V,) after `pending`, which it now is itself; None for an end token.

        Raises LlamakitError for logits that are not finite.
        """
        token = self._sampler.sample(logits)
        if token in self._tokenizer.eog_ids:
            self.reason, self._has_end_token = "end", True
            return None
        self._n_generated += 1
        text = self._stream.push(token)
        if self._stops is not None:
            text, self._stop = self._stops.push(token, text)
        self.pending = [token]
        if self._stop is not None:
            self.reason = "stop"
        elif self._sampler.is_complete:
            self.reason = "end"
        elif self._n_generated == self._config.n_predict:
            self.reason = "length"
        else:
            self._make_room()
        if self._config.logprobs is None:
            return Token(token, text)
        logprobs = log_probabilities(logits)
        return Token(token, text, float(logprobs[token]), likeliest(logprobs, self._config.logprobs))

    def done(self) -> Done:
        """The last report, once there is a reason."""
        assert self.reason is not None, "it goes on"
        rest = self._stream.finish()
        if self._stops is not None:
            rest = "" if self._stop is not None else self._stops.finish() + rest
        n_decoded = max(0, self._n_generated + self._has_end_token - 1)
        return Done(
            self.reason, rest, self._sampler.seed, self._n_prompt, self._n_generated, n_decoded, self.prefill_s,
            self.decode_s, self._stop,
        )  # fmt: skip

    def _make_room(self) -> None:
        """For one more token in the context, where it is full: half of what may go goes, or the text ends.

        As in llama.cpp (tools/completion/completion.cpp), which shifts while there is room for one token yet.
        """
        context = self.context
        n_discard = (context.n_past - self._n_keep) // 2
        if self._shifts and context.n_past + 1 >= context.n_ctx and n_discard > 0:
            context.shift(self._n_keep, n_discard)
        elif context.n_past == context.n_ctx:
            self.reason = "context"


def n_keep(keep: int, n_prompt: int, *, add_bos: bool) -> int:
    """How many tokens stay when the context is shifted: `keep` and the BOS before them, or the whole prompt where that
    is negative or more than there are; llama.cpp's rule."""
    return n_prompt if keep < 0 or keep > n_prompt else keep + add_bos
