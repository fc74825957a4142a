"""A corpus becomes a vocabulary: `train_tokenizer`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llamakit.dataset.documents import sampled_text
from llamakit.dataset.prepare_config import TrainTokenizerConfig
from llamakit.dataset.sources import find_sources
from llamakit.files import check_writable
from llamakit.formats.gguf import write_gguf
from llamakit.formats.sentencepiece_model import write_sentencepiece_model
from llamakit.formats.vocabulary import vocabulary_only
from llamakit.tokenizer.train import new_vocabulary


@dataclass(frozen=True)
class ReadingCorpus:
    """What there is: files, their bytes, files of folders that were left out because of their names."""

    n_files: int
    n_bytes: int
    n_left_out: int


@dataclass(frozen=True)
class TrainedTokenizer:
    """The vocabulary is written. longest: the longest pieces, a space in them as it is spelled there."""

    path: Path
    n_vocab: int
    n_characters: int
    longest: tuple[str, ...]
    elapsed_s: float


def train_tokenizer(
    config: TrainTokenizerConfig, *, stdin: BinaryIO | None = None
) -> Iterator[ReadingCorpus | TrainedTokenizer]:
    """Make a vocabulary from a corpus and write it; the same text gives the same file. stdin: what the input "-" is.

    Raises UsageError for a size that the text cannot give, and for files that cannot be read, DataError for text that
    cannot be used, SaveError.
    """
    started = time.monotonic()
    check_writable(config.out)
    with tempfile.TemporaryDirectory() as scratch:
        found = find_sources(config, Path(scratch), stdin)
        yield ReadingCorpus(len(found.sources), found.n_bytes, found.n_left_out)
        model = new_vocabulary(sampled_text(found, config), config.vocab_size, config.character_coverage)
        if config.out.suffix == ".gguf":
            plain = Path(scratch, "tokenizer.model")
            write_sentencepiece_model(plain, model)
            head = {"general.architecture": "llama", "general.type": "model"}
            write_gguf(config.out, metadata={**head, **vocabulary_only(plain)}, tensors=())
        else:
            write_sentencepiece_model(config.out, model)
    normal = [piece.text for piece in model.pieces if piece.type == 1]
    longest = sorted(normal, key=lambda text: (-len(text), text))[:8]
    yield TrainedTokenizer(
        config.out,
        len(model.pieces),
        sum(len(text) == 1 for text in normal),
        tuple(longest),
        time.monotonic() - started,
    )
