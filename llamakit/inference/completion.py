"""Prompts and their continuations: the prompt at once, then one token at a time; of one, or of several together."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence

from llamakit.errors import MismatchError, UsageError
from llamakit.inference.config import GenerateConfig
from llamakit.inference.continuation import Continuation, Done, Token, n_keep
from llamakit.inference.dry import breakers
from llamakit.inference.engine import Context, Engine, Logits, TorchEngine
from llamakit.inference.grammar import check_grammar, open_grammar
from llamakit.inference.sampling import Sampler
from llamakit.model import Llama
from llamakit.tokenizer import Tokenizer


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
    context, MismatchError for another model's tokenizer, and what `grammar.check_grammar` raises; later, LlamakitError
    for logits that are not finite, UnsupportedError for a grammar that leads nowhere with this vocabulary.
    """
    config = config or GenerateConfig()
    ids = checked_prompt(model, tokenizer, prompt, config)
    check_grammar(config)
    return _generate(_engine(model, config), tokenizer, ids, config)


def generate_batch(
    model: Llama | Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    config: GenerateConfig | None = None,
) -> Iterator[tuple[int, Token | Done]]:
    """`generate` for many prompts, config.parallel of them at once: (number of the prompt from 0, its next report).

    Reports of different prompts come in no certain order. Each continuation is what it would be alone with the same
    seed, as far as rounding goes: more tokens at once are added up in another order. The time of a step counts for each
    prompt in it. Raises as `generate` does, for all prompts before the first is computed.
    """
    config = config or GenerateConfig()
    ids = [checked_prompt(model, tokenizer, prompt, config) for prompt in prompts]
    check_grammar(config)
    return _generate_batch(_engine(model, config), tokenizer, ids, config)


def checked_prompt(
    model: Llama | Engine, tokenizer: Tokenizer, prompt: str | Sequence[int], config: GenerateConfig
) -> list[int]:
    """`encode_prompt`, and the refusals of `generate` for what this model cannot take."""
    ids = encode_prompt(tokenizer, prompt)
    if tokenizer.n_vocab != model.config.n_vocab:
        raise MismatchError(f"the vocabulary has {tokenizer.n_vocab} tokens, the model {model.config.n_vocab}")
    _check_room(tokenizer, ids, config.ctx or model.config.n_ctx, config)
    return ids


def _engine(model: Llama | Engine, config: GenerateConfig) -> Engine:
    return TorchEngine(model, prefill_chunk=config.prefill_chunk) if isinstance(model, Llama) else model


def _check_room(tokenizer: Tokenizer, ids: Sequence[int], n_ctx: int, config: GenerateConfig) -> None:
    """Raise UsageError for a prompt that a context does not hold, or that it has to keep and has no room behind."""
    if len(ids) > n_ctx:
        reason = f"the prompt has {len(ids)} tokens, the context holds {n_ctx}"
        raise UsageError(reason, hint="a larger --ctx, or less text")
    kept = n_keep(config.keep, len(ids), add_bos=tokenizer.add_bos)
    overflows = config.n_predict == -1 or len(ids) + config.n_predict > n_ctx
    if config.context_shift and overflows and kept > n_ctx - 4:
        reason = f"--keep keeps {kept} tokens of a context of {n_ctx}, where nothing can be shifted"
        raise UsageError(reason, hint="a larger --ctx, or a smaller --keep")


def new_sampler(tokenizer: Tokenizer, ids: list[int], config: GenerateConfig) -> Sampler:
    """The chain, with what it needs of the vocabulary: end tokens to leave out, DRY's breakers, the grammar's start.

    Raises as `grammar.open_grammar` does.
    """
    known = breakers(tokenizer, config.dry_sequence_breaker) if config.dry_multiplier else None
    banned = tokenizer.eog_ids if config.ignore_eos else ()
    return Sampler(config, ids, banned=banned, breakers=known, grammar=open_grammar(config, tokenizer))


def _generate(engine: Engine, tokenizer: Tokenizer, ids: list[int], config: GenerateConfig) -> Iterator[Token | Done]:
    yield from continue_context(engine, _context(engine, ids, config), tokenizer, ids, config)


def _context(engine: Engine, ids: Sequence[int], config: GenerateConfig) -> Context:
    """With room for a prompt and its continuation."""
    n_ctx = config.ctx or engine.config.n_ctx
    return engine.context(n_ctx if config.n_predict < 0 else min(n_ctx, len(ids) + config.n_predict))


def continue_context(
    engine: Engine, context: Context, tokenizer: Tokenizer, ids: list[int], config: GenerateConfig
) -> Iterator[Token | Done]:
    """`generate` in a context that may hold the first of these ids already: only those that it lacks are computed.

    ids: the whole prompt, at least one id, at most context.n_ctx; its first context.n_past are what the context holds.
    Afterwards the context holds the prompt and all that was generated but the last token, also where the caller
    stopped halfway or was interrupted: what it holds is always the first context.n_past of them, unless it was shifted.
    Raises LlamakitError for logits that are not finite.
    """
    continuation = Continuation(tokenizer, context, ids, config, new_sampler(tokenizer, ids, config))
    started = time.perf_counter()
    logits = engine.feed(context, continuation.pending)
    now = time.perf_counter()
    continuation.prefill_s = now - started
    while continuation.reason is None:
        started = now
        token = continuation.take(logits)
        if token is not None:
            continuation.decode_s += time.perf_counter() - started
            yield token
            started = time.perf_counter()
        if continuation.reason is None:
            logits = engine.feed(context, continuation.pending)
        now = time.perf_counter()
        continuation.decode_s += now - started
    yield continuation.done()


def _generate_batch(
    engine: Engine, tokenizer: Tokenizer, prompts: list[list[int]], config: GenerateConfig
) -> Iterator[tuple[int, Token | Done]]:
    waiting = deque(enumerate(prompts))
    running: list[tuple[int, Continuation]] = []
    while waiting or running:
        while waiting and len(running) < config.parallel:
            number, ids = waiting.popleft()
            context, sampler = _context(engine, ids, config), new_sampler(tokenizer, ids, config)
            running.append((number, Continuation(tokenizer, context, ids, config, sampler)))
        started = time.perf_counter()
        batch = engine.feed_batch([(c.context, c.pending) for _, c in running])
        step_s = time.perf_counter() - started
        for (number, continuation), logits in zip(running, batch, strict=True):
            yield from ((number, report) for report in _reports(continuation, logits, step_s))
        running = [(number, c) for number, c in running if c.reason is None]


def _reports(continuation: Continuation, logits: Logits, step_s: float) -> Iterator[Token | Done]:
    """What a step of a batch, of step_s seconds, brings one of its prompts: a token, its end, or both."""
    if continuation.prefill_s:
        continuation.decode_s += step_s
    else:
        continuation.prefill_s = step_s
    if continuation.reason is None:
        started = time.perf_counter()
        token = continuation.take(logits)
        continuation.decode_s += time.perf_counter() - started
        if token is not None:
            yield token
    if continuation.reason is not None:
        yield continuation.done()
