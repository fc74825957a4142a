"""From logits to a token: the chain of samplers with its state, in llama.cpp's order (common/sampling.cpp).

With equal logits, seed and configuration the token is llama.cpp's. The functions that are chained: `samplers` leaves
candidates over, `choice` draws among them.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter, deque
from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llamakit.errors import LlamakitError, UsageError
from llamakit.inference import choice, llama2c_rng, samplers
from llamakit.inference.config import GenerateConfig
from llamakit.inference.dry import Breakers, dry
from llamakit.inference.mt19937 import Mt19937
from llamakit.inference.sampler_names import parse_names
from llamakit.inference.samplers import Candidates, Logits


def log_probabilities(logits: Logits) -> NDArray[np.float64]:
    """Natural logarithms of the softmax of logits (V,), in float64."""
    shifted = logits.astype(np.float64) - float(logits.max())
    return shifted - np.log(np.exp(shifted).sum())


def likeliest(logprobs: NDArray[np.float64], n: int) -> tuple[tuple[int, float], ...]:
    """The n largest of logprobs (V,) as (token, its log-probability), in falling order; equal ones by id."""
    n = min(n, len(logprobs))
    least = np.partition(logprobs, len(logprobs) - n)[len(logprobs) - n] if n else np.inf
    ids = np.flatnonzero(logprobs >= least)
    ids = ids[np.argsort(-logprobs[ids], kind="stable")][:n]
    return tuple((int(id), float(logprobs[id])) for id in ids)


def resolve_seed(config: GenerateConfig) -> int:
    """The seed asked for, or a random one in [1, 2**32 - 1) where that is -1 or the largest, as in llama.cpp, or 0
    for llama2.c, whose generator stands still at 0."""
    is_random = config.seed in (-1, 2**32 - 1) or (config.rng == "llama2c" and config.seed == 0)
    return 1 + secrets.randbelow(2**32 - 2) if is_random else config.seed


def is_on(config: GenerateConfig, name: str) -> bool:
    """Whether the sampler of this name can change anything with these settings; llama.cpp's rule."""
    c = config
    match name:
        case "penalties":
            return c.repeat_last_n > 0 and (c.repeat_penalty, c.frequency_penalty, c.presence_penalty) != (1, 0, 0)
        case "dry":
            return c.dry_multiplier != 0 and c.dry_penalty_last_n > 0
        case "top_n_sigma":
            return c.top_n_sigma > 0
        case "top_k":
            return c.top_k > 0
        case "typ_p":
            return c.typical < 1
        case "top_p":
            return c.top_p < 1
        case "min_p":
            return c.min_p > 0
        case "xtc":
            return c.xtc_probability > 0 and c.xtc_threshold <= 0.5
        case "temperature":
            return c.temperature != 1 or c.dynatemp_range > 0
        case _:
            return True


def _keeps_the_likeliest(config: GenerateConfig, names: Sequence[str]) -> bool:
    """Whether the chain can end at nothing but the first largest logit: temperature 0, and no sampler that is on can
    change or drop that one."""
    if config.rng == "llama2c" or config.mirostat or config.temperature > 0 or config.dynatemp_range > 0:
        return False
    harmless = {"top_n_sigma", "top_k", "top_p", "min_p", "temperature"}
    return "temperature" in names and all(name in harmless or not is_on(config, name) for name in names)


#: what llama.cpp calls its samplers where they differ from ours
_SHOWN = {"typ_p": "typical", "temperature": "temp-ext"}


def shown_chain(config: GenerateConfig, *, banned: bool = False) -> str:
    """The chain as llama.cpp prints it, `logits -> ?penalties -> top-k -> ... -> dist`; a ? before what is off.

    banned: tokens are ruled out beside the biases of the configuration.
    """
    if config.rng == "llama2c":
        return "logits -> temp -> top-p -> run.c"
    steps = ["logits"] + ["logit-bias"] * bool(config.logit_bias or banned)
    if config.mirostat:
        return " -> ".join(
            [*steps, "temp" if config.temperature != 1 else "?temp", ("mirostat", "mirostat-v2")[config.mirostat - 1]]
        )
    names = parse_names(config.samplers)
    for name in names:
        if name != "adaptive_p":
            steps.append("?" * (not is_on(config, name)) + _SHOWN.get(name, name.replace("_", "-")))
    return " -> ".join([*steps, "adaptive-p" if "adaptive_p" in names else "dist"])


class Constraint(Protocol):
    """What decides which tokens may come next, such as `grammar.Grammar`."""

    @property
    def is_complete(self) -> bool:
        """Whether none may."""
        ...

    def allows(self, token: int) -> bool:
        """Whether it may."""
        ...

    def mask(self) -> NDArray[np.bool_]:
        """All that may, (V,)."""
        ...

    def accept(self, token: int) -> None:
        """Go on with one that may."""
        ...


class Sampler:
    """The whole chain: random numbers, the windows of recent tokens, what Mirostat and adaptive-p have learned.

    seed: the one in use, also when the configuration asked for a random one. banned: tokens never to be drawn;
    breakers: of DRY, see `dry.breakers`; grammar: what every token drawn must satisfy.
    """

    def __init__(
        self,
        config: GenerateConfig,
        prompt: Sequence[int] = (),
        *,
        banned: Collection[int] = (),
        breakers: Breakers | None = None,
        grammar: Constraint | None = None,
    ) -> None:
        self.seed = resolve_seed(config)
        self._config = config
        self._bias = [*config.logit_bias, *((id, -np.inf) for id in sorted(banned))]
        self._breakers = breakers or {}
        self._grammar = grammar
        names = parse_names(config.samplers)
        # Each XTC has random numbers of its own.
        self._steps = [
            (name, Mt19937(self.seed) if name == "xtc" else None)
            for name in names
            if name != "adaptive_p" and is_on(config, name)
        ]
        self._is_greedy = _keeps_the_likeliest(config, names)
        # The likeliest token of all stays that, unless it has a bias itself, or another one is raised.
        self._only_lowered = {id for id, _ in self._bias} if all(amount <= 0 for _, amount in self._bias) else None
        self._vocabulary = np.arange(0)
        self._random = Mt19937(self.seed)
        self._xorshift = llama2c_rng.Xorshift(self.seed)
        self._mu = np.float32(2) * np.float32(config.mirostat_ent)
        self._adaptive = _Average(config) if "adaptive_p" in names and not config.mirostat else None
        self._share = np.float32(0)
        self._recent: deque[int] = deque(maxlen=config.repeat_last_n)
        self._repeated: deque[int] = deque(maxlen=config.dry_penalty_last_n)
        for token in prompt:
            self.accept(token)

    @property
    def is_complete(self) -> bool:
        """Whether a grammar has come to its end, where nothing can follow."""
        return self._grammar is not None and self._grammar.is_complete

    def accept(self, token: int) -> None:
        """Count a token as recent."""
        self._recent.append(token)
        self._repeated.append(token)

    def sample(self, logits: Logits) -> int:
        """The next token for logits (V,) float32; it counts as recent from now on.

        Raises LlamakitError for logits that are not finite, UsageError for a bias of a token that there is not, and
        where no token is left.
        """
        if not math.isfinite(logits.dot(logits)):  # one pass; only what overflows, too, is looked at again
            self._refuse_infinite(logits)
        if self._config.rng == "llama2c":
            token = llama2c_rng.sample(logits, self._config.temperature, self._config.top_p, self._xorshift)
        else:
            token = self._draw(logits)
        self.accept(token)
        return token

    def _draw(self, logits: Logits) -> int:
        """A token from the whole vocabulary and, if the grammar refuses it, one from what that allows.

        As in llama.cpp: most tokens need no mask, and the second draw has random numbers of its own.
        """
        grammar = self._grammar
        token = self._likeliest(logits) if self._is_greedy else self._choose(self._biased(logits))
        if grammar is not None:
            if not grammar.allows(token):
                token = self._draw_allowed(logits, grammar.mask())
            grammar.accept(token)
        if self._adaptive is not None:
            self._adaptive.add(self._share)
        return token

    def _likeliest(self, logits: Logits) -> int:
        """The first largest logit, biases added."""
        lowered, token = self._only_lowered, int(logits.argmax())
        if lowered is not None and token not in lowered and max(lowered, default=0) < len(logits):
            return token
        return int(self._biased(logits).logits.argmax())

    def _draw_allowed(self, logits: Logits, allowed: NDArray[np.bool_]) -> int:
        """A token of those allowed, (V,), whose logits alone are not -inf."""
        possible = np.where(allowed, logits, np.float32(-np.inf))
        if self._is_greedy and not self._bias:
            return int(possible.argmax())
        candidates = self._biased(possible)
        token = self._choose(candidates)
        if allowed[token]:
            return token
        # XTC without a threshold keeps the least likely of all: llama.cpp ends here.
        finite = np.flatnonzero(np.isfinite(candidates.logits))
        return self._choose(Candidates(candidates.ids[finite], candidates.logits[finite]))

    def _refuse_infinite(self, logits: Logits) -> None:
        if not np.isfinite(logits).all():
            bad = int(np.flatnonzero(~np.isfinite(logits))[0])
            raise LlamakitError(
                f"the model computed {logits[bad]} as the logit of token {bad} (expected a finite number)",
                hint="the weights or an adapter are damaged, or the scale of an adapter is too large",
            )

    def _biased(self, logits: Logits) -> Candidates:
        if len(self._vocabulary) != len(logits):
            self._vocabulary = np.arange(len(logits), dtype=np.int64)
            self._vocabulary.flags.writeable = False  # it is used again for the next token
        if not self._bias:
            return Candidates(self._vocabulary, logits)
        bad = next((id for id, _ in self._bias if id >= len(logits)), None)
        if bad is not None:
            raise UsageError(f"--logit-bias has the token {bad} (expected 0 to {len(logits) - 1})")
        candidates = samplers.logit_bias(Candidates(self._vocabulary, logits), self._bias)
        if not np.isfinite(candidates.logits).any():
            hint = "fewer -inf in --logit-bias" + (", or another grammar" if self._grammar else "")
            raise UsageError("no token is left: all are ruled out", hint=hint)
        return candidates

    def _choose(self, c: Candidates) -> int:
        config, n_vocab, uniform = self._config, len(c.ids), self._random.uniform
        if config.mirostat:
            c = samplers.temperature(c, config.temperature)
            tau, eta = config.mirostat_ent, config.mirostat_lr
            if config.mirostat == 1:
                token, self._mu = choice.mirostat(c, self._mu, tau, eta, n_vocab, uniform)
            else:
                token, self._mu = choice.mirostat_v2(c, self._mu, tau, eta, uniform)
            return token
        for name, random in self._steps:
            c = self._step(name, c, random)
        if self._adaptive is None:
            return choice.dist(c, uniform)
        token, self._share = choice.adaptive_p(c, self._adaptive.target(), uniform)
        return token

    def _step(self, name: str, c: Candidates, random: Mt19937 | None) -> Candidates:
        config = self._config
        match name:
            case "penalties":
                strengths = config.repeat_penalty, config.frequency_penalty, config.presence_penalty
                return samplers.penalties(c, Counter(self._recent), *strengths)
            case "dry":
                strengths = config.dry_multiplier, config.dry_base, config.dry_allowed_length
                return dry(c, self._repeated, self._breakers, *strengths)
            case "top_n_sigma":
                return samplers.top_n_sigma(c, config.top_n_sigma)
            case "top_k":
                return samplers.top_k(c, config.top_k)
            case "typ_p":
                return samplers.typical(c, config.typical)
            case "top_p":
                return samplers.top_p(c, config.top_p)
            case "min_p":
                return samplers.min_p(c, config.min_p)
            case "xtc":
                assert random is not None, "each XTC has its own"
                return self._xtc(c, random)
            case _:
                return samplers.dynamic_temperature(c, config.temperature, config.dynatemp_range, config.dynatemp_exp)

    def _xtc(self, c: Candidates, random: Mt19937) -> Candidates:
        """A lot decides whether XTC is applied; none is drawn where one candidate is left."""
        if len(c.ids) < 2 or random.uniform_float() > np.float32(self._config.xtc_probability):
            return c
        return samplers.xtc(c, self._config.xtc_threshold)


class _Average:
    """adaptive-p's moving average of the probabilities of the tokens drawn so far, in float32."""

    def __init__(self, config: GenerateConfig) -> None:
        self._target, self._decay = np.float32(config.adaptive_target), np.float32(config.adaptive_decay)
        one = np.float32(1)
        self._sum, self._weight = self._target / (one - self._decay), one / (one - self._decay)

    def target(self) -> np.float32 | None:
        """What to aim at now, so that the average comes to the target; None where adaptive-p is off."""
        if self._target < 0:
            return None
        aim = np.float32(2) * self._target - self._sum / self._weight
        return np.clip(aim, np.float32(0), np.float32(1))

    def add(self, share: np.float32) -> None:
        """Count one more token."""
        self._sum = share + self._decay * self._sum
        self._weight = np.float32(1) + self._decay * self._weight
