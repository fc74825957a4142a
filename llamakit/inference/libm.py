"""C's expf, logf, log2f and powf, in numpy: what glibc, and so llama.cpp on it, computes, to the last bit.

A float32 result rounded from an exact one is not it: glibc works in float64 on short polynomials and is off by one unit
in the last place now and then, logf in one value of a few hundred. Algorithms and constants: Arm Optimized Routines
(math/expf.c, logf.c, log2f.c, powf.c), which glibc 2.27 and later, musl, newlib and bionic have in common.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# 2**(i/32), rounded; and the sixteen reciprocals by which a mantissa is brought close to one.
_EXP2 = np.array([2.0 ** (i / 32) for i in range(32)])
_INVERSES = np.array(
    [float.fromhex(x) for x in (
        "0x1.661ec79f8f3bep+0", "0x1.571ed4aaf883dp+0", "0x1.49539f0f010bp+0", "0x1.3c995b0b80385p+0",
        "0x1.30d190c8864a5p+0", "0x1.25e227b0b8eap+0", "0x1.1bb4a4a1a343fp+0", "0x1.12358f08ae5bap+0",
        "0x1.0953f419900a7p+0", "0x1p+0", "0x1.e608cfd9a47acp-1", "0x1.ca4b31f026aap-1",
        "0x1.b2036576afce6p-1", "0x1.9c2d163a1aa2dp-1", "0x1.886e6037841edp-1", "0x1.767dcf5534862p-1",
    )]
)  # fmt: skip
_LOG = np.array([-math.log(x) if x != 1 else 0.0 for x in _INVERSES.tolist()])
_LOG2 = np.array([-math.log2(x) for x in _INVERSES.tolist()])
_EXP2_POLY = [float.fromhex(x) for x in ("0x1.c6af84b912394p-5", "0x1.ebfce50fac4f3p-3", "0x1.62e42ff0c52d6p-1")]
_LOG_POLY = [float.fromhex(x) for x in ("-0x1.00ea348b88334p-2", "0x1.5575b0be00b6ap-2", "-0x1.ffffef20a4123p-2")]
_LOG2_POLY = [
    float.fromhex(x)
    for x in ("-0x1.712b6f70a7e4dp-2", "0x1.ecabf496832ep-2", "-0x1.715479ffae3dep-1", "0x1.715475f35c8b8p+0")
]
_POW_POLY = [
    float.fromhex(x)
    for x in (
        "0x1.27616c9496e0bp-2", "-0x1.71969a075c67ap-2", "0x1.ec70a6ca7baddp-2", "-0x1.7154748bef6c8p-1",
        "0x1.71547652ab82bp+0",
    )
]  # fmt: skip
_LN2 = math.log(2)
_OFFSET = 0x3F330000  # the bits of about 0.7: mantissas are taken from there to twice of it


def _exp2(x: Doubles) -> Doubles:
    """2**(x/32): a power of two, a table entry, and a polynomial of degree three for the rest."""
    whole = np.rint(x)
    r = (x - whole) / 32
    c0, c1, c2 = _EXP2_POLY
    r2 = r * r
    index = whole.astype(np.int32)
    # The scale goes into the exponent's bits, as in C; its result is an ordinary float64 for all x here.
    scale = np.ldexp(_EXP2[index & 31], index >> 5)
    return ((c0 * r + c1) * r2 + (c2 * r + 1)) * scale


def expf(x: Floats) -> Floats:
    """e**x for x (n,) float32 of any value but nan."""
    bounded = np.maximum(x, np.float32(-104), dtype=np.float64)  # below it is 0, and -inf would make nan
    bounded = np.minimum(bounded, 89.0)
    result = _exp2(bounded * (32 / _LN2))
    with np.errstate(over="ignore"):
        return result.astype(np.float32)


def _reduced(x: Floats) -> tuple[NDArray[np.int32], Doubles, Doubles]:
    """Positive normal x as 2**k * z: (index of the reciprocal nearest to 1/z, z, k)."""
    bits = np.ascontiguousarray(x).view(np.int32)
    offset = bits - np.int32(_OFFSET)
    exponent = offset >> 23
    z = (bits - (exponent << 23)).view(np.float32).astype(np.float64)
    return (offset >> 19) & 15, z, exponent.astype(np.float64)


def _logarithm(x: Floats, table: Doubles, poly: list[float], base: float) -> Floats:
    """Shared by logf and log2f: zero gives -inf, subnormals are scaled up first; a negative x gives nan."""
    tiny = x < np.float32(2.0**-126)
    index, z, k = _reduced(x * np.where(tiny, np.float32(2.0**23), np.float32(1)))
    k -= 23 * tiny
    r = z * _INVERSES[index] - 1
    y0 = table[index] + k * base
    r2 = r * r
    if len(poly) == 3:
        y = (poly[1] * r + poly[2]) + poly[0] * r2
        y = y * r2 + (y0 + r)
    else:
        y = (poly[1] * r + poly[2]) + poly[0] * r2
        y = y * r2 + (poly[3] * r + y0)
    result = y.astype(np.float32)
    special = ~(np.isfinite(x) & (x > 0))
    if special.any():
        result[special] = np.where(x == 0, -np.inf, np.where(x == np.inf, np.inf, np.nan))[special]
    return result


def logf(x: Floats) -> Floats:
    """The natural logarithm of x (n,) float32; 0 gives -inf, what is below nan."""
    return _logarithm(x, _LOG, _LOG_POLY, _LN2)


def log2f(x: Floats) -> Floats:
    """The logarithm to base 2 of x (n,) float32; 0 gives -inf, what is below nan."""
    return _logarithm(x, _LOG2, _LOG2_POLY, 1.0)


@cache
def log_one(x: float) -> np.float32:
    """logf of one number."""
    return logf(np.array([x], dtype=np.float32))[0]


def powf(x: float, y: float) -> np.float32:
    """x**y in float32, for any two numbers; what is not a power of a positive normal number follows C's pow."""
    base, power = np.float32(x), np.float32(y)
    if not (np.isfinite(base) and np.isfinite(power) and base >= np.float32(2.0**-126) and power != 0):
        return _special_power(float(base), float(power))
    index, z, k = _reduced(np.array([base], dtype=np.float32))
    r = float(z[0] * _INVERSES[index[0]] - 1)
    y0 = float(_LOG2[index[0]] + k[0])
    c0, c1, c2, c3, c4 = _POW_POLY
    r2 = r * r
    high, p = c0 * r + c1, c2 * r + c3
    r4, q = r2 * r2, c4 * r + y0
    q = p * r2 + q
    exponent = float(power) * (high * r4 + q)
    if exponent > 128 or exponent <= -150:
        return np.float32(np.inf if exponent > 0 else 0)
    with np.errstate(over="ignore"):
        return _exp2(np.array([exponent * 32])).astype(np.float32)[0]


def _special_power(x: float, y: float) -> np.float32:
    with np.errstate(all="ignore"):
        return np.float32(np.power(np.float64(x), np.float64(y)))
