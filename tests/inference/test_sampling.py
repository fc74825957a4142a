import numpy as np
import pytest

from llamakit.errors import LlamakitError
from llamakit.inference import sampling
from llamakit.inference.config import GenerateConfig
from llamakit.inference.sampling import Sampler
from tests.inference.llama_sampler import Candidates, LlamaSampler


def _logits(rng: np.random.Generator, n: int | None = None) -> np.ndarray:
    """Distinct logits: llama.cpp leaves the order of equal ones open."""
    n = n or int(rng.integers(2, 3000))
    while True:
        logits = rng.normal(0, rng.uniform(0.5, 8), n).astype(np.float32)
        if len(np.unique(logits)) == n:
            return logits


def _cases(n: int, seed: int):
    return (np.random.default_rng([seed, i]) for i in range(n))


def _all(logits: np.ndarray):
    return np.arange(len(logits), dtype=np.int64), logits


def test_top_k_keeps_the_largest_sorted_and_breaks_ties_by_id():
    ids, logits = sampling.top_k(*_all(np.float32([1, 3, 3, 2, 3])), 2)
    assert ids.tolist() == [1, 2]
    assert logits.tolist() == [3, 3]
    assert sampling.top_k(*_all(np.float32([1, 3])), 0)[0].tolist() == [0, 1]
    assert sampling.top_k(*_all(np.float32([1, 3])), 9)[0].tolist() == [1, 0]


def test_top_p_keeps_the_shortest_prefix_that_reaches_p():
    logits = np.log(np.float32([0.2, 0.5, 0.3]))
    assert sampling.top_p(*_all(logits), 0.45)[0].tolist() == [1]
    assert sampling.top_p(*_all(logits), 0.75)[0].tolist() == [1, 2]
    assert sampling.top_p(*_all(logits), 1.0)[0].tolist() == [0, 1, 2]
    assert sampling.top_p(*_all(logits), 0.0)[0].tolist() == [1]


def test_min_p_is_relative_to_the_likeliest():
    logits = np.log(np.float32([0.04, 0.7, 0.26]))
    assert sampling.min_p(*_all(logits), 0.1)[0].tolist() == [1, 2]
    assert sampling.min_p(*_all(logits), 1.0)[0].tolist() == [1]


def test_penalty_divides_positive_and_multiplies_negative_logits():
    logits = np.float32([2, -2, 2])
    assert sampling.penalize(logits, [0, 1, 0], 2.0).tolist() == [1, -4, 2]
    assert logits.tolist() == [2, -2, 2]


def test_temperature_zero_takes_the_first_of_equal_logits():
    assert Sampler(GenerateConfig(temperature=0)).sample(np.float32([0, 5, 1, 5])) == 1
    assert sampling.temperature(*_all(np.float32([0, 5, 1, 5])), -1.0)[0].tolist() == [1]


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


@pytest.mark.interop
@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "temp"])
def test_each_sampler_leaves_the_candidates_that_llama_cpp_leaves(name, is_sorted):
    for rng in _cases(150, seed=1):
        ids, logits = _all(_logits(rng))
        if is_sorted:
            ids, logits = sampling.top_k(ids, logits, len(ids))
        value = {"top_k": int(rng.integers(-1, len(ids) + 5))}.get(name, float(np.float32(rng.uniform(0, 1))))
        arguments = (value,) if name in ("top_k", "temp") else (value, 0)
        ours = getattr(sampling, {"temp": "temperature"}.get(name, name))(ids, logits, value)
        with LlamaSampler((name, *arguments)) as sampler:
            their_ids, their_logits = sampler.apply(Candidates(ids, logits, is_sorted=is_sorted)).read()
        assert ours[0].tolist() == their_ids.tolist()
        assert ours[1].tobytes() == their_logits.tobytes()


@pytest.mark.interop
def test_penalties_are_llama_cpps():
    for rng in _cases(200, seed=2):
        logits = _logits(rng)
        last_n, repeat = int(rng.integers(0, 80)), float(np.float32(rng.uniform(0.5, 2)))
        history = rng.integers(0, len(logits), int(rng.integers(0, 100))).tolist()
        ours = sampling.penalize(logits, history[-last_n:] if last_n else [], repeat)
        with LlamaSampler(("penalties", len(logits), last_n, repeat, 0.0, 0.0)) as sampler:
            sampler.accept(history)
            _, theirs = sampler.apply(Candidates(*_all(logits))).read()
        assert ours.tobytes() == theirs.tobytes()


@pytest.mark.interop
def test_dist_draws_llama_cpps_tokens():
    for rng in _cases(100, seed=3):
        logits, seed = _logits(rng), int(rng.integers(0, 2**32 - 1))
        ours = Sampler(GenerateConfig(top_k=0, top_p=1, min_p=0, temperature=1, seed=seed))
        with LlamaSampler(("dist", seed)) as sampler:
            theirs = [sampler.apply(Candidates(*_all(logits))).selected for _ in range(5)]
        assert [ours.sample(logits) for _ in range(5)] == theirs


@pytest.mark.interop
def test_greedy_is_llama_cpps():
    for rng in _cases(100, seed=4):
        logits = rng.integers(0, 5, 200).astype(np.float32)
        with LlamaSampler(("greedy",)) as sampler:
            theirs = sampler.apply(Candidates(*_all(logits))).selected
        assert Sampler(GenerateConfig(temperature=0)).sample(logits) == theirs


@pytest.mark.interop
def test_the_whole_chain_gives_llama_cpps_tokens():
    for rng in _cases(200, seed=5):
        n = int(rng.integers(2, 3000))
        config = GenerateConfig(
            temperature=float(np.float32(rng.uniform(0.1, 2))),
            top_k=int(rng.choice([0, 1, 5, 40, 200])),
            top_p=float(np.float32(rng.choice([0.3, 0.95, 1.0]))),
            min_p=float(np.float32(rng.choice([0.0, 0.05, 0.3]))),
            repeat_penalty=float(np.float32(rng.choice([1.0, 1.1, 1.5]))),
            repeat_last_n=int(rng.choice([0, 3, 64])),
            seed=int(rng.integers(0, 2**32 - 1)),
        )
        prompt = rng.integers(0, n, 10).tolist()
        ours = Sampler(config, prompt)
        chain = (
            ("penalties", n, config.repeat_last_n, config.repeat_penalty, 0.0, 0.0),
            ("top_k", config.top_k),
            ("top_p", config.top_p, 0),
            ("min_p", config.min_p, 0),
            ("temp", config.temperature),
            ("dist", config.seed),
        )
        with LlamaSampler(*chain) as theirs:
            theirs.accept(prompt)
            for _ in range(5):
                logits = _logits(rng, n)
                token = theirs.apply(Candidates(*_all(logits))).selected
                assert ours.sample(logits) == token
                theirs.accept([token])
