"""A vocabulary from whatever holds one: a GGUF file, a folder, or a vocabulary's own file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llamakit.errors import FormatError, UnsupportedError, UsageError
from llamakit.formats.folder import member
from llamakit.formats.gguf_split import open_gguf
from llamakit.formats.huggingface_vocab import read_vocabulary, sentencepiece_vocabulary
from llamakit.formats.llama2c_vocab import read_llama2c_vocabulary
from llamakit.formats.open import sniff
from llamakit.formats.tiktoken_model import is_tiktoken, read_tiktoken_vocabulary


def vocabulary_only(
    path: str | os.PathLike[str], n_vocab: int | None = None, *, pre: str | None = None
) -> dict[str, Any]:
    """The `tokenizer.*` metadata of a GGUF file of any architecture, a Hugging Face folder, a tokenizer.model
    (SentencePiece's, or tiktoken's with the special tokens of Llama 3.1 and later), a tokenizer.json (with the
    tokenizer_config.json beside it), a folder of tokens, or a llama2.c tokenizer.bin.

    n_vocab: the model's number of tokens; tokenizer.bin needs it, shorter vocabularies are padded with [PADi]. pre:
    how BPE cuts words, where a tokenizer.json is not recognised.

    Raises UsageError for a path that cannot be read, holds no vocabulary, or lacks n_vocab, FormatError for a broken
    file, UnsupportedError for one of another kind.
    """
    path = Path(path)
    kind = sniff(path)
    if kind in ("huggingface", "directory"):
        return read_vocabulary(path, n_vocab, pre=pre)
    if kind in ("gguf", "tokens"):
        return _of_gguf(path if kind == "gguf" else member(path, "vocab.gguf"))
    if kind == "llama2c-tokenizer":
        if n_vocab is None:
            hint = "give the model with it, which knows the number of tokens"
            raise UsageError(
                "is a llama2.c vocabulary, which does not say how many tokens it has", path=path, hint=hint
            )
        return read_llama2c_vocabulary(path, n_vocab)
    if kind == "text" and is_tiktoken(path):
        return read_tiktoken_vocabulary(path, n_vocab, tools=True)
    if kind == "sentencepiece" or path.suffix == ".model":
        return sentencepiece_vocabulary(path, n_vocab)
    if kind == "text" and path.name == "tokenizer.json":
        return read_vocabulary(member(path.parent, path.name).parent, n_vocab, pre=pre, prefer_json=True)
    raise UnsupportedError(
        f"is no vocabulary that llamakit knows ({kind})",
        path=path,
        hint="give a GGUF file, a model's folder, tokenizer.model, tokenizer.json, or llama2.c's tokenizer.bin",
    )


def _of_gguf(path: Path) -> dict[str, Any]:
    with open_gguf(path) as file:
        found = {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
    if "tokenizer.ggml.tokens" not in found:
        raise FormatError("holds no vocabulary (tokenizer.ggml.tokens is missing)", path=path)
    return found
