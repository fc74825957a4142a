import pytest

from llamakit.errors import UsageError
from llamakit.inference.gbnf import gbnf_to_lark


def rules(text: str, **options) -> dict[str, str]:
    """Rule -> what Lark gets for it."""
    head, *lines = gbnf_to_lark(text, **options).splitlines()
    assert head == '%llguidance {"no_forcing": true}'
    return dict(line.split(": ", 1) for line in lines)


@pytest.mark.parametrize(
    ("text", "lark"),
    [
        ('root ::= "ab"', r"(/\x{61}/ /\x{62}/)"),
        ('root ::= "" | "a"', r'("") | /\x{61}/'),
        ('root ::= "a" |', r'/\x{61}/ | ""'),
        ("root ::= [a-c]", r"/[\x{61}-\x{63}]/"),
        ("root ::= [^ab-]", r"/[^\x{61}-\x{61}\x{62}-\x{62}\x{2D}-\x{2D}]/"),
        (r'root ::= "\n\t\r\\\"\[\]\-"', r"(/\x{A}/ /\x{9}/ /\x{D}/ /\x{5C}/ /\x{22}/ /\x{5B}/ /\x{5D}/ /\x{2D}/)"),
        (r"root ::= [\x41\u00e9\U0001F600]", r"/[\x{41}-\x{41}\x{E9}-\x{E9}\x{1F600}-\x{1F600}]/"),
        ("root ::= [ぁ-ゟ]", r"/[\x{3041}-\x{309F}]/"),
        ("root ::= .", "/./s"),
        ('root ::= "a"* "b"+ "c"?', r"/\x{61}/* /\x{62}/+ /\x{63}/?"),
        ('root ::= "a"{2} "b"{2,} "c"{2,3} "d"{0,1} "e"{0}', r'/\x{61}/{2,2} /\x{62}/{2,} /\x{63}/{2,3} /\x{64}/? ""'),
        ('root ::= "a"{ 2 , 3 }', r"/\x{61}/{2,3}"),
        ('root ::=\n  "a" | # one\n  "b" # two\n\n', r"/\x{61}/ | /\x{62}/"),
        ("root ::= <[7]> !<[8]>", "<[7]> <[^8]>"),
    ],
    ids=lambda value: value[:30],
)
def test_every_terminal_is_one_character(text, lark):
    assert rules(text) == {"start": lark}


def test_groups_and_repetitions_of_repetitions_become_rules():
    assert rules('root ::= ("a" | b-1\n)* \nb-1 ::= "b"+?') == {
        "start": "r2*",
        "r1": "r3?",
        "r2": r"/\x{61}/ | r1",
        "r3": r"/\x{62}/+",
    }


def test_tokens_are_looked_up():
    assert rules("root ::= <think> !</think>", token_id={"<think>": 5, "</think>": 6}.__getitem__) == {
        "start": "<[5]> <[^6]>"
    }


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("", None, "has no rule root"),
        ('start ::= "a"', None, "has no rule root"),
        ("root", 1, "column 5: expected ::=, at the end"),
        ("root = x", 1, "column 6: expected ::=, at '= x'"),
        ("%llguidance {}", 1, "column 1: expected the name of a rule"),
        ('root ::= "a\n', 1, "column 10: this is not closed, at '\"a'"),
        ("root ::= [a-", 1, "column 10: this is not closed, at '[a-'"),
        ("root ::= []", 1, "expected characters between the brackets"),
        ("root ::= [z-a]", 1, "column 10: the range is the wrong way round"),
        (r'root ::= "\q"', 1, r"there is no such escape, at '\\q"),
        (r'root ::= "\u12"', 1, "expected 4 hexadecimal digits"),
        (r'root ::= "\uD83D"', 1, "no Unicode character"),
        (r'root ::= "\U00110000"', 1, "no Unicode character"),
        ('root ::= ("a"', 1, "expected ), at the end"),
        ('root ::= "a")', 1, "expected the end of the rule, at ')'"),
        ('root ::= "a" * +\n| "b"', 2, "expected the name of a rule"),
        ('root ::= * "a"', 1, "expected the end of the rule, at '* "),
        ('root ::= "a"{', 1, "expected a number"),
        ('root ::= "a"{2', 1, "expected }"),
        ('root ::= "a"{3,2}', 1, "at least 3 and at most 2 cannot be"),
        ('root ::= "a"{20000}', 1, "more than 10000 repetitions"),
        ("root ::= a\nb ::= c", 1, "there is no rule a, at 'a'"),
        ('root ::= "a"\nroot ::= "b"', 2, "column 1: the rule root is there already"),
        ("root ::= <think", 1, "expected a token"),
        ("root ::= " + "(" * 300, 1, "more than 200 groups"),
        ('root ::= "a" x\nx ::= "b" x | y\ny ::= x', 1, "the rule root cannot come to an end"),
        ("root ::= root", 1, "the rule root cannot come to an end"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_place(text, line, reason):
    with pytest.raises(UsageError) as caught:
        gbnf_to_lark(text, name="my.gbnf")
    assert reason in caught.value.reason
    assert (caught.value.path, caught.value.line) == ("my.gbnf", line)
    assert "\n" not in str(caught.value)


def test_hostile_grammars_take_no_time():
    chain = "\n".join(f"r{i} ::= r{i + 1}" for i in range(20_000))
    assert len(rules(f'root ::= r0\n{chain}\nr20000 ::= "x"')) == 20_002
    rules('root ::= "a"' + "?" * 20_000)
    with pytest.raises(UsageError, match="too long"):
        rules("#" * (1 << 20) + "\n")
