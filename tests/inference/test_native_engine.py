"""The native engine beside the torch model in float32, for every type, shape and instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamakit import native
from llamakit.errors import MismatchError
from llamakit.formats.adapter import Adapter
from llamakit.formats.gguf import GGUFFile
from llamakit.inference.engine import Logits, TorchEngine
from llamakit.inference.native_engine import NativeEngine, native_library
from llamakit.model import load_config, load_model
from tests.tiny import cached_tiny_gguf

TILED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "F16", "BF16", "F32")
#: the largest error of a logit, of the largest logit: float32 sums in another order; int8 or bfloat16 activations
EXACT, ROUNDED = 1e-5, 0.06
IDS = np.random.default_rng(3).integers(3, 260, size=61).tolist()

pytestmark = pytest.mark.skipif(not native.status().isas, reason="the native library is not built")


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in native.status().isas:
        pytest.skip(f"this processor has no {request.param}")
    with native.using(request.param):
        yield request.param


def engine(path: Path, n_threads: int = 2) -> NativeEngine:
    file = GGUFFile(path)
    config = load_config(file)
    code = native_library(file, config)
    assert code is not None
    return NativeEngine(file, config, code, n_threads=n_threads)


def reference(path: Path) -> TorchEngine:
    return TorchEngine(load_model(GGUFFile(path)))


def last_logits(runner: Any, parts: list[list[int]], n_ctx: int = 128) -> Logits:
    context = runner.context(n_ctx)
    logits = np.empty(0)
    for part in parts:
        logits = runner.feed(context, part)
    assert context.n_past == sum(map(len, parts))
    return logits.copy()


def error(logits: Logits, expected: Logits) -> float:
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


def one_by_one(ids: list[int]) -> list[list[int]]:
    return [[id_] for id_ in ids]


@pytest.mark.parametrize(
    "type",  # every third by default
    [pytest.param(type, marks=[pytest.mark.slow] if number % 3 else []) for number, type in enumerate(TILED)],
)
def test_every_type_gives_the_logits_of_the_torch_model(type, isa):
    path = cached_tiny_gguf(type=type, n_embd=256, n_ff=512, n_head=4, n_head_kv=2)
    expected = last_logits(reference(path), [IDS])
    runner, limit = engine(path), EXACT if type in ("F32", "F16") else ROUNDED
    limit = 3e-3 if type == "F16" else limit  # the cache is float16
    logits = last_logits(runner, [IDS])
    assert error(logits, expected) < limit
    # What a token gives does not depend on what is computed together with it, nor on the number of threads.
    assert (last_logits(engine(path, 1), one_by_one(IDS)) == logits).all()
    assert (last_logits(runner, [IDS[:20], IDS[20:21], IDS[21:24], IDS[24:32], IDS[32:]]) == logits).all()


@pytest.mark.parametrize(
    "options",
    [
        {"n_embd": 64, "n_head": 8, "n_head_kv": 4, "n_ff": 172},  # stories260K: heads of 8, a width of no 32
        {"n_embd": 72, "n_head": 3, "n_head_kv": 1, "n_ff": 100},
        {"n_embd": 64, "n_head": 4, "n_head_kv": 4, "head_dim": 20},
        {"n_embd": 96, "n_head": 12, "n_head_kv": 1},  # more queries of a head than are computed at once
        {"tied": True},
        {"biases": True},
        {"rope": "llama3"},
        {"rope": "linear"},
        {"rope": "yarn"},
    ],
    ids=str,
)
def test_every_shape_gives_the_logits_of_the_torch_model(options, isa):
    path = cached_tiny_gguf(**options)
    expected = last_logits(reference(path), [IDS])
    for n_threads in (1, 2):
        runner = engine(path, n_threads)
        runner._llama.n_threads = n_threads  # a tiny model takes one by itself
        assert error(last_logits(runner, [IDS]), expected) < EXACT
        # Threads that wait for each other at each token take long where something else runs, too.
        parts = one_by_one(IDS) if n_threads == 1 else [IDS[:-9], *one_by_one(IDS[-9:])]
        assert error(last_logits(runner, parts), expected) < EXACT


def test_a_long_context_is_read_in_chunks():
    path = cached_tiny_gguf(n_ctx=1024)
    ids = (IDS * 12)[:700]
    expected = last_logits(reference(path), [ids], 1024)
    runner = engine(path)
    assert error(last_logits(runner, [ids], 1024), expected) < EXACT
    assert error(last_logits(runner, [ids[:300], *one_by_one(ids[300:])], 1024), expected) < EXACT


def test_a_sequence_can_be_cut_and_another_begun():
    runner = engine(cached_tiny_gguf())
    whole = last_logits(runner, [IDS])
    context = runner.context(128)
    runner.feed(context, [*IDS[:30], 5, 6, 7])
    other = runner.context(64)
    runner.feed(other, IDS[:9])
    context.truncate(30)
    assert error(runner.feed(context, IDS[30:]), whole) < EXACT
    assert (context.n_past, other.n_past) == (len(IDS), 9)


def random_adapter(path: Path, rank: int, seed: int) -> Adapter:
    rng, tensors = np.random.default_rng(seed), {}
    config = load_config(GGUFFile(path))
    for name, shape in config.tensor_shapes().items():
        n_out, n_in = shape if len(shape) == 2 else (1, *shape)
        a, b = rng.normal(size=(rank, n_in)), rng.normal(size=(n_out, rank))
        tensors[name] = a.astype(np.float32) * 0.1, b.astype(np.float32) * 0.1
    return Adapter(alpha=2.0 * rank, tensors=tensors)


@pytest.mark.parametrize("biases", [False, True])
def test_adapters_change_what_they_change_in_torch(biases, isa):
    path = cached_tiny_gguf(biases=biases)
    adapters = [(random_adapter(path, 3, 1), 0.7), (random_adapter(path, 5, 2), -0.4)]
    torch_engine, runner = reference(path), engine(path)
    plain = last_logits(runner, [IDS])
    for put_on in (adapters[:1], adapters, []):
        torch_engine.set_adapters(put_on)
        runner.set_adapters(put_on)
        expected = last_logits(torch_engine, [IDS])
        assert error(last_logits(runner, [IDS]), expected) < EXACT
        assert error(last_logits(runner, one_by_one(IDS)), expected) < EXACT
    assert error(last_logits(runner, [IDS]), plain) == 0


@pytest.mark.parametrize("type", ["F32", "Q4_1"])
@pytest.mark.parametrize("ranks", [(1,), (8,), (5, 2)], ids=str)
def test_adapters_on_several_threads(ranks, type, isa):
    path = cached_tiny_gguf(type=type, n_embd=96, n_head=3, n_head_kv=1, n_ff=160)
    adapters = [(random_adapter(path, rank, rank), 0.5) for rank in ranks]
    torch_engine, runner = reference(path), engine(path)
    torch_engine.set_adapters(adapters)
    expected = last_logits(torch_engine, [IDS])
    runner.set_adapters(adapters)
    logits = last_logits(runner, [IDS])
    assert error(logits, expected) < (EXACT if type == "F32" else ROUNDED)
    runner._llama._scratch.fill_(255)  # what memory held before: no numbers
    for n_threads in (1, 2):
        runner._llama.n_threads = n_threads
        parts = one_by_one(IDS) if n_threads == 1 else [IDS[:-9], *one_by_one(IDS[-9:])]
        assert (last_logits(runner, parts) == logits).all()
        assert (last_logits(runner, [IDS[:3], IDS[3:14], IDS[14:]]) == logits).all()


def test_an_adapter_of_another_model_is_refused_and_leaves_none_on():
    path = cached_tiny_gguf()
    runner, good = engine(path), random_adapter(path, 2, 1)
    plain = last_logits(runner, [IDS])
    pair = good.tensors["blk.0.ffn_down.weight"]
    for name, reason in (("blk.0.attn_q.weight", "is for"), ("blk.9.ffn_down.weight", "does not have")):
        with pytest.raises(MismatchError, match=reason):
            runner.set_adapters([(good, 1.0), (Adapter(alpha=1, tensors={name: pair}), 1.0)])
    assert error(last_logits(runner, [IDS]), plain) == 0


def test_what_has_no_tiles_is_left_to_torch():
    for type in ("Q2_K", "Q3_K", "TQ2_0", "MXFP4"):
        file = GGUFFile(cached_tiny_gguf(type=type, n_embd=256, n_ff=256))
        assert native_library(file, load_config(file)) is None


@pytest.mark.parametrize(
    "options",
    [
        {"type": "F32"},
        {"type": "Q4_1"},
        {"n_embd": 96, "n_head": 12, "n_head_kv": 1, "biases": True},  # heads that share their keys
        {"type": "F16", "n_embd": 72, "n_head": 3, "n_head_kv": 1, "n_ff": 200},  # tiles that have no neighbour
        {"type": "BF16", "n_embd": 72, "n_head": 3, "n_head_kv": 1, "n_ff": 200},
    ],
    ids=str,
)
def test_a_batch_gives_each_sequence_the_logits_that_it_has_alone(options, isa):
    path = cached_tiny_gguf(**options)
    runner = engine(path)
    runner._llama.n_threads = 2  # a tiny model takes one by itself
    runner.set_adapters([(random_adapter(path, 3, 1), 0.7)])
    prompts = [IDS[:5], IDS[:1], IDS * 5, IDS[7:30]]
    ours, alone = ([runner.context(400) for _ in prompts] for _ in range(2))
    for tokens in (prompts, [[5], [6, 7], [8], [9]], [[5], [6]], [[7], [8], [9]], [[4, 5]]):
        batch = runner.feed_batch(list(zip(ours[: len(tokens)], tokens, strict=True)))
        for logits, context, ids in zip(batch, alone[: len(tokens)], tokens, strict=True):
            assert (logits == runner.feed(context, ids)).all()
    assert [c.n_past for c in ours] == [c.n_past for c in alone] == [10, 5, 307, 24]


@pytest.mark.parametrize(
    "options", [{}, {"rope": "llama3", "head_dim": 32}, {"rope": "yarn"}, {"type": "F16"}], ids=str
)
def test_a_shifted_context_goes_on_as_the_torch_model_does(options):
    path = cached_tiny_gguf(**{"type": "F32", **options})
    logits = []
    for runner in (engine(path), reference(path)):
        context = runner.context(40)
        runner.feed(context, IDS[:39])
        for keep, discard in ((3, 18), (0, 10)):
            context.shift(keep, discard)
            runner.feed(context, IDS[39 : 39 + discard])
        assert context.n_past == 39
        logits.append(runner.feed(context, [7]))
    assert error(*logits) < (1e-2 if options.get("type") == "F16" else EXACT)


def test_adapters_that_were_on_come_back_as_they_were():
    path = cached_tiny_gguf()
    runner = engine(path)
    one, two = random_adapter(path, 3, 1), random_adapter(path, 5, 2)
    sets = [[], [(one, 1.0)], [(two, 0.5)], [(one, 1.0), (two, -1.0)], *([(one, 2.0 + i)] for i in range(6))]
    first = []
    for put_on in sets:
        runner.set_adapters(put_on)
        first.append(last_logits(runner, [IDS]))
    for n_ctx in (300, 600):  # more rotations than before, which are no part of what was on
        for put_on, expected in zip([*sets, *sets[::-1]], [*first, *first[::-1]], strict=True):
            runner.set_adapters(put_on)
            assert np.array_equal(runner.feed(runner.context(n_ctx), IDS), expected)
    assert len({logits.tobytes() for logits in first}) == len(sets)
