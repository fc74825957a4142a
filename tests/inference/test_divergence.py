"""The statistics of a divergence, against plain float64 formulas, and against llama-perplexity's own tables."""

import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from llamakit.cli.perplexity_view import print_statistics
from llamakit.conversion.quantize import quantize
from llamakit.conversion.quantize_config import QuantizeConfig
from llamakit.errors import FormatError, MismatchError
from llamakit.formats.kl_base import KLBaseFile, kl_base_writer
from llamakit.formats.open import open_model
from llamakit.inference.chunks import cut, read_tokens, with_bos
from llamakit.inference.compare import Comparison, compare
from llamakit.inference.config import PerplexityConfig
from llamakit.inference.divergence import Divergence, DivergenceTable, check_same_text, divergence
from llamakit.inference.perplexity import perplexity
from llamakit.model import load_model
from llamakit.tokenizer import load_tokenizer
from tests.tiny import cached_tiny_gguf

SHARED = Path(os.environ.get("LLAMAKIT_SHARED", Path(__file__).parents[3] / "shared"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no shared files at {SHARED} (LLAMAKIT_SHARED)")
N_CTX = 32
CONFIG = PerplexityConfig(ctx=N_CTX, batch=3 * N_CTX)


def model(**options):
    with open_model(cached_tiny_gguf(**options)) as file:
        return load_model(file)


def tokens(n_chunk, n_vocab, seed=1):
    return np.random.default_rng(seed).integers(0, n_vocab, (n_chunk, N_CTX)).astype(np.int32)


@pytest.fixture
def base(tmp_path):
    """Log-probabilities of a tiny model on 7 chunks: 105 scored positions."""
    net = model()
    ids = tokens(7, net.config.n_vocab)
    with kl_base_writer(tmp_path / "base.kl", ids, net.config.n_vocab) as write:
        list(perplexity(net, ids, ids, CONFIG, write=write))
    return KLBaseFile(tmp_path / "base.kl")


def log_probs(net, ids):
    """(B, 15, V) float64 at the scored positions, and the ids that stand there."""
    with torch.inference_mode():
        logits = net.logits(net(torch.from_numpy(ids.astype(np.int64))))
    p = logits[:, N_CTX // 2 : -1].double().log_softmax(dim=-1).numpy()
    return p, ids[:, N_CTX // 2 + 1 :]


def test_against_the_formulas(base):
    other = model(seed=5)
    *reports, table = divergence(other, base, base.tokens, CONFIG)
    assert isinstance(table, DivergenceTable) and [r.chunk for r in reports] == [*range(1, 8)]
    last = reports[-1]
    assert table.last == last and last.count == 105
    (p, targets), (q, _) = log_probs(model(), base.tokens), log_probs(other, base.tokens)
    kld = (np.exp(p) * (p - q)).sum(axis=-1).ravel()
    at_p, at_q = (np.take_along_axis(x, targets[..., None].astype(np.int64), -1).ravel() for x in (p, q))
    delta = np.exp(at_q) - np.exp(at_p)

    def error(x):
        return x.std() / math.sqrt(len(x) - 1)

    assert last.kld.value == pytest.approx(kld.mean(), abs=1e-4)
    assert last.kld.error == pytest.approx(error(kld), rel=1e-3)
    assert last.ppl.value == pytest.approx(math.exp(-at_q.mean()), rel=1e-5)
    assert last.ppl.error == pytest.approx(math.exp(-at_q.mean()) * error(at_q), rel=1e-4)
    assert last.base_ppl.value == pytest.approx(math.exp(-at_p.mean()), rel=1e-4)
    assert last.log_ratio.error == pytest.approx(error(at_q - at_p), rel=1e-3)
    assert last.same_top.value == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert last.rms_delta_p.value == pytest.approx(math.sqrt((delta**2).mean()), rel=1e-3)
    assert table.mean_delta_p.value == pytest.approx(delta.mean(), abs=1e-6)
    assert table.correlation == pytest.approx(np.corrcoef(at_p, at_q)[0, 1], abs=1e-3)
    for share, value in table.kld_shares.items():
        assert value == pytest.approx(np.quantile(kld, share), abs=2e-4)
    for share, value in table.delta_p_shares.items():
        assert value == pytest.approx(np.quantile(delta, share), abs=1e-5)


def test_a_model_does_not_diverge_from_itself(base):
    *_, table = divergence(model(), base, base.tokens, CONFIG)
    assert isinstance(table, DivergenceTable)
    assert abs(table.last.kld.value) < 1e-5 and table.last.same_top.value == 1.0
    assert table.last.same_top.error == 0.0 and abs(table.correlation - 1) < 1e-3


def test_batches_change_nothing(base):
    a, b = (
        list(divergence(model(seed=5), base, base.tokens, PerplexityConfig(ctx=N_CTX, batch=n)))[-1] for n in (1, 999)
    )
    assert isinstance(a, DivergenceTable) and isinstance(b, DivergenceTable)
    assert a.last.kld.value == pytest.approx(b.last.kld.value, rel=1e-5)


def test_few_positions_have_no_table(base):
    reports = list(divergence(model(seed=5), base, base.tokens[:6], CONFIG))
    assert len(reports) == 6 and all(isinstance(report, Divergence) for report in reports)


def test_up_to_ten_positions_have_no_error(tmp_path):
    net, config = model(), PerplexityConfig(ctx=20)
    ids = np.arange(20, dtype=np.int32)[None]
    with kl_base_writer(tmp_path / "b", ids, net.config.n_vocab) as write:
        list(perplexity(net, ids, ids, config, write=write))
    (report,) = divergence(model(seed=5), KLBaseFile(tmp_path / "b"), ids, config)
    assert isinstance(report, Divergence) and report.count == 9
    assert report.kld.error == report.ppl.error == report.log_ratio.error == 0.0


def test_unlikely_tokens_of_the_base_do_not_count(tmp_path):
    """A base that is certain of one token, all others at e^-17: only that token's term is there."""
    net, config = model(), PerplexityConfig(ctx=4)
    n_vocab = net.config.n_vocab
    ids = np.arange(4, dtype=np.int32)[None]
    row = np.zeros(2 * ((n_vocab + 1) // 2) + 4, "<u2")
    row[:4] = np.array([17 / 65535, -17], "<f4").view("<u2")
    row[4 + 7] = 65535
    with kl_base_writer(tmp_path / "b", ids, n_vocab) as write:
        write(row[None])
    (report,) = divergence(net, KLBaseFile(tmp_path / "b"), ids, config)
    with torch.inference_mode():
        expected = -net.logits(net(torch.arange(4)[None]))[0, 2].double().log_softmax(-1)[7]
    assert isinstance(report, Divergence) and report.kld.value == pytest.approx(float(expected), abs=1e-5)


def test_what_does_not_fit_is_refused(base, tmp_path):
    other = model(n_merges=20)
    with pytest.raises(MismatchError, match=rf"of {base.n_vocab} tokens \(the model has {other.config.n_vocab}\)"):
        next(divergence(other, base, base.tokens, CONFIG))
    ids = base.tokens.reshape(-1).copy()
    check_same_text(base, np.append(ids, 5), "t.txt")
    with pytest.raises(MismatchError, match=r"t\.txt: .*it has 220 tokens \(expected the 224 of"):
        check_same_text(base, ids[:220], "t.txt")
    was, ids[40] = ids[40], ids[40] + 1
    with pytest.raises(MismatchError, match=rf"its token 41 is {was + 1}, which is {was} in"):
        check_same_text(base, ids, "t.txt")


def test_numbers_that_are_none_are_refused(base, tmp_path):
    data = bytearray(base.path.read_bytes())
    start = len(data) - 2 * 105 * (2 * ((base.n_vocab + 1) // 2) + 4)
    data[start : start + 4] = np.float32(3e38).tobytes()
    (tmp_path / "huge").write_bytes(data)
    with pytest.raises(FormatError, match="no finite divergence in chunk 1"):
        next(divergence(model(), KLBaseFile(tmp_path / "huge"), base.tokens, CONFIG))


def test_compare(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the king has a crown and the sailor has a boat. " * 30)
    source = cached_tiny_gguf()
    list(quantize(QuantizeConfig(source=source, out=tmp_path / "q.gguf", type="Q4_0")))
    *reports, result = compare(open_model(source), tmp_path / "q.gguf", text, config=CONFIG)
    assert isinstance(result, Comparison) and result.table is not None
    assert 0 < result.last.kld.value < 1 and result.source in reports and result.last in reports
    assert result.last.base_ppl.value == pytest.approx(result.source.ppl, rel=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.gguf", "text.txt"]


NUMBER = re.compile(r"-?\d+\.\d+")


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_against_llama_perplexity(kind, tmp_path, capsys):
    """Its tables for files dequantized to F32; a packed file decoded to float32 is the same model."""
    golden = SHARED / "golden"
    list(quantize(QuantizeConfig(source=golden / "stories260K-f32.gguf", out=tmp_path / "q.gguf", type=kind)))
    config = PerplexityConfig(ctx=128)
    with open_model(golden / "stories260K-f32.gguf") as file:
        tokenizer, net = load_tokenizer(file), load_model(file)
    ids = cut(read_tokens(golden / "text40k.txt", tokenizer), 128)
    with kl_base_writer(tmp_path / "base", ids, net.config.n_vocab) as write:
        *_, estimate = perplexity(net, ids, with_bos(ids, tokenizer), config, write=write)
    last = (golden / "llama.cpp-2026/perplexity-f32.txt").read_text().splitlines()[-1]
    assert last == f"Final estimate: PPL = {estimate.ppl:.4f} +/- {estimate.error:.5f}"
    with open_model(tmp_path / "q.gguf") as file:
        *_, table = divergence(load_model(file), KLBaseFile(tmp_path / "base"), with_bos(ids, tokenizer), config)
    assert isinstance(table, DivergenceTable)
    capsys.readouterr()
    print_statistics(table)
    ours = capsys.readouterr().out.split("\n")
    theirs = (golden / f"llama.cpp-2026/kl-{kind}-as-f32.txt").read_text().split("\n")
    for a, b in zip(ours, theirs, strict=False):
        assert NUMBER.sub("#", a).replace(" ", "").replace("-#", "#") == NUMBER.sub("#", b).replace(" ", "").replace(
            "-#", "#"
        )
        # the 16 bits of the file are worth some millionths where a divergence is that small
        for x, y in zip(NUMBER.findall(a), NUMBER.findall(b), strict=True):
            assert float(x) == pytest.approx(float(y), rel=2e-3, abs=6e-6 if "KLD" in a else 6e-3)
