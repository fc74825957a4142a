"""The vocabulary of a Hugging Face folder as GGUF metadata, and back.

Values, types and order of the keys are those of convert_hf_to_gguf.py (conversion/base.py, conversion/llama.py), so
that the same folder gives the same vocabulary. Four differences, each where its file would tokenize in another way than
the folder, or not load at all: SentencePiece's BPE without a tokenizer.model gets scores from the order of its merges
rather than the same score for all, and is padded to the model's rows; a tokenizer.model that puts no space before a
text says so; and how BPE cuts words is told by the structure of tokenizer.json rather than by the ids of a sample.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamakit.errors import FormatError, UnsupportedError, UsageError
from llamakit.files import escape_control
from llamakit.formats.byte_letters import spelled_text
from llamakit.formats.folder import member
from llamakit.formats.huggingface_special import (
    USUAL_KINDS,
    HuggingFaceFiles,
    content_of,
    looks_special,
    optional_object,
    special_metadata,
)
from llamakit.formats.huggingface_vocab_writer import ADDED_SCORE, KEPT, UNSAID, write_vocabulary
from llamakit.formats.pre_tokenizers import IGNORE_MERGES, names_of
from llamakit.formats.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
    read_sentencepiece_model,
)
from llamakit.formats.tiktoken_model import is_tiktoken
from llamakit.formats.tokenizer_json import (
    MAX_TOKENS,
    AddedToken,
    TokenizerJson,
    check_id,
    read_tokenizer_json,
    token_flags,
)

__all__ = ["read_vocabulary", "write_vocabulary"]

_PADDING_SCORE = -10000.0
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
#: vocabulary of Code Llama, and where its tokens for filling in stand; the size of Granite's, which adds no BOS
_CODE_LLAMA, _CODE_LLAMA_EOT, _GRANITE = 32016, 32010, 49152


def read_vocabulary(
    directory: Path, n_vocab: int | None = None, *, pre: str | None = None, prefer_json: bool = False
) -> dict[str, Any]:
    """The `tokenizer.*` keys of a folder: of its tokenizer.model, else (prefer_json: at once) of its tokenizer.json.
    A tokenizer.model of tiktoken's says less than the tokenizer.json beside it.

    n_vocab: rows of the model's embedding; ids without a token become [PADi]. None: config.json's vocab_size, else as
    many as there are. pre: how BPE cuts words (`tokenizer.ggml.pre`), for a tokenizer.json that is not recognised.

    Raises UsageError where there is no vocabulary or a file cannot be read, FormatError, naming file and place, for a
    broken one, UnsupportedError for one that llama.cpp's tokenizers cannot follow.
    """
    files = HuggingFaceFiles.read(directory)
    n_vocab = _n_vocab(files, n_vocab)
    model = member(directory, "tokenizer.model")
    prefer_json = prefer_json or (files.tokenizer is not None and model.is_file() and is_tiktoken(model))
    if model.is_file() and not prefer_json:
        found = _read_sentencepiece(files, model, n_vocab)
    elif files.tokenizer is not None:
        file = read_tokenizer_json(files.path("tokenizer.json"))
        found = _read_llama_hf(files, file, n_vocab) if file.byte_fallback else _read_bpe(files, file, n_vocab, pre)
    else:
        raise _nothing(directory)
    _check_unique(found, directory)
    if n_vocab == _CODE_LLAMA:
        fill_in = special_metadata(files, None, ("prefix", "suffix", "middle", "eot"))
        found |= {"tokenizer.ggml.eot_token_id": _CODE_LLAMA_EOT, **fill_in}
    if n_vocab == _GRANITE:
        found["tokenizer.ggml.add_bos_token"] = False
    for name, id in _kept_ids(files, len(found["tokenizer.ggml.tokens"])).items():
        found.setdefault(f"tokenizer.ggml.{name}_token_id", id)
    unsaid = _kept(files).get("unsaid")
    for name in UNSAID:
        if isinstance(unsaid, list) and name in unsaid:
            found.pop(f"tokenizer.ggml.{name}", None)
    return found


def _kept(files: HuggingFaceFiles) -> Mapping[str, Any]:
    """What `write_vocabulary` wrote down that transformers has no name for."""
    kept = (files.tokenizer_config or {}).get(KEPT)
    return kept if isinstance(kept, Mapping) else {}


def _kept_ids(files: HuggingFaceFiles, n_vocab: int) -> dict[str, int]:
    ids = _kept(files).get("token_ids", {})
    path = files.path("tokenizer_config.json")
    if not isinstance(ids, Mapping):
        raise FormatError(f"{KEPT}.token_ids is no object", path=path)
    for name, id in ids.items():
        if not re.fullmatch("[a-z_]{1,20}", name) or type(id) is not int or not 0 <= id < n_vocab:
            shown = escape_control(repr((name, id))[:80])
            raise FormatError(f"{KEPT}.token_ids has {shown} (expected the id of a token)", path=path)
    return dict(ids)


def _nothing(directory: Path) -> UsageError:
    others = [name for name in ("tekken.json", "vocab.json") if (directory / name).is_file()]
    has = f" (there is a {others[0]}, which is another format)" if others else ""
    return UsageError(
        f"has no tokenizer.model and no tokenizer.json{has}", path=directory, hint="get the vocabulary's files too"
    )


def _n_vocab(files: HuggingFaceFiles, n_vocab: int | None) -> int | None:
    if n_vocab is None:
        n_vocab = (files.config or {}).get("vocab_size")
    if n_vocab is None:
        return None
    if type(n_vocab) is not int or not 1 <= n_vocab <= MAX_TOKENS:
        reason = f"vocab_size is {str(n_vocab)[:40]} (expected 1 to {MAX_TOKENS})"
        raise FormatError(escape_control(reason), path=files.path("config.json"))
    return n_vocab


def _check_unique(found: Mapping[str, Any], directory: Path) -> None:
    first: dict[str, int] = {}
    for i, token in enumerate(found["tokenizer.ggml.tokens"]):
        if first.setdefault(token, i) != i:
            reason = f"the token {token[:80]!r} is there twice, as {first[token]} and {i}, which GGUF does not allow"
            raise FormatError(escape_control(reason), path=directory)


def _prefix_key(files: HuggingFaceFiles) -> dict[str, Any]:
    """tokenizer_config.json's add_prefix_space, the first key of all."""
    flag = (files.tokenizer_config or {}).get("add_prefix_space")
    if flag is None:
        return {}
    if not isinstance(flag, bool):
        raise FormatError("add_prefix_space is neither true nor false", path=files.path("tokenizer_config.json"))
    return {"tokenizer.ggml.add_space_prefix": flag}


class _Table:
    """Tokens, scores and types by id; what is never set is padding."""

    def __init__(self, n: int) -> None:
        self.tokens = [f"[PAD{i}]" for i in range(n)]
        self.scores = [_PADDING_SCORE] * n
        self.types = [UNUSED] * n

    def set(self, id: int, token: str, score: float, type: int) -> None:
        self.tokens[id], self.scores[id], self.types[id] = token, score, type

    def metadata(self, model: str, pre: str, *, with_scores: bool) -> dict[str, Any]:
        """The keys in converters' order."""
        found: dict[str, Any] = {
            "tokenizer.ggml.model": model,
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": self.tokens,
        }
        if with_scores:
            found["tokenizer.ggml.scores"] = np.array(self.scores, np.float32)
        found["tokenizer.ggml.token_type"] = np.array(self.types, np.int32)
        return found


def sentencepiece_vocabulary(path: Path, n_vocab: int | None = None) -> dict[str, Any]:
    """The `tokenizer.*` keys of a tokenizer.model alone; BOS, EOS and padding are those that it names itself.

    n_vocab and what is raised: as `read_vocabulary`.
    """
    model = read_sentencepiece_model(path)
    table = _sentencepiece_table(model, n_vocab, user_defined=USER_DEFINED)
    prefix = {} if model.add_dummy_prefix else {"tokenizer.ggml.add_space_prefix": False}
    unknown = next(i for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN)
    ids = {"bos": model.bos_id, "eos": model.eos_id, "unknown": unknown, "padding": model.pad_id}
    n = len(table.tokens)
    stated = {f"tokenizer.ggml.{k}_token_id": id for k, id in ids.items() if id is not None and id < n}
    return {**prefix, **table.metadata("llama", "default", with_scores=True), **stated}


def _sentencepiece_table(model: SentencePieceModel, n_vocab: int | None, *, user_defined: int) -> _Table:
    """user_defined: type of the pieces of that kind, which a folder's other files list again."""
    table = _Table(n_vocab or len(model.pieces))
    for id, (text, score, type) in enumerate(model.pieces[: len(table.tokens)]):
        table.set(id, text, score, user_defined if type == USER_DEFINED else type)
    return table


def _read_sentencepiece(files: HuggingFaceFiles, path: Path, n_vocab: int | None) -> dict[str, Any]:
    model = read_sentencepiece_model(path)
    table = _sentencepiece_table(model, n_vocab, user_defined=NORMAL)
    n = len(table.tokens)
    added = optional_object(files.directory, "added_tokens.json") or {}
    for token, id in added.items():
        check_id(id, f"the id of {token[:80]!r}", files.path("added_tokens.json"))
        if id < n:
            table.set(id, token, ADDED_SCORE, USER_DEFINED)
    for id, (content, special, _) in _added_decoder(files):
        if id < n:
            table.set(id, *_added_entry(content, special))
    prefix = _prefix_key(files)
    if not prefix and not model.add_dummy_prefix:
        prefix = {"tokenizer.ggml.add_space_prefix": False}
    keys = table.metadata("llama", "default", with_scores=True)
    return {**prefix, **keys, **special_metadata(files, n)}


def _added_entry(content: str, special: bool) -> tuple[str, float, int]:
    """(token, score, type) of an added token."""
    if special or looks_special(content):
        return content, ADDED_SCORE, CONTROL
    return content.replace("\u2581", " "), ADDED_SCORE, USER_DEFINED


def _added_decoder(files: HuggingFaceFiles) -> list[tuple[int, tuple[str, bool, bool]]]:
    """tokenizer_config.json's added_tokens_decoder: (id, (content, special, normalized)) in the order of the file."""
    path = files.path("tokenizer_config.json")
    decoder = (files.tokenizer_config or {}).get("added_tokens_decoder", {})
    if not isinstance(decoder, Mapping):
        raise FormatError("added_tokens_decoder is no object", path=path)
    found = []
    for key, item in decoder.items():
        place = f"added_tokens_decoder[{escape_control(repr(key)[:40])}]"
        if not key.isascii() or not key.isdigit() or len(key) > 9 or not isinstance(item, Mapping):
            raise FormatError(f"{place} is no token with an id", path=path)
        check_id(int(key), place, path)
        found.append((int(key), token_flags(item, place, path)))
    return found


def _named_special(files: HuggingFaceFiles) -> list[str]:
    """Spellings of the tokens that tokenizer_config.json names as special ones."""
    config = files.tokenizer_config or {}
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or ()
    extra = list(extra.values()) if isinstance(extra, Mapping) else extra if isinstance(extra, list) else ()
    tokens = [content_of(token) for token in (*(config.get(f"{kind}_token") for kind in USUAL_KINDS), *extra)]
    return [token for token in dict.fromkeys(tokens) if token]


def _all_added(files: HuggingFaceFiles, file: TokenizerJson) -> dict[int, AddedToken]:
    """Added tokens by id: those of tokenizer.json, of tokenizer_config.json, and the special ones that it names."""
    found = {token.id: token for token in file.added}
    ids = {**file.tokens, **{token.content: token.id for token in file.added}}
    spelled = {id: content for content, id in ids.items()}
    for id, (content, special, normalized) in _added_decoder(files):
        if spelled.setdefault(id, content) != content or ids.setdefault(content, id) != id:
            reason = f"added_tokens_decoder['{id}'] is {content[:80]!r}, which is not that token of tokenizer.json"
            raise FormatError(escape_control(reason), path=files.path("tokenizer_config.json"))
        found.setdefault(id, AddedToken(id, content, special, normalized))
    following = max(ids.values()) + 1
    for content in _named_special(files):
        if content not in ids:
            ids[content], following = following, following + 1
        id = ids[content]
        found[id] = found.get(id, AddedToken(id, content, True, False))._replace(special=True)
    return found


def _sized(file: TokenizerJson, ids: Sequence[int], n_vocab: int | None) -> _Table:
    n = max(ids) + 1
    if n_vocab is not None and n > n_vocab:
        raise FormatError(f"has the id {n - 1}, but the model only has {n_vocab} tokens", path=file.path)
    return _Table(n_vocab or n)


def _read_llama_hf(files: HuggingFaceFiles, file: TokenizerJson, n_vocab: int | None) -> dict[str, Any]:
    """SentencePiece's BPE in a tokenizer.json: the earlier a merge, the higher the score of what it makes."""
    added = _all_added(files, file)
    table = _sized(file, [*file.tokens.values(), *added], n_vocab)
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(file.merges):
        rank.setdefault(left + right, i)
    for token, id in file.tokens.items():
        kind = BYTE if _BYTE_TOKEN.fullmatch(token) else NORMAL
        table.set(id, token, -float(rank.get(token, len(file.merges))), kind)
    for id, (_, content, special, _) in added.items():
        table.set(id, content, ADDED_SCORE, CONTROL if special else USER_DEFINED)
    prefix = _prefix_key(files)
    if not prefix and not file.prefix_space:
        prefix = {"tokenizer.ggml.add_space_prefix": False}
    keys = table.metadata("llama", "default", with_scores=True)
    return {**prefix, **keys, **special_metadata(files, len(table.tokens))}


def _read_bpe(files: HuggingFaceFiles, file: TokenizerJson, n_vocab: int | None, pre: str | None) -> dict[str, Any]:
    pre = pre or _recognised(files, file)
    added = _all_added(files, file)
    table = _sized(file, [*file.tokens.values(), *added], n_vocab)
    for token, id in file.tokens.items():
        table.set(id, token, 0.0, NORMAL)
    for id, (_, content, special, normalized) in added.items():
        token = content if normalized else spelled_text(content)
        if special or looks_special(token):
            table.set(id, token, 0.0, CONTROL)
        else:
            table.set(id, token.replace("\u2581", " "), 0.0, USER_DEFINED)
    merges = [f"{a} {b}" for a, b in ((_without_spaces(a), _without_spaces(b)) for a, b in file.merges)]
    keys = table.metadata("gpt2", pre, with_scores=False)
    return {**_prefix_key(files), **keys, "tokenizer.ggml.merges": merges, **special_metadata(files, None)}


def _without_spaces(part: str) -> str:
    """A space in a merge is spelled as the byte's letter: GGUF cuts a merge at its space."""
    return part.replace(" ", "\u0120")


def _recognised(files: HuggingFaceFiles, file: TokenizerJson) -> str:
    """The name of how this tokenizer.json cuts words; among equal ones, the usual one."""
    hint = "if you know how it cuts words, name it with --pre (a name of tokenizer.ggml.pre)"
    try:
        names = names_of(file.raw.get("pre_tokenizer"))
    except ValueError as error:
        reason = f"pre_tokenizer {escape_control(str(error))[:200]}"
        raise UnsupportedError(reason, path=file.path, hint=hint) from error
    if not names:
        reason = "pre_tokenizer cuts words by expressions that are none of llama.cpp's"
        raise UnsupportedError(reason, path=file.path, hint=hint)
    alike = [name for name in names if (name in IGNORE_MERGES) == file.ignore_merges]
    if not alike and not _merges_make_all(file):
        reason = f"model.ignore_merges is {str(file.ignore_merges).lower()}, which {names[0]} in llama.cpp is not"
        raise UnsupportedError(reason, path=file.path, hint=hint)
    kept = _kept(files).get("pre")
    name = kept if isinstance(kept, str) and kept in (alike or names) else (alike or names)[0]
    return name if name == kept else _kin_of_smollm(files, file) if name == "smollm" else name


def _merges_make_all(file: TokenizerJson) -> bool:
    """Whether every token is a letter or made by a merge: then a word that is a token comes out of merging, too."""
    made = {left + right for left, right in file.merges}
    apart = {token.content for token in file.added}
    return all(len(token) == 1 or token in made or token in apart for token in file.tokens)


def _kin_of_smollm(files: HuggingFaceFiles, file: TokenizerJson) -> str:
    """Names that cut alike, but differ in whether spaces before punctuation are closed up in what is decoded."""
    if file.raw.get("normalizer"):
        return "command-r"
    return "starcoder" if (files.tokenizer_config or {}).get("clean_up_tokenization_spaces") is True else "smollm"
