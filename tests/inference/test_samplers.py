import numpy as np

from llamakit.inference import samplers
from llamakit.inference.samplers import Candidates


def _all(*logits: float) -> Candidates:
    return samplers.whole_vocabulary(np.float32(logits))


def test_top_k_keeps_the_largest_sorted_and_breaks_ties_by_id():
    kept = samplers.top_k(_all(1, 3, 3, 2, 3), 2)
    assert (kept.ids.tolist(), kept.logits.tolist(), kept.is_sorted) == ([1, 2], [3, 3], True)
    assert samplers.top_k(_all(1, 3), 0).ids.tolist() == [0, 1]
    assert samplers.top_k(_all(1, 3), 9).ids.tolist() == [1, 0]
    many = np.arange(5000, dtype=np.float32) * 1234 % 4999
    expected = sorted(range(5000), key=lambda i: (-many[i], i))
    assert samplers.top_k(samplers.whole_vocabulary(many), 30).ids.tolist() == expected[:30]
    assert samplers.sort(samplers.whole_vocabulary(many)).ids.tolist() == expected


def test_top_p_keeps_the_shortest_prefix_that_reaches_p():
    c = _all(*np.log(np.float32([0.2, 0.5, 0.3])))
    assert samplers.top_p(c, 0.45).ids.tolist() == [1]
    assert samplers.top_p(c, 0.75).ids.tolist() == [1, 2]
    assert samplers.top_p(c, 1.0).ids.tolist() == [0, 1, 2]
    assert samplers.top_p(c, 0.0).ids.tolist() == [1]


def test_min_p_is_relative_to_the_likeliest():
    c = _all(*np.log(np.float32([0.04, 0.7, 0.26])))
    assert samplers.min_p(c, 0.1).ids.tolist() == [1, 2]
    assert samplers.min_p(c, 1.0).ids.tolist() == [1]


def test_penalties_divide_positive_and_multiply_negative_logits_and_count():
    c = _all(2, -2, 2)
    assert samplers.penalties(c, {0: 1, 1: 2}, 2.0, 0.0, 0.0).logits.tolist() == [1, -4, 2]
    assert samplers.penalties(c, {0: 1, 1: 2}, 1.0, 0.5, 0.25).logits.tolist() == [1.25, -3.25, 2]
    assert c.logits.tolist() == [2, -2, 2]


def test_top_n_sigma_rules_out_what_lies_far_below_the_highest():
    assert samplers.top_n_sigma(_all(4, 2, 0, -np.inf), 1.5).logits.tolist() == [4, 2, -np.inf, -np.inf]


def test_xtc_leaves_the_least_likely_of_the_likely():
    c = _all(*np.log(np.float32([0.2, 0.5, 0.25, 0.05])))
    assert samplers.xtc(c, 0.19).ids.tolist() == [0, 3]
    assert samplers.xtc(c, 0.3).ids.tolist() == [1, 2, 0, 3]


def test_temperature_zero_leaves_the_first_of_equal_logits():
    assert samplers.temperature(_all(0, 5, 1, 5), -1.0).logits.tolist() == [-np.inf, 5, -np.inf, -np.inf]
