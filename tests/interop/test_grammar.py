"""Grammars in GBNF against llama.cpp's own: which tokens are allowed, and which one is then drawn."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest

from llamakit.errors import LlamakitError
from llamakit.formats.open import open_model
from llamakit.inference.config import GenerateConfig
from llamakit.inference.grammar import open_grammar
from llamakit.inference.sampling import Sampler
from llamakit.tokenizer import Tokenizer, load_tokenizer
from llamakit.tokenizer.vocabulary import Attr
from tests.inference import llama_sampler
from tests.inference.llama_sampler import LlamaSampler
from tests.inference.random_cases import cases, config, distinct_logits, llama_chain
from tests.inference.test_grammar import GRAMMARS
from tests.oracle import LlamaVocab, llama_vocab
from tests.tiny import cached_tiny_gguf

pytestmark = pytest.mark.interop
NUMBERS = pytest.mark.parametrize(
    "n_cases", [60, pytest.param(2000, marks=[pytest.mark.prove, pytest.mark.timeout(1800)])]
)
JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""


class LlamaGrammar:
    """llama.cpp's grammar sampler. Raises ValueError for what it refuses."""

    def __init__(self, vocab: LlamaVocab, text: str) -> None:
        self._lib = llama_sampler.library()
        init = self._lib.llama_sampler_init_grammar
        init.argtypes, init.restype = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p], ctypes.c_void_p
        self._sampler = init(vocab.pointer, text.encode(), b"root")
        if not self._sampler:
            raise ValueError("llama.cpp refuses the grammar")

    def __enter__(self) -> LlamaGrammar:
        return self

    def __exit__(self, *_: object) -> None:
        self._lib.llama_sampler_free(self._sampler)

    def mask(self, ids: np.ndarray) -> np.ndarray:
        """Which of some tokens are allowed."""
        candidates = llama_sampler.Candidates(ids, np.zeros(len(ids)))
        self._lib.llama_sampler_apply(self._sampler, candidates.pointer)
        return candidates.read()[1] == 0

    def accept(self, token: int) -> None:
        self._lib.llama_sampler_accept(self._sampler, token)


def _texts(tokenizer: Tokenizer) -> np.ndarray:
    """The tokens that are whole letters, and the end tokens. llama.cpp takes control tokens for the text that they are
    written as, and bytes that begin no letter for letters."""

    def is_text(id: int) -> bool:
        if tokenizer.vocabulary.attrs[id] & (Attr.CONTROL | Attr.UNKNOWN):
            return False
        return "\N{REPLACEMENT CHARACTER}" not in tokenizer.piece(id).decode("utf-8", "replace")

    return np.array([id in tokenizer.eog_ids or is_text(id) for id in range(tokenizer.n_vocab)])


@pytest.fixture(scope="module", params=["spm", "bpe"])
def vocabulary(request) -> tuple[Tokenizer, LlamaVocab]:
    path = cached_tiny_gguf(tokenizer=request.param, n_merges=200)
    return load_tokenizer(open_model(path)), llama_vocab(path)


@NUMBERS
@pytest.mark.parametrize("name", [*GRAMMARS, "json"])
def test_the_same_tokens_are_allowed(name, n_cases, vocabulary):
    tokenizer, theirs_of = vocabulary
    text, is_text = {**GRAMMARS, "json": JSON}[name], _texts(tokenizer)
    ids = np.arange(tokenizer.n_vocab)
    for rng in cases(n_cases // 10, seed=6):
        ours = open_grammar(GenerateConfig(grammar=text), tokenizer)
        assert ours is not None
        with LlamaGrammar(theirs_of, text) as theirs:
            for _ in range(20):
                if ours.is_complete:
                    assert set(ids[theirs.mask(ids) & is_text]) <= tokenizer.eog_ids
                    break
                mask = ours.mask()
                assert (mask == theirs.mask(ids))[is_text].all()
                going_on = np.flatnonzero(mask & ~np.isin(ids, list(tokenizer.eog_ids)))
                if name == "tokens":  # after half a letter llama.cpp takes nothing more
                    going_on = going_on[is_text[going_on]]
                if not len(going_on):
                    break
                token = int(rng.choice(going_on))
                ours.accept(token)
                theirs.accept(token)


_REFUSED = ["x", 'root ::= "a', "root ::= a", "root ::= [a", 'root ::= "a"{3', "root ::= (", "root ::= <x", r'root ::= "\q"', 'root ::= "a" ) "b"', "root ::= * x", "root ::= <no-token>"]  # fmt: skip
_TAKEN = ["root ::=", 'root ::= "a"', "root ::=\n\n[a-]", "root::=x\nx::=.", 'root ::= ("a"\n|\n"b")', 'root ::= "a" |\n "b" # c', "root ::= <[300]>", "# only\nroot ::= [\\]\\[]\r\n"]  # fmt: skip


@pytest.mark.parametrize("text", [*_REFUSED, *_TAKEN])
def test_the_same_grammars_are_refused(text, vocabulary):
    tokenizer, theirs_of = vocabulary
    try:
        with LlamaGrammar(theirs_of, text):
            taken = True
    except ValueError:
        taken = False
    try:
        ours = open_grammar(GenerateConfig(grammar=text), tokenizer) is not None
    except LlamakitError:
        ours = False
    assert ours == taken == (text in _TAKEN)


@NUMBERS
def test_the_same_tokens_are_drawn(n_cases, vocabulary):
    tokenizer, theirs_of = vocabulary
    n, is_text = tokenizer.n_vocab, _texts(tokenizer)
    names = ("letters before a word made of them", "calls inside of calls", "ambiguous", "empty parts")  # ASCII alone
    n_refused = 0
    for rng in cases(n_cases, seed=7):
        text = GRAMMARS[names[rng.integers(len(names))]]
        end = {"mirostat": int(rng.integers(0, 3))}
        settings = config(rng, typical=1.0, grammar=text, **end)
        if settings.xtc_threshold == 0:  # keeps a token that is ruled out, at which llama.cpp aborts
            settings = replace(settings, xtc_probability=0.0)
        if rng.random() < 0.2 and not settings.mirostat:
            settings = replace(settings, samplers="top_k;adaptive_p", adaptive_target=0.4, temperature=1.0)
        ours = Sampler(settings, grammar=open_grammar(settings, tokenizer))
        with LlamaGrammar(theirs_of, text) as grammar, LlamaSampler(*llama_chain(settings, n)) as chain:
            for _ in range(12):
                logits = distinct_logits(rng, n)
                logits[~is_text] -= np.float32(200)  # control tokens
                drawn = chain.apply(llama_sampler.Candidates(np.arange(n), logits)).selected
                if not grammar.mask(np.array([drawn]))[0]:
                    n_refused += 1
                    allowed = np.where(grammar.mask(np.arange(n)), logits, np.float32(-np.inf))
                    drawn = chain.apply(llama_sampler.Candidates(np.arange(n), allowed)).selected
                assert (token := ours.sample(logits)) == drawn, (logits[[token, drawn]], settings)
                if drawn in tokenizer.eog_ids or ours.is_complete:
                    break
                chain.accept([drawn])
                grammar.accept(drawn)
    assert n_refused > n_cases
