import dataclasses
import math
import subprocess
import sys

import pytest

from llamakit.errors import UsageError
from llamakit.inference.config import GenerateConfig
from llamakit.inference.sampler_names import parse_letters, parse_names


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("n_predict", -3, "-n"),
        ("temperature", math.nan, "-t"),
        ("top_p", 1.5, "--top-p"),
        ("min_p", -0.1, "--min-p"),
        ("repeat_penalty", 0.0, "--repeat-penalty"),
        ("repeat_penalty", math.inf, "--repeat-penalty"),
        ("repeat_last_n", -1, "--repeat-last-n"),
        ("seed", -2, "--seed"),
        ("seed", 2**32, "--seed"),
        ("ctx", -1, "--ctx"),
        ("dry_base", 0.5, "--dry-base"),
        ("presence_penalty", math.inf, "--presence-penalty"),
        ("top_n_sigma", math.nan, "--top-nsigma"),
        ("typical", 1.5, "--typical"),
        ("xtc_probability", -0.1, "--xtc-probability"),
        ("mirostat", 3, "--mirostat"),
        ("adaptive_decay", 1.0, "--adaptive-decay"),
        ("logit_bias", ((3, math.inf),), "--logit-bias"),
        ("rng", "mine", "--rng"),
    ],
)
def test_values_that_cannot_be_name_their_flag(field, value, flag):
    with pytest.raises(UsageError, match=f"^{flag} is "):
        GenerateConfig(**{field: value})


def test_it_is_frozen_and_needs_no_torch():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerateConfig().seed = 1  # pyright: ignore[reportAttributeAccessIssue]
    code = "import sys, llamakit.inference.config; sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_samplers_have_llama_cpps_spellings_and_an_unknown_one_is_named():
    spelt = "Penalties;top-k;TOPP;nucleus;typ;temp;top_n_sigma;adaptive-p"
    names = ("penalties", "top_k", "top_p", "top_p", "typ_p", "temperature", "top_n_sigma", "adaptive_p")
    assert parse_names(spelt) == names
    assert ";".join(parse_letters("edskypmxt")) == GenerateConfig.samplers
    assert parse_names("") == ()
    with pytest.raises(UsageError, match="unknown sampler 'topq'"):
        GenerateConfig(samplers="top_k;topq")
    with pytest.raises(UsageError, match="unknown sampler 'q'"):
        parse_letters("kq")
    with pytest.raises(UsageError, match="does not have"):
        parse_names("infill")


def test_llama2c_takes_temperature_and_top_p_alone():
    GenerateConfig(rng="llama2c", temperature=0.5, top_p=0.9)
    with pytest.raises(UsageError, match="--min-p does not go with --rng llama2c"):
        GenerateConfig(rng="llama2c", min_p=0.1)
