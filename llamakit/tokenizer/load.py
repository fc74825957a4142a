"""A tokenizer from the metadata of a model file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamakit.errors import UnsupportedError
from llamakit.files import escape_control
from llamakit.formats.base import ModelFile
from llamakit.formats.gguf_writer import Typed
from llamakit.formats.metadata import Metadata
from llamakit.tokenizer.base import Tokenizer
from llamakit.tokenizer.bpe import BpeTokenizer
from llamakit.tokenizer.pre import find_pre_tokenizer
from llamakit.tokenizer.spm import SpmTokenizer
from llamakit.tokenizer.vocabulary import Defaults, check_scores, read_vocabulary

_SPM_DEFAULTS = Defaults(bos_id=1, eos_id=2, unk_id=0, add_bos=True, add_space_prefix=True, clean_spaces=False)


def load_tokenizer(file: ModelFile) -> Tokenizer:
    """The tokenizer of a model, from its `tokenizer.*` metadata: SPM ("llama") or byte-level BPE ("gpt2").

    Raises UnsupportedError for another kind of tokenizer or an unsupported `tokenizer.ggml.pre`, by name, and
    FormatError, naming the key, for metadata that is missing, of the wrong type, or contradicts itself.
    """
    return tokenizer_of(file.metadata, file.path)


def tokenizer_of(keys: Mapping[str, Any], path: Path | None) -> Tokenizer:
    """The tokenizer that `tokenizer.*` keys describe, those of `vocabulary_only`, say; path: for the errors.

    Raises as `load_tokenizer`.
    """
    metadata = Metadata({key: v.value if isinstance(v, Typed) else v for key, v in keys.items()}, path)
    model = metadata.string("tokenizer.ggml.model")
    if model == "llama":
        return _load_spm(metadata)
    if model == "gpt2":
        return _load_bpe(metadata, path)
    if model is None:
        raise metadata.error("tokenizer.ggml.model", "is missing: the file holds no vocabulary")
    raise UnsupportedError(
        f"tokenizer.ggml.model is {escape_control(model)!r} (expected 'llama', which is SPM, or 'gpt2', which is BPE)",
        path=path,
    )


def _load_spm(metadata: Metadata) -> SpmTokenizer:
    vocabulary = read_vocabulary(metadata, _SPM_DEFAULTS)
    check_scores(metadata, vocabulary.scores)
    vocabulary.warnings[:0] = metadata.warnings
    return SpmTokenizer(vocabulary)


def _load_bpe(metadata: Metadata, path: Path | None) -> BpeTokenizer:
    name = metadata.string("tokenizer.ggml.pre")
    if not name:
        metadata.warnings.append("tokenizer.ggml.pre is missing: 'default' is used, and the ids may be wrong")
    try:
        pre = find_pre_tokenizer(name or "default")
    except UnsupportedError as error:
        raise UnsupportedError(error.reason, path=path, hint=error.hint) from error
    bos = 11 if pre.has_bos else None
    defaults = Defaults(
        bos_id=bos, eos_id=11, unk_id=None, add_bos=pre.add_bos, add_space_prefix=False, clean_spaces=pre.clean_spaces
    )
    vocabulary = read_vocabulary(metadata, defaults)
    merges = metadata.strings("tokenizer.ggml.merges")
    if merges is None:
        raise metadata.error("tokenizer.ggml.merges", "is missing")
    vocabulary.warnings[:0] = metadata.warnings
    return BpeTokenizer(vocabulary, merges, pre)
