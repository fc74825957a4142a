"""--max-memory: how a run is computed so that it fits, without a change of what it computes.

Every choice gives the samples, the order and the losses that were asked for; rows of a batch one after another add up
to the same gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llamakit.errors import UsageError
from llamakit.training.config import Cache, FinetuneConfig
from llamakit.training.memory import Footprint, Kept, cache_sizes, memory_of

# Predictions of what a run adds to its process are a few percent off; a run that may take 3 GB is to take less.
_OFF = 0.05
# Decoding a weight takes as long as multiplying so many tokens with it; a step has work as for so many more tokens; and
# a single layout of the weights makes products so much slower.
_DECODE_TOKENS, _STEP_TOKENS, _ONE_LAYOUT = 150, 32, 1.12
#: how decoded weights are kept -> the --weight-cache that says so
CACHES: dict[Kept, Cache] = {"twice": "auto", "once": "bf16", "none": "none"}


@dataclass(frozen=True)
class Choice:
    """A way to compute a run. why: in words, where something had to be chosen."""

    config: FinetuneConfig
    run: Footprint
    why: str = ""


def chosen(config: FinetuneConfig, asked: Footprint, interpreter: int, *, twice: bool) -> Choice:
    """The fastest way that fits into --max-memory. twice: this machine keeps weights in two layouts.

    Raises UsageError, naming the smallest way, where none fits.
    """
    limit, ways = config.max_memory_bytes, list(_ways(config, asked, twice=twice))
    needed = [_needed(way, interpreter) for way in ways]
    fitting = [way for way, size in zip(ways, needed, strict=True) if size <= limit]
    if not fitting:
        least = ways[needed.index(min(needed))]
        raise UsageError(
            f"--max-memory {config.max_memory}: nothing fits; the smallest takes {_size(min(needed))}"
            f" ({_flags(least)})",
            hint="a smaller --ctx, a lower rank or a base with fewer bits per weight needs less",
        )
    best = min(fitting, key=lambda way: (_cost(way), -way.rows))
    total = memory_of(best, interpreter).total
    why = f"{_flags(best)}: the fastest of {len(ways)} ways that fits, {_size(total)} predicted"
    changed = dataclasses.replace(
        config,
        micro_batch=0 if best.rows >= config.batch else best.rows,
        use_checkpointing=best.checkpointing,
        weight_cache=config.weight_cache if config.full else CACHES[best.kept],
    )
    return Choice(changed, best, why)


def _needed(way: Footprint, interpreter: int) -> float:
    total = memory_of(way, interpreter).total
    return total + _OFF * (total - interpreter)


def _ways(config: FinetuneConfig, asked: Footprint, *, twice: bool) -> Iterator[Footprint]:
    """Every way to compute what was asked for; a --weight-cache that was given stays."""
    rows = sorted({-(-config.micro_rows // n) for n in range(1, config.micro_rows + 1)}, reverse=True)
    cached: Sequence[Kept] = (("twice",) if twice else ()) + ("once", "none")
    caches = cached if config.weight_cache == "auto" and not asked.full else (asked.kept,)
    # What is not there to be decoded needs no cache.
    nothing = not cache_sizes(asked.shape, asked.tensors, asked.item)["once"]
    for kept in caches:
        if nothing and kept == "none" and len(caches) > 1:
            continue
        for checkpointing in (False, True):
            for n in rows:
                yield dataclasses.replace(asked, rows=n, checkpointing=checkpointing, kept=kept)


def _cost(way: Footprint) -> float:
    """Time of a token, in no particular unit."""
    n_tokens = way.rows * way.ctx
    passes = (6 if way.full else 4) + 2 * way.checkpointing
    decoding = _DECODE_TOKENS / n_tokens if way.kept == "none" and not way.full else 0.0
    slower = _ONE_LAYOUT if way.kept == "once" else 1.0
    return passes * (slower + decoding + _STEP_TOKENS / n_tokens)


def _flags(way: Footprint) -> str:
    checkpointing = "--use-checkpointing" if way.checkpointing else "--no-checkpointing"
    cache = "" if way.full else f", --weight-cache {CACHES[way.kept]}"
    return f"--micro-batch {way.rows}, {checkpointing}{cache}"


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f}G" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f}M"
