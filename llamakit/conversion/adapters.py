"""Adapters and vocabularies from one format into another: small files, read whole."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from llamakit.conversion.convert import Converted, converted
from llamakit.errors import SaveError, UsageError
from llamakit.files import atomic_directory, check_writable
from llamakit.formats.adapter import Adapter, check_adapter, read_adapter, write_adapter, write_adapter_folder
from llamakit.formats.gguf import write_gguf
from llamakit.formats.huggingface_vocab_writer import write_vocabulary
from llamakit.formats.llama2c_vocab import write_llama2c_vocabulary
from llamakit.formats.open import open_model
from llamakit.formats.vocabulary import vocabulary_only


def convert_adapter(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    force: bool = False,
) -> Converted:
    """A LoRA adapter (GGUF, PEFT folder, old ggla) as GGUF where `out` ends in .gguf, else as a PEFT folder.

    base: the model that it belongs to, in any format; its tensors give names and shapes, its stamps go into a GGUF.
    What was written is read again and compared. Raises what `read_adapter` and `check_adapter` raise, UnsupportedError
    for what the target cannot hold, SaveError when the disk refuses or the result differs.
    """
    with open_model(base) as model:
        adapter = read_adapter(source, model)
        notes = check_adapter(adapter, model, force=force)
        if str(out).endswith(".gguf"):
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


def convert_vocabulary(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> Converted:
    """A vocabulary as llama2.c's tokenizer.bin (`*.bin`), as a GGUF without tensors (`*.gguf`), or as a folder that
    transformers' AutoTokenizer loads.

    Raises what `vocabulary_only` raises, UnsupportedError for one that the target cannot hold, SaveError.
    """
    path, vocabulary = Path(out), vocabulary_only(source)
    if path.exists() and os.path.samefile(path, source):
        raise UsageError("is the source itself", path=path, hint="name another target with -o")
    if path.suffix == ".bin":
        check_writable(path)
        write_llama2c_vocabulary(path, vocabulary)
    elif path.suffix == ".gguf":
        check_writable(path)
        write_gguf(path, metadata={"general.architecture": "llama", "general.type": "model", **vocabulary}, tensors=())
    else:
        with atomic_directory(path) as folder:
            write_vocabulary(folder, vocabulary)
    return converted([path])
