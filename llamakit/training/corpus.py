"""What `train` learns from: tokens as they lie on the disk, or text that is turned into tokens in the run's folder."""

from __future__ import annotations

import hashlib
import json
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
from llamakit.dataset.tokens import INDEX, VOCABULARY, TokenData, check_ids, check_vocabulary, holds_tokens, open_tokens
from llamakit.dataset.tokens_writer import write_vocabulary
from llamakit.errors import DataError, MismatchError, UsageError
from llamakit.files import atomic_path, escape_control
from llamakit.formats.gguf import open_gguf
from llamakit.formats.stamps import vocabulary_stamp
from llamakit.formats.strict_json import read_object
from llamakit.formats.vocabulary import vocabulary_only
from llamakit.tokenizer import Tokenizer
from llamakit.tokenizer.load import tokenizer_of
from llamakit.training.train_config import TrainConfig

PLAYS = "tinyshakespeare"
_DATA, _SOURCE = "data", "data.json"


@dataclass(frozen=True, eq=False)
class Corpus:
    """data: the tokens. vocabulary: its `tokenizer.*` keys. tokenizer: made of them."""

    data: TokenData
    vocabulary: Mapping[str, Any]
    tokenizer: Tokenizer


def open_corpus(
    config: TrainConfig, model_vocabulary: Mapping[str, Any], *, resumes: bool, reads_only: bool = False
) -> Generator[PrepareReport, None, Corpus]:
    """The corpus of a run; text becomes tokens in OUT_DIR/data first, unless they are there from this very text.

    model_vocabulary: `tokenizer.*` keys of the model that is trained on; empty where it is new or has none. resumes:
    a checkpoint needs the tokens that are there, which are not replaced. reads_only: another process has prepared them.
    Raises UsageError and DataError for what cannot be read or used, MismatchError for tokens of another vocabulary.
    """
    vocabulary = _given_vocabulary(config, model_vocabulary)
    path = Path(config.train_data)
    if holds_tokens(path):
        data = open_tokens(path)
    else:
        yield from () if reads_only else _prepare(config, vocabulary, resumes=resumes)
        data = open_tokens(Path(config.out_dir) / _DATA)
    if vocabulary:
        check_vocabulary(data, vocabulary, config.vocab_model or config.init_from)
    elif data.vocabulary_file is not None:
        vocabulary = _vocabulary_of(data.vocabulary_file)
    else:
        hint = "name a model or file with the vocabulary that the tokens were made with: --vocab-model FILE"
        raise UsageError("has tokens, and no vocabulary beside them", path=path, hint=hint)
    if data.vocabulary:  # of others' tokens check_vocabulary has read every one
        check_ids(data, len(vocabulary["tokenizer.ggml.tokens"]))
    folder = Path(config.out_dir)
    file = folder / VOCABULARY if reads_only else write_vocabulary(folder, vocabulary)
    return Corpus(data, vocabulary, tokenizer_of(vocabulary, file))


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


def known_vocabulary(config: TrainConfig, model_vocabulary: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `tokenizer.*` keys of a run whose text is not needed: those that are named, or those in its folder.

    Raises UsageError where there are none.
    """
    vocabulary = model_vocabulary or (vocabulary_only(config.vocab_model) if config.vocab_model else {})
    return vocabulary or _vocabulary_of(Path(config.out_dir) / VOCABULARY)


def _prepare(
    config: TrainConfig, vocabulary: Mapping[str, Any], *, resumes: bool
) -> Generator[PrepareReport, None, None]:
    """OUT_DIR/data, made of --train-data; kept where it is of the same text, vocabulary and options."""
    if not config.vocab_size and not vocabulary:
        raise UsageError(
            "no vocabulary is given",
            hint="--vocab-model FILE takes one from a model, --vocab-size N makes one from the text",
        )
    folder, mark = Path(config.out_dir) / _DATA, Path(config.out_dir) / _SOURCE
    is_name = config.train_data == PLAYS and not os.path.exists(config.train_data)
    source = _source(config, vocabulary, is_name=is_name)
    if folder.is_dir() and mark.is_file():
        before = read_object(mark)
        if before == source:
            return
        if resumes:
            raise MismatchError(
                f"{_difference(before, source)}, but the checkpoint goes on with the tokens that are there",
                path=folder,
                hint="--init-from scratch starts afresh in this folder, another --out-dir keeps both runs",
            )
    if folder.is_dir():
        _remove(folder)
    mark.unlink(missing_ok=True)
    options = PrepareConfig(
        out=folder,
        inputs=() if is_name else (config.train_data,),
        name=PLAYS if is_name else None,
        vocab_model=write_vocabulary(Path(config.out_dir), vocabulary) if vocabulary else None,
        vocab_size=config.vocab_size or None,
        errors=config.errors,
        val_split=config.val_split,
        seed=config.seed,
    )
    try:
        yield from prepare(options)
    except DataError as error:
        if error.path is None:
            raise DataError(error.reason, path=config.train_data, hint=error.hint) from error
        raise
    with atomic_path(mark) as temporary:
        temporary.write_text(json.dumps(source, indent=1) + "\n", encoding="ascii")


def _remove(folder: Path) -> None:
    """Clear tokens away that are no longer those of the run. Raises UsageError for a folder that holds more."""
    names = sorted(path.name for path in folder.iterdir())
    ours = {
        name for name in names if name in (INDEX, VOCABULARY, "tokenizer.model") or name.endswith((".bin", ".bounds"))
    }
    strange = next((name for name in names if name not in ours), None)
    if strange is None and names and INDEX not in names:
        strange = names[0]
    if strange is not None:
        raise UsageError(
            f"holds {strange!r}, which is not of a run: the tokens of this one would replace the folder",
            path=folder,
            hint="give another --out-dir",
        )
    shutil.rmtree(folder)


def _source(config: TrainConfig, vocabulary: Mapping[str, Any], *, is_name: bool) -> dict[str, Any]:
    """Everything that decides about the tokens; files by their sha256 (hex)."""
    source: dict[str, Any] = {
        "--vocab-size": config.vocab_size,
        "vocabulary": vocabulary_stamp(vocabulary) if vocabulary else "",
        "--errors": config.errors,
        "--val-split": config.val_split,
        "--seed": config.seed,
    }
    for path in find_plays() if is_name else _files(config.train_data):
        name = path.name if is_name else os.path.relpath(path, Path(config.train_data).parent)
        try:
            with path.open("rb") as file:
                source[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            reason = f"cannot be read: {error.strerror or escape_control(str(error))}"
            raise UsageError(reason, path=path) from error
    return source


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first thing that is not as it was, in words."""
    key = next(key for key in {**now, **before} if before.get(key) != now.get(key))
    if key.startswith("--") and key in before:
        return f"{key} is {now[key]}, these tokens were made with {before[key]}"
    if key == "vocabulary":
        return "the vocabulary is not the one that these tokens were made with"
    return f"{escape_control(key)} is not what it was when these tokens were made of it"


def _files(name: str) -> list[Path]:
    path = Path(name)
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file())
