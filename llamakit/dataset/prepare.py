"""A corpus becomes a folder of tokens: `prepare`.

It streams: text is read in blocks, tokenized in units of a few hundred kilobytes by several processes, and spooled to
the disk in the order in which it was read. The folder appears under its name when it is complete.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from llamakit.dataset.documents import Documents, sampled_text
from llamakit.dataset.encoding import encoded
from llamakit.dataset.prepare_config import PrepareConfig
from llamakit.dataset.sources import Found, find_sources
from llamakit.dataset.tokens import open_tokens
from llamakit.dataset.tokens_writer import TokenSpool, WrittenShard, dtype_for, write_vocabulary
from llamakit.errors import SaveError, UnsupportedError, UsageError
from llamakit.files import atomic_directory, remove_stale_temporaries
from llamakit.formats.open import sniff
from llamakit.formats.sentencepiece_model import write_sentencepiece_model
from llamakit.formats.vocabulary import vocabulary_only
from llamakit.tokenizer.load import tokenizer_of
from llamakit.tokenizer.train import new_vocabulary

#: below this, starting processes takes longer than what they save
_WORTH_WORKERS = 4 << 20


@dataclass(frozen=True)
class Reading:
    """What there is: files, their bytes, files of folders that were left out because of their names."""

    n_files: int
    n_bytes: int
    n_left_out: int


@dataclass(frozen=True)
class TrainingVocabulary:
    """A vocabulary of this many tokens is being made from the text."""

    n_vocab: int


@dataclass(frozen=True)
class VocabularyReady:
    """kind: "llama" (SPM) or "gpt2" (BPE); source: the file that it is from, None for a new one."""

    n_vocab: int
    kind: str
    source: Path | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Encoding:
    """How far it is: bytes of text read, of so many; documents and tokens so far."""

    n_bytes: int
    n_bytes_total: int
    n_documents: int
    n_tokens: int


@dataclass(frozen=True)
class Saving:
    """A shard is written; average_seqlen: tokens of a document, BOS included."""

    shard: WrittenShard
    average_seqlen: float


@dataclass(frozen=True)
class Prepared:
    """The folder is in its place.

    n_tokens: BOS of each document included, as longest, in tokens. n_bytes: UTF-8 bytes of the text. n_empty: records
    without text, left out. n_duplicates: documents that were there before; they are kept. n_replaced: U+FFFD put in.
    example: the start of the first document.
    """

    path: Path
    shards: tuple[WrittenShard, ...]
    n_vocab: int
    dtype: str
    n_documents: int
    n_tokens: int
    n_validation_tokens: int
    n_bytes: int
    longest: int
    n_empty: int
    n_duplicates: int
    n_replaced: int
    example: str
    elapsed_s: float

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text that a token stands for, BOS left out."""
        return self.n_bytes / max(1, self.n_tokens - self.n_documents)


Report = Reading | TrainingVocabulary | VocabularyReady | Encoding | Saving | Prepared


def prepare(config: PrepareConfig, *, stdin: BinaryIO | None = None) -> Generator[Report, None, None]:
    """Turn a corpus into a folder of tokens: reports on the way, `Prepared` last, when the folder is in its place.

    stdin: what the input "-" is. A generator that is given up, or fails, leaves nothing behind.
    Raises UsageError for options and files that cannot be, DataError for text that cannot be used, with its line,
    UnsupportedError for a vocabulary without BOS and EOS, SaveError when the disk refuses.
    """
    started = time.monotonic()
    parent = config.out.parent
    if not parent.is_dir():
        hint = f"create it with: mkdir -p {shlex.quote(str(parent))}"
        raise UsageError("there is no such folder to write into", path=parent, hint=hint)
    remove_stale_temporaries(parent, re.compile(re.escape(config.out.name)))
    if config.vocab_model is not None:  # what is wrong with it is told before anything is read
        _given_vocabulary(config)
    shards: list[WrittenShard] = []
    with atomic_directory(config.out, lambda folder: _check(folder, shards)) as folder:
        found = find_sources(config, folder, stdin)
        yield Reading(len(found.sources), found.n_bytes, found.n_left_out)
        vocabulary = yield from _vocabulary(config, found, folder)
        prepared = yield from _written(config, found, folder, vocabulary, shards)
    yield replace(prepared, elapsed_s=time.monotonic() - started)


def _check(folder: Path, shards: list[WrittenShard]) -> None:
    data = open_tokens(folder)
    if data.train.n_tokens + data.validation.n_tokens != sum(shard.n_tokens for shard in shards):
        raise SaveError("reads back with another number of tokens than was written", path=folder)


def _given_vocabulary(config: PrepareConfig) -> dict[str, Any]:
    assert config.vocab_model is not None
    kind = sniff(config.vocab_model)
    if config.vocab_size is not None and kind != "llama2c-tokenizer":
        raise UsageError(
            "both --vocab-model and --vocab-size are given",
            hint="--vocab-model takes a vocabulary as it is, --vocab-size makes a new one from the text",
        )
    if config.vocab_size is None and kind == "llama2c-tokenizer":
        raise UsageError(
            "is a llama2.c vocabulary, which does not say how many tokens it has",
            path=config.vocab_model,
            hint="say it with --vocab-size N",
        )
    return vocabulary_only(config.vocab_model, config.vocab_size)


def _vocabulary(config: PrepareConfig, found: Found, folder: Path) -> Generator[Report, None, dict[str, Any]]:
    """The `tokenizer.*` keys."""
    if config.vocab_model is not None:
        return _given_vocabulary(config)
    assert config.vocab_size is not None
    yield TrainingVocabulary(config.vocab_size)
    target = folder / "tokenizer.model"
    write_sentencepiece_model(
        target, new_vocabulary(sampled_text(found, config), config.vocab_size, config.character_coverage)
    )
    return vocabulary_only(target)


def _written(
    config: PrepareConfig, found: Found, folder: Path, vocabulary: dict[str, Any], shards: list[WrittenShard]
) -> Generator[Report, None, Prepared]:
    path = write_vocabulary(folder, vocabulary)
    tokenizer = tokenizer_of(vocabulary, config.vocab_model)
    bos = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if bos is None:
        raise UnsupportedError(
            "has neither BOS nor EOS, one of which stands before a document", path=config.vocab_model
        )
    dtype = dtype_for(tokenizer.n_vocab, config.dtype)
    yield VocabularyReady(tokenizer.n_vocab, tokenizer.model, config.vocab_model, tuple(tokenizer.warnings))
    documents = Documents(found, config, tokenizer)
    with contextlib.closing(TokenSpool(folder, dtype, bos)) as spool:
        workers = 1 if found.n_bytes < _WORTH_WORKERS else config.workers or len(os.sched_getaffinity(0))
        for unit, ids in encoded(documents.units(), tokenizer, path, workers):
            for piece, tokens in zip(unit.pieces, ids, strict=True):
                if piece.begins:
                    spool.begin(held_out=piece.held_out)
                spool.add(tokens, len(piece.text.encode()))
            yield Encoding(unit.n_read, found.n_bytes, spool.n_documents, spool.n_tokens)
    sizes = spool.sizes()
    made = {key: getattr(config, key) for key in ("split_on", "text_key", "errors", "val_split", "seed")}
    options = {"val_split": config.val_split, "seed": config.seed, "shard_tokens": config.shard_tokens, "made": made}
    for shard in spool.finish(folder, vocabulary, **options):
        shards.append(shard)
        yield Saving(shard, shard.n_tokens / shard.n_documents)
    for scratch in folder.glob(".input*"):
        scratch.unlink()
    held_out = sum(shard.n_tokens for shard in shards if shard.split == "validation")
    return Prepared(
        config.out, tuple(shards), tokenizer.n_vocab, dtype, spool.n_documents, spool.n_tokens, held_out,
        sum(shard.n_bytes for shard in shards), int(sizes.max()), documents.n_empty, documents.n_duplicates(),
        documents.n_replaced, documents.example, 0.0,
    )  # fmt: skip
