"""How BPE cuts a text into words: the regular expressions behind each name of `tokenizer.ggml.pre`.

The names, the expressions and what else hangs on a name are llama.cpp's (src/llama-vocab.cpp, src/unicode.cpp). An
expression is applied to every part that the one before left, and cuts out its matches; what lies between them
stays in one part. As there, an expression with classes of letters sees the text "collapsed": every character
from U+0080 on is one stand-in for its class, so letters of either case are alike beyond ASCII.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise, repeat

from llamakit.errors import UnsupportedError
from llamakit.files import escape_control
from llamakit.formats.pre_tokenizers import (
    ADD_BOS,
    BLOOM_SEPARATORS,
    CASED_LETTERS,
    CLEAN_SPACES,
    EAST_ASIAN,
    HAN_HANGUL,
    HAN_KANA,
    IGNORE_MERGES,
    NO_BOS,
    WIDE_PUNCTUATION,
)
from llamakit.tokenizer.unicode import COLLAPSED, LETTER, MARK, NUMBER, PLAIN_SPACES, PUNCTUATION, SYMBOL

# The classes as members of [...]: their ASCII characters and the stand-in for all others.
_L, _N, _M = f"A-Za-z{LETTER}", f"0-9{NUMBER}", MARK
_P = rf"!-#%-*,-/:-;?-@\[-\]_{{}}{PUNCTUATION}"
_S = f"$+<->^`|~{SYMBOL}"

_STAND_INS = (LETTER, NUMBER, PUNCTUATION, MARK, SYMBOL)

_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_WORD = rf"[^\r\n{_L}{_N}]?[{_L}]+"
_OTHER = rf" ?[^\s{_L}{_N}]+"
_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?[{_L}]+| ?[{_N}]+|{_OTHER}|\s+(?!\S)|\s+"
_DIGIT = f"[{_N}]"
_THREE_DIGITS = "[0-9][0-9][0-9]"
_NO_SEPARATOR = rf" ?[^(\s|{BLOOM_SEPARATORS})]+"


def _llama3(digits: str) -> str:
    return rf"{_ENDINGS}|{_WORD}|{digits}|{_OTHER}[\r\n]*|{_SPACES}"


def _cased(upper: str, lower: str, ending: str, digits: str) -> str:
    """Words that begin in capitals: beyond ASCII every letter is of either case."""
    lead = rf"[^\r\n{_L}{_N}]?"
    return (
        rf"{lead}[{upper}]*[{lower}]+{ending}|{lead}[{upper}]+[{lower}]*{ending}"
        rf"|{digits}|{_OTHER}[\r\n/]*|{_SPACES}"
    )


_UPPER, _LOWER = f"A-Z{LETTER}", f"a-z{LETTER}"
_WIDE_PUNCTUATION = rf"\s?[{WIDE_PUNCTUATION}]+"
_HAN_HANGUL, _HAN_KANA = f"[{HAN_HANGUL}]+", f"[{HAN_KANA}]+"
#: cuts after each group of three digits, counted from the end of a number
_NUMBER_GROUPS = rf"[^{_N}]*(?:(?<![{_N}])[{_N}]{{1,2}}(?=(?:[{_N}]{{3}})+(?![{_N}]))|[{_N}]{{1,3}}|\Z)"
_ASCII_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"


def _deepseek3(newlines: str) -> str:
    return (
        rf"{_ASCII_WORD}|[^\r\n{_L}{_P}{_S}]?[{_L}{_M}]+"
        rf"| ?[{_P}{_S}]+{newlines}|\s+(?!\S)|\s+"
    )


@dataclass(frozen=True)
class PreTokenizer:
    """How one `pre` cuts. expressions: (pattern, whether it sees the collapsed text), applied in a row.

    ignore_merges: a word that is a token is not merged. add_bos, clean_spaces, has_bos: defaults for the vocabulary
    (has_bos: BOS is token 11 where the file names none).
    """

    name: str
    expressions: tuple[tuple[re.Pattern[str], bool], ...]
    ignore_merges: bool = False
    add_bos: bool = False
    clean_spaces: bool = True
    has_bos: bool = True

    def split(self, text: str) -> list[str]:
        """The words of a text; joined they are the text."""
        bounds = [0, len(text)]
        collapsed = plain = text
        if not text.isascii():
            collapsed, plain = text.translate(COLLAPSED), text.translate(PLAIN_SPACES)
        for pattern, sees_classes in self.expressions:
            bounds = _cut(pattern, collapsed if sees_classes else plain, bounds)
        return list(map(text.__getitem__, map(slice, bounds, bounds[1:], repeat(None))))


def _cut(pattern: re.Pattern[str], text: str, bounds: list[int]) -> list[int]:
    """Where the parts of a text begin and end once the matches within each part are cut out of it."""
    cut = [0]
    last = 0
    for begin, end in pairwise(bounds):
        for match in pattern.finditer(text, begin, end):
            for at in match.span():
                if at > last:
                    cut.append(at)
                    last = at
        if end > last:
            cut.append(end)
            last = end
    return cut


_DEFAULT = (rf"[{_P}$+<=>^~|]+", _GPT2, f"[{_N}]+", _THREE_DIGITS)
_DIGIT_GPT2 = (_DIGIT, _GPT2)

#: names -> expressions; those that hold a stand-in for a class see the collapsed text
_EXPRESSIONS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe chatglm-bpe glm4":
        (_llama3(f"[{_N}]{{1,3}}"),),
    "jais-2": (
        rf"{_ENDINGS}|{_WORD}|[{_N}]{{1,3}}|{_OTHER}[\r\n]*|\s*[\r\n]+|"
        + "".join(rf"\s{{{n}}}(?!\S)|" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"\s{1,2}(?!\S)|\s{1}",
    ),
    "minicpm5": (f"[{_N}]{{1,3}}", _llama3(f"[{_N}]+")),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": (_llama3(_DIGIT),),
    "qwen35": (
        rf"{_ENDINGS}|[^\r\n{_L}{_N}]?[{_L}{_M}]+|{_DIGIT}| ?[^\s{_L}{_M}{_N}]+[\r\n]*|{_SPACES}",
    ),
    "ufakzeka": (rf"{_WORD}|{_DIGIT}|{_OTHER}[\r\n]*|{_SPACES}",),
    "laguna": (r"[^\n]+|[\n]+", _llama3(_DIGIT)),
    "seed-coder": (
        rf"{_ENDINGS}|{_WORD}|{_DIGIT}| ?[^\s{_L}{_N}\r\n]+|{_SPACES}",
    ),
    "bailingmoe bailingmoe2 llada-moe": (
        rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}|{_DIGIT}|{_OTHER}[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    "exaone-moe": (
        rf"{_ENDINGS}|[^\r\n{_L}{_N}]?(?:[{_L}]{_M}*(?: [{_L}]{_M}*)*)+|{_DIGIT}|{_OTHER}[\r\n/]?|\s*[\r\n]"
        r"|\s+(?!\S)|\s+",
    ),
    "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en jina-v2-code "
    "roberta-bpe mpt olmo jais trillion granite-docling exaone4": (_GPT2,),
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": _DIGIT_GPT2,
    "falcon": (rf"[{_P}$+<=>^~|`]+", _GPT2, _THREE_DIGITS),
    "chameleon": (
        "<sentinel:[0-9]+>", "IMGIMG[A-I]{1,4}Z", r"[\t\n]|    |  ", _DIGIT, rf"[{_P}!-/:-@\[-`{{-~]", _GPT2,
    ),
    "bloom gpt3-finnish poro-chat": (_NO_SEPARATOR,),
    "viking": (_NO_SEPARATOR, _DIGIT),
    "tekken": (_cased(_UPPER, _LOWER, "", _DIGIT),),
    "gpt-4o llama4 kanana2 talkie minimax-m2": (_cased(_UPPER, _LOWER, f"(?:{_ENDINGS})?", f"[{_N}]{{1,3}}"),),
    "granite-embed-multi-97m": (
        _cased(_UPPER + _M, _LOWER + _M, f"(?:{_ENDINGS})?", f"[{_N}]{{1,3}}"),
    ),
    "tiny_aya cohere2moe": (
        _NUMBER_GROUPS, _cased(_L + _M, _L + _M, f"(?:{_ENDINGS})?", f"[{_N}]{{1,3}}"),
    ),
    "youtu": (
        EAST_ASIAN,
        _cased(_L + _M, _L + _M, f"(?:{_ENDINGS})?", _DIGIT),
    ),
    "deepseek-llm": (
        r"[\r\n]", rf"\s?[{CASED_LETTERS}]+", _WIDE_PUNCTUATION, r"\s+\Z", _HAN_HANGUL, f"[{_N}]+",
    ),
    "deepseek-coder": (r"[\r\n]", rf"\s?[{_L}]+", rf"\s?[{_P}]+", _HAN_HANGUL, _DIGIT),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": (
        f"[{_N}]{{1,3}}", _HAN_KANA, _deepseek3(r"[\r\n]*|\s*[\r\n]+"),
    ),
    "spark2_5": (f"[{_N}]{{1,3}}", _HAN_KANA, _deepseek3(r"|[\r\n]"), _DIGIT),
    "superbpe": (f"[{_N}]+", r"(?=(?:\d{3})+(?!\d))"),
}  # fmt: skip


_BY_NAME = {name: expressions for names, expressions in _EXPRESSIONS.items() for name in names.split()}

#: names that llama.cpp knows, but cuts with hand-written code or without byte-level letters
_SPECIAL_CODE = ("afmoe", "kimi-k2", "gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace")

PRE_NAMES: tuple[str, ...] = tuple(sorted(_BY_NAME))


def find_pre_tokenizer(name: str) -> PreTokenizer:
    """The way of cutting with this name. Raises UnsupportedError for one that is unknown or needs code of its own."""
    expressions = _BY_NAME.get(name)
    if expressions is None:
        why = "needs code of its own, which llamakit lacks" if name in _SPECIAL_CODE else "is unknown"
        raise UnsupportedError(
            f"tokenizer.ggml.pre {escape_control(name)!r} {why}",
            hint=f"supported are {', '.join(PRE_NAMES)}",
        )
    return PreTokenizer(
        name,
        tuple((re.compile(e, re.ASCII), any(c in e for c in _STAND_INS)) for e in expressions),
        ignore_merges=name in IGNORE_MERGES,
        add_bos=name in ADD_BOS,
        clean_spaces=name in CLEAN_SPACES,
        has_bos=name not in NO_BOS,
    )
