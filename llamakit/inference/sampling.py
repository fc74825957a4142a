"""From logits to a token: the chain of samplers with its state, in llama.cpp's order (common/sampling.cpp).

With equal logits, seed and configuration the token is llama.cpp's. The functions that are chained: `samplers` leaves
candidates over, `choice` draws among them.
"""

from __future__ import annotations

import secrets
from collections import Counter, deque
from collections.abc import Collection, Sequence

import numpy as np

from llamakit.errors import LlamakitError, UsageError
from llamakit.inference import choice, llama2c_rng, samplers
from llamakit.inference.config import GenerateConfig
from llamakit.inference.dry import Breakers, dry
from llamakit.inference.mt19937 import Mt19937
from llamakit.inference.sampler_names import parse_names
from llamakit.inference.samplers import Candidates, Logits


def log_probability(logits: Logits, token: int) -> float:
    """Natural logarithm of the softmax of logits (V,) at token, in float64."""
    shifted = logits.astype(np.float64) - float(logits.max())
    return float(shifted[token] - np.log(np.exp(shifted).sum()))


def resolve_seed(config: GenerateConfig) -> int:
    """The seed asked for, or a random one in [1, 2**32 - 1) where that is -1 or the largest, as in llama.cpp, or 0
    for llama2.c, whose generator stands still at 0."""
    is_random = config.seed in (-1, 2**32 - 1) or (config.rng == "llama2c" and config.seed == 0)
    return 1 + secrets.randbelow(2**32 - 2) if is_random else config.seed


class Sampler:
    """The whole chain: random numbers, the windows of recent tokens, what Mirostat and adaptive-p have learned.

    seed: the one in use, also when the configuration asked for a random one. banned: tokens never to be drawn;
    breakers: of DRY, see `dry.breakers`.
    """

    def __init__(
        self,
        config: GenerateConfig,
        prompt: Sequence[int] = (),
        *,
        banned: Collection[int] = (),
        breakers: Breakers | None = None,
    ) -> None:
        self.seed = resolve_seed(config)
        self._config = config
        self._bias = [*config.logit_bias, *((id, -np.inf) for id in sorted(banned))]
        self._breakers = breakers or {}
        names = parse_names(config.samplers)
        # Each XTC has random numbers of its own.
        self._steps = [(name, Mt19937(self.seed)) for name in names if name != "adaptive_p"]
        self._random = Mt19937(self.seed)
        self._xorshift = llama2c_rng.Xorshift(self.seed)
        self._mu = np.float32(2) * np.float32(config.mirostat_ent)
        self._adaptive = _Average(config) if "adaptive_p" in names else None
        self._recent: deque[int] = deque(maxlen=config.repeat_last_n)
        self._repeated: deque[int] = deque(maxlen=config.dry_penalty_last_n)
        for token in prompt:
            self.accept(token)

    def accept(self, token: int) -> None:
        """Count a token as recent."""
        self._recent.append(token)
        self._repeated.append(token)

    def sample(self, logits: Logits) -> int:
        """The next token for logits (V,) float32; it counts as recent from now on.

        Raises LlamakitError for logits that are not finite, UsageError for a bias of a token that there is not, and
        where no token is left.
        """
        if not np.isfinite(logits).all():
            bad = int(np.flatnonzero(~np.isfinite(logits))[0])
            raise LlamakitError(
                f"the model computed {logits[bad]} as the logit of token {bad} (expected a finite number)",
                hint="the weights or an adapter are damaged, or the scale of an adapter is too large",
            )
        config = self._config
        if config.rng == "llama2c":
            token = llama2c_rng.sample(logits, config.temperature, config.top_p, self._xorshift)
        else:
            token = self._choose(self._biased(logits))
        self.accept(token)
        return token

    def _biased(self, logits: Logits) -> Candidates:
        bad = next((id for id, _ in self._bias if id >= len(logits)), None)
        if bad is not None:
            raise UsageError(f"--logit-bias has the token {bad} (expected 0 to {len(logits) - 1})")
        candidates = samplers.logit_bias(samplers.whole_vocabulary(logits), self._bias)
        if self._bias and not np.isfinite(candidates.logits).any():
            raise UsageError("no token is left: all are ruled out", hint="fewer -inf in --logit-bias")
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
        token, share = choice.adaptive_p(c, self._adaptive.target(), uniform)
        self._adaptive.add(share)
        return token

    def _step(self, name: str, c: Candidates, random: Mt19937) -> Candidates:
        config = self._config
        match name:
            case "penalties":
                strengths = config.repeat_penalty, config.frequency_penalty, config.presence_penalty
                return samplers.penalties(c, Counter(self._recent), *strengths) if config.repeat_last_n else c
            case "dry":
                if config.dry_multiplier == 0:
                    return c
                strengths = config.dry_multiplier, config.dry_base, config.dry_allowed_length
                return dry(c, self._repeated, self._breakers, *strengths) if config.dry_penalty_last_n else c
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
                return self._xtc(c, random)
            case _:
                return samplers.dynamic_temperature(c, config.temperature, config.dynatemp_range, config.dynatemp_exp)

    def _xtc(self, c: Candidates, random: Mt19937) -> Candidates:
        """A lot decides whether XTC is applied; none is drawn where it is off or one candidate is left."""
        probability, threshold = np.float32(self._config.xtc_probability), self._config.xtc_threshold
        if probability <= 0 or threshold > 0.5 or len(c.ids) < 2 or random.uniform_float() > probability:
            return c
        return samplers.xtc(c, threshold)


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
