"""Texts cut into samples and rows, against a token-by-token rewriting of what the old tool did."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamakit.dataset.config import SampleOptions
from llamakit.dataset.order import SampleOrder
from llamakit.dataset.text import BatchBuilder, Samples, read_training_text
from llamakit.errors import DataError, LlamakitError
from llamakit.formats.open import open_model
from llamakit.tokenizer import load_tokenizer
from tests.tiny import cached_tiny_gguf, tiny_text

BOS, EOS, N_VOCAB = 1, 2, 100


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(open_model(cached_tiny_gguf()))


def old_row(samples, order, options, ahead):
    """One row, token by token: llama.cpp 2024, common/train.cpp, get_example_targets_batch, as described."""

    def sample(i):
        j = order.sample(i)
        return samples.tokens[samples.begins[j] : samples.begins[j] + samples.sizes[j]]

    used, current, at = 1, sample(ahead), 0
    if options.sample_random_offsets and len(current) > 1:
        at = int((len(current) - 1) * order.uniform(ahead))
    eos_done, bos_done = not options.separate_with_eos, not options.separate_with_bos
    row = []
    for _ in range(options.ctx):
        token = EOS
        if at >= len(current) and options.fill_with_next_samples:
            if not eos_done:
                eos_done = True
            elif not bos_done:
                bos_done, token = True, BOS
            else:
                eos_done, bos_done = not options.separate_with_eos, not options.separate_with_bos
                current, at = sample(ahead + used), 0
                used += 1
        if at < len(current):
            token, at = min(max(int(current[at]), 0), N_VOCAB - 1), at + 1
        row.append(token)
    return row, used


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    ctx=st.integers(1, 20),
    batch=st.integers(1, 4),
    flags=st.tuples(*[st.booleans()] * 4),
    seed=st.integers(0, 5),
)
def test_rows_are_those_of_the_old_tool(sizes, ctx, batch, flags, seed):
    options = SampleOptions(
        ctx=ctx,
        fill_with_next_samples=flags[0],
        separate_with_eos=flags[1],
        separate_with_bos=flags[2],
        sample_random_offsets=flags[3],
    )
    tokens = np.arange(3, 3 + sum(sizes) + 1, dtype=np.int32)
    begins = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    samples = Samples(tokens, begins, np.array(sizes, dtype=np.int64))
    order = SampleOrder(seed, len(sizes))
    built = BatchBuilder(samples, options, bos=BOS, eos=EOS, n_vocab=N_VOCAB).build(order, batch)
    used = 0
    for row in range(batch):
        expected, n = old_row(samples, order, options, used)
        used += n
        assert built.targets[row].tolist() == expected
        assert built.inputs[row].tolist() == [BOS, *expected[:-1]]
    assert built.used == used


def test_every_token_starts_a_window_and_the_end_is_held_out(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text(tiny_text(4000, 1))
    all_tokens = tokenizer.encode(path.read_text(), add_special=False, parse_special=False)
    n = len(all_tokens)
    text = read_training_text(path, tokenizer, SampleOptions(ctx=16, val_split=0.1))
    held_out = int(n * 0.1)
    assert text.validation.tolist() == all_tokens[n - held_out :]
    assert text.train.tokens.tolist() == all_tokens[: n - held_out]
    assert len(text.train.begins) == n - held_out - 16
    assert set(text.train.sizes.tolist()) == {16}
    assert int((text.train.begins + text.train.sizes).max()) <= n - held_out
    whole = read_training_text(path, tokenizer, SampleOptions(ctx=16, val_split=0))
    assert len(whole.validation) == 0 and len(whole.train.begins) == n - 16


def test_nothing_is_held_out_of_a_text_below_twenty_windows(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text(tiny_text(600, 1))
    n = len(tokenizer.encode(path.read_text(), add_special=False, parse_special=False))
    assert len(read_training_text(path, tokenizer, SampleOptions(ctx=n // 20 + 1)).validation) == 0
    assert len(read_training_text(path, tokenizer, SampleOptions(ctx=n // 20)).validation) == int(n * 0.05)


def test_a_text_shorter_than_the_context_is_one_sample(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("a king")
    text = read_training_text(path, tokenizer, SampleOptions(ctx=64))
    assert text.train.begins.tolist() == [0]
    assert text.train.sizes.tolist() == [len(text.train.tokens)]


def test_samples_start_at_the_pattern(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("ignored<S>one king<S>two queens<S>")
    text = read_training_text(path, tokenizer, SampleOptions(ctx=64, sample_start="<S>", val_split=0))
    pieces = [text.train.tokens[b : b + s].tolist() for b, s in zip(text.train.begins, text.train.sizes, strict=True)]

    def encode(t):
        return tokenizer.encode(t, add_special=False, parse_special=False)

    assert pieces == [encode("one king"), encode("two queens"), []]
    assert any("shorter" in w for w in text.warnings) and any("empty" in w for w in text.warnings)
    including = SampleOptions(ctx=64, sample_start="\\x3cS>", escape=True, include_sample_start=True, val_split=0)
    text = read_training_text(path, tokenizer, including)
    assert text.train.tokens[: text.train.sizes[0]].tolist() == encode("<S>one king")


def test_overlapping_samples_reach_over_the_next_start(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("<S>one<S>two<S>three")
    options = SampleOptions(ctx=64, sample_start="<S>", overlapping_samples=True, val_split=0)
    text = read_training_text(path, tokenizer, options)
    first = text.train.tokens[: text.train.sizes[0]].tolist()
    assert first == tokenizer.encode("one<S>two<S>three", add_special=False, parse_special=False)


def test_a_pattern_that_does_not_occur_makes_one_sample_and_a_warning(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("no pattern here")
    text = read_training_text(path, tokenizer, SampleOptions(ctx=4, sample_start="<S>", val_split=0))
    assert len(text.train.begins) == 1
    assert "does not occur" in text.warnings[0]


def test_held_out_samples_are_whole_and_nothing_of_them_is_trained_on(tmp_path, tokenizer):
    parts = [f"<S>mark{i}x {tiny_text(120, i)}" for i in range(40)]
    path = tmp_path / "text.txt"
    path.write_text("".join(parts))
    options = SampleOptions(ctx=16, sample_start="<S>", overlapping_samples=True, val_split=0.2)
    text = read_training_text(path, tokenizer, options)
    trained, held_out = tokenizer.decode(text.train.tokens.tolist()), tokenizer.decode(text.validation.tolist())
    assert len(text.validation) > 0
    seen_in_both = [i for i in range(40) if f"mark{i}x" in trained and f"mark{i}x" in held_out]
    assert seen_in_both == []
    assert "mark39x" in held_out and "mark0x" in trained


@pytest.mark.parametrize(("content", "reason"), [(b"", "empty"), (b"caf\xe9", "not UTF-8"), (None, "No such file")])
def test_a_text_that_cannot_be_used_is_refused(tmp_path, tokenizer, content, reason):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LlamakitError, match=reason) as caught:
        read_training_text(path, tokenizer, SampleOptions())
    assert caught.value.exit_code == 2 and str(path) in str(caught.value)


def test_a_text_of_one_token_is_refused(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text(tokenizer.piece(tokenizer.encode("x", add_special=False)[-1]).decode().strip() or "x")
    if len(tokenizer.encode(path.read_text(), add_special=False, parse_special=False)) < 2:
        with pytest.raises(DataError, match="at least 2"):
            read_training_text(path, tokenizer, SampleOptions())
