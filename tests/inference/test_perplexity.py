"""The estimate against its formula, the text's cutting, and the 16 bits of the file of log-probabilities."""

import math

import numpy as np
import pytest
import torch

from llamakit.errors import FormatError, UsageError
from llamakit.formats.kl_base import row_words
from llamakit.formats.open import open_model
from llamakit.inference.chunks import cut, overlapping, read_tokens, with_bos
from llamakit.inference.config import PerplexityConfig
from llamakit.inference.perplexity import estimate, negative_log_likelihood, pack_log_probs, perplexity
from llamakit.model import load_model
from llamakit.tokenizer import load_tokenizer
from tests.tiny import cached_tiny_gguf


@pytest.fixture(scope="module")
def model():
    with open_model(cached_tiny_gguf()) as file:
        return load_model(file)


@pytest.fixture(scope="module")
def tokenizer():
    with open_model(cached_tiny_gguf()) as file:
        return load_tokenizer(file)


@pytest.mark.parametrize("n_ctx", [4, 5, 16, 33])
@pytest.mark.parametrize("batch", [1, 40, 999])
def test_against_the_formula(model, tokenizer, n_ctx, batch):
    """Predictions at n_ctx / 2 to n_ctx - 2 count; BOS stands first, and what it hides is no target."""
    ids = np.random.default_rng(n_ctx).integers(3, model.config.n_vocab, (3, n_ctx)).astype(np.int32)
    seen = with_bos(ids, tokenizer)
    assert (seen[:, 0] == 1).all() and np.array_equal(seen[:, 1:], ids[:, 1:])
    reports = list(perplexity(model, ids, seen, PerplexityConfig(ctx=n_ctx, batch=batch)))
    with torch.inference_mode():
        logits = model.logits(model(torch.from_numpy(seen.astype(np.int64))))
    log_p = logits.double().log_softmax(dim=-1).numpy()
    nll = np.array([[-log_p[c, t, ids[c, t + 1]] for t in range(n_ctx // 2, n_ctx - 1)] for c in range(3)])
    for i, report in enumerate(reports, 1):
        values = nll[:i].ravel()
        assert (report.chunk, report.count) == (i, len(values))
        assert report.nll == pytest.approx(values.mean(), rel=1e-6)
        assert report.ppl == pytest.approx(math.exp(values.mean()), rel=1e-6)
        if len(values) > 1:
            assert report.nll_error == pytest.approx(values.std() / math.sqrt(len(values) - 1), rel=1e-4)
            assert report.error == pytest.approx(report.ppl * report.nll_error)
    assert len(reports) == 3


def test_windows_that_overlap(model, tokenizer):
    """llama-perplexity --ppl-stride S: a window is half a stride longer, and its last S predictions count."""
    config = PerplexityConfig(ctx=8, ppl_stride=4)
    ids = np.random.default_rng(0).integers(3, model.config.n_vocab, 22).astype(np.int32)
    windows = overlapping(ids, config.n_window, config.ppl_stride)
    assert windows.tolist() == [ids[i : i + 10].tolist() for i in (0, 4, 8)]  # one more would end with the text
    assert len(overlapping(ids[:21], 10, 4)) == len(overlapping(ids, 10, 4, chunks=9)) == 3
    assert len(overlapping(ids[:11], 10, 4)) == len(overlapping(ids, 10, 4, chunks=1)) == 1
    with pytest.raises(UsageError, match=r"the text has 10 tokens \(expected more than a window of 10\)"):
        overlapping(ids[:10], 10, 4)
    *_, last = perplexity(model, windows, windows, config)
    with torch.inference_mode():
        log_p = model.logits(model(torch.from_numpy(windows.astype(np.int64)))).double().log_softmax(dim=-1).numpy()
    nll = [-log_p[w, t, windows[w, t + 1]] for w in range(3) for t in range(5, 9)]
    assert (last.chunk, last.count) == (3, 12) and last.nll == pytest.approx(np.mean(nll), rel=1e-6)


def test_estimates_at_the_edge():
    assert estimate(1, 2.0, 4.0, 1).error == 0.0
    assert estimate(1, 1e5, 1e10, 1).ppl == math.exp(700)


def test_large_vocabularies_are_taken_in_pieces(model, monkeypatch):
    ids = np.arange(60, dtype=np.int32).reshape(2, 30)
    whole = list(perplexity(model, ids, ids, PerplexityConfig(ctx=30)))
    monkeypatch.setattr("llamakit.inference.perplexity._LOGIT_BYTES", 4 * model.config.n_vocab * 4)
    pieces = list(perplexity(model, ids, ids, PerplexityConfig(ctx=30)))
    assert [r.ppl for r in pieces] == pytest.approx([r.ppl for r in whole], rel=1e-6)


def test_logits_that_are_no_numbers_are_refused():
    with open_model(cached_tiny_gguf()) as file:
        broken = load_model(file)
    broken.output_norm.weight.data[0] = math.nan
    ids = np.arange(8, dtype=np.int32)[None]
    with pytest.raises(FormatError, match=r"no finite numbers \(chunk 1"):
        next(perplexity(broken, ids, ids, PerplexityConfig(ctx=8)))


@pytest.mark.parametrize("n_vocab", [6, 7])
def test_sixteen_bits(n_vocab):
    logits = torch.tensor([[0.0, 1.0, -3.0, 2.5, -30.0, 0.5, 9.0][:n_vocab], [3.0] * n_vocab])
    rows = pack_log_probs(logits)
    assert rows.dtype == np.dtype("<u2") and rows.shape == (2, row_words(n_vocab))
    scale, low = np.ascontiguousarray(rows[:, :4]).view("<f4").T
    log_p = scale[:, None] * rows[:, 4 : 4 + n_vocab] + low[:, None]
    expected = logits.log_softmax(dim=-1).numpy()
    top = expected.max(axis=-1, keepdims=True)
    # nothing lies more than 16 below the largest, and a step is a 65535th of what is left
    assert log_p[0] == pytest.approx(np.maximum(expected, top - 16)[0], abs=16 / 65535)
    assert scale[1] == 0 and (rows[1, 4:] == 0).all() and log_p[1] == pytest.approx(expected[1], abs=1e-6)


def test_negative_log_likelihood_is_stable():
    nll = negative_log_likelihood(torch.tensor([[1e4, 0.0], [-1e4, -1e4]]), np.array([1, 0]))
    assert nll.dtype == torch.float64 and nll.tolist() == pytest.approx([1e4, math.log(2)])


def test_reading_and_cutting(tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("the king\n\n")
    ids = read_tokens(tmp_path / "t.txt", tokenizer)
    assert ids.tolist() == tokenizer.encode("the king\n", add_special=True) and ids[0] == 1
    ids = np.arange(35)
    assert cut(ids, 10).tolist() == np.arange(30).reshape(3, 10).tolist()
    assert cut(ids, 10, chunks=2).shape == (2, 10) and cut(ids, 10, chunks=9).shape == (3, 10)
    with pytest.raises(UsageError, match=r"t: the text has 35 tokens \(expected at least 36, two contexts of 18\)"):
        cut(ids, 18, source="t")
    with open_model(cached_tiny_gguf(tokenizer="bpe")) as file:
        assert np.array_equal(with_bos(cut(ids, 10), load_tokenizer(file)), cut(ids, 10))


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [("ctx", 3, "--ctx"), ("batch", 0, "--batch"), ("chunks", 0, "--chunks"), ("ppl_output_type", 2, "--ppl-output")],
)
def test_values_that_cannot_be_name_their_flag(field, value, flag):
    with pytest.raises(UsageError, match=f"^{flag}"):
        PerplexityConfig(**{field: value})


def test_the_caller_is_not_put_into_inference_mode_between_two_reports(model) -> None:
    tokens = np.zeros((2, 8), np.int32)
    for _ in perplexity(model, tokens, tokens, PerplexityConfig(ctx=8)):
        assert not torch.is_inference_mode_enabled()
