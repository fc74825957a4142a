"""What `generate` and `perplexity` can be asked for. Torch-free: the command line takes its defaults from here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llamakit.errors import UsageError

_MAX_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Length and sampling of one continuation; llama.cpp's meanings and defaults. Raises UsageError naming the flag."""

    n_predict: int = -1
    """Tokens to generate at most; -1 goes on until an end token or a full context."""
    temperature: float = 0.8
    """Randomness: logits are divided by it; 0 or less always takes the likeliest token."""
    top_k: int = 40
    """Sample among the k likeliest tokens only; 0 or less is off."""
    top_p: float = 0.95
    """Sample among the likeliest tokens that together reach this probability; 1 is off."""
    min_p: float = 0.05
    """Drop tokens less likely than this share of the likeliest one; 0 is off."""
    repeat_penalty: float = 1.0
    """Logits of recent tokens are divided (above zero) or multiplied (below) by it; 1 is off."""
    repeat_last_n: int = 64
    """How many of the last tokens count as recent for the penalty; 0 is off."""
    seed: int = -1
    """Seed of the sampler, 0 to 4294967295; -1 takes a random one, which is reported."""
    ctx: int = 0
    """Context in tokens, prompt and continuation together; 0 takes the model's."""
    prefill_chunk: int = 512
    """Prompt tokens computed at once; less needs less memory."""
    logprobs: bool = False
    """Report the natural log-probability of every token, before any sampler."""

    def __post_init__(self) -> None:
        _require(self.n_predict >= -2, "-n", self.n_predict, "-1 or more")
        _require(math.isfinite(self.temperature), "-t", self.temperature, "a finite number")
        _require(0 <= self.top_p <= 1, "--top-p", self.top_p, "0 to 1")
        _require(0 <= self.min_p <= 1, "--min-p", self.min_p, "0 to 1")
        positive = math.isfinite(self.repeat_penalty) and self.repeat_penalty > 0
        _require(positive, "--repeat-penalty", self.repeat_penalty, "a number above 0")
        _require(self.repeat_last_n >= 0, "--repeat-last-n", self.repeat_last_n, "0 or more")
        _require(-1 <= self.seed <= _MAX_SEED, "--seed", self.seed, f"-1, or 0 to {_MAX_SEED}")
        _require(self.ctx >= 0, "--ctx", self.ctx, "0 or more")
        _require(self.prefill_chunk >= 1, "prefill_chunk", self.prefill_chunk, "1 or more")


@dataclass(frozen=True, kw_only=True)
class PerplexityConfig:
    """How a text is cut and measured; llama-perplexity's meanings and defaults. Raises UsageError naming the flag."""

    ctx: int = 512
    """Tokens of a chunk; the second half of each is scored."""
    batch: int = 2048
    """Tokens computed at once: as many whole chunks as fit, at least one."""
    chunks: int = -1
    """Chunks to measure at most; -1 takes the whole text."""
    ppl_output_type: int = 0
    """0 prints the running perplexity, 1 a table with the mean negative log-likelihood and its error."""

    def __post_init__(self) -> None:
        _require(self.ctx >= 4, "--ctx", self.ctx, "4 or more")
        _require(self.batch >= 1, "--batch", self.batch, "1 or more")
        _require(self.chunks == -1 or self.chunks >= 1, "--chunks", self.chunks, "-1, or 1 or more")
        _require(self.ppl_output_type in (0, 1), "--ppl-output-type", self.ppl_output_type, "0 or 1")


def _require(holds: bool, flag: str, value: float, expected: str) -> None:
    if not holds:
        raise UsageError(f"{flag} is {value} (expected {expected})")
