"""The `tokenizer.*` keys of a GGUF file, checked as far as a writer of another format needs them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llamakit.errors import UnsupportedError
from llamakit.files import escape_control
from llamakit.formats.gguf_writer import Typed
from llamakit.formats.metadata import Metadata
from llamakit.formats.pre_tokenizers import ADD_BOS, NO_BOS
from llamakit.formats.sentencepiece_model import NORMAL, UNUSED

_ID_KEY = re.compile(r"tokenizer\.ggml\.(\w+)_token_id")
_ADD_KEY = re.compile(r"tokenizer\.ggml\.add_(bos|eos|sep)_token")
_NAMED_TEMPLATE = "tokenizer.chat_template."


@dataclass(frozen=True)
class VocabularyKeys:
    """One vocabulary.

    model: "llama" (SPM) or "gpt2" (BPE). scores: (n,) float32. ids: GGUF's name of a special token ("bos", "unknown")
    -> its id, as stated; add: "bos", "eos", "sep" -> whether it is put around a text, as stated. add_space_prefix: None
    where nothing is said. merges: of BPE. templates: name -> Jinja, the usual one under "".
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: np.ndarray
    ids: dict[str, int]
    add: dict[str, bool]
    add_space_prefix: bool | None
    merges: list[str]
    templates: dict[str, str]

    @property
    def adds_bos(self) -> bool:
        """Whether BOS is put before a text: as stated, else as llama.cpp does."""
        return self.add.get("bos", self.model == "llama" or self.pre in ADD_BOS)

    def special_id(self, name: str) -> int | None:
        """The id of "bos", "eos" or "unknown": as stated, else llama.cpp's default; None where there is none."""
        if self.model == "llama":
            default = {"bos": 1, "eos": 2, "unknown": 0}[name]
        else:
            default = -1 if name == "unknown" or (name == "bos" and self.pre in NO_BOS) else 11
        id = self.ids.get(name, default)
        return id if 0 <= id < len(self.tokens) else None

    def of_type(self, *types: int) -> list[int]:
        """Ids of the tokens of some types."""
        return [i for i, type in enumerate(self.types) if type in types]

    def padding(self) -> set[int]:
        """Ids of the model's rows that have no token: those are spelled [PADi] and unused."""
        return {i for i in self.of_type(UNUSED) if self.tokens[i] == f"[PAD{i}]"}


def read_keys(metadata: Mapping[str, Any]) -> VocabularyKeys:
    """The keys of a vocabulary; others are ignored.

    Raises UnsupportedError for another kind than SPM and BPE and for tokens that are no Unicode text, FormatError for
    keys that are missing, of the wrong type, or contradict each other; both name the key.
    """
    values = {
        key: v.value if isinstance(v, Typed) else v for key, v in metadata.items() if key.startswith("tokenizer.")
    }
    keys = Metadata(values, None)
    model = keys.string("tokenizer.ggml.model")
    if model not in ("llama", "gpt2"):
        shown = escape_control(repr(model)[:40])
        raise UnsupportedError(f"tokenizer.ggml.model is {shown} (expected 'llama', which is SPM, or 'gpt2', BPE)")
    tokens = _tokens(keys)
    n = len(tokens)
    types = keys.numbers("tokenizer.ggml.token_type", n, "iu")
    scores = keys.numbers("tokenizer.ggml.scores", n, "fi")
    if scores is not None and np.isnan(scores).any():
        raise keys.error("tokenizer.ggml.scores", f"has no number at {int(np.isnan(scores).argmax())}")
    names = [m[1] for m in map(_ID_KEY.fullmatch, values) if m]
    ids = {name: keys.token_id(f"tokenizer.ggml.{name}_token_id", None, n) for name in names}
    adds = [m[1] for m in map(_ADD_KEY.fullmatch, values) if m]
    prefix = "tokenizer.ggml.add_space_prefix"
    return VocabularyKeys(
        model,
        keys.string("tokenizer.ggml.pre") or "default",
        tokens,
        [NORMAL] * n if types is None else types.tolist(),
        np.zeros(n, np.float32) if scores is None else scores.astype(np.float32),
        {name: id for name, id in ids.items() if id is not None},
        {name: keys.flag(f"tokenizer.ggml.add_{name}_token", False) for name in adds},
        keys.flag(prefix, True) if prefix in values else None,
        _merges(keys) if model == "gpt2" else [],
        _templates(keys, values),
    )


def _tokens(keys: Metadata) -> list[str]:
    name = "tokenizer.ggml.tokens"
    tokens = keys.strings(name)
    if not tokens:
        raise keys.error(name, "is missing or empty")
    first: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if not token:
            tokens[i] = token = f"[EMPTY_{i}]"  # as llama.cpp reads it
        if first.setdefault(token, i) != i:
            raise keys.error(name, f"has {token[:80]!r} twice, as {first[token]} and {i}")
        if not token.isascii() and not _is_unicode(token):
            reason = f"{name}[{i}] is {token[:80]!a}, which is no UTF-8"
            raise UnsupportedError(
                reason, hint="keep this vocabulary in GGUF: other formats have no place for such bytes"
            )
    return tokens


def _is_unicode(token: str) -> bool:
    try:
        token.encode()
    except UnicodeEncodeError:
        return False
    return True


def _merges(keys: Metadata) -> list[str]:
    merges = keys.strings("tokenizer.ggml.merges")
    if not merges:
        raise keys.error("tokenizer.ggml.merges", "is missing or empty")
    return merges


def _templates(keys: Metadata, values: Mapping[str, Any]) -> dict[str, str]:
    found = {key[len(_NAMED_TEMPLATE) :]: keys.string(key) for key in values if key.startswith(_NAMED_TEMPLATE)}
    found[""] = keys.string("tokenizer.chat_template")
    templates = {name: template for name, template in found.items() if template is not None}
    if not all(map(_is_unicode, templates.values())):
        raise UnsupportedError("tokenizer.chat_template is no UTF-8")
    return templates
