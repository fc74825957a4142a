"""Rotary embeddings as Hugging Face's config.json and as GGUF say them, and the way between both.

Three scalings exist on both sides: linear, yarn (Peng et al. 2023, arXiv 2309.00071) and llama3, which GGUF keeps as a
tensor of divisors, `rope_freqs.weight`. Facts: transformers 5, modeling_rope_utils.py; llama.cpp, conversion/base.py,
conversion/llama.py, src/llama-context.cpp.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llamakit.errors import UnsupportedError
from llamakit.files import escape_control
from llamakit.formats.fields import Fields

_SCALING = "llama.rope.scaling."
#: what transformers 4 and 5 take where a config says nothing, for both classes; GGUF's default is the same
_DEFAULT_THETA = 10000.0
#: GGUF key -> config.json's, for what YaRN's may say and mostly does not
_YARN_OPTIONS = {
    "yarn_ext_factor": "extrapolation_factor",
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
#: pairs of a head up to which parameters are looked for: no model has a tenth of these
_MAX_PAIRS = 4096
#: how near to a tensor the one of the right parameters comes: PyTorch's powf errs in the last places
_TOLERANCE = 4e-6


@dataclass(frozen=True)
class Rope:
    """theta: base of the frequencies. type: default, linear, yarn, llama3; values: its numbers, by config.json's names.

    original_ctx: the context before the scaling, of yarn and llama3.
    """

    theta: float = _DEFAULT_THETA
    type: str = "default"
    values: Mapping[str, float] = field(default_factory=dict)
    original_ctx: int = 0

    def metadata(self) -> dict[str, Any]:
        """GGUF's keys, in the order of convert_hf_to_gguf.py.

        YaRN's `attn_factor` comes on top where the attention factor is not the usual one: it is the key that llama.cpp
        reads for a Llama, and the script does not write it.
        """
        found: dict[str, Any] = {}
        if self.type in ("linear", "yarn"):
            found = {f"{_SCALING}type": self.type, f"{_SCALING}factor": self.values["factor"]}
        if self.type == "yarn":
            found[f"{_SCALING}original_context_length"] = self.original_ctx
            found |= {f"{_SCALING}{ours}": self.values[t] for ours, t in _YARN_OPTIONS.items() if t in self.values}
            extra = self.values.get("attention_factor", self._yarn_magnitude()) / self._yarn_magnitude()
            if abs(extra - 1) > 1e-6:
                found[f"{_SCALING}attn_factor"] = extra
        return found | {"llama.rope.freq_base": self.theta}

    def _yarn_magnitude(self) -> float:
        """The factor on cos and sin that YaRN's paper recommends (eq. 22), and everybody takes by default."""
        return 1 + 0.1 * math.log(self.values["factor"]) if self.values["factor"] > 1 else 1.0

    def config(self) -> dict[str, Any]:
        """config.json's `rope_theta` and `rope_scaling`, which transformers 4 and 5 both understand."""
        scaling: dict[str, Any] | None = None
        if self.type != "default":
            scaling = {"rope_type": self.type, **self.values}
        if scaling is not None and self.type in ("yarn", "llama3"):
            scaling["original_max_position_embeddings"] = self.original_ctx
        return {"rope_theta": self.theta, "rope_scaling": scaling}

    def freqs(self, head_dim: int) -> np.ndarray | None:
        """`rope_freqs.weight`, float32 (head_dim / 2,), of llama3; None for the others."""
        if self.type != "llama3":
            return None
        v = self.values
        return _llama3_divisors(
            self.theta, head_dim, v["factor"], v["low_freq_factor"], v["high_freq_factor"], self.original_ctx
        )


def _llama3_divisors(
    theta: float, head_dim: int, factor: float, low: float, high: float, original_ctx: float
) -> np.ndarray:
    """What each frequency is divided by, float32 (head_dim / 2,): 1 for fast ones, factor for slow ones, else between.

    Rounded operation by operation as PyTorch does for convert_hf_to_gguf.py (a division by a tensor is a product with
    its reciprocal there): the same bits, unless PyTorch's powf was off in its last place.
    """
    one, f32 = np.float32(1), np.float32
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / f32(head_dim)
    frequencies = one / np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    wavelengths = one / frequencies * f32(2 * math.pi)
    with np.errstate(all="ignore"):  # what comes out beside the ramp is not used
        smooth = (one / wavelengths * f32(original_ctx) - f32(low)) / f32(high - low)
        ramp = one / ((one - smooth) / f32(factor) + smooth)
    slow = np.where(wavelengths > original_ctx / low, f32(factor), ramp)
    return np.where(wavelengths < original_ctx / high, one, slow).astype(np.float32)


def rope_of_config(config: Mapping[str, Any], n_ctx: int, path: Any) -> Rope:
    """What a config.json of either generation says: `rope_theta` and `rope_scaling`, or `rope_parameters`.

    As transformers 5 reads it: `rope_scaling` before `rope_parameters`, `rope_type` before the old `type`; theta is
    10000 where neither generation states it, by the definition of both classes; the original context is n_ctx where
    it is not stated. Raises UnsupportedError for other kinds, FormatError naming the field at fault.
    """
    stated = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(stated, dict) or any(isinstance(value, dict) for value in stated.values()):
        raise UnsupportedError("rope parameters that differ between layers are not supported", path=path)
    fields, top = Fields(stated, path), Fields(config, path)
    theta = fields.positive("rope_theta", top.positive("rope_theta", _DEFAULT_THETA))
    if fields.number("partial_rotary_factor", top.number("partial_rotary_factor", 1.0)) != 1:
        raise UnsupportedError("partial_rotary_factor: heads that turn in part are not supported", path=path)
    kind = fields.text("rope_type", fields.text("type", "default"))
    if kind == "default":
        return Rope(theta)
    if kind not in ("linear", "yarn", "llama3"):
        shown = escape_control(kind[:80])
        raise UnsupportedError(f"rope_type is '{shown}' (expected default, linear, yarn or llama3)", path=path)
    values = {"factor": fields.positive("factor")}
    if kind == "linear":
        return Rope(theta, kind, values)
    original = top.integer(
        "original_max_position_embeddings", fields.integer("original_max_position_embeddings", n_ctx)
    )
    if kind == "llama3":
        values |= {name: fields.positive(name) for name in ("low_freq_factor", "high_freq_factor")}
        if values["high_freq_factor"] <= values["low_freq_factor"]:
            raise fields.wrong("high_freq_factor", "more than low_freq_factor")
        return Rope(theta, kind, values, original)
    return Rope(theta, kind, values | _yarn_values(fields, values["factor"]), original)


def _yarn_values(fields: Fields, factor: float) -> dict[str, float]:
    """What YaRN's parameters say beyond the factor."""
    if not fields.flag("truncate", True):
        raise UnsupportedError("truncate: YaRN without whole numbers of pairs is not supported", path=fields.path)
    values = {name: fields.number(name) for name in _YARN_OPTIONS.values() if name in fields}
    mscale, all_dim = fields.number("mscale", 0.0), fields.number("mscale_all_dim", 0.0)
    if mscale and all_dim and "attention_factor" not in values and factor > 1:
        values["attention_factor"] = (1 + 0.1 * mscale * math.log(factor)) / (1 + 0.1 * all_dim * math.log(factor))
    return values


def rope_of_metadata(keys: Fields, n_ctx: int, freqs: np.ndarray | None) -> Rope:
    """What GGUF metadata and `rope_freqs.weight` (float32 (head_dim / 2,), None where absent) say.

    Raises UnsupportedError for what Hugging Face's Llama cannot say, FormatError naming the key at fault.
    """
    theta = shortest(keys.positive("llama.rope.freq_base", _DEFAULT_THETA))
    kind = keys.text(f"{_SCALING}type", "linear")
    factor = shortest(keys.number(f"{_SCALING}factor", keys.number("llama.rope.scale_linear", 0.0)))
    scaled = kind != "none" and factor not in (0.0, 1.0)
    if freqs is not None and not np.all(freqs == 1):
        if scaled:
            raise UnsupportedError(f"{_SCALING}factor and rope_freqs.weight at once are not supported", path=keys.path)
        return _llama3_of(theta, freqs.astype(np.float32), keys.path)
    if not scaled:
        return Rope(theta)
    if factor < 0 or kind not in ("linear", "yarn"):
        raise UnsupportedError(f"{_SCALING}type '{escape_control(kind[:80])}' is not supported", path=keys.path)
    if kind == "linear":
        return Rope(theta, kind, {"factor": factor})
    if keys.number(f"{_SCALING}yarn_ext_factor", 1.0) != 1:
        raise keys.wrong(f"{_SCALING}yarn_ext_factor", "1, transformers has no other")
    values = {theirs: shortest(keys.number(_SCALING + ours)) for ours, theirs in _YARN_OPTIONS.items()
              if _SCALING + ours in keys and ours != "yarn_ext_factor"}  # fmt: skip
    rope = Rope(theta, kind, {"factor": factor, **values}, keys.integer(f"{_SCALING}original_context_length", n_ctx))
    extra = keys.positive(f"{_SCALING}attn_factor", 1.0)
    if extra != 1 and "attention_factor" not in values:
        values["attention_factor"] = shortest(float(np.float32(extra * rope._yarn_magnitude())))
    return Rope(theta, kind, {"factor": factor, **values}, rope.original_ctx)


def _llama3_of(theta: float, freqs: np.ndarray, path: Any) -> Rope:
    """The parameters that give these divisors. Only the ratios of context, low and high can be told from them; low is
    1 in every released model, and taken so."""
    for factor, low, high, original_ctx in _llama3_candidates(theta, freqs):
        there = _llama3_divisors(theta, 2 * len(freqs), factor, low, high, original_ctx)
        if np.allclose(there, freqs, rtol=_TOLERANCE, atol=0):
            values = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            return Rope(theta, "llama3", values, original_ctx)
    raise UnsupportedError(
        "rope_freqs.weight holds divisors that no parameters of rope_type llama3 give", path=path,
        hint="Hugging Face's config.json has no other way to say them",
    )  # fmt: skip


def _llama3_candidates(theta: float, freqs: np.ndarray) -> Iterator[tuple[float, float, float, int]]:
    """(factor, low, high, original context): what real models have first, then round numbers, of which heads of few
    pairs show little, then what the ramp's values solve to."""
    if not np.all(np.isfinite(freqs)) or freqs.min() < 1 or len(freqs) > _MAX_PAIRS:
        return
    factors = dict.fromkeys([shortest(float(freqs.max())), 8.0, 32.0])
    yield from ((factor, 1.0, 4.0, 8192) for factor in factors)
    yield from ((f, 1.0, high, 2**n) for f, high, n in itertools.product(factors, (4.0, 2.0, 8.0), range(5, 22)))
    for factor in factors:
        ramp = (freqs > 1) & (freqs < factor)
        if ramp.sum() < 2:
            continue
        # On the ramp, 1 / divisor = (1 - s) / factor + s, and s = (ctx / wavelength - low) / (high - low) is a line.
        s = (1 / freqs[ramp].astype(np.float64) - 1 / factor) / (1 - 1 / factor)
        turns = theta ** (-2.0 * np.flatnonzero(ramp) / (2 * len(freqs))) / (2 * math.pi)
        slope, offset = np.polyfit(turns, s, 1)
        if not (slope > 0 and offset < 0):
            continue
        high, original_ctx = 1 - 1 / offset, -slope / offset
        if 1 <= original_ctx < 2**31:
            for digits in (0, 1, 2, 4, 8):
                yield factor, 1.0, round(high, digits), round(original_ctx)


def shortest(value: float) -> float:
    """The number with the fewest digits that is this float32: 1e-05, where a GGUF file holds 9.99999974e-06."""
    single = np.float32(value)
    return float(str(single)) if float(single) == value else value
