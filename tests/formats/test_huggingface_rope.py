"""Rotary parameters: both generations of config.json, and llama3's numbers found again in its tensor."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from llamakit.errors import FormatError, LlamakitError, UnsupportedError
from llamakit.formats.fields import Fields
from llamakit.formats.huggingface_rope import Rope, rope_of_config, rope_of_metadata, shortest
from tests.hf import ROPES, hf_config


@pytest.mark.parametrize("name", ROPES)
def test_both_generations_say_the_same(name: str) -> None:
    old, new = (rope_of_config(hf_config(rope=name, generation=g, theta=5e5), 256, "x") for g in (4, 5))
    assert old == new
    assert old.type == name.partition("-")[0]
    assert old.theta == 5e5


def test_details_of_the_older_spellings() -> None:
    assert rope_of_config({"rope_scaling": {"type": "linear", "factor": 2}}, 64, "x") == Rope(
        10000.0, "linear", {"factor": 2.0}
    )
    yarn = {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 2.0}}
    assert rope_of_config(yarn, 64, "x").original_ctx == 64
    assert rope_of_config(yarn | {"original_max_position_embeddings": 32}, 64, "x").original_ctx == 32
    both = {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}
    assert rope_of_config(both, 64, "x") == Rope(7.0)


@pytest.mark.parametrize(
    ("config", "error", "reason"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, UnsupportedError, "rope_type is 'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, UnsupportedError, "rope_type is 'longrope'"),
        ({"rope_scaling": {"rope_type": 3}}, FormatError, "rope_type is 3"),
        ({"rope_scaling": [1]}, UnsupportedError, "differ between layers"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, UnsupportedError, "differ between layers"),
        ({"rope_scaling": {"type": "linear"}}, FormatError, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, FormatError, "factor is -1"),
        ({"rope_theta": 0}, FormatError, "rope_theta is 0"),
        ({"rope_theta": "10000"}, FormatError, "rope_theta is '10000'"),
        ({"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": False}}, UnsupportedError, "truncate"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, FormatError, "low_freq_factor is missing"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            FormatError,
            "high_freq_factor is 4",
        ),
    ],
)
def test_what_is_refused(config: dict[str, Any], error: type[LlamakitError], reason: str) -> None:
    with pytest.raises(error, match=reason):
        rope_of_config(config, 64, "x")


def test_deepseeks_way_of_saying_the_attention_factor() -> None:
    config = {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 2.0, "mscale_all_dim": 1.0}}
    rope = rope_of_config(config, 64, "x")
    usual = 1 + 0.1 * math.log(4)
    assert rope.values["attention_factor"] == pytest.approx((1 + 0.2 * math.log(4)) / usual)


def llama3(theta: float, d: int, factor: float, low: float, high: float, ctx: int) -> np.ndarray:
    """The formula of llama.cpp's conversion/llama.py in float64."""
    found = []
    for i in range(0, d, 2):
        wavelength = 2 * math.pi * theta ** (i / d)
        smooth = (ctx / wavelength - low) / (high - low)
        ramp = 1 / ((1 - smooth) / factor + smooth) if smooth != 0 else factor
        found.append(1 if wavelength < ctx / high else factor if wavelength > ctx / low else ramp)
    return np.array(found, "<f4")


#: theta, head_dim, factor, low, high, original context; the first three are Llama 3.1 8B, 3.2 1B and 3.2 3B
LLAMA3 = [
    (500000.0, 128, 8.0, 1.0, 4.0, 8192),
    (500000.0, 64, 32.0, 1.0, 4.0, 8192),
    (500000.0, 128, 32.0, 1.0, 4.0, 8192),
    (10000.0, 8, 8.0, 1.0, 4.0, 64),
    (1000000.0, 64, 4.0, 1.0, 2.0, 4096),
    (150000.0, 96, 5.5, 1.0, 3.5, 1000),
]


@pytest.mark.parametrize("numbers", LLAMA3)
def test_llama3_is_found_again(numbers: tuple[float, int, float, float, float, int]) -> None:
    theta, head_dim, factor, low, high, ctx = numbers
    tensor = llama3(*numbers)
    rope = rope_of_metadata(Fields({"llama.rope.freq_base": theta}, "x"), 2 * ctx, tensor)
    assert rope == Rope(theta, "llama3", {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}, ctx)
    freqs = rope.freqs(head_dim)
    assert freqs is not None
    assert np.allclose(freqs, tensor, rtol=4e-6, atol=0)


def test_only_ratios_can_be_told() -> None:
    """low, high and context may be doubled together without a change: what is found gives the same divisors."""
    twice = llama3(500000.0, 128, 8.0, 2.0, 8.0, 16384)
    assert np.allclose(twice, llama3(500000.0, 128, 8.0, 1.0, 4.0, 8192), rtol=1e-6)


@pytest.mark.parametrize(
    "tensor",
    [np.linspace(1, 8, 32), np.full(32, 2.0), np.linspace(8, 1, 32), np.zeros(32), np.full(32, np.nan), [1e38] * 32],
)
def test_divisors_of_something_else(tensor: Any) -> None:
    with pytest.raises(UnsupportedError, match="no parameters of rope_type llama3"):
        rope_of_metadata(Fields({"llama.rope.freq_base": 1e4}, "x"), 64, np.asarray(tensor, "<f4"))


def test_metadata_without_a_word_and_divisors_of_one() -> None:
    assert rope_of_metadata(Fields({}, "x"), 64, np.ones(4, "<f4")) == Rope(10000.0)


_S = "llama.rope.scaling."


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({_S + "type": "none", _S + "factor": 4.0}, Rope(10000.0)),
        ({_S + "factor": 4.0}, Rope(10000.0, "linear", {"factor": 4.0})),
        ({"llama.rope.scale_linear": 4.0}, Rope(10000.0, "linear", {"factor": 4.0})),
        ({_S + "type": "yarn", _S + "factor": 4.0}, Rope(10000.0, "yarn", {"factor": 4.0}, 64)),
        (
            {_S + "type": "yarn", _S + "factor": 1.5, _S + "attn_factor": 2.0},
            Rope(10000.0, "yarn", {"factor": 1.5, "attention_factor": 2.081093}, 64),
        ),
    ],
)
def test_scaling_in_metadata(metadata: dict[str, Any], expected: Rope) -> None:
    assert rope_of_metadata(Fields(metadata, "x"), 64, None) == expected


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({_S + "type": "longrope", _S + "factor": 4.0}, "'longrope' is not supported"),
        ({_S + "type": "yarn", _S + "factor": 4.0, _S + "yarn_ext_factor": 0.5}, "yarn_ext_factor is 0.5"),
        ({_S + "factor": float("nan")}, "factor is nan"),
    ],
)
def test_scaling_that_cannot_be_said(metadata: dict[str, Any], reason: str) -> None:
    with pytest.raises(LlamakitError, match=reason):
        rope_of_metadata(Fields(metadata, "x"), 64, None)
    with pytest.raises(UnsupportedError, match="at once"):
        rope_of_metadata(Fields({_S + "factor": 4.0}, "x"), 64, np.full(4, 2.0, "<f4"))


def test_shortest() -> None:
    assert shortest(float(np.float32(1e-5))) == 1e-5
    assert shortest(1e-5) == 1e-5  # no float32 at all
    assert shortest(500000.0) == 500000.0
