"""Grammars and schemas on tiny vocabularies of both kinds, with logits that know nothing: whatever comes is allowed."""

import json
import sys

import numpy as np
import pytest

from llamakit.errors import LlamakitError, UnsupportedError, UsageError
from llamakit.formats.open import open_model
from llamakit.inference.completion import generate
from llamakit.inference.config import GenerateConfig
from llamakit.inference.continuation import Done
from llamakit.inference.grammar import Grammar, check_grammar, open_grammar
from llamakit.inference.sampling import Sampler
from llamakit.model import load_model
from llamakit.tokenizer import Tokenizer, load_tokenizer
from tests.inference.schemas import SCHEMAS, assert_valid
from tests.tiny import cached_tiny_gguf

GRAMMARS = {
    "letters before a word made of them": 'root ::= [a-z]+ "foo" "."',
    "calls inside of calls": 'root ::= name "(" (root ("," root)*)? ")" | [0-9]{1,3}\nname ::= "f" | "fo" | "of"',
    "ambiguous": 'root ::= x x* y?\nx ::= "a" | "aa" | "ab"\ny ::= "b" | "ba"',
    "all but": r'root ::= ([^"\\\x00-\x1f] | "\\" ["\\n])* "\""',
    "letters of several bytes": 'root ::= ([😀-😏] | "é" | "→ß")+ "."',
    "new lines, too": r'root ::= .{0,5} "\n" .',
    "repetitions": 'root ::= "a"{2,4} ("b" | "bc"){0,3} "x"{0} [^\\n]{2}',
    "empty parts": 'root ::= (| "a" | "b" root "c")? "d"*',
    "tokens": 'root ::= <[300]> "a" | !<[301]> "b"',
}


@pytest.fixture(scope="module", params=["spm", "bpe"])
def tokenizer(request) -> Tokenizer:
    return load_tokenizer(open_model(cached_tiny_gguf(tokenizer=request.param)))


def _grammar(tokenizer: Tokenizer, **config) -> Grammar:
    grammar = open_grammar(GenerateConfig(**config), tokenizer)
    assert grammar is not None
    return grammar


def _accepts(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Whether a text may be all that there is, as its single bytes."""
    letters = {tokenizer.piece(id): id for id in range(tokenizer.n_vocab) if len(tokenizer.piece(id)) == 1}
    for byte in text.encode():
        token = letters[bytes([byte])]
        if not grammar.allows(token):
            return False
        grammar.accept(token)
    return grammar.is_complete or grammar.allows(min(tokenizer.eog_ids))


def _continued(tokenizer: Tokenizer, seed: int, limit: int = 3000, **config) -> str | None:
    """What comes of random logits, None where that has no end."""
    wanted = GenerateConfig(seed=seed, **config)
    sampler = Sampler(wanted, grammar=open_grammar(wanted, tokenizer))
    rng, text = np.random.default_rng(seed), b""
    for _ in range(limit):
        token = sampler.sample(rng.normal(0, 2, tokenizer.n_vocab).astype(np.float32))
        if token in tokenizer.eog_ids:
            return text.decode()
        text += tokenizer.piece(token)
        if sampler.is_complete:
            return text.decode()
    return None


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_mask_says_of_every_token_what_the_single_question_says(name, tokenizer):
    rng = np.random.default_rng(0)
    grammar = _grammar(tokenizer, grammar=GRAMMARS[name])
    for _ in range(6):
        mask = grammar.mask()
        assert mask.tolist() == [grammar.allows(token) for token in range(tokenizer.n_vocab)]
        going_on = [int(t) for t in np.flatnonzero(mask) if t not in tokenizer.eog_ids]
        if not going_on:
            break
        grammar.accept(int(rng.choice(going_on)))
        if grammar.is_complete:
            break


@pytest.mark.parametrize(
    ("grammar", "yes", "no"),
    [
        ('root ::= [a-z]+ "foo"', ["xfoo", "foofoo", "fofoo", "xfoofoo"], ["foo", "fo", "xfoox", ""]),
        ('root ::= "a"? b\nb ::= "b" | "ab"', ["b", "ab", "aab"], ["a", "aaab", "bb"]),
        ('root ::= root "+" root | [0-9]', ["1", "1+2", "1+2+3"], ["+", "1+", "12"]),
        ("root ::= [^a] .", ["\nb", "é😀", "\x01\x02"], ["ab", "\n", "xyz"]),
        ('root ::= ("a" | "é"){2,3}', ["aa", "éaé"], ["a", "aaaa"]),
        ('root ::= "" | "x"', ["", "x"], ["xx"]),
    ],
)
def test_what_a_grammar_accepts(grammar, yes, no, tokenizer):
    for text in yes:
        assert _accepts(_grammar(tokenizer, grammar=grammar), tokenizer, text), text
    for text in no:
        assert not _accepts(_grammar(tokenizer, grammar=grammar), tokenizer, text), text


def test_space_in_json_is_bounded_and_objects_have_the_properties_named(tokenizer):
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "number"}, "maxItems": 2}}}
    yes = ['{"a":[1,2]}', '{ "a" : [ 1 , 2.5 ] }', '{\n\n\t"a": []\n}', "{}", '{"a":[-0.000001]}']
    no = ['{  "a":[]}', '{\n\n\n"a":[]}', ' {"a":[]}', '{"a":[]} ', '{"b":1}', '{"a":[0.0000001]}', '{"a":[1e9]}']
    for text in yes:
        assert _accepts(_grammar(tokenizer, json_schema=json.dumps(schema)), tokenizer, text), text
    for text in no:
        assert not _accepts(_grammar(tokenizer, json_schema=json.dumps(schema)), tokenizer, text), text
    for text in ('{"b": [null, "x", {"c": true}]}', '"x"', "1e9", "null"):
        assert _accepts(_grammar(tokenizer, json_schema="{}"), tokenizer, text), text


def test_a_date_is_one_of_every_year(tokenizer):
    schema = json.dumps({"type": "string", "format": "date"})
    for day, there_is in (("2023-02-28", True), ("2023-12-31", True), ("2023-02-29", False), ("2023-04-31", False)):
        assert _accepts(_grammar(tokenizer, json_schema=schema), tokenizer, f'"{day}"') == there_is


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_follows_a_schema_parses_and_validates(name, tokenizer):
    for seed in range(4):
        text = _continued(tokenizer, seed, json_schema=json.dumps(SCHEMAS[name]))
        assert text is not None, "it came to no end"
        assert_valid(text, SCHEMAS[name])


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"mirostat": 2}, {"typical": 0.5}, {"xtc_probability": 1.0, "xtc_threshold": 0.01}, {"xtc_probability": 1.0, "xtc_threshold": 0.0, "top_k": 0}, {"top_k": 0, "top_p": 1.0, "min_p": 0.0}, {"samplers": "adaptive_p", "adaptive_target": 0.5}, {"top_n_sigma": 1.0, "repeat_penalty": 1.5, "dynatemp_range": 0.5}], ids=str)  # fmt: skip
def test_every_sampler_obeys(settings, tokenizer):
    for seed in range(2):
        text = _continued(tokenizer, seed, json_schema=json.dumps(SCHEMAS["strings"]), **settings)
        assert text is not None
        assert_valid(text, SCHEMAS["strings"])


@pytest.fixture(scope="module", params=["spm", "bpe"])
def model(request):
    file = open_model(cached_tiny_gguf(tokenizer=request.param))
    return load_model(file), load_tokenizer(file)


def test_a_generation_ends_with_its_grammar(model):
    *tokens, done = generate(*model, "The old king", GenerateConfig(grammar='root ::= "yes" | "no"', seed=1))
    assert isinstance(done, Done)
    assert (done.reason, done.n_generated) == ("end", len(tokens))
    assert "".join(report.text for report in (*tokens, done)) in ("yes", "no")
    *_, cut = generate(*model, "The", GenerateConfig(grammar='root ::= "a"{20} [😀]', n_predict=3, temperature=0))
    assert cut.reason == "length"


def test_letters_of_several_tokens_come_out_whole(model):
    for seed in range(3):
        config = GenerateConfig(grammar="root ::= ([😀-😏] | [ぁ-ゟ]){6}", seed=seed)
        text = "".join(report.text for report in generate(*model, "The", config))
        assert len(text) == 6
        assert "\N{REPLACEMENT CHARACTER}" not in text


def test_an_end_token_may_come_only_where_the_text_may_end(tokenizer):
    end = sorted(tokenizer.eog_ids)
    grammar = _grammar(tokenizer, grammar='root ::= "a"+')
    letter = next(id for id in range(tokenizer.n_vocab) if tokenizer.piece(id) == b"a")
    assert not grammar.mask()[end].any()
    grammar.accept(letter)
    assert grammar.mask()[end].all()
    assert not grammar.is_complete
    grammar.accept(end[0])
    assert grammar.mask()[letter]


class _Only:
    """Allows some tokens, and writes down what it is asked."""

    is_complete = False

    def __init__(self, *tokens: int) -> None:
        self.tokens, self.asked = tokens, []

    def allows(self, token: int) -> bool:
        self.asked.append(token)
        return token in self.tokens

    def mask(self) -> np.ndarray:
        return np.isin(np.arange(50), self.tokens)

    def accept(self, token: int) -> None:
        assert token in self.tokens


@pytest.mark.parametrize("settings", [{}, {"mirostat": 2}, {"samplers": "top_k;adaptive_p", "adaptive_target": 0.3}])
def test_what_the_grammar_allows_is_drawn_as_without_one(settings):
    logits = np.linspace(0, 3, 50, dtype=np.float32)
    plain, free = (
        Sampler(GenerateConfig(seed=3, **settings)),
        Sampler(GenerateConfig(seed=3, **settings), grammar=_Only(*range(50))),
    )
    assert [plain.sample(logits) for _ in range(20)] == [free.sample(logits) for _ in range(20)]


def test_a_token_that_is_refused_costs_one_random_number():
    logits = np.linspace(0, 3, 50, dtype=np.float32)
    only = _Only(1, 2)
    refusing = Sampler(GenerateConfig(seed=3), grammar=only)
    plain = Sampler(GenerateConfig(seed=3))
    masked = np.where(only.mask(), logits, np.float32(-100))
    for _ in range(10):
        token = refusing.sample(logits)
        assert plain.sample(logits) == only.asked[-1] not in (1, 2)
        assert plain.sample(masked) == token


def test_biases_that_leave_nothing_of_a_grammar_are_told():
    config = GenerateConfig(logit_bias=((1, -np.inf),))
    with pytest.raises(UsageError, match="no token is left") as caught:
        Sampler(config, grammar=_Only(1)).sample(np.zeros(50, np.float32))
    assert "grammar" in str(caught.value.hint)


BROKEN = [
    ("grammar", "root ::= x", "--grammar:1: column 10: there is no rule x"),
    ("grammar", 'root ::= ("a"{9999}){9999} ("b"{9999}){9999}', None),
    ("grammar", r"root ::= [^\x00-\U0010FFFF]", "leads nowhere"),
    ("json_schema", "{", "no sound JSON"),
    ("json_schema", '{"type": "foo"}', "Invalid type: foo"),
    ("json_schema", '{"$ref": "#/$defs/x"}', "'/$defs/x' does not exist"),
    ("json_schema", '{"$ref": "http://localhost/x"}', "does not fetch"),
    ("json_schema", '{"$ref": "file:///etc/passwd"}', "does not fetch"),
    ("json_schema", '{"$ref": "#"}', "leads nowhere"),
    ("json_schema", '{"not": {}}', 'Unimplemented keys: ["not"]'),
    ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
    ("json_schema", '{"type": "integer", "minimum": 3, "maximum": 2}', "minimum (3) is greater than maximum (2)"),
    ("json_schema", '{"allOf": [{"type": "null"}, {"type": "string"}]}', "Unsatisfiable"),
    ("json_schema", '{"enum": []}', "Unsatisfiable"),
    ("json_schema", '{"pattern": "("}', "unclosed group"),
    ("json_schema", '{"type": "string", "pattern": "^[a-z]{3}$", "maxLength": 2}', "empty"),
    ("json_schema", '{"format": "foo"}', "Unknown format: foo"),
    ("json_schema", '{"oneOf": [{"type": "integer"}, {"type": "number"}]}', "fit twice"),
    ("json_schema", '{"x-guidance": {"lenient": true}, "not": {}}', "Unimplemented"),
    ("json_schema", '{"maxLength": 1000000000000000000}', "decimal literal invalid"),
    ("json_schema", '{"type": "string", "pattern": "^((a|b)*c){500}$", "maxLength": 400}', "Unable to determine"),
    ("json_schema", '{"items":' * 140 + "{}" + "}" * 140, "recursion limit"),
    ("json_schema", json.dumps({"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {"type": "null"}}} for j in range(4)]} for i in range(10)]}), "too large"),
    ("json_schema", '{"type": "integer", "minimum": 1e300}', "integer range"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "text", "reason"), BROKEN, ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_one_line(field, text, reason, tokenizer):
    config = GenerateConfig(**{field: text})
    try:
        check_grammar(config)
        grammar = _grammar(tokenizer, **{field: text})
        grammar.mask()
    except LlamakitError as error:
        assert error.exit_code == 2
        assert "\n" not in str(error)
        assert reason is None or reason in str(error)
    else:
        assert reason is None


def test_the_place_that_a_grammar_came_from_is_named():
    for config in (GenerateConfig(grammar="x"), GenerateConfig(json_schema="{")):
        with pytest.raises(LlamakitError, match=r"^my\.file"):
            check_grammar(config, name="my.file")


def test_a_grammar_that_grows_too_complex_ends_the_generation(tokenizer):
    grammar = _grammar(tokenizer, grammar="root ::= (([a-z]{0,1000} [a-z]{0,1000}){0,1000}){0,1000}")
    letter = next(id for id in range(tokenizer.n_vocab) if tokenizer.piece(id) == b"a")
    with pytest.raises(UnsupportedError, match=r"cannot be followed: .*max is"):
        for _ in range(100):
            grammar.mask()
            grammar.accept(letter)


def test_a_token_of_no_vocabulary_is_refused(tokenizer):
    check_grammar(GenerateConfig(grammar="root ::= <no-such-token> <[99999]>"))
    for text, reason in (("<no-such-token>", "tokens of this model"), ("<[99999]>", "99999")):
        with pytest.raises(LlamakitError, match=reason):
            _grammar(tokenizer, grammar=f"root ::= {text}")


def test_grammar_and_schema_exclude_each_other_and_run_c():
    with pytest.raises(UsageError, match="do not go together"):
        GenerateConfig(grammar="x", json_schema="{}")
    with pytest.raises(UsageError, match="--json-schema does not go with --rng llama2c"):
        GenerateConfig(json_schema="{}", rng="llama2c")


def test_without_llguidance_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UsageError, match="need the package llguidance") as caught:
        check_grammar(GenerateConfig(json_schema="{}"))
    assert "pip install '.[grammar]'" in str(caught.value.hint)
    check_grammar(GenerateConfig())


def test_a_panic_inside_of_llguidance_is_an_error_of_ours(tokenizer, monkeypatch):
    class PanicException(BaseException):
        pass

    class Matcher:
        def validate_tokens(self, tokens):
            raise PanicException("index out of bounds")

    grammar = _grammar(tokenizer, json_schema="{}")
    monkeypatch.setattr(grammar, "_matcher", Matcher())
    with pytest.raises(LlamakitError, match="llguidance failed: index out of bounds"):
        grammar.allows(100)
