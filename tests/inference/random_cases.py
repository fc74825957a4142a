"""Random logits, settings and windows for samplers, and each setting as llama.cpp's own chain."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llamakit.inference.config import GenerateConfig
from llamakit.inference.sampler_names import SAMPLERS, parse_names


def cases(n: int, seed: int) -> Iterator[np.random.Generator]:
    return (np.random.default_rng([seed, i]) for i in range(n))


def f32(value: float) -> float:
    return float(np.float32(value))


def size(rng: np.random.Generator) -> int:
    """10 to 50,000, small ones more often."""
    return int(np.exp(rng.uniform(np.log(10), np.log(50_000))))


def distinct_logits(rng: np.random.Generator, n: int) -> np.ndarray:
    """llama.cpp leaves the order of equal logits open."""
    while True:
        logits = rng.normal(rng.uniform(-5, 5), rng.uniform(0.1, 8), 2 * n).astype(np.float32)
        logits = np.unique(logits)
        if len(logits) >= n:
            return rng.permutation(logits)[:n]


def possible_logits(rng: np.random.Generator, n: int) -> np.ndarray:
    """Distinct ones of which none has the probability zero: the surprise of that is not a number, and llama.cpp's
    typical sampler then sorts by nothing."""
    while True:
        logits = distinct_logits(rng, n)
        logits = np.float32(40) * (logits - logits.min()) / np.float32(max(float(np.ptp(logits)), 40.0))
        if len(np.unique(logits)) == n:
            return logits


def any_logits(rng: np.random.Generator, n: int) -> np.ndarray:
    """Distinct ones, ones with many ties, ones far apart, and some that are ruled out."""
    kind = rng.integers(0, 5)
    if kind == 0:
        logits = rng.integers(-5, 6, n).astype(np.float32)
    elif kind == 1:
        logits = (rng.standard_cauchy(n) * 100).astype(np.float32)
    else:
        logits = distinct_logits(rng, n)
    if rng.random() < 0.3:
        logits[rng.random(n) < 0.3] = -np.inf
        logits[0] = 1
    return logits


def config(rng: np.random.Generator, **fixed: object) -> GenerateConfig:
    """Settings of every sampler: off, usual, or extreme."""

    def one_of(*values: float) -> float:
        return f32(values[rng.integers(len(values))])

    names = list(rng.permutation([name for name in SAMPLERS if name != "adaptive_p"])[: rng.integers(0, 10)])
    return GenerateConfig(**{
        "temperature": one_of(0, 0.1, 0.8, 1, rng.uniform(0.01, 3)),
        "top_k": int(rng.choice([0, 1, 5, 40, 200, 100_000])),
        "top_p": one_of(0, 0.3, 0.95, 1, rng.random()),
        "min_p": one_of(0, 0.05, 0.3, 1, rng.random()),
        "repeat_penalty": one_of(1, 1.1, 0.5, 3),
        "presence_penalty": one_of(0, 0.5, -0.7, 5),
        "frequency_penalty": one_of(0, 0.3, -0.3),
        "repeat_last_n": int(rng.choice([0, 1, 3, 64])),
        "dry_multiplier": one_of(0, 0.8, 3),
        "dry_base": one_of(1, 1.75, 4),
        "dry_allowed_length": int(rng.choice([0, 1, 2, 5])),
        "dry_penalty_last_n": int(rng.choice([0, 1, 10, 64])),
        "top_n_sigma": one_of(-1, 0.5, 1, 3),
        "typical": one_of(1, 0.9, 0.2, 0),
        "xtc_probability": one_of(0, 0.5, 1),
        "xtc_threshold": one_of(0, 0.01, 0.1, 0.5),
        "dynatemp_range": one_of(0, 0.3, 2),
        "dynatemp_exp": one_of(1, 0.5, 2.5),
        "mirostat_lr": one_of(0.1, 0.5),
        "mirostat_ent": one_of(5, 1, 9),
        "samplers": ";".join(names),
        "seed": int(rng.integers(0, 2**32 - 1)),
        **fixed,
    })  # fmt: skip


def llama_chain(c: GenerateConfig, n_vocab: int) -> list[tuple]:
    """What llama.cpp builds for these settings (common/sampling.cpp)."""
    bias = [("logit_bias", n_vocab, list(c.logit_bias))] if c.logit_bias else []
    if c.mirostat == 1:
        return [*bias, ("temp", c.temperature), ("mirostat", n_vocab, c.seed, c.mirostat_ent, c.mirostat_lr, 100)]
    if c.mirostat == 2:
        return [*bias, ("temp", c.temperature), ("mirostat_v2", c.seed, c.mirostat_ent, c.mirostat_lr)]
    penalties = c.repeat_last_n, c.repeat_penalty, c.frequency_penalty, c.presence_penalty
    steps = {
        "penalties": ("penalties", n_vocab, *penalties),
        "dry": ("dry", None, c.dry_multiplier, c.dry_base, c.dry_allowed_length, c.dry_penalty_last_n, None, 0),
        "top_n_sigma": ("top_n_sigma", c.top_n_sigma),
        "top_k": ("top_k", c.top_k),
        "typ_p": ("typical", c.typical, 0),
        "top_p": ("top_p", c.top_p, 0),
        "min_p": ("min_p", c.min_p, 0),
        "xtc": ("xtc", c.xtc_probability, c.xtc_threshold, 0, c.seed),
        "temperature": ("temp_ext", c.temperature, c.dynatemp_range, c.dynatemp_exp),
    }
    names = parse_names(c.samplers)
    end = ("adaptive_p", c.adaptive_target, c.adaptive_decay, c.seed) if "adaptive_p" in names else ("dist", c.seed)
    return [*bias, *(steps[name] for name in names if name != "adaptive_p"), end]
