"""Every sampler, and whole chains over many tokens, against llama.cpp's own."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from llamakit.formats.open import open_model
from llamakit.inference import choice, samplers
from llamakit.inference.dry import breakers, dry
from llamakit.inference.samplers import Candidates
from llamakit.inference.sampling import Sampler
from llamakit.tokenizer import load_tokenizer
from tests.inference import llama_sampler
from tests.inference.llama_sampler import LlamaSampler
from tests.inference.random_cases import (
    any_logits,
    cases,
    config,
    distinct_logits,
    f32,
    llama_chain,
    possible_logits,
    size,
)
from tests.oracle import llama_vocab
from tests.tiny import cached_tiny_gguf

pytestmark = pytest.mark.interop
NUMBERS = pytest.mark.parametrize(
    "n_cases", [200, pytest.param(10_000, marks=[pytest.mark.prove, pytest.mark.timeout(1800)])]
)
#: name -> (how the argument of a case is drawn, ours, llama.cpp's)
SINGLE = {
    "top_k": (lambda r, n: int(r.integers(-1, n + 5)), samplers.top_k, lambda x: ("top_k", x)),
    "top_p": (lambda r, n: f32(r.choice([0, 1, r.random()])), samplers.top_p, lambda x: ("top_p", x, 0)),
    "min_p": (lambda r, n: f32(r.choice([0, 1, r.random(), 1e-30])), samplers.min_p, lambda x: ("min_p", x, 0)),
    "typical": (lambda r, n: f32(r.choice([0, 1, r.random()])), samplers.typical, lambda x: ("typical", x, 0)),
    "top_n_sigma": (lambda r, n: f32(r.uniform(-1, 5)), samplers.top_n_sigma, lambda x: ("top_n_sigma", x)),
    "temperature": (lambda r, n: f32(r.choice([-1, 0, 1e-30, r.uniform(0.01, 9)])), samplers.temperature, lambda x: ("temp", x)),
    "dynamic": (
        lambda r, n: (f32(r.uniform(0, 2)), f32(r.uniform(-0.1, 2)), f32(r.uniform(0.1, 4))),
        lambda c, x: samplers.dynamic_temperature(c, *x),
        lambda x: ("temp_ext", *x),
    ),
    "xtc": (
        lambda r, n: f32(r.choice([0, 0.5, r.uniform(0, 0.5), 1e-4])),
        samplers.xtc,
        lambda x: ("xtc", 1.0, x, 0, 7),
    ),
}  # fmt: skip


def _same(before: Candidates, ours: Candidates, theirs: llama_sampler.Candidates, keys: np.ndarray) -> None:
    """Equal marks, keys and logits, bit by bit, and the same tokens wherever no tie of keys leaves their order open.

    keys: what is sorted by, for each of the candidates before.
    """
    ids, logits = theirs.read()
    assert ours.is_sorted == theirs.is_sorted
    values, counts = np.unique(keys, return_counts=True)
    key = np.zeros(before.ids.max() + 1, dtype=np.float32)
    key[before.ids] = keys
    assert key[ours.ids].tobytes() == key[ids].tobytes()
    certain = np.isin(key[ids], values[counts == 1])
    assert (ours.ids[certain] == ids[certain]).all()
    if keys is before.logits:  # equal logits stay equal
        certain[:] = True
    assert ours.logits[certain].tobytes() == logits[certain].tobytes()


@NUMBERS
@pytest.mark.parametrize("name", SINGLE)
def test_each_sampler_leaves_the_candidates_that_llama_cpp_leaves(name, n_cases):
    draw, apply, theirs = SINGLE[name]
    for rng in cases(n_cases, seed=1):
        n = size(rng)
        logits = possible_logits(rng, n) if name == "typical" else any_logits(rng, n)
        c = samplers.whole_vocabulary(logits)
        if rng.random() < 0.3:
            c = samplers.top_k(c, n)
        value = draw(rng, n)
        with LlamaSampler(theirs(value)) as sampler:
            expected = sampler.apply(llama_sampler.Candidates(c.ids, c.logits, is_sorted=c.is_sorted))
            in_order = samplers.sort(c) if name == "typical" else c
            keys = samplers.off_entropy(samplers.softmax(in_order)) if name == "typical" else c.logits
            _same(in_order, apply(c, value), expected, keys)


@NUMBERS
def test_penalties_bias_and_dry_change_logits_as_llama_cpps(n_cases):
    for rng in cases(n_cases, seed=2):
        n = size(rng)
        settings = config(rng)
        c = samplers.whole_vocabulary(any_logits(rng, n))
        if rng.random() < 0.3:
            c = samplers.top_k(c, max(1, n // 2))
        few = int(rng.integers(2, min(n, 12)))
        history = rng.choice(c.ids[:few], int(rng.integers(0, 100))).tolist()
        bias = [(int(rng.integers(0, n)), f32(rng.normal(0, 5))) for _ in range(5)]
        strengths = settings.repeat_penalty, settings.frequency_penalty, settings.presence_penalty
        dry_strengths = settings.dry_multiplier, settings.dry_base, settings.dry_allowed_length
        last, dry_last = settings.repeat_last_n, settings.dry_penalty_last_n
        full = samplers.whole_vocabulary(any_logits(rng, n))
        triples = [
            (full, samplers.logit_bias(full, bias), ("logit_bias", n, bias)),
            (c, samplers.penalties(c, Counter(history[-last:]), *strengths) if last else c, ("penalties", n, last, *strengths)),
            (c, dry(c, history[-dry_last:], {}, *dry_strengths) if dry_last and dry_strengths[0] else c, ("dry", None, *dry_strengths, dry_last, None, 0)),
        ]  # fmt: skip
        for before, ours, theirs in triples:
            with LlamaSampler(theirs) as sampler:
                sampler.accept(history)
                array = llama_sampler.Candidates(before.ids, before.logits, is_sorted=before.is_sorted)
                ids, logits = sampler.apply(array).read()
            assert ours.ids.tolist() == ids.tolist(), theirs
            assert ours.logits.tobytes() == logits.tobytes(), theirs
            assert ours.is_sorted == array.is_sorted, theirs


@NUMBERS
def test_greedy_takes_llama_cpps_token(n_cases):
    for rng in cases(n_cases, seed=3):
        c = samplers.whole_vocabulary(any_logits(rng, size(rng)))
        with LlamaSampler(("greedy",)) as sampler:
            assert choice.greedy(c) == sampler.apply(llama_sampler.Candidates(c.ids, c.logits)).selected


def _follows(rng: np.random.Generator, settings, n: int, n_tokens: int, *, wide: bool = True) -> None:
    """Draw several tokens in a row: state, windows and random numbers stay llama.cpp's."""
    vocabulary = int(rng.integers(2, min(n, 20)))
    prompt = rng.integers(0, vocabulary, int(rng.integers(0, 80))).tolist()
    ours = Sampler(settings, prompt)
    with LlamaSampler(*llama_chain(settings, n)) as theirs:
        theirs.accept(prompt)
        for _ in range(n_tokens):
            logits = distinct_logits(rng, n) if wide else possible_logits(rng, n)
            logits[:vocabulary] += np.float32(3)  # so that tokens repeat
            array = theirs.apply(llama_sampler.Candidates(np.arange(n), logits))
            token = ours.sample(logits)
            if token != array.selected and abs(logits[token] - logits[array.selected]) <= 4 * np.spacing(
                np.abs(logits[token])
            ):
                return  # rounding has made a tie of them, whose order llama.cpp leaves open
            assert token == array.selected, (settings.samplers, logits[[token, array.selected]], settings)
            theirs.accept([token])


@NUMBERS
@pytest.mark.parametrize("end", ["dist", "mirostat", "mirostat_v2", "adaptive_p"])
def test_each_way_to_draw_gives_llama_cpps_tokens(end, n_cases):
    for rng in cases(n_cases // 4, seed=4):
        version = {"mirostat": 1, "mirostat_v2": 2}.get(end, 0)
        target = f32(rng.choice([-1, 0, 0.5, 1, rng.random()]))
        settings = config(
            rng, mirostat=version, samplers="top_k;adaptive_p" if end == "adaptive_p" else "", adaptive_target=target,
            adaptive_decay=f32(rng.uniform(0, 0.99)), temperature=f32(rng.uniform(0.1, 2)),
        )  # fmt: skip
        _follows(rng, settings, size(rng), 4)


@NUMBERS
def test_whole_chains_in_any_order_give_llama_cpps_tokens(n_cases):
    for rng in cases(n_cases // 5, seed=5):
        settings = config(rng)
        is_typical = "typ_p" in settings.samplers and settings.typical < 1
        n = min(size(rng), 200) if is_typical else size(rng)
        bias = tuple((int(i), f32(rng.normal())) for i in rng.integers(0, n, 3))
        if is_typical:  # before what rules tokens out, and where surprises do not tie: see `possible_logits`
            names = [name for name in settings.samplers.split(";") if name != "typ_p"]
            settings = replace(settings, samplers=";".join(["typ_p", *names]))
        if settings.xtc_threshold == 0:  # it would leave one of the tokens that are ruled out before, no matter which
            settings = replace(settings, xtc_threshold=f32(1e-30))
        _follows(rng, replace(settings, logit_bias=bias), n, 5, wide=not is_typical)


@pytest.mark.parametrize("tokenizer", ["spm", "bpe"])
def test_dry_with_sequence_breakers_of_a_vocabulary_changes_logits_as_llama_cpps(tokenizer):
    path = cached_tiny_gguf(tokenizer=tokenizer)
    ours, theirs = load_tokenizer(open_model(path)), llama_vocab(path)
    for rng in cases(40, seed=6):
        texts = [["\n", ":", '"', "*"], ["the", "he k", " and", "é"], ["king of", "x" * 50]][rng.integers(3)]
        known = breakers(ours, texts)
        few = rng.permutation([*known, *range(3, 40)])[: int(rng.integers(3, 9))]
        c = samplers.whole_vocabulary(distinct_logits(rng, ours.n_vocab))
        for _ in range(10):
            history = rng.choice(few, 64).tolist()
            with LlamaSampler(("dry", theirs.pointer, 0.8, 1.75, 1, 64, texts)) as sampler:
                sampler.accept(history)
                _, logits = sampler.apply(llama_sampler.Candidates(c.ids, c.logits)).read()
            assert dry(c, history, known, 0.8, 1.75, 1).logits.tobytes() == logits.tobytes()


@pytest.mark.parametrize("highest", [np.inf, -np.inf])
def test_a_draw_among_infinite_logits_takes_llama_cpps_token(highest):
    c = Candidates(np.array([4, 2, 9]), np.float32([highest] * 3), True)
    with LlamaSampler(("dist", 5)) as sampler:
        expected = sampler.apply(llama_sampler.Candidates(c.ids, c.logits, is_sorted=True)).selected
    assert choice.dist(c, lambda: 0.5) == expected
