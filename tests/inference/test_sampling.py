import numpy as np
import pytest

from llamakit.errors import LlamakitError, UsageError
from llamakit.inference import choice, sampling
from llamakit.inference.config import GenerateConfig
from llamakit.inference.samplers import Candidates
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
    logprobs = sampling.log_probabilities(logits)
    assert np.exp(logprobs).sum() == pytest.approx(1)
    assert logprobs[0] - logprobs[1] == pytest.approx(1)


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


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_p": 0.0},
        {"top_n_sigma": 0.5, "min_p": 1.0},
        {"samplers": "temperature;top_k", "top_k": 0},
        {"logit_bias": tuple((id, -np.inf) for id in range(200))},
        {"logit_bias": ((3, -20.0), (5, 0.5), (5, -0.25), (7, -0.5), (9, 1.0))},
    ],
    ids=str,
)
def test_the_short_way_to_the_likeliest_token_is_the_long_one(settings):
    short, long = (Sampler(GenerateConfig(temperature=0, **settings)) for _ in range(2))
    assert short._is_greedy
    long._is_greedy = False
    rng = np.random.default_rng(1)
    for _ in range(20):
        logits = rng.integers(-9, 9, 300).astype(np.float32)  # many ties
        assert short.sample(logits) == long.sample(logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"repeat_penalty": 1.1},
        {"dry_multiplier": 1.0},
        {"typical": 0.5},
        {"xtc_probability": 1.0},
        {"dynatemp_range": 0.5},
        {"mirostat": 2},
        {"samplers": "top_k"},
        {"samplers": "adaptive_p;temperature"},
    ],
    ids=str,
)
def test_what_may_drop_the_likeliest_token_takes_the_long_way(settings):
    assert not Sampler(GenerateConfig(temperature=0, **settings))._is_greedy


@pytest.mark.parametrize("highest", [np.inf, -np.inf])
def test_infinite_logits_in_the_chain_leave_the_last_candidate_as_in_llama_cpp(highest):
    c = Candidates(np.array([4, 2, 9]), np.float32([highest] * 3), True)
    assert choice.dist(c, lambda: 0.1) == 9


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({}, "?penalties -> ?dry -> ?top-n-sigma -> top-k -> ?typical -> top-p -> min-p -> ?xtc -> temp-ext -> dist"),
        (
            {"presence_penalty": 1.0, "dry_multiplier": 0.5, "top_n_sigma": 1.0, "top_k": 0, "typical": 0.5,
             "top_p": 1.0, "min_p": 0.0, "xtc_probability": 0.5, "temperature": 1.0, "logit_bias": ((1, 1.0),)},
            "logit-bias -> penalties -> dry -> top-n-sigma -> ?top-k -> typical -> ?top-p -> ?min-p -> xtc -> "
            "?temp-ext -> dist",
        ),
        ({"samplers": "top_k;adaptive_p"}, "top-k -> adaptive-p"),
        ({"mirostat": 1}, "temp -> mirostat"),
        ({"mirostat": 2, "temperature": 1.0}, "?temp -> mirostat-v2"),
        ({"rng": "llama2c"}, "temp -> top-p -> run.c"),
    ],
)  # fmt: skip
def test_the_chain_is_shown_as_llama_cpp_shows_it(settings, shown):
    assert sampling.shown_chain(GenerateConfig(**settings)) == f"logits -> {shown}"
    if not settings:
        assert sampling.shown_chain(GenerateConfig(), banned=True) == f"logits -> logit-bias -> {shown}"


def test_the_likeliest_are_in_falling_order_and_equal_ones_by_id():
    logprobs = np.log(np.array([0.1, 0.3, 0.1, 0.3, 0.2]))
    assert [id for id, _ in sampling.likeliest(logprobs, 4)] == [1, 3, 4, 0]
    assert len(sampling.likeliest(logprobs, 99)) == 5
    assert sampling.likeliest(logprobs, 0) == ()
