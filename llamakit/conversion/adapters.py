"""Adapters and vocabularies from one format into another: small files, read whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from llamakit.conversion.convert import Converted, converted
from llamakit.conversion.convert_config import Target, target_of
from llamakit.errors import SaveError, UsageError
from llamakit.files import atomic_directory, check_writable, is_same_file
from llamakit.formats.adapter import Adapter, check_adapter, read_adapter, write_adapter, write_adapter_folder
from llamakit.formats.gguf import open_gguf, typed_metadata, write_gguf
from llamakit.formats.huggingface_vocab_writer import write_vocabulary
from llamakit.formats.llama2c_vocab import write_llama2c_vocabulary
from llamakit.formats.open import check_is_model, open_model, sniff
from llamakit.formats.tiktoken_model import is_tiktoken
from llamakit.formats.vocabulary import vocabulary_only


def convert_adapter(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    to: Target | None = None,
    force: bool = False,
) -> Converted:
    """A LoRA adapter (GGUF, PEFT folder, old ggla) as GGUF where `out` ends in .gguf, else as a PEFT folder.

    base: the model that it belongs to, in any format; its tensors give names and shapes, its stamps go into a GGUF.
    to: gguf or hf, whatever the name of `out`.
    What was written is read again and compared. Raises what `read_adapter` and `check_adapter` raise, UnsupportedError
    for what the target cannot hold, SaveError when the disk refuses or the result differs.
    """
    form = to or target_of(Path(out))
    if form == "llama2c":
        raise UsageError("llama2.c has no adapters", path=out, hint="name a .gguf, or a folder (PEFT)")
    _refuse_same(Path(out), source)
    with open_model(base, n_ctx=0) as model:
        check_is_model(model)
        adapter = read_adapter(source, model)
        notes = check_adapter(adapter, model, force=force)
        if form == "gguf":
            check_writable(out)
            write_adapter(out, adapter, model)
        else:
            write_adapter_folder(out, adapter, model)
        _compare(adapter, read_adapter(out, model), Path(out))
    return converted([Path(out)], *notes)


def _compare(expected: Adapter, written: Adapter, path: Path) -> None:
    """The same changes of the same tensors; where one alpha had to serve all, a ratio went into B."""
    for name, (a, b) in expected.tensors.items():
        again = written.tensors.get(name)
        if again is not None and np.array_equal(a, again[0]):
            ours, theirs = again[1] * np.float32(written.scale(name)), b * np.float32(expected.scale(name))
            if np.allclose(ours, theirs, rtol=1e-6, atol=0):
                continue
        raise SaveError(f"reads back with another change of {name} than was written", path=path)


def convert_vocabulary(
    source: str | os.PathLike[str], out: str | os.PathLike[str], *, to: Target | None = None, pre: str | None = None
) -> Converted:
    """A vocabulary as llama2.c's tokenizer.bin (`*.bin`), as a GGUF without tensors (`*.gguf`), or as a folder that
    transformers' AutoTokenizer loads. to: which of them, whatever the name; pre: how BPE cuts words, where the source
    does not show it.

    Raises what `vocabulary_only` raises, UnsupportedError for one that the target cannot hold, SaveError.
    """
    path = Path(out)
    _refuse_same(path, source)
    vocabulary = vocabulary_only(source, pre=pre)
    form = to or target_of(path)
    if form == "llama2c":
        check_writable(path)
        write_llama2c_vocabulary(path, vocabulary)
    elif form == "gguf":
        check_writable(path)
        write_gguf(path, metadata={**_head(source), **vocabulary}, tensors=())
    else:
        with atomic_directory(path) as folder:
            write_vocabulary(folder, vocabulary)
    return converted([path], *_vocabulary_notes(Path(source)))


def _head(source: str | os.PathLike[str]) -> dict[str, Any]:
    """What stands in a GGUF before the vocabulary: what stood there, where the source is one."""
    if sniff(source) != "gguf":
        return {"general.architecture": "llama", "general.type": "model"}
    with open_gguf(source) as file:
        return typed_metadata(file)


def _vocabulary_notes(source: Path) -> tuple[str, ...]:
    if source.is_file() and is_tiktoken(source):
        return ("tiktoken's file does not name its special tokens: they are those of Llama 3.1 and later",)
    return ()


def _refuse_same(path: Path, source: str | os.PathLike[str]) -> None:
    if is_same_file(path, source):
        raise UsageError("is the source itself", path=path, hint="name another target with -o")
