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
_NO_SEPARATOR = r" ?[^(\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"


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
#: cased letters of Unicode 11 or so, as DeepSeek lists them
_CASED = (
    r"A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    r"\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    r"\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    r"\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    r"\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    r"\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    r"\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    r"\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    r"\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    r"\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_WIDE_PUNCTUATION = r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_HAN_HANGUL = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_HAN_KANA = r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_EAST_ASIAN = (
    r"[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f"
    r"\ufe30-\ufe4f]+|[\u3105-\u312f]+|" + _HAN_KANA
)
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
        _EAST_ASIAN,
        _cased(_L + _M, _L + _M, f"(?:{_ENDINGS})?", _DIGIT),
    ),
    "deepseek-llm": (
        r"[\r\n]", rf"\s?[{_CASED}]+", _WIDE_PUNCTUATION, r"\s+\Z", _HAN_HANGUL, f"[{_N}]+",
    ),
    "deepseek-coder": (r"[\r\n]", rf"\s?[{_L}]+", rf"\s?[{_P}]+", _HAN_HANGUL, _DIGIT),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": (
        f"[{_N}]{{1,3}}", _HAN_KANA, _deepseek3(r"[\r\n]*|\s*[\r\n]+"),
    ),
    "spark2_5": (f"[{_N}]{{1,3}}", _HAN_KANA, _deepseek3(r"|[\r\n]"), _DIGIT),
    "superbpe": (f"[{_N}]+", r"(?=(?:\d{3})+(?!\d))"),
}  # fmt: skip


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_IGNORE_MERGES = _names(
    "minicpm5 llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano youtu tekken "
    "granite-embed-multi-97m"
)
_ADD_BOS = _names("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano tekken chameleon")
_CLEAN_SPACES = _names(
    "default minicpm5 llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano falcon mpt "
    "starcoder gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jais-2 "
    "jina-v1-en jina-v2-code roberta-bpe refact stablelm2 olmo dbrx smaug-bpe glm4 chatglm-bpe jais codeshell bloom "
    "gpt3-finnish exaone exaone4 exaone-moe minerva-7b megrez mellum2"
)
_NO_BOS = _names("glm4 chatglm-bpe")

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
        ignore_merges=name in _IGNORE_MERGES,
        add_bos=name in _ADD_BOS,
        clean_spaces=name in _CLEAN_SPACES,
        has_bos=name not in _NO_BOS,
    )
