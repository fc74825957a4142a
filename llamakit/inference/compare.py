"""What quantizing a model did to it: perplexity before and after, and the divergence of the two."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llamakit.formats.base import ModelFile
from llamakit.formats.kl_base import KLBaseFile, kl_base_writer
from llamakit.formats.open import open_model
from llamakit.inference.chunks import cut, read_tokens, with_bos
from llamakit.inference.config import PerplexityConfig
from llamakit.inference.divergence import Divergence, DivergenceTable, divergence
from llamakit.inference.perplexity import Estimate, perplexity
from llamakit.model import load_config, load_model
from llamakit.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Comparison:
    """source: the estimate of the model as it was; last: the other's perplexity and its divergence from it; table: the
    rest of llama-perplexity's statistics, None below 100 scored positions. text: what they were measured on."""

    text: Path
    source: Estimate
    last: Divergence
    table: DivergenceTable | None


def count_chunks(source: ModelFile, text: str | os.PathLike[str], *, config: PerplexityConfig | None = None) -> int:
    """Into how many chunks `compare` would cut a text. Raises UsageError for one that is too short."""
    return len(_cut(source, text, config)[0])


def _cut(
    file: ModelFile, text: str | os.PathLike[str], config: PerplexityConfig | None
) -> tuple[np.ndarray, np.ndarray, PerplexityConfig]:
    """(tokens as they stand in the text, tokens as the model sees them, both (B, T), how they were cut)."""
    wanted = config or PerplexityConfig(ctx=min(PerplexityConfig.ctx, load_config(file).n_ctx))
    tokenizer = load_tokenizer(file)
    tokens = cut(read_tokens(text, tokenizer), wanted.ctx, chunks=wanted.chunks, source=text)
    return tokens, with_bos(tokens, tokenizer), wanted


def compare(
    source: ModelFile,
    quantized: str | os.PathLike[str],
    text: str | os.PathLike[str],
    *,
    config: PerplexityConfig | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[Estimate | Divergence | Comparison]:
    """An Estimate after every chunk of an opened model, a Divergence after every chunk of the second, the Comparison.

    One model is in memory at a time. Between the two the first one's log-probabilities lie in a temporary file beside
    the second model: 2 n_vocab bytes for every other token. config: by default llama-perplexity's, with a context that
    both were trained for. Raises UsageError for a text that is too short, MismatchError for another vocabulary, and
    what opening and loading models raises.
    """
    with tempfile.TemporaryDirectory(dir=Path(quantized).parent, prefix=".llamakit-kl-") as folder:
        path = Path(folder) / "base.kl"
        tokens, seen, wanted = _cut(source, text, config)
        model = load_model(source, device=device, dtype=dtype)
        estimate = None
        with kl_base_writer(path, tokens, model.config.n_vocab) as write:
            for estimate in perplexity(model, tokens, seen, wanted, write=write):
                yield estimate
        del model
        with open_model(quantized) as file:
            model = load_model(file, device=device, dtype=dtype)
        last, table = None, None
        for report in divergence(model, KLBaseFile(path), seen, wanted):
            if isinstance(report, DivergenceTable):
                table = report
            else:
                last = report
                yield report
    assert estimate is not None and last is not None
    yield Comparison(Path(text), estimate, last, table)
