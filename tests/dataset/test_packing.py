"""Rows of a batch: every target of every sample once an epoch, whatever shares a row, and nothing across a border."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamakit.dataset.chat import ChatSample
from llamakit.dataset.chat_data import ChatData, Piece, fitted, hold_out, joined, read_chat_data
from llamakit.dataset.chat_records import Problem
from llamakit.dataset.config import ChatOptions
from llamakit.dataset.order import SampleOrder
from llamakit.dataset.packing import ChatBatch, ChatBatches
from llamakit.errors import DataError, UnsupportedError, UsageError
from llamakit.formats.open import open_model
from llamakit.tokenizer import Tokenizer, load_tokenizer
from tests.helpers import render_in_this_process
from tests.tiny import cached_tiny_gguf

CTX = 16


def data_of(sizes: list[int]) -> ChatData:
    """Samples of these many tokens, every token its own number, every second one trained."""
    pieces, at = [], 1
    for number, size in enumerate(sizes):
        tokens = np.arange(at, at + size, dtype=np.int32)
        trained = (tokens % 2).astype(bool)
        trained[0] = False
        pieces.append(Piece(tokens, trained, f"a:{number}"))
        at += size
    return joined(pieces)


def pairs(batch: ChatBatch) -> Counter[tuple[int, int, bool, int]]:
    """(input, target, trained, position) of each place that is no padding."""
    real = batch.segments >= 0
    arrays = (batch.inputs, batch.targets, batch.trained, batch.positions)
    return Counter(zip(*(array[real].tolist() for array in arrays), strict=True))


def expected(data: ChatData) -> Counter[tuple[int, int, bool, int]]:
    found: Counter[tuple[int, int, bool, int]] = Counter()
    for i in range(data.count):
        tokens, trained = data.sample(i)
        columns = (tokens[:-1].tolist(), tokens[1:].tolist(), trained[1:].tolist(), range(len(tokens) - 1))
        found.update(zip(*columns, strict=True))
    return found


def epoch(batches: ChatBatches, order: SampleOrder, batch: int) -> list[ChatBatch]:
    """All batches of the order's epoch."""
    found, done = [], False
    while not done:
        found.append(batches.build(order, batch))
        done = order.advance(found[-1].used)
    return found


def total(found: list[ChatBatch]) -> Counter[tuple[int, int, bool, int]]:
    return sum((pairs(batch) for batch in found), Counter())


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(2, CTX + 1), min_size=1, max_size=40),
    batch=st.integers(1, 5), seed=st.integers(0, 9), pack=st.booleans(),
)  # fmt: skip
def test_an_epoch_has_every_target_once(sizes: list[int], batch: int, seed: int, pack: bool) -> None:
    data = data_of(sizes)
    batches = ChatBatches(data, ctx=CTX, pack=pack, pad=0)
    order = SampleOrder(seed, batches.count)
    found = epoch(batches, order, batch)
    assert total(found) == expected(data) == total(list(batches.in_order(batch)))
    assert sum(b.used for b in found) == len(sizes) and (order.epoch, order.next_sample) == (1, 0)
    assert sum(b.n_trained for b in found) == data.n_trained
    assert sum(len(b.inputs) for b in found) == batches.n_rows(seed, 0)
    for b in found:
        assert b.n_tokens == (b.segments >= 0).sum() and not b.trained[b.segments < 0].any()
        assert b.inputs.shape[1] == CTX if pack else not b.packed
        for segments, positions in zip(b.segments, b.positions, strict=True):
            # Segments are runs, counted from 0, padding last; positions begin anew in each.
            real = segments[segments >= 0]
            assert (segments[len(real) :] == -1).all() and real[0] == 0 and set(np.diff(real)) <= {0, 1}
            starts = np.flatnonzero(np.diff(segments, prepend=-2))
            assert (positions[starts] == 0).all() and (np.delete(np.diff(positions), starts[1:] - 1) == 1).all()


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    data = data_of([3, 5, 2, 9, 4, 7, 3, 3, 12, 2, 6])
    first = epoch(ChatBatches(data, ctx=CTX, pack=True, pad=0), SampleOrder(1, data.count), 2)
    again = epoch(ChatBatches(data, ctx=CTX, pack=True, pad=0), SampleOrder(1, data.count), 2)
    other = epoch(ChatBatches(data, ctx=CTX, pack=True, pad=0), SampleOrder(1, data.count, epoch=1), 2)
    same = [(a.inputs.tolist(), a.segments.tolist()) for a in first] == [
        (b.inputs.tolist(), b.segments.tolist()) for b in again
    ]
    assert same and [a.inputs.tolist() for a in first] != [b.inputs.tolist() for b in other]
    # A resume in the middle goes on with the row that is next.
    resumed = ChatBatches(data, ctx=CTX, pack=True, pad=0).build(SampleOrder(1, data.count, 0, first[0].used), 2)
    assert resumed.inputs.tolist() == first[1].inputs.tolist()


def test_packing_fills_rows() -> None:
    rng = np.random.default_rng(0)
    data = data_of(rng.integers(10, 200, 2000).tolist())
    batches = ChatBatches(data, ctx=512, pack=True, pad=0)
    share = int((data.sizes - 1).sum()) / (512 * batches.n_rows(0, 0))
    assert share > 0.97
    alone = ChatBatches(data, ctx=512, pack=False, pad=0)
    found = epoch(alone, SampleOrder(0, data.count), 8)
    assert sum(b.n_tokens for b in found) / sum(b.inputs.size for b in found) > 0.9
    widths = [b.inputs.shape[1] for b in found]
    assert widths != sorted(widths) and len({len(b.inputs) for b in found}) == 1


def sample(n: int, first_trained: int) -> ChatSample:
    trained = np.arange(n) >= first_trained
    return ChatSample("a.jsonl", 3, "messages", np.arange(n, dtype=np.int32), trained)


def test_what_is_too_long_is_cut_or_becomes_windows() -> None:
    (whole,) = fitted(sample(CTX + 1, 5), CTX, "cut")  # type: ignore[misc]
    assert len(whole.tokens) == CTX + 1
    (cut,) = fitted(sample(40, 5), CTX, "cut")  # type: ignore[misc]
    assert cut.tokens.tolist() == list(range(CTX + 1)) and cut.trained.sum() == CTX + 1 - 5
    nothing = fitted(sample(40, 30), CTX, "cut")
    assert isinstance(nothing, Problem) and nothing.kind == "untrained"
    assert "it has 40 tokens, the first that is trained is number 31, and --ctx 16 holds 17" in nothing.reason
    for first in (1, 5, 16, 17, 30, 39):
        windows = fitted(sample(40, first), CTX, "window")
        assert not isinstance(windows, Problem)
        # Each trained token is a target once, and what is learnt from has what comes before it.
        assert [int(t) for w in windows for t in w.tokens[w.trained]] == list(range(first, 40))
        assert all(len(w.tokens) <= CTX + 1 and not w.trained[0] for w in windows)


@settings(deadline=None)
@given(n=st.integers(2, 100), first=st.integers(1, 99), ctx=st.integers(1, 30))
def test_windows_lose_no_target(n: int, first: int, ctx: int) -> None:
    windows = fitted(sample(n, min(first, n - 1)), ctx, "window")
    assert not isinstance(windows, Problem)
    assert [int(t) for w in windows for t in w.tokens[w.trained]] == list(range(min(first, n - 1), n))


def test_what_is_held_out_is_not_trained_on() -> None:
    data = joined(
        [Piece(np.array([i, i, i], dtype=np.int32), np.array([False, True, True]), f"a:{i // 2}") for i in range(20)]
    )
    train, validation = hold_out(data, 0.2, seed=3)
    assert validation is not None and train.count + validation.count == 20 and validation.count == 4
    assert not set(train.sources) & set(validation.sources)
    assert hold_out(data, 0.2, seed=3)[1].sha256 == validation.sha256  # type: ignore[union-attr]
    assert hold_out(data, 0.2, seed=4)[1].sha256 != validation.sha256  # type: ignore[union-attr]
    assert hold_out(data, 0.0, seed=3) == (data, None)
    assert hold_out(data, 1.0, seed=3)[0].count == 2


CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    render_in_this_process(monkeypatch)
    return load_tokenizer(open_model(cached_tiny_gguf(tokenizer="bpe", chat_template=CHATML)))


def test_reading_a_file_counts_everything(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path, long = tmp_path / "a.jsonl", "long " * 60
    values = (
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "completion": ""},
        {"text": long},
        {"prompt": "q", "completion": long},
    )
    path.write_text("\n".join(map(json.dumps, values)))
    with pytest.raises(DataError, match=r"a.jsonl:2: answer 1 of 1 is empty") as caught:
        read_chat_data([path], tokenizer, ChatOptions(), ctx=32)
    assert "--on-error skip" in (caught.value.hint or "")
    data, counts = read_chat_data([path], tokenizer, ChatOptions(on_error="skip"), ctx=64)
    assert counts.schemas == {"prompt/completion": 2, "text": 1} and counts.n_records == 4
    assert [p.line for p in counts.skipped] == [2]
    # A conversation is cut; a text has no end that belongs to its beginning, and becomes windows.
    assert (counts.n_cut, counts.n_windowed, counts.not_ended) == (1, 1, 0)
    assert Counter(data.sources) == {f"{path}:1": 1, f"{path}:3": data.count - 2, f"{path}:4": 1} and data.count > 4
    assert counts.n_cut_tokens > 0 and data.sizes.max() == 65
    windows, all_windows = read_chat_data(
        [path], tokenizer, ChatOptions(on_error="skip", long_samples="window"), ctx=64
    )
    assert (all_windows.n_cut, all_windows.n_cut_tokens, all_windows.n_windowed) == (0, 0, 2)
    # The line break behind the end token was cut, too, and is no target.
    assert windows.n_trained == data.n_trained + counts.n_cut_tokens - 1


def test_a_file_that_gives_nothing_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "q", "completion": ""}\n')
    with pytest.raises(DataError, match="nothing to train on: all 1 records were skipped"):
        read_chat_data([path], tokenizer, ChatOptions(on_error="skip"), ctx=32)
    with pytest.raises(UsageError, match="unknown chat template 'chatnl'"):
        read_chat_data([path], tokenizer, ChatOptions(chat_template="chatnl"), ctx=32)
    path.write_text('{"prompt": "q", "completion": "a"}\n')
    tokenizer.chat_template = None
    with pytest.raises(UnsupportedError, match="no chat template"):
        read_chat_data([path], tokenizer, ChatOptions(), ctx=32)
    assert read_chat_data([path], tokenizer, ChatOptions(chat_template="zephyr"), ctx=128)[0].count == 1
