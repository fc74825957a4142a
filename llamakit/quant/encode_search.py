"""The searches for the scale of a group of weights: what makes the K-quants and the importance-weighted types good.

Formulas: ggml-quants.c (make_qx_quants, make_q3_quants, make_qkx2_quants, make_qkx3_quants, make_qp_quants). The bytes
must equal those of ggml, so that every float32 operation is done as there: one rounding each, sums from the first
element to the last. Hence no torch.sum (adds in pairs), no addcmul (may fuse), no division with a plain number (torch
may multiply by the reciprocal), no torch.sqrt of float32 (the last bit may be off).

Shapes: S elements of a group, N groups; groups lie side by side, (S, N): a step of a sum is one vector operation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: groups whose largest magnitude is below this are taken as zero (GROUP_MAX_EPS of ggml-quants.c)
TINY = 1e-15
_PASSES = 5


class Fit(NamedTuple):
    """levels: uint8 (S, N); scale: float32 (N,); low: float32 (N,), the weight of level 0, where there is an offset."""

    levels: Tensor
    scale: Tensor
    low: Tensor | None = None


def lanes(blocks: Tensor, size: int) -> Tensor:
    """A copy with groups side by side: (N, B) -> contiguous (size, N * B / size), a block's groups being neighbours."""
    # Not contiguous(), which gives a view where there is one group.
    return blocks.view(-1, size).t().clone(memory_format=torch.contiguous_format)


def unlanes(groups: Tensor, n_blocks: int) -> Tensor:
    """The inverse of `lanes`: (size, N * G) -> contiguous (N, G * size)."""
    return groups.t().contiguous().view(n_blocks, -1)


def nearest(x: Tensor) -> Tensor:
    """Float32 -> int32, half to even: adding 1.5 * 2^23 leaves the integer in the mantissa.

    Beyond +-2^22, where ggml's nearest_int is not defined, it is what its arithmetic gives; NaN is 0.
    """
    return (x + 12582912.0).view(torch.int32).bitwise_and_(0x7FFFFF).sub_(0x400000)


def accumulate(rows: Tensor) -> Tensor:
    """Sum over the first axis, one addition after the other."""
    total = rows[0].clone()
    for row in rows[1:].unbind():
        total.add_(row)
    return total


def divide(number: float, by: Tensor) -> Tensor:
    """number / by, rounded once."""
    return torch.full_like(by, number).div_(by)


def over(x: Tensor, number: float) -> Tensor:
    """x / number in x's memory, rounded once; on some devices torch multiplies by the reciprocal of a plain number."""
    return x.div_(torch.full((), number, dtype=x.dtype, device=x.device))


def root(x: Tensor) -> Tensor:
    """The correctly rounded square root, by way of float64."""
    return x.double().sqrt_().float()


def steps(start: float, step: float, count: int, n_max: int) -> list[float]:
    """start + step * i + n_max for i in 0..count, in float32."""
    return torch.arange(count + 1, dtype=torch.float32).mul_(step).add_(start).add_(n_max).tolist()


def around(n_max: int, reach: int) -> list[float]:
    """n_max + 0.1 i for i in -reach..reach but 0, in float32."""
    offsets = [i for i in range(-reach, reach + 1) if i]
    return torch.tensor(offsets, dtype=torch.float32).mul_(0.1).add_(n_max).tolist()


def largest(x: Tensor) -> Tensor:
    """The signed element of the largest magnitude, the first of several; 0 is positive: (S, N) -> (N,).

    NaN counts as 0: scales are NaN where squares of weights overflow.
    """
    high, low = x.amax(0), x.amin(0)
    if high.isnan().any():
        x = torch.where(x.isnan(), 0.0, x)
        high, low = x.amax(0), x.amin(0)
    peak = torch.where(high >= -low, high, low).add_(0.0)
    tied = (high == -low) & (high > 0)
    if tied.any():
        which = tied.nonzero().view(-1)
        columns = x.index_select(1, which)
        first = columns.abs().eq_(high[which]).argmax(0, keepdim=True)
        peak[which] = columns.gather(0, first).view(-1)
    return peak


def smallest(x: Tensor) -> Tensor:
    """The smallest element; of zeros with both signs the first: (S, N) -> (N,)."""
    low = x.amin(0)
    zero = low == 0
    if zero.any():
        which = zero.nonzero().view(-1)
        columns = x.index_select(1, which)
        low[which] = columns.gather(0, (columns == 0).int().argmax(0, keepdim=True)).view(-1)
    return low


def fit_scale(x: Tensor, weight: Tensor, n_max: int) -> Fit:
    """x ~ scale (level - n_max), level in 0..2 n_max - 1, least squares: 19 scales around that of the largest element.

    Every level of a group that is as good as zero is 0.
    """
    peak = largest(x)
    zero = peak.abs() < TINY
    peak.masked_fill_(zero, torch.inf)  # levels of zero then, and no infinities
    weighted, level = weight * x, torch.empty_like(x)
    products = x.new_empty(x.shape[0], 2, x.shape[1])

    def sums(inverse: Tensor) -> tuple[Tensor, Tensor]:
        torch.mul(x, inverse, out=level)
        level.round_().clamp_(-n_max, n_max - 1)  # |x / peak| <= 1: no level is out of nearest's range
        torch.mul(weighted, level, out=products[:, 0])
        torch.mul(weight, level, out=products[:, 1])
        products[:, 1].mul_(level)
        total = accumulate(products)
        return total[0], total[1]

    chosen = divide(-n_max, peak)
    xl, ll = sums(chosen)
    scale = torch.where(ll != 0, xl / ll, 0.0)
    best = scale * xl
    for numerator in around(n_max, 9):
        inverse = divide(-numerator, peak)
        xl, ll = sums(inverse)
        better = (ll > 0).logical_and_(xl * xl > best * ll)
        torch.where(better, xl / ll, scale, out=scale)
        torch.where(better, scale * xl, best, out=best)
        torch.where(better, inverse, chosen, out=chosen)
    torch.mul(x, chosen, out=level)
    level.round_().clamp_(-n_max, n_max - 1).add_(n_max).masked_fill_(zero, 0)
    return Fit(level.to(torch.uint8), scale.masked_fill_(zero, 0))


def fit_scale_by_descent(x: Tensor, n_max: int) -> Fit:
    """As `fit_scale` with weights x^2, by up to five rounds in which one level after the other is improved."""
    peak = largest(x)
    zero = peak.abs() < TINY
    weight = x * x
    weighted = weight * x
    level = (x * divide(-n_max, peak.masked_fill_(zero, torch.inf))).round_().clamp_(-n_max, n_max - 1)
    xl, ll = accumulate(weighted * level), accumulate(weight * level * level)
    for _ in range(_PASSES):
        changed = torch.zeros_like(zero)
        for element, w, wx, value in zip(x, weight, weighted, level, strict=True):
            rest_xl, rest_ll = xl - wx * value, ll - w * value * value
            new = nearest(element * rest_ll / rest_xl).clamp_(-n_max, n_max - 1).float()
            new_xl, new_ll = rest_xl + wx * new, rest_ll + w * new * new
            better = (rest_xl > 0) & (new != value) & (new_ll > 0) & (new_xl * new_xl * ll > xl * xl * new_ll)
            _replace(better, (new, value), (new_xl, xl), (new_ll, ll))
            changed |= better
        if not changed.any():
            break
    scale = torch.where(ll > 0, xl / ll, 0.0)
    return Fit(level.add_(n_max).masked_fill_(zero, 0).to(torch.uint8), scale.masked_fill_(zero, 0))


def _replace(mask: Tensor, *pairs: tuple[Tensor, Tensor]) -> None:
    """old = new where the mask is set, for every (new, old)."""
    for new, old in pairs:
        torch.where(mask, new, old, out=old)


def fit_positive(x: Tensor, weight: Tensor, n_max: int) -> Fit:
    """x ~ scale * level, level in 0..n_max, for scales that should be positive. Levels are bytes as in ggml: a negative
    one wraps around there, and is used so."""
    peak = x.amax(0).clamp_(min=0)
    zero = peak < TINY
    peak.masked_fill_(zero, torch.inf)
    chosen = _best_inverse(x, weight, n_max, peak)
    level = nearest(x * chosen).clamp_(max=n_max)
    weighted = weight * x
    xl = accumulate(weighted * level.float())
    ll = accumulate(weight * level.float() * level.float())
    stored = (level & 0xFF).float()
    for _ in range(_PASSES):
        changed = torch.zeros_like(zero)
        for element, w, wx, value in zip(x, weight, weighted, stored, strict=True):
            rest_xl, rest_ll = xl - wx * value, ll - w * value * value
            integer = nearest(element * rest_ll / rest_xl).clamp_(max=n_max)
            new = integer.float()
            new_xl, new_ll = rest_xl + wx * new, rest_ll + w * new * new
            better = (rest_xl > 0) & (rest_ll > 0) & (new != value) & (new_xl * new_xl * ll > xl * xl * new_ll)
            _replace(better, ((integer & 0xFF).float(), value), (new_xl, xl), (new_ll, ll))
            changed |= better
        if not changed.any():
            break
    scale = torch.where(ll > 0, xl / ll, 0.0)
    return Fit(stored.masked_fill_(zero, 0).to(torch.uint8), scale.masked_fill_(zero, 0))


def _best_inverse(x: Tensor, weight: Tensor, n_max: int, peak: Tensor) -> Tensor:
    """Of nine inverse scales around n_max / peak the one with the smallest weighted square error."""

    def error(inverse: Tensor, level: Tensor) -> Tensor:
        difference = x - divide(1, inverse) * level.float()
        return accumulate(weight * difference * difference)

    chosen = divide(n_max, peak)
    best = error(chosen, nearest(x * chosen) & 0xFF)
    for numerator in around(n_max, 4):
        inverse = divide(numerator, peak)
        now = error(inverse, nearest(x * inverse).clamp_(max=n_max))
        _replace(now < best, (now.clone(), best), (inverse, chosen))
    return chosen


class _Candidate(NamedTuple):
    """A try of `fit_scale_and_min`: what levels were computed with, and the line through them."""

    inverse: Tensor
    origin: Tensor
    scale: Tensor
    low: Tensor


def fit_scale_and_min(
    x: Tensor, weight: Tensor, n_max: int, *, start: float, step: float, count: int, absolute: bool = False
) -> Fit:
    """x ~ scale * level + low, level in 0..n_max, low <= 0: weighted regression for count + 1 inverse scales.

    absolute: the error to make small is that of magnitudes, not of squares. A step that is accepted moves `low` for
    those after it, too.
    """
    return _RegressionSearch(x, weight, n_max, absolute).run(steps(start, step, count, n_max))


class _RegressionSearch:
    """The scratch memory and constants of `fit_scale_and_min`."""

    def __init__(self, x: Tensor, weight: Tensor, n_max: int, absolute: bool) -> None:
        self.x, self.weight, self.n_max, self.absolute = x, weight, n_max, absolute
        self.sum_w, self.sum_x = accumulate(weight), accumulate(weight * x)
        least = smallest(x)
        self.least = torch.where(least > 0, 0.0, least)
        self.most = x.amax(0)
        self.flat = self.most == self.least
        self.most.masked_fill_(self.flat, torch.inf)  # an inverse scale of 0: levels of 0, and no infinities
        self.level, self.work = torch.empty_like(x), torch.empty_like(x)
        self.products = x.new_empty(x.shape[0], 3, x.shape[1])

    def run(self, numerators: list[float]) -> Fit:
        inverse = divide(self.n_max, self.most - self.least)
        best = _Candidate(inverse, self.least.clone(), divide(1, inverse), self.least.clone())
        self._set_levels(best.inverse, best.origin)
        error = self._error(best.scale, best.low)
        for numerator in numerators:
            inverse = divide(numerator, self.most - best.low)
            self._set_levels(inverse, best.low)
            scale, low, valid = self._regression()
            now = self._error(scale, low)
            better = valid.logical_and_(now < error)
            new = _Candidate(inverse, best.low.clone(), scale, low)
            _replace(better, (now, error), *zip(new, best, strict=True))
        self._set_levels(best.inverse, best.origin)
        levels = self.level.masked_fill_(self.flat, 0).to(torch.uint8)
        return Fit(levels, best.scale.masked_fill_(self.flat, 0), best.low)

    def _set_levels(self, inverse: Tensor, origin: Tensor) -> None:
        torch.sub(self.x, origin, out=self.level)
        self.level.mul_(inverse)
        # The largest level is about n_max; the smallest may be anything where a step has moved the origin.
        smallest_level = (self.least - origin).mul_(inverse).abs_().amax()
        if smallest_level < 1 << 21:
            self.level.round_()
        else:
            self.level.copy_(nearest(self.level))
        self.level.clamp_(0, self.n_max)

    def _regression(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scale and low of the weighted least squares for the levels, and whether there is such a line."""
        products, level = self.products, self.level
        torch.mul(self.weight, level, out=products[:, 0])
        torch.mul(products[:, 0], level, out=products[:, 1])
        torch.mul(products[:, 0], self.x, out=products[:, 2])
        levels, ll, xl = accumulate(products)
        determinant = self.sum_w * ll - levels * levels
        scale = (self.sum_w * xl - self.sum_x * levels).div_(determinant)
        low = (ll * self.sum_x - levels * xl).div_(determinant)
        positive = low > 0
        low.masked_fill_(positive, 0)
        _replace(positive, (xl / ll, scale))
        return scale, low, determinant > 0

    def _error(self, scale: Tensor, low: Tensor) -> Tensor:
        difference = torch.mul(self.level, scale, out=self.work).add_(low).sub_(self.x)
        difference = difference.abs_() if self.absolute else difference.mul_(difference)
        return accumulate(difference.mul_(self.weight))
