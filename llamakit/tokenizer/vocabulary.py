"""The vocabulary of a GGUF file: tokens, their kinds, the special ones, and the rules that come with them.

Every rule is llama.cpp's (src/llama-vocab.cpp, llama_vocab::impl::load), the ones that go by a token's spelling too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from llamakit.formats.metadata import Metadata


class Attr:
    """What a token is: bits, numbered as in llama.h; a token whose kind was overridden can be several things.

    Plain numbers: an enumeration's operators would take most of the time of loading.
    """

    UNDEFINED = 0
    UNKNOWN = 1
    UNUSED = 2
    NORMAL = 4
    CONTROL = 8
    USER_DEFINED = 16
    BYTE = 32
    LSTRIP = 128
    RSTRIP = 256


#: tokenizer.ggml.token_type -> Attr; any other number is undefined
_ATTR_OF_TYPE = {1: Attr.NORMAL, 2: Attr.UNKNOWN, 3: Attr.CONTROL, 4: Attr.USER_DEFINED, 5: Attr.UNUSED, 6: Attr.BYTE}

#: how a byte is spelled in a vocabulary
BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")

#: spellings that end a turn; the first one found is the end-of-turn token where the file names none
_EOT = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>",
    "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>",
)  # fmt: skip
_EOM = ("<|eom_id|>",)
#: spellings that end a generation, whatever the file says
_EOG = (
    *_EOT, *_EOM, "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "</s>", "[EOS]", "<eos>", "<turn|>",
    "<|tool_response>", "[e~[",
)  # fmt: skip
#: fill-in-the-middle tokens by their spelling, used where the file names none
_FIM = {
    "pre": (
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
        "<|prefix|>",
    ),
    "suf": (
        "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>",
        "<|suffix|>",
    ),
    "mid": (
        "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>",
        "<|middle|>",
    ),
    "pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "sep": ("<|file_sep|>",),
}  # fmt: skip
#: deprecated keys, read after the present ones
_OLD_FIM_KEYS = {"pre": "prefix", "suf": "suffix", "mid": "middle"}
#: always shown: the frame of a harmony conversation
_ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


@dataclass(frozen=True)
class Defaults:
    """What holds where the file does not say otherwise; it depends on the kind of tokenizer."""

    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    add_bos: bool
    add_space_prefix: bool
    clean_spaces: bool


@dataclass
class Vocabulary:
    """Tokens by id (bytes that are no UTF-8 as lone surrogates, "surrogateescape"), and what to do with them.

    ids: spelling -> id. scores: (n,) float64, None where the file has none. special_ids: tokens that are searched
    in a text before anything else, the longest first. warnings: what was odd about the file.
    """

    tokens: list[str]
    ids: dict[str, int]
    attrs: list[int]
    scores: np.ndarray | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    clean_spaces: bool = False
    eog_ids: frozenset[int] = frozenset()
    special_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    warnings: list[str] = field(default_factory=list)


def read_vocabulary(metadata: Metadata, defaults: Defaults) -> Vocabulary:
    """The vocabulary that some metadata describes. Raises FormatError naming the key at fault."""
    tokens = _read_tokens(metadata)
    vocabulary = Vocabulary(tokens, _ids_of(tokens, metadata), [])
    vocabulary.scores = metadata.numbers("tokenizer.ggml.scores", len(tokens), "fi")
    vocabulary.attrs = _read_attrs(metadata, tokens)
    vocabulary.add_space_prefix = metadata.flag("tokenizer.ggml.add_space_prefix", defaults.add_space_prefix)
    vocabulary.clean_spaces = defaults.clean_spaces
    vocabulary.chat_template = metadata.string("tokenizer.chat_template")
    _read_special(metadata, vocabulary, defaults)
    order = sorted(
        (i for i, a in enumerate(vocabulary.attrs) if a & (Attr.CONTROL | Attr.USER_DEFINED | Attr.UNKNOWN)),
        key=lambda i: -len(tokens[i].encode("utf-8", "surrogateescape")),
    )
    vocabulary.special_ids = tuple(order)
    _set_strip_attributes(metadata, vocabulary)
    return vocabulary


def _read_tokens(metadata: Metadata) -> list[str]:
    tokens = metadata.strings("tokenizer.ggml.tokens")
    if tokens is None:
        raise metadata.error("tokenizer.ggml.tokens", "is missing")
    if not tokens:
        raise metadata.error("tokenizer.ggml.tokens", "is empty")
    for i, token in enumerate(tokens):
        if not token:
            tokens[i] = f"[EMPTY_{i}]"
            metadata.warnings.append(f"token {i} is empty; it is read as {tokens[i]}")
    return tokens


def _ids_of(tokens: list[str], metadata: Metadata) -> dict[str, int]:
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        first: dict[str, int] = {}
        for i, token in enumerate(tokens):
            if first.setdefault(token, i) != i:
                raise metadata.error("tokenizer.ggml.tokens", f"has {token!r} twice, as {first[token]} and {i}")
    return ids


def _read_attrs(metadata: Metadata, tokens: list[str]) -> list[int]:
    types = metadata.numbers("tokenizer.ggml.token_type", len(tokens), "iu")
    if types is None:
        return [Attr.NORMAL] * len(tokens)
    attrs = [_ATTR_OF_TYPE.get(t, Attr.UNDEFINED) for t in types.tolist()]
    for i, attr in enumerate(attrs):
        if attr == Attr.BYTE and not BYTE_TOKEN.fullmatch(tokens[i]):
            raise metadata.error("tokenizer.ggml.tokens", f"has {tokens[i]!r} as byte token {i} (expected <0xNN>)")
    return attrs


def _read_special(metadata: Metadata, v: Vocabulary, defaults: Defaults) -> None:
    """BOS, EOS and the others: ids, whether they are added, and which tokens end a generation."""
    n = len(v.tokens)
    v.bos_id = metadata.token_id("tokenizer.ggml.bos_token_id", defaults.bos_id, n)
    v.eos_id = metadata.token_id("tokenizer.ggml.eos_token_id", defaults.eos_id, n)
    v.unk_id = metadata.token_id("tokenizer.ggml.unknown_token_id", defaults.unk_id, n)
    eot = metadata.token_id("tokenizer.ggml.eot_token_id", None, n)
    eom = metadata.token_id("tokenizer.ggml.eom_token_id", None, n)
    fim = {kind: metadata.token_id(f"tokenizer.ggml.fim_{kind}_token_id", None, n) for kind in _FIM}
    for kind, old in _OLD_FIM_KEYS.items():
        fim[kind] = metadata.token_id(f"tokenizer.ggml.{old}_token_id", fim[kind], n)
    v.add_bos = metadata.flag("tokenizer.ggml.add_bos_token", defaults.add_bos)
    v.add_eos = metadata.flag("tokenizer.ggml.add_eos_token", False)
    for wanted, id, name in ((v.add_bos, v.bos_id, "bos"), (v.add_eos, v.eos_id, "eos")):
        if wanted and id is None:
            raise metadata.error(f"tokenizer.ggml.add_{name}_token", f"is true, but there is no {name}_token_id")
    eot, eom = _found(v, _EOT, eot), _found(v, _EOM, eom)
    fim = {kind: _found(v, spellings, fim[kind]) for kind, spellings in _FIM.items()}
    for token, id in v.ids.items():
        if v.attrs[id] & Attr.CONTROL and "unused" in token.partition("\0")[0]:
            v.attrs[id] |= Attr.UNUSED
    v.eog_ids = _eog_ids(v, [fim["pad"], fim["rep"], fim["sep"]], [v.eos_id, eot, eom])


def _found(v: Vocabulary, spellings: Iterable[str], known: int | None) -> int | None:
    """The id that the file names, else the one that is spelled so; what is found by its spelling is a control token."""
    if known is not None:
        return known
    id = next((v.ids[s] for s in spellings if s in v.ids), None)
    if id is not None:
        v.attrs[id] |= Attr.CONTROL
    return id


def _eog_ids(v: Vocabulary, fill: list[int | None], ends: list[int | None]) -> frozenset[int]:
    """Tokens that end a generation. Changes the kind of those that are known by their spelling."""
    spelled = [v.ids[s] for s in _EOG if s in v.ids]
    for id in spelled:
        v.attrs[id] |= Attr.CONTROL
    for id in (v.ids[s] for s in _ALWAYS_SHOWN if s in v.ids):
        v.attrs[id] = Attr.USER_DEFINED
    eog = {id for id in (*spelled, *fill, *ends) if id is not None}
    texts = {v.tokens[id] for id in eog}
    called = bool(texts & {"<|call|>", "<|calls|>"})
    # In a harmony or solar-open vocabulary <|end|> ends a message, not the turn.
    if "<|end|>" in texts and called and texts & {"<|return|>", "<|flush|>"}:
        eog.discard(v.ids["<|end|>"])
        v.attrs[v.ids["<|end|>"]] = Attr.USER_DEFINED
    if {"<|tool_response>", "</s>"} <= texts:
        eog.discard(v.ids["</s>"])
        v.attrs[v.ids["</s>"]] = Attr.NORMAL
    return frozenset(eog)


def _set_strip_attributes(metadata: Metadata, v: Vocabulary) -> None:
    """Tokens that swallow the spaces beside them: files do not say which, llama.cpp goes by names."""
    name = (metadata.string("general.name") or "").lower()
    pre = metadata.string("tokenizer.ggml.pre") or ""
    architecture = metadata.string("general.architecture") or ""
    if any(s in pre for s in ("jina-v2-de", "jina-v2-es", "jina-v2-code")) or any(
        s in architecture for s in ("nomic-bert-moe", "jina-bert-v3")
    ):
        left, right, kept = ("<mask>",), (), ()
    elif "phi-3" in name or "phi3" in name:
        left, kept = (), ("<unk>", "<s>", "<|endoftext|>")
        right = (*(v.tokens[i] for i in v.special_ids), "</s>")
    elif "modern-bert" in name:
        left, right, kept = ("[MASK]",), (), ()
    else:
        return
    for tokens, attr in ((left, Attr.LSTRIP), (right, Attr.RSTRIP)):
        for id in (v.ids[t] for t in tokens if t in v.ids and t not in kept):
            v.attrs[id] |= attr


def check_scores(metadata: Metadata, scores: np.ndarray | None) -> None:
    """Raise FormatError where SPM scores are missing or one is not a number: merging could not be put in order."""
    if scores is not None and bool(np.isnan(scores).any()):
        raise metadata.error("tokenizer.ggml.scores", f"has no number at {int(np.isnan(scores).argmax())}")
