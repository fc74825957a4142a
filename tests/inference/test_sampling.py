import numpy as np
import pytest

from llamakit.errors import LlamakitError, UsageError
from llamakit.inference import sampling
from llamakit.inference.config import GenerateConfig
from llamakit.inference.sampling import Sampler


def test_temperature_zero_takes_the_first_of_equal_logits():
    assert Sampler(GenerateConfig(temperature=0)).sample(np.float32([0, 5, 1, 5])) == 1


def test_penalty_window_holds_the_last_n_tokens_of_prompt_and_continuation():
    sampler = Sampler(GenerateConfig(temperature=0, repeat_penalty=100, repeat_last_n=2), prompt=[1, 2, 0])
    logits = np.float32([3, 4, 2])
    assert sampler.sample(logits) == 1  # 2 and 0 are recent
    assert sampler.sample(logits) == 2  # 0 and 1 are recent
    assert sampler.sample(logits) == 0  # 1 and 2 are recent


def test_equal_seeds_give_equal_tokens_and_a_random_seed_is_reported():
    logits = np.zeros(1000, np.float32)
    first, again, other = (Sampler(GenerateConfig(seed=s, top_k=0)) for s in (7, 7, 8))
    tokens = [first.sample(logits) for _ in range(20)]
    assert tokens == [again.sample(logits) for _ in range(20)]
    assert tokens != [other.sample(logits) for _ in range(20)]
    random = Sampler(GenerateConfig(top_k=0))
    repeated = Sampler(GenerateConfig(seed=random.seed, top_k=0))
    assert [random.sample(logits) for _ in range(9)] == [repeated.sample(logits) for _ in range(9)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error_that_names_the_token(bad, temperature):
    logits = np.zeros(8, np.float32)
    logits[3] = bad
    with pytest.raises(LlamakitError, match="logit of token 3"):
        Sampler(GenerateConfig(temperature=temperature)).sample(logits)


def test_log_probability_is_the_log_softmax():
    logits = np.float32([1000, 999, 998])
    total = sum(np.exp(sampling.log_probability(logits, i)) for i in range(3))
    assert total == pytest.approx(1)
    assert sampling.log_probability(logits, 0) - sampling.log_probability(logits, 1) == pytest.approx(1)


def _zigzag(n: int = 1000) -> np.ndarray:
    """Distinct logits of -5 to 5 in no order."""
    return (np.arange(n, dtype=np.float32) * 617 % n) / np.float32(n / 10) - 5


# What llama.cpp draws from the zigzag, with seed 11 and a prompt of 1 to 9 twice.
DRAWN = [
    ({}, [141, 128, 329, 645, 188, 376, 598, 410]),
    ({"typical": 0.5}, [517, 34, 611, 269, 517, 611, 222, 175]),
    ({"top_n_sigma": 1.0, "top_k": 0}, [282, 713, 799, 755, 423, 940, 3, 687]),
    ({"xtc_probability": 0.5, "xtc_threshold": 0.02}, [786, 786, 786, 645, 786, 786, 598, 410]),
    ({"dynatemp_range": 0.5, "dynatemp_exp": 1.5}, [141, 128, 329, 645, 188, 376, 598, 457]),
    (
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repeat_penalty": 1.2},
        [141, 175, 376, 786, 235, 470, 833, 645],
    ),
    ({"dry_multiplier": 2.0, "logit_bias": ((1, 9.0), (2, 9.0))}, [2, 1, 1, 1, 1, 2, 1, 1]),
    ({"mirostat": 1}, [282, 491, 141, 961, 47, 611, 175, 81]),
    ({"mirostat": 2, "mirostat_ent": 3.0}, [47, 47, 47, 376, 94, 423, 47, 94]),
    ({"samplers": "top_k;adaptive_p", "adaptive_target": 0.3}, [141, 222, 329, 739, 188, 423, 692, 551]),
]


@pytest.mark.parametrize(("settings", "tokens"), DRAWN, ids=str)
def test_every_sampler_draws_llama_cpps_tokens(settings, tokens):
    sampler = Sampler(GenerateConfig(seed=11, **settings), [*range(1, 10), *range(1, 10)])
    assert [sampler.sample(_zigzag()) for _ in range(8)] == tokens


def test_banned_tokens_are_never_drawn_and_a_bias_needs_its_token():
    logits = np.float32([9, 0, 0])
    assert Sampler(GenerateConfig(temperature=0), banned=[0]).sample(logits) == 1
    assert Sampler(GenerateConfig(temperature=0, logit_bias=((2, 9.5),))).sample(logits) == 2
    with pytest.raises(UsageError, match=r"--logit-bias has the token 3 .expected 0 to 2"):
        Sampler(GenerateConfig(logit_bias=((3, 1.0),))).sample(logits)
    with pytest.raises(UsageError, match="no token is left"):
        Sampler(GenerateConfig(), banned=range(3)).sample(logits)


def test_llama2c_draws_run_cs_tokens():
    sampler = Sampler(GenerateConfig(rng="llama2c", temperature=1.0, top_p=0.9, seed=133742))
    assert [sampler.sample(_zigzag(50)) for _ in range(4)] == [32, 35, 38, 38]
    assert Sampler(GenerateConfig(rng="llama2c", seed=0)).seed != 0
