"""What `generate` and `perplexity` can be asked for. Torch-free: the command line takes its defaults from here."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from llamakit.errors import UsageError
from llamakit.inference.sampler_names import DEFAULT, parse_names

_MAX_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Length and sampling of one continuation; llama.cpp's meanings and defaults. Raises UsageError naming the flag."""

    n_predict: int = -1
    """Tokens to generate at most; -1 goes on until an end token (or, without context_shift, a full context), -2 until
    an end token or a full context, with context_shift too."""
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
    """How many of the last tokens count as recent for the penalties; 0 is off."""
    presence_penalty: float = 0.0
    """Taken off the logit of every recent token; 0 is off."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a recent token for each time that it occurs; 0 is off."""
    dry_multiplier: float = 0.0
    """What a token that goes on with a repetition loses, times dry_base for each token too long; 0 is off."""
    dry_base: float = 1.75
    """Growth of the DRY penalty for each token that a repetition is longer, 1 or more."""
    dry_allowed_length: int = 2
    """Repetitions of fewer tokens cost nothing."""
    dry_penalty_last_n: int = 64
    """How many of the last tokens are searched for repetitions; 0 is off."""
    dry_sequence_breaker: tuple[str, ...] = ("\n", ":", '"', "*")
    """Texts at which a repetition ends."""
    top_n_sigma: float = -1.0
    """Drop tokens whose logit is more than so many standard deviations below the highest; 0 or less is off."""
    typical: float = 1.0
    """Sample among the tokens of about average surprise that together exceed this probability; 1 is off."""
    xtc_probability: float = 0.0
    """How often the likely tokens but the last are dropped; 0 is off."""
    xtc_threshold: float = 0.1
    """From which probability on a token is likely; above 0.5 is off."""
    dynatemp_range: float = 0.0
    """How far the temperature may go below and above its value, by the entropy; 0 is off."""
    dynatemp_exp: float = 1.0
    """Exponent of the entropy's share in the dynamic temperature."""
    mirostat: int = 0
    """1 or 2: Mirostat of that version, in place of the samplers between temperature and the draw; 0 is off."""
    mirostat_lr: float = 0.1
    """Learning rate of Mirostat."""
    mirostat_ent: float = 5.0
    """Surprise in bits that Mirostat aims at."""
    adaptive_target: float = -1.0
    """Probability of the tokens that the sampler adaptive_p prefers; below 0 is off."""
    adaptive_decay: float = 0.9
    """How much adaptive_p remembers of earlier tokens, 0 to 0.99."""
    samplers: str = DEFAULT
    """Names of the samplers in the order in which they are applied, with `;` between them."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit), before any sampler; -inf rules it out."""
    ignore_eos: bool = False
    """Go on after an end token: none can be drawn."""
    grammar: str = ""
    """A grammar in GBNF that the text must follow; empty for none."""
    json_schema: str = ""
    """A JSON schema that the text must satisfy, itself as JSON; empty for none."""
    rng: Literal["llama.cpp", "llama2c"] = "llama.cpp"
    """Whose random numbers and samplers; llama2c has temperature and top_p alone."""
    seed: int = -1
    """Seed of the sampler, 0 to 4294967295; -1 takes a random one, which is reported."""
    ctx: int = 0
    """Context in tokens, prompt and continuation together; 0 takes the model's."""
    prefill_chunk: int = 512
    """Prompt tokens computed at once; less needs less memory."""
    keep: int = 0
    """Tokens at the beginning of the prompt, besides BOS, that stay when the context is shifted; -1 is all of them."""
    context_shift: bool = False
    """When the context is full, forget half of what keep does not keep, and go on."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation; they are not shown, nor is what follows them."""
    reverse_prompt: tuple[str, ...] = ()
    """Texts that end the generation and stay in it, as may the rest of the token that completes them."""
    parallel: int = 4
    """Prompts that are continued at once, where there are several."""
    logprobs: int | None = None
    """Report the natural log-probability of every token, before any sampler, and so many of the likeliest tokens with
    theirs; None reports neither."""

    def __post_init__(self) -> None:
        _require(self.n_predict >= -2, "-n", self.n_predict, "-2 or more")
        _require(0 <= self.top_p <= 1, "--top-p", self.top_p, "0 to 1")
        _require(0 <= self.min_p <= 1, "--min-p", self.min_p, "0 to 1")
        _require(self.repeat_penalty > 0, "--repeat-penalty", self.repeat_penalty, "a number above 0")
        for name in _FINITE:
            value = getattr(self, name)
            _require(math.isfinite(value), _flag(name), value, "a finite number")
        for name in ("repeat_last_n", "dry_penalty_last_n", "dry_allowed_length", "ctx"):
            _require(getattr(self, name) >= 0, _flag(name), getattr(self, name), "0 or more")
        _require(self.dry_base >= 1, "--dry-base", self.dry_base, "1 or more")
        for name in ("typical", "xtc_probability", "xtc_threshold"):
            _require(0 <= getattr(self, name) <= 1, _flag(name), getattr(self, name), "0 to 1")
        _require(self.mirostat in (0, 1, 2), "--mirostat", self.mirostat, "0, 1 or 2")
        _require(self.adaptive_target <= 1, "--adaptive-target", self.adaptive_target, "0 to 1, or less for off")
        _require(0 <= self.adaptive_decay <= 0.99, "--adaptive-decay", self.adaptive_decay, "0 to 0.99")
        _require(-1 <= self.seed <= _MAX_SEED, "--seed", self.seed, f"-1, or 0 to {_MAX_SEED}")
        _require(self.prefill_chunk >= 1, "prefill_chunk", self.prefill_chunk, "1 or more")
        _require(self.keep >= -1, "--keep", self.keep, "-1 or more")
        _require(self.parallel >= 1, "--parallel", self.parallel, "1 or more")
        _require(self.logprobs is None or self.logprobs >= 0, "--logprobs", self.logprobs, "0 or more")
        for flag, texts in (("--stop", self.stop), ("--reverse-prompt", self.reverse_prompt)):
            _require(all(texts), flag, "empty", "a text")
        for token, bias in self.logit_bias:
            sane = token >= 0 and (math.isfinite(bias) or bias == -math.inf)
            _require(sane, "--logit-bias", f"{token}{bias:+g}", "TOKEN+BIAS or TOKEN-BIAS, finite or -inf")
        parse_names(self.samplers)
        if self.grammar and self.json_schema:
            raise UsageError("--grammar and --json-schema do not go together", hint="give only one of them")
        self._check_rng()

    def _check_rng(self) -> None:
        if self.rng == "llama.cpp":
            return
        _require(self.rng == "llama2c", "--rng", self.rng, "llama.cpp or llama2c")
        _require(self.temperature >= 0, "-t", self.temperature, "0 or more with --rng llama2c")
        changed = [f.name for f in fields(self) if f.name in _NOT_IN_LLAMA2C and getattr(self, f.name) != f.default]
        if changed:
            raise UsageError(f"{_flag(changed[0])} does not go with --rng llama2c: it has -t and --top-p alone")


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
    ppl_stride: int = 0
    """Tokens from the start of one chunk to the next's, of which so many are scored at its end; 0: side by side."""
    max_ppl: float | None = None
    """A result with a larger perplexity fails; None: any passes."""
    max_rise: float | None = None
    """So does one that is more than this many percent above the first result's; None: any passes."""
    rope_freq_base: float | None = None
    """Base of the rotary embedding, where a model has none or another."""

    def __post_init__(self) -> None:
        _require(self.ctx >= 4, "--ctx", self.ctx, "4 or more")
        _require(self.batch >= 1, "--batch", self.batch, "1 or more")
        _require(self.chunks == -1 or self.chunks >= 1, "--chunks", self.chunks, "-1, or 1 or more")
        _require(self.ppl_output_type in (0, 1), "--ppl-output-type", self.ppl_output_type, "0 or 1")
        fits = 0 <= self.ppl_stride < self.n_window
        _require(fits, "--ppl-stride", self.ppl_stride, f"0, or less than a chunk, {self.n_window} tokens with --ctx")
        _require(self.max_ppl is None or self.max_ppl >= 1, "--max-ppl", self.max_ppl, "1 or more")
        _require(self.max_rise is None or self.max_rise >= 0, "--max-rise", self.max_rise, "0 or more, in percent")

    @property
    def n_window(self) -> int:
        """Tokens that the model sees at a time: a chunk, which llama-perplexity makes longer by half a stride."""
        return self.ctx + self.ppl_stride // 2

    def first_scored(self, n_ctx: int) -> int:
        """The first position of a chunk whose prediction counts: those up to the last but one do."""
        return n_ctx - 1 - self.ppl_stride if self.ppl_stride else n_ctx // 2


_FINITE = (
    "temperature", "repeat_penalty", "presence_penalty", "frequency_penalty", "dry_multiplier", "dry_base",
    "top_n_sigma", "dynatemp_range", "dynatemp_exp", "mirostat_lr", "mirostat_ent", "adaptive_target",
)  # fmt: skip
_NOT_IN_LLAMA2C = frozenset(
    {
        "top_k", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty", "dry_multiplier", "top_n_sigma",
        "typical", "xtc_probability", "dynatemp_range", "mirostat", "samplers", "logit_bias", "ignore_eos",
        "grammar", "json_schema",
    }
)  # fmt: skip
_FLAGS = {"temperature": "-t", "top_n_sigma": "--top-nsigma"}


def _flag(name: str) -> str:
    return _FLAGS.get(name, "--" + name.replace("_", "-"))


def _require(holds: bool, flag: str, value: object, expected: str) -> None:
    if not holds:
        raise UsageError(f"{flag} is {value} (expected {expected})")
