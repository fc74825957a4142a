"""How far a model's predictions are from a base model's: llama-perplexity's Kullback-Leibler statistics.

The base model's log-probabilities come from its file (`formats/kl_base.py`). Numbers are rounded where llama.cpp rounds
them (tools/perplexity/perplexity.cpp): what belongs to one token is float32, and so is every product of two such
numbers; sums over tokens are float64.

Shapes: T n_ctx, n positions, N all scored positions, V n_vocab, W u16 words of a row of the file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from llamakit.errors import FormatError, MismatchError
from llamakit.formats.kl_base import KLBaseFile, n_scored
from llamakit.inference.config import PerplexityConfig
from llamakit.inference.perplexity import scored_logits
from llamakit.model import Llama

#: tokens of the base less likely than e to this do not count
_LEAST_LOG_P = -16.0
#: statistics over fewer positions than this say nothing
_LEAST_FOR_TABLE = 100
_KLD_SHARES = (0.999, 0.99, 0.95, 0.9, 0.5, 0.1, 0.05, 0.01, 0.001)
_DELTA_P_SHARES = (0.999, 0.99, 0.95, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.01, 0.001)


@dataclass(frozen=True)
class Uncertain:
    """A value and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Divergence:
    """The statistics after `chunk` chunks (from 1), over `count` tokens.

    ppl, base_ppl: perplexity of the model and of the base (whose 16-bit file makes it a little smaller than it is).
    log_ratio: ln(ppl / base_ppl). kld: mean divergence in nats. rms_delta_p: root mean square of the difference in the
    probability of the token that stands in the text. same_top: share of positions with the same likeliest token.
    """

    chunk: int
    count: int
    ppl: Uncertain
    base_ppl: Uncertain
    log_ratio: Uncertain
    kld: Uncertain
    rms_delta_p: Uncertain
    same_top: Uncertain


@dataclass(frozen=True)
class DivergenceTable:
    """What llama-perplexity shows at the end. correlation: of the two logarithms of the perplexity.

    kld_shares, delta_p_shares: share of the positions -> the value that they stay below; 0 is the least, 1 the largest.
    """

    last: Divergence
    correlation: float
    ratio: Uncertain
    difference: Uncertain
    mean_delta_p: Uncertain
    kld_shares: dict[float, float]
    delta_p_shares: dict[float, float]


def divergence(
    model: Llama, base: KLBaseFile, seen: np.ndarray, config: PerplexityConfig
) -> Iterator[Divergence | DivergenceTable]:
    """A Divergence after every chunk; then the table, if there are 100 scored positions.

    seen: the first chunks of the base's tokens, (B, T), as the model sees them (`chunks.with_bos`).
    Raises MismatchError for a file of another vocabulary, FormatError for one, or for a model, with numbers that are
    none.
    """
    if base.n_vocab != model.config.n_vocab:
        raise MismatchError(
            f"holds log-probabilities of {base.n_vocab} tokens (the model has {model.config.n_vocab})",
            path=base.path,
            hint="both models must have the same vocabulary",
        )
    first, n_rows = base.n_ctx // 2, n_scored(base.n_ctx)
    sums = _Sums()
    rows = base.rows(0)
    for chunk, at, logits in scored_logits(model, seen, config):
        rows = base.rows(chunk) if at == 0 else rows
        stop = at + len(logits)
        targets = base.tokens[chunk, first + 1 + at : first + 1 + stop]
        if not sums.add(logits, rows[at:stop], targets):
            raise FormatError(f"no finite divergence in chunk {chunk + 1}", path=base.path)
        if stop == n_rows:
            yield sums.report(chunk + 1)
    if sums.count >= _LEAST_FOR_TABLE:
        yield sums.table(len(seen))


def check_same_text(base: KLBaseFile, tokens: np.ndarray, text: str | os.PathLike[str]) -> None:
    """Refuse the ids (n,) of a text that are not those that the base's file was made of. Raises MismatchError."""
    count = min(len(tokens), base.tokens.size)
    different = np.flatnonzero(tokens[:count] != base.tokens.reshape(-1)[:count])
    if len(different):
        at = int(different[0])
        found = f"its token {at + 1} is {tokens[at]}, which is {base.tokens.flat[at]} in {base.path}"
    elif count < base.tokens.size:
        found = f"it has {count} tokens (expected the {base.tokens.size} of {base.path})"
    else:
        return
    raise MismatchError(
        f"is not the text of the base's log-probabilities: {found}",
        path=text,
        hint="leave -f out: the file has its ids",
    )


@dataclass
class _Sums:
    """Sums over tokens: q the model's negative log-likelihood, b the base's, k the divergence, d the difference of
    the probabilities."""

    count: int = 0
    q: float = 0.0
    qq: float = 0.0
    b: float = 0.0
    bb: float = 0.0
    qb: float = 0.0
    k: float = 0.0
    kk: float = 0.0
    d: float = 0.0
    dd: float = 0.0
    dddd: float = 0.0
    n_same_top: int = 0
    klds: list[np.ndarray] = field(default_factory=list)
    delta_ps: list[np.ndarray] = field(default_factory=list)

    def add(self, logits: Tensor, rows: np.ndarray, targets: np.ndarray) -> bool:
        """Take logits (n, V) float32, the base's rows (n, W) uint16, token ids (n,); whether all is finite."""
        index = torch.from_numpy(targets.astype(np.int64)).to(logits.device)[:, None]
        base = _log_probs(rows, logits.shape[1]).to(logits.device)
        top = logits.amax(dim=-1, keepdim=True)
        log_sum = (logits - top).exp_().sum(dim=-1, keepdim=True, dtype=torch.float64).log().float()
        q = _numpy((top + log_sum - logits.gather(-1, index))[:, 0])
        b = _numpy(-base.gather(-1, index)[:, 0])
        self.n_same_top += int((logits.argmax(dim=-1) == base.argmax(dim=-1)).sum())
        terms = base.exp() * (base - logits + (top + log_sum))
        k = _numpy(terms.masked_fill_(base <= _LEAST_LOG_P, 0).sum(dim=-1, dtype=torch.float64))
        d = np.exp(-q) - np.exp(-b)
        dd = (d * d).astype(np.float64)
        self.count += len(q)
        for name, values in (
            ("q", q), ("qq", q * q), ("b", b), ("bb", b * b), ("qb", q * b),
            ("k", k), ("kk", k * k), ("d", d), ("dd", dd), ("dddd", dd * dd),
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) + float(values.sum(dtype=np.float64)))
        self.klds.append(k.astype(np.float32))
        self.delta_ps.append(d)
        return math.isfinite(self.q + self.b + self.kk)

    def report(self, chunk: int) -> Divergence:
        """The statistics so far."""
        q, b = _mean(self.q, self.qq, self.count), _mean(self.b, self.bb, self.count)
        mse = _mean(self.dd, self.dddd, self.count)
        rms = math.sqrt(mse.value)
        same = self.n_same_top / self.count
        return Divergence(
            chunk=chunk,
            count=self.count,
            ppl=_exp(q),
            base_ppl=_exp(b),
            log_ratio=Uncertain(q.value - b.value, _difference_error(q.error, b.error, self._covariance())),
            kld=_mean(self.k, self.kk, self.count),
            rms_delta_p=Uncertain(rms, 0.5 / rms * mse.error if rms else 0.0),
            same_top=Uncertain(same, math.sqrt(same * (1 - same) / (self.count - 1)) if self.count > 1 else 0.0),
        )

    def table(self, chunk: int) -> DivergenceTable:
        """The statistics at the end."""
        last = self.report(chunk)
        q, b = _mean(self.q, self.qq, self.count), _mean(self.b, self.bb, self.count)
        covariance, ppl, base = self._covariance(), last.ppl, last.base_ppl
        error = _difference_error(ppl.error, base.error, ppl.value * base.value * covariance)
        return DivergenceTable(
            last=last,
            correlation=covariance / (q.error * b.error) if q.error * b.error else math.nan,
            ratio=_exp(last.log_ratio),
            difference=Uncertain(ppl.value - base.value, error),
            mean_delta_p=_mean(self.d, self.dd, self.count),
            kld_shares=_shares(np.concatenate(self.klds), _KLD_SHARES),
            delta_p_shares=_shares(np.concatenate(self.delta_ps), _DELTA_P_SHARES),
        )

    def _covariance(self) -> float:
        """Of the means of q and b."""
        if self.count < 10:
            return 0.0
        return (self.qb / self.count - (self.q / self.count) * (self.b / self.count)) / (self.count - 1)


def _log_probs(rows: np.ndarray, n_vocab: int) -> Tensor:
    """(n, V) float32 of rows (n, W): scale * step + minimum."""
    head = np.ascontiguousarray(rows[:, :4]).view("<f4")
    with np.errstate(over="ignore"):  # what is no number is found in the sums
        log_probs = head[:, :1] * rows[:, 4 : 4 + n_vocab].astype(np.float32) + head[:, 1:]
    return torch.from_numpy(log_probs)


def _numpy(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()


def _mean(total: float, total2: float, count: int) -> Uncertain:
    """From a sum and a sum of squares; up to 10 values give no error."""
    mean = total / count
    variance = total2 / count - mean * mean
    return Uncertain(mean, math.sqrt(variance / (count - 1)) if variance > 0 and count > 10 else 0.0)


def _exp(log: Uncertain) -> Uncertain:
    value = math.exp(min(log.value, 700.0))
    return Uncertain(value, value * log.error)


def _difference_error(a: float, b: float, covariance: float) -> float:
    """Standard error of a difference, from the errors and the covariance of what it is of."""
    return math.sqrt(max(0.0, a * a + b * b - 2 * covariance))


def _shares(values: np.ndarray, shares: tuple[float, ...]) -> dict[float, float]:
    """Least, percentiles and largest of (N,) float32, from the largest down; linear between neighbours, in float32."""
    values = np.sort(values)
    return {1.0: float(values[-1]), **{share: _percentile(values, share) for share in shares}, 0.0: float(values[0])}


def _percentile(ordered: np.ndarray, share: float) -> float:
    if share == 0.5:  # exactly the middle, which float32 places would miss
        middle = len(ordered) // 2
        return float(ordered[middle] if len(ordered) % 2 else np.float32(0.5) * (ordered[middle] + ordered[middle - 1]))
    place = np.float32(share) * np.float32(len(ordered) - 1)
    index = int(place)
    rest = place - np.float32(index)
    return float((1 - rest) * ordered[index] + rest * ordered[min(index + 1, len(ordered) - 1)])
