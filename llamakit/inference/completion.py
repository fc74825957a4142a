"""A prompt and its continuation: prefill in chunks, then one token at a time over a key-value cache.

Shapes: V n_vocab.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from llamakit.errors import MismatchError, UsageError
from llamakit.inference.config import GenerateConfig
from llamakit.inference.dry import breakers
from llamakit.inference.engine import Context, Engine, TorchEngine
from llamakit.inference.sampling import Sampler, log_probability
from llamakit.model import Llama
from llamakit.tokenizer import Tokenizer

StopReason = Literal["end", "length", "context"]


@dataclass(frozen=True)
class Token:
    """One generated token.

    text: what it adds to the text; empty while a UTF-8 character is still open.
    logprob: its natural log-probability before any sampler, where the configuration asks for it.
    """

    id: int
    text: str
    logprob: float | None = None


@dataclass(frozen=True)
class Done:
    """The last report of a generation.

    reason: "end" for an end-of-generation token (which is not reported as a Token), "length" for n_predict,
    "context" for a full context. text: what was still open, an unfinished UTF-8 character as U+FFFD; else empty.
    seed: of the sampler, also where a random one was asked for. decode_s: computing and sampling after the
    prompt; the time that the caller takes between two tokens does not count. n_decoded: tokens computed in it.
    n_prompt: prompt tokens computed, which leaves out what the context held already.
    """

    reason: StopReason
    text: str
    seed: int
    n_prompt: int
    n_generated: int
    n_decoded: int
    prefill_s: float
    decode_s: float

    @property
    def prefill_tok_per_s(self) -> float:
        """Prompt tokens per second."""
        return self.n_prompt / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tok_per_s(self) -> float:
        """Tokens per second after the prompt."""
        return self.n_decoded / self.decode_s if self.decode_s else 0.0


def encode_prompt(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """Token ids (at least one) of a prompt: text with BOS and special tokens as llama.cpp reads them, or ids as given.

    Nothing at all starts from BOS. Raises UsageError for an empty prompt where the model has no BOS, and for an
    id outside the vocabulary.
    """
    ids = tokenizer.encode(prompt, add_special=True, parse_special=True) if isinstance(prompt, str) else list(prompt)
    if not ids and tokenizer.bos_id is not None:
        return [tokenizer.bos_id]
    if not ids:
        raise UsageError("the prompt is empty, and this model has no BOS token to start from", hint="give a prompt: -p")
    bad = next((i for i in ids if not 0 <= i < tokenizer.n_vocab), None)
    if bad is not None:
        raise UsageError(f"the prompt has the token id {bad} (expected 0 to {tokenizer.n_vocab - 1})")
    return ids


def generate(
    model: Llama | Engine, tokenizer: Tokenizer, prompt: str | Sequence[int] = "", config: GenerateConfig | None = None
) -> Iterator[Token | Done]:
    """The continuation of a prompt, token by token, then one Done; the text is all reports' `text` joined.

    model: what computes; a Llama runs in torch. prompt: text, or token ids taken as they are; an empty one starts from
    BOS. Ends at an end-of-generation token, after n_predict tokens, or when the context (config.ctx, by default the
    model's) is full. Raises at once UsageError for a prompt that cannot be (see `encode_prompt`) or is longer than the
    context, and MismatchError for another model's tokenizer; later, LlamakitError for logits that are not finite.
    """
    config = config or GenerateConfig()
    ids = encode_prompt(tokenizer, prompt)
    if tokenizer.n_vocab != model.config.n_vocab:
        raise MismatchError(f"the vocabulary has {tokenizer.n_vocab} tokens, the model {model.config.n_vocab}")
    n_ctx = config.ctx or model.config.n_ctx
    if len(ids) > n_ctx:
        raise UsageError(
            f"the prompt has {len(ids)} tokens, the context holds {n_ctx}", hint="a larger --ctx, or less text"
        )
    engine = TorchEngine(model, prefill_chunk=config.prefill_chunk) if isinstance(model, Llama) else model
    return _generate(engine, tokenizer, ids, n_ctx, config)


def _sampler(tokenizer: Tokenizer, ids: list[int], config: GenerateConfig) -> Sampler:
    """The chain, with what it needs of the vocabulary: end tokens to leave out, where DRY's breakers stand."""
    known = breakers(tokenizer, config.dry_sequence_breaker) if config.dry_multiplier else None
    return Sampler(config, ids, banned=tokenizer.eog_ids if config.ignore_eos else (), breakers=known)


def _generate(
    engine: Engine, tokenizer: Tokenizer, ids: list[int], n_ctx: int, config: GenerateConfig
) -> Iterator[Token | Done]:
    limit = config.n_predict if config.n_predict >= 0 else n_ctx + 1
    yield from continue_context(engine, engine.context(min(n_ctx, len(ids) + limit)), tokenizer, ids, config)


def continue_context(
    engine: Engine, context: Context, tokenizer: Tokenizer, ids: list[int], config: GenerateConfig
) -> Iterator[Token | Done]:
    """`generate` in a context that may hold the first of these ids already: only those that it lacks are computed.

    ids: the whole prompt, at least one id, at most context.n_ctx; its first context.n_past are what the context holds.
    Afterwards the context holds the prompt and all that was generated but the last token, also where the caller
    stopped halfway or was interrupted: what it holds is always the first context.n_past of them. Raises LlamakitError
    for logits that are not finite.
    """
    sampler, stream = _sampler(tokenizer, ids, config), tokenizer.stream()
    limit = config.n_predict if config.n_predict >= 0 else context.n_ctx + 1
    for id_ in ids:  # so that the first piece is what follows this prompt, its leading space included
        stream.push(id_)
    context.truncate(len(ids) - 1)  # the logits are those after the last id: it is always computed
    token, started, lacking = ids[-1], time.perf_counter(), ids[context.n_past :]
    logits = engine.feed(context, lacking)
    prefill_s, decode_s, n_generated = time.perf_counter() - started, 0.0, 0
    reason: StopReason = "length"
    while n_generated < limit:
        if n_generated and context.n_past == context.n_ctx:
            reason = "context"
            break
        started = time.perf_counter()
        if n_generated:
            logits = engine.feed(context, [token])
        token = sampler.sample(logits)
        decode_s += time.perf_counter() - started
        if token in tokenizer.eog_ids:
            reason = "end"
            break
        n_generated += 1
        yield Token(token, stream.push(token), log_probability(logits, token) if config.logprobs else None)
    n_decoded = context.n_past - len(ids)
    yield Done(reason, stream.finish(), sampler.seed, len(lacking), n_generated, n_decoded, prefill_s, decode_s)
