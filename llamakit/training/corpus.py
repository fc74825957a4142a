"""What `train` learns from: tokens as they lie on the disk, or text that is turned into tokens in the run's folder."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamakit.dataset.plays import find_plays
from llamakit.dataset.prepare import Report as PrepareReport
from llamakit.dataset.prepare import prepare
from llamakit.dataset.prepare_config import PrepareConfig
from llamakit.dataset.tokens import TokenData, check_ids, check_vocabulary, holds_tokens, open_tokens
from llamakit.dataset.tokens_writer import write_vocabulary
from llamakit.errors import UsageError
from llamakit.files import atomic_path, escape_control
from llamakit.formats.gguf import open_gguf
from llamakit.formats.vocabulary import vocabulary_only
from llamakit.tokenizer import Tokenizer, load_tokenizer
from llamakit.training.train_config import TrainConfig

PLAYS = "tinyshakespeare"
_DATA, _SOURCE = "data", "data.sha256"


@dataclass(frozen=True, eq=False)
class Corpus:
    """data: the tokens. vocabulary: its `tokenizer.*` keys. tokenizer: made of them."""

    data: TokenData
    vocabulary: Mapping[str, Any]
    tokenizer: Tokenizer


def open_corpus(config: TrainConfig, model_vocabulary: Mapping[str, Any]) -> Generator[PrepareReport, None, Corpus]:
    """The corpus of a run; text becomes tokens in OUT_DIR/data first, unless they are there from this very text.

    model_vocabulary: `tokenizer.*` keys of the model that is trained on; empty where it is new or has none.
    Raises UsageError and DataError for what cannot be read or used, MismatchError for tokens of another vocabulary.
    """
    vocabulary = _given_vocabulary(config, model_vocabulary)
    path = Path(config.train_data)
    if holds_tokens(path):
        data = open_tokens(path)
    else:
        yield from _prepare(config, vocabulary)
        data = open_tokens(Path(config.out_dir) / _DATA)
    if vocabulary:
        check_vocabulary(data, vocabulary, config.vocab_model or config.init_from)
    elif data.vocabulary_file is not None:
        vocabulary = _vocabulary_of(data.vocabulary_file)
    else:
        hint = "name a model or file with the vocabulary that the tokens were made with: --vocab-model FILE"
        raise UsageError("has tokens, and no vocabulary beside them", path=path, hint=hint)
    check_ids(data, len(vocabulary["tokenizer.ggml.tokens"]))
    with open_gguf(write_vocabulary(Path(config.out_dir), vocabulary)) as file:
        return Corpus(data, vocabulary, load_tokenizer(file))


def _vocabulary_of(path: Path) -> dict[str, Any]:
    with open_gguf(path) as file:
        return {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}


def _given_vocabulary(config: TrainConfig, model_vocabulary: Mapping[str, Any]) -> Mapping[str, Any]:
    if config.vocab_model and config.vocab_size:
        raise UsageError(
            "both --vocab-model and --vocab-size are given",
            hint="--vocab-model takes a vocabulary as it is, --vocab-size makes a new one from the text",
        )
    if model_vocabulary:
        if config.vocab_size:
            raise UsageError("--vocab-size: the model that is trained on has a vocabulary, which stays")
        return model_vocabulary
    return vocabulary_only(config.vocab_model) if config.vocab_model else {}


def _prepare(config: TrainConfig, vocabulary: Mapping[str, Any]) -> Generator[PrepareReport, None, None]:
    """OUT_DIR/data, made of --train-data; kept where it is of the same text, vocabulary and options."""
    if not config.vocab_size and not vocabulary:
        raise UsageError(
            "no vocabulary is given",
            hint="--vocab-model FILE takes one from a model, --vocab-size N makes one from the text",
        )
    folder, mark = Path(config.out_dir) / _DATA, Path(config.out_dir) / _SOURCE
    source = write_vocabulary(Path(config.out_dir), vocabulary) if vocabulary else None
    is_name = config.train_data == PLAYS and not os.path.exists(config.train_data)
    digest = _digest(config, source, is_name=is_name)
    if folder.is_dir() and mark.is_file() and mark.read_text(encoding="ascii") == digest:
        return
    mark.unlink(missing_ok=True)
    if folder.is_dir():
        shutil.rmtree(folder)
    yield from prepare(
        PrepareConfig(
            out=folder,
            inputs=() if is_name else (config.train_data,),
            name=PLAYS if is_name else None,
            vocab_model=source,
            vocab_size=config.vocab_size or None,
            val_split=config.val_split,
            seed=config.seed,
        )
    )
    with atomic_path(mark) as temporary:
        temporary.write_text(digest, encoding="ascii")


def _digest(config: TrainConfig, vocabulary: Path | None, *, is_name: bool) -> str:
    """sha256 (hex) of everything that decides about the tokens."""
    digest = hashlib.sha256(f"{config.vocab_size} {config.val_split} {config.seed}".encode())
    for path in [*([vocabulary] if vocabulary else []), *(find_plays() if is_name else _files(config.train_data))]:
        digest.update(os.fsencode(path.name) + b"\0")
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            reason = f"cannot be read: {error.strerror or escape_control(str(error))}"
            raise UsageError(reason, path=path) from error
    return digest.hexdigest()


def _files(name: str) -> list[Path]:
    path = Path(name)
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file())
