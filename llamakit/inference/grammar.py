"""Structured output: which tokens a grammar or a JSON schema allows next, by the library llguidance (extra `grammar`).

Without a grammar nothing of this is imported. Shapes: V n_vocab.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llamakit.errors import LlamakitError, UnsupportedError, UsageError
from llamakit.files import escape_control
from llamakit.inference.config import GenerateConfig
from llamakit.inference.gbnf import TokenId, gbnf_to_lark
from llamakit.inference.json_schema import Schema, bounded, read_schema, with_any_of
from llamakit.tokenizer import Tokenizer
from llamakit.tokenizer.vocabulary import Attr

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# Between the parts of JSON as in llama.cpp: nothing, a space, or one or two new lines with up to 20 spaces.
_WHITESPACE = r"( |\n{1,2}[ \t]{0,20})"
_JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": _WHITESPACE, "lenient": False}
# Looking at a vocabulary letter by letter takes more steps than llguidance's own grammars; 100 ms are the most.
_MAX_STEP_ITEMS = 2_000_000
_LONGEST_REASON = 300


def check_grammar(config: GenerateConfig, *, name: str | None = None) -> None:
    """Raise where the grammar or the schema of a configuration cannot be, as far as that shows without a vocabulary.

    name: what an error calls it, such as the path that it came from. Raises UsageError, FormatError or
    UnsupportedError; UsageError, too, where llguidance is missing.
    """
    if config.grammar or config.json_schema:
        _lark(config, name, None)


def open_grammar(config: GenerateConfig, tokenizer: Tokenizer) -> Grammar | None:
    """The grammar of a configuration at its start, None where there is none. Raises as `check_grammar`."""
    if not config.grammar and not config.json_schema:
        return None
    return Grammar(_lark(config, None, lambda text: _token_id(tokenizer, text)), tokenizer)


class Grammar:
    """Where in a grammar one text is. Made by `open_grammar`."""

    def __init__(self, lark: str, tokenizer: Tokenizer) -> None:
        llguidance = _library()
        vocabulary, self._has_text = _vocabulary(tokenizer)
        self._eog, self._n_vocab = sorted(tokenizer.eog_ids), tokenizer.n_vocab
        self._bits = np.zeros((1, (self._n_vocab + 31) // 32), dtype=np.int32)
        with _failures():
            self._matcher: LLMatcher = llguidance.LLMatcher(vocabulary, lark, log_level=0, limits=_limits())
        self._check()
        self.mask()

    @property
    def is_complete(self) -> bool:
        """Whether the text is whole and nothing can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allows(self, token: int) -> bool:
        """Whether a token may come next; an end token: whether the text may end here."""
        with _failures():
            if token in self._eog:
                return self._matcher.is_accepting()
            return bool(self._has_text[token]) and self._matcher.validate_tokens([token]) == 1

    def mask(self) -> NDArray[np.bool_]:
        """Which tokens may come next, (V,): at least one. Raises UnsupportedError where there is none, or where telling
        would take too long."""
        from llguidance.numpy import fill_next_token_bitmask

        with _failures():
            fill_next_token_bitmask(self._matcher, self._bits)
            is_accepting = self._matcher.is_accepting()
        bits = np.unpackbits(self._bits.view(np.uint8)[0], count=self._n_vocab, bitorder="little")
        allowed = bits.view(np.bool_)
        # llguidance takes end tokens and those without a text for any other in <[^1]>, and end tokens for a dead end.
        allowed &= self._has_text
        allowed[self._eog] = is_accepting
        if not allowed.any():
            self._check("the grammar or the schema leads nowhere: no token of this vocabulary can come next")
        return allowed

    def accept(self, token: int) -> None:
        """Go on with a token that is allowed. An end token ends the text and changes nothing."""
        if token in self._eog:
            return
        with _failures():
            self._matcher.consume_token(token)
        self._check()

    def _check(self, otherwise: str = "") -> None:
        """Raises what llguidance reports, or else `otherwise`."""
        message = self._matcher.get_error() if self._matcher.is_error() else ""
        if message and "NoExtension" not in message:
            raise UnsupportedError(f"the grammar or the schema cannot be followed: {_one_line(message)}")
        if message or otherwise:
            raise UnsupportedError(otherwise or "the grammar or the schema leads nowhere")


def _lark(config: GenerateConfig, name: str | None, token_id: TokenId | None) -> str:
    """What llguidance gets: a grammar in Lark, sound as far as that shows without a vocabulary.

    The mark no_forcing makes it judge tokens as they are, instead of putting down by itself, in the vocabulary's usual
    cut, what cannot be otherwise.
    """
    if config.grammar:
        name = name or "--grammar"
        lark = gbnf_to_lark(config.grammar, name=name, token_id=token_id)
        problem = _problem(lambda llguidance: llguidance.LLMatcher.grammar_from_lark(lark))
        if problem:
            raise UnsupportedError(f"the grammar cannot be used: {problem}", path=name)
        return lark
    schema = _usable_schema(config.json_schema, name or "--json-schema")
    return '%llguidance {"no_forcing": true}\nstart: %json ' + json.dumps({**schema, "x-guidance": _JSON_OPTIONS})


def _usable_schema(text: str, name: str) -> Schema:
    """The schema in a text, with bounds where it has none and that leaves anything of it."""
    schema = read_schema(text, name=name)
    problem = _schema_problem(schema)
    if "coerce_one_of" in problem:
        schema = with_any_of(schema)
        problem = _schema_problem(schema)
    if "coerce_one_of" in problem:
        raise UnsupportedError("oneOf has alternatives that one value may fit twice", path=name, hint="write anyOf")
    if problem:
        raise UnsupportedError(f"the schema cannot be used: {problem}", path=name)
    narrow = bounded(schema)
    return schema if _schema_problem(narrow) else narrow


def _schema_problem(schema: Schema) -> str:
    return _problem(
        lambda llguidance: llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_OPTIONS)
    )


def _problem(make: Callable[[Any], str]) -> str:
    """What llguidance finds wrong with a grammar that is made with it, in one line; empty where that is nothing."""
    llguidance = _library()
    with _failures():
        try:
            is_error, messages = llguidance.LLMatcher.validate_grammar_with_warnings(make(llguidance), limits=_limits())
        except RecursionError:
            return "it is too deeply nested"
        except ValueError as error:
            return _one_line(str(error))
    return _one_line(messages[0]) if is_error else ""


def _one_line(message: str) -> str:
    """A message without line breaks, the grammar that it shows, and the arrows below that."""
    message = message.partition("\n   1 |")[0].partition("<non-verbose/>")[0]
    text = " ".join(word for line in message.splitlines() if line.strip(" ^") for word in line.split())
    return escape_control(text[:_LONGEST_REASON])


def _limits() -> LLParserLimits:
    return _library().LLParserLimits(step_max_items=_MAX_STEP_ITEMS, verbose_errors=False)


@contextmanager
def _failures() -> Iterator[None]:
    """Turns a panic, llguidance's way to fail by its own mistake, into an error of ours; it is no Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise LlamakitError(
            f"llguidance failed: {_one_line(str(error))}", hint="a simpler grammar or schema"
        ) from error


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        hint = "pip install '.[grammar]' in llamakit's folder, or pip install llguidance"
        raise UsageError("grammars and JSON schemas need the package llguidance", hint=hint) from error
    return llguidance


def _token_id(tokenizer: Tokenizer, text: str) -> int:
    ids = tokenizer.encode(text, add_special=False, parse_special=True)
    if len(ids) != 1:
        raise UsageError(
            f"the grammar has the token {escape_control(text)!r}, which is {len(ids)} tokens of this model"
        )
    return ids[0]


@lru_cache(maxsize=1)
def _vocabulary(tokenizer: Tokenizer) -> tuple[LLTokenizer, NDArray[np.bool_]]:
    """The tokens as llguidance keeps them, and which have a text (V,): the others are never allowed, nor, as in
    llama.cpp, those that begin with a zero byte. The last result is remembered: it takes 0.1 s for 50,000 tokens."""
    llguidance, tokens = _library(), _Tokens(tokenizer)
    known = llguidance.LLTokenizer(llguidance.TokenizerWrapper(tokens), eos_token=sorted(tokenizer.eog_ids))
    return known, np.array([piece[:1] not in (b"", b"\0") for piece in tokens.tokens])


class _Tokens:
    """What llguidance asks of a tokenizer: the bytes of each token, and which of them stand for no text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens = [tokenizer.piece(id, special=True) for id in range(tokenizer.n_vocab)]
        attrs = enumerate(tokenizer.vocabulary.attrs)
        special = {id for id, attr in attrs if attr & (Attr.CONTROL | Attr.UNKNOWN)}
        self.special_token_ids = sorted(special | tokenizer.eog_ids)
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id

    def __call__(self, text: bytes) -> list[int]:
        """Tokens of a text; nobody asks, where nothing is forced."""
        return []
