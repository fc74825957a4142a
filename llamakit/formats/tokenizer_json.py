"""tokenizer.json, the file of the `tokenizers` library, read strictly: BPE vocabularies only.

Two kinds are told apart, as in convert_hf_to_gguf.py: byte-level BPE, whose tokens are spelled in GPT-2's letters, and
SentencePiece's BPE as transformers converts it, which spells unknown characters in byte tokens (`byte_fallback`).
What llama.cpp would tokenize in another way is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llamakit.errors import FormatError, UnsupportedError
from llamakit.files import escape_control
from llamakit.formats.strict_json import read_object

#: more tokens than any model has rows
MAX_TOKENS = 1 << 22


class AddedToken(NamedTuple):
    """A token that is looked for in a text before anything else. normalized: only after normalizing the text."""

    id: int
    content: str
    special: bool
    normalized: bool


@dataclass(frozen=True)
class TokenizerJson:
    """A checked BPE vocabulary.

    tokens: spelling -> id. merges: in their order. added: in the order of the file, some of them among the tokens, too.
    byte_fallback: SentencePiece's kind. prefix_space: such a one puts a space before a text. raw: the file.
    """

    path: Path
    raw: Mapping[str, Any]
    tokens: Mapping[str, int]
    merges: list[tuple[str, str]]
    added: list[AddedToken]
    ignore_merges: bool
    byte_fallback: bool
    prefix_space: bool = False

    def error(self, reason: str) -> FormatError:
        """A FormatError about this file; the reason may quote it."""
        return FormatError(escape_control(reason), path=self.path)


def read_tokenizer_json(path: Path) -> TokenizerJson:
    """The BPE vocabulary in a tokenizer.json.

    Raises UsageError where it cannot be read, FormatError, naming the place in the file, for what is broken,
    UnsupportedError for a sound one that llama.cpp's tokenizers cannot follow.
    """
    raw = read_object(path)
    model = raw.get("model")
    if not isinstance(model, Mapping):
        raise FormatError("model is missing or no object", path=path)
    _check_kind(model, path)
    tokens = _tokens(model.get("vocab"), path)
    fallback = model.get("byte_fallback", False) is True
    found = TokenizerJson(
        path,
        raw,
        tokens,
        _merges(model.get("merges"), tokens, path),
        added_tokens(raw, path),
        ignore_merges=model.get("ignore_merges", False) is True,
        byte_fallback=fallback,
        prefix_space=fallback and _prefix_space(raw, path),
    )
    _check_normalizer(found)
    _check_added(found)
    return found


def _check_kind(model: Mapping[str, Any], path: Path) -> None:
    if model.get("type") != "BPE":
        shown = escape_control(repr(model.get("type"))[:40])
        raise UnsupportedError(f"model.type is {shown} (expected 'BPE')", path=path)
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            shown = escape_control(repr(model[key])[:40])
            raise UnsupportedError(f"model.{key} is {shown}, which llama.cpp does not know", path=path)


def _tokens(vocab: Any, path: Path) -> dict[str, int]:
    if not isinstance(vocab, Mapping) or not vocab:
        raise FormatError("model.vocab is missing, empty or no object", path=path)
    names: dict[int, str] = {}
    for token, id in vocab.items():
        check_id(id, f"model.vocab[{token[:80]!r}]", path)
        if names.setdefault(id, token) != token:
            reason = f"model.vocab has the id {id} twice, for {names[id][:80]!r} and {token[:80]!r}"
            raise FormatError(escape_control(reason), path=path)
    return dict(vocab)


def check_id(id: Any, place: str, path: Path) -> None:
    """Raise FormatError for what cannot be a token's id."""
    if type(id) is not int or not 0 <= id < MAX_TOKENS:
        reason = f"{place} is {str(id)[:40]} (expected an id from 0 to {MAX_TOKENS - 1})"
        raise FormatError(escape_control(reason), path=path)


def _merges(merges: Any, tokens: Mapping[str, int], path: Path) -> list[tuple[str, str]]:
    """Both spellings, "a b" and ["a", "b"], not mixed."""
    if not isinstance(merges, list) or not merges:
        raise FormatError("model.merges is missing, empty or no list", path=path)
    kind = type(merges[0])
    found: list[tuple[str, str]] = []
    for i, merge in enumerate(merges):
        pair = merge.split(" ") if kind is str and type(merge) is str else merge
        if type(merge) is not kind or not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_text, pair)):
            shown = escape_control(repr(merge)[:80])
            raise FormatError(f"model.merges[{i}] is {shown} (expected two tokens)", path=path)
        left, right = pair
        missing = next((t for t in (left, right, left + right) if t not in tokens), None)
        if missing is not None:
            reason = f"model.merges[{i}] needs the token {missing[:80]!r}, which is missing"
            raise FormatError(escape_control(reason), path=path)
        found.append((left, right))
    return found


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def added_tokens(raw: Mapping[str, Any], path: Path) -> list[AddedToken]:
    """The "added_tokens" of a tokenizer.json, which may be missing."""
    added = raw.get("added_tokens")
    if not isinstance(added, list | None):
        raise FormatError("added_tokens is no list", path=path)
    found: list[AddedToken] = []
    for i, item in enumerate(added or ()):
        if not isinstance(item, Mapping):
            raise FormatError(f"added_tokens[{i}] is no object", path=path)
        check_id(item.get("id"), f"added_tokens[{i}].id", path)
        found.append(AddedToken(item["id"], *token_flags(item, f"added_tokens[{i}]", path)))
    return found


def token_flags(item: Mapping[str, Any], place: str, path: Path) -> tuple[str, bool, bool]:
    """(content, special, normalized) of an object that describes an added token."""
    content = item.get("content")
    if not _is_text(content):
        raise FormatError(f"{place}.content is no text, or an empty one", path=path)
    special = item.get("special", False)
    normalized = item.get("normalized", not special)
    if not isinstance(special, bool) or not isinstance(normalized, bool):
        raise FormatError(f"{place} has flags that are neither true nor false", path=path)
    return str(content), special, normalized


def _check_added(file: TokenizerJson) -> None:
    """An added token is the one of that id in the vocabulary, or a new one; no two are the same."""
    spelled = {id: token for token, id in file.tokens.items()}
    ids: dict[str, int] = {}
    for i, (id, content, _, _) in enumerate(file.added):
        if spelled.setdefault(id, content) != content or ids.setdefault(content, id) != id:
            raise file.error(f"added_tokens[{i}] is {content[:80]!r} with the id {id}, which is another token's")
        if file.tokens.get(content, id) != id:
            raise file.error(f"added_tokens[{i}] is {content[:80]!r} with the id {id}, and not in model.vocab")


def _steps(structure: Any) -> list[Mapping[str, Any]] | None:
    """The steps of a normalizer or decoder, in one row; None for what is neither."""
    if structure is None:
        return []
    if not isinstance(structure, Mapping):
        return None
    if structure.get("type") != "Sequence":
        return [structure]
    inner = next((structure[k] for k in ("normalizers", "decoders", "pretokenizers") if k in structure), None)
    if not isinstance(inner, list) or not all(isinstance(step, Mapping) for step in inner):
        return None
    return inner


def _check_normalizer(file: TokenizerJson) -> None:
    """Byte-level BPE: nothing, or NFC, which llama.cpp skips and which changes few texts."""
    if file.byte_fallback:
        return
    steps = _steps(file.raw.get("normalizer"))
    kinds = None if steps is None else [step.get("type") for step in steps]
    if kinds is None or any(kind != "NFC" for kind in kinds):
        reason = f"normalizer is {kinds if kinds is not None else 'broken'} (expected none, or NFC)"
        raise UnsupportedError(f"{escape_control(reason[:200])}: llama.cpp does not change a text", path=file.path)


def _prefix_space(raw: Mapping[str, Any], path: Path) -> bool:
    """Whether SentencePiece's kind puts a space before a text.

    Two forms do so: the normalizers Prepend and Replace, or the pre-tokenizer Metaspace, which does not cut.
    """
    normalizers, cutters = _steps(raw.get("normalizer")), _steps(raw.get("pre_tokenizer"))
    if normalizers is not None and cutters is not None and len(cutters) <= 1:
        plain = [_without_defaults(step) for step in normalizers]
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        prepend = {"type": "Prepend", "prepend": "\u2581"}
        if not cutters and plain in ([replace], [prepend, replace]):
            return prepend in plain
        if not plain and cutters and cutters[0].get("type") == "Metaspace":
            return _metaspace(cutters[0], path)
    raise UnsupportedError(
        "normalizer and pre_tokenizer are not SentencePiece's (expected Prepend and Replace, or Metaspace alone)",
        path=path,
        hint="put the model's tokenizer.model into the folder",
    )


def _without_defaults(step: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in step.items() if value is not None}


def _metaspace(step: Mapping[str, Any], path: Path) -> bool:
    scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
    if step.get("replacement") != "\u2581" or step.get("split", True) is not False or scheme not in _SCHEMES:
        shown = escape_control(repr(dict(step))[:200])
        raise UnsupportedError(f"pre_tokenizer is {shown}, which llama.cpp does not know", path=path)
    return scheme != "never"


_SCHEMES = ("always", "first", "never")
