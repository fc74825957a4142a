r"""How BPE cuts a text into words, as tokenizer.json says it and as GGUF names it (`tokenizer.ggml.pre`), both ways.

A family is a row of regular expressions: each cuts its matches out of the parts that the one before left. A
tokenizer.json spells them as a sequence of Split, Digits, Punctuation and ByteLevel (whose own expression is GPT-2's);
names with the same row differ in at most whether a word that is a token is taken as it is (`ignore_merges`), and in
defaults that a file states anyway. The expressions are those of the models' own tokenizer.json, as the comments in
llama.cpp's src/llama-vocab.cpp and transformers' tokenization_*.py quote them. llama.cpp departs from them in a
few places, where a tokenizer.json and a GGUF file of the same vocabulary may give other ids: beyond ASCII, it takes a
letter of either case for any other in tekken, gpt-4o and granite-embed-multi-97m (in tiny_aya, cohere2moe and youtu
within ASCII, too), takes white space for one character outside of every listed range, does not fold the long s of
`(?i:'s)`, and knows Unicode 15.1; in deepseek-llm it keeps digits together, in falcon it does not part them from the
space before them, and for falcon3 it uses llama-bpe's row. Their vocabularies have few merges, or none, that show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamakit.errors import UnsupportedError
from llamakit.files import escape_control


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What hangs on a name where the file does not say otherwise (llama.cpp, src/llama-vocab.cpp).
#: words that are tokens are not merged
IGNORE_MERGES = _names(
    "minicpm5 llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano youtu tekken "
    "granite-embed-multi-97m"
)
#: BOS is put before a text
ADD_BOS = _names("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano tekken chameleon")
#: spaces before English punctuation are closed up in what is decoded
CLEAN_SPACES = _names(
    "default minicpm5 llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano falcon mpt "
    "starcoder gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jais-2 "
    "jina-v1-en jina-v2-code roberta-bpe refact stablelm2 olmo dbrx smaug-bpe glm4 chatglm-bpe jais codeshell bloom "
    "gpt3-finnish exaone exaone4 exaone-moe minerva-7b megrez mellum2"
)
#: there is no BOS; elsewhere it is token 11
NO_BOS = _names("glm4 chatglm-bpe")
#: the letters with case that DeepSeek lists, members of [...]
CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
WIDE_PUNCTUATION = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
HAN_HANGUL = "\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff"
HAN_KANA = "\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff"
BLOOM_SEPARATORS = ".,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c"
EAST_ASIAN = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f"
    f"\ufe30-\ufe4f]+|[\u3105-\u312f]+|[{HAN_KANA}]+"
)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT, _NUMBER = r"\p{N}", r"\p{N}+"
#: what Punctuation cuts out, whole runs of it
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD, _OTHER = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _llama3(digits: str, spaces: str = _SPACES) -> str:
    return rf"{_ENDINGS}|{_WORD}|{digits}|{_OTHER}[\r\n]*|{spaces}"


def _cased(ending: str, digits: str) -> str:
    lead = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{lead}[{_UPPER}]*[{_LOWER}]+{ending}|{lead}[{_UPPER}]+[{_LOWER}]*{ending}"
        rf"|{digits}|{_OTHER}[\r\n/]*|{_SPACES}"
    )


_GPT4O = _cased(f"{_ENDINGS}?", r"\p{N}{1,3}")
_DEEPSEEK3_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
_DEEPSEEK3 = rf"{_DEEPSEEK3_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
_CASCADE = r"\s*[\r\n]+|" + "".join(rf"\s{{{n}}}(?!\S)|" for n in (512, 256, 128, 64, 32, 16, 8, 4))
_BLOOM = rf" ?[^(\s|[{BLOOM_SEPARATORS}])]+"

#: names, the usual one first -> the row of expressions
_FAMILIES: dict[str, tuple[str, ...]] = {
    "gpt-2 phi-2 olmo mpt jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code gigachat a.x-4.0 mellum "
    "modern-bert roberta-bpe jais trillion granite-docling exaone4": (_GPT2,),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": (_DIGIT, _GPT2),
    "llama-bpe llama3 llama-v3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano smaug-bpe dbrx glm4 chatglm-bpe":
        (_llama3(r"\p{N}{1,3}"),),
    "falcon3": (_PUNCTUATION, _GPT2, _DIGIT),
    "falcon": (_PUNCTUATION, _GPT2, _NUMBER, "[0-9][0-9][0-9]"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, _NUMBER, "[0-9][0-9][0-9]"),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": (_llama3(_DIGIT),),
    "qwen35": (
        rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
    ),
    "ufakzeka": (rf"{_WORD}|\p{{N}}|{_OTHER}[\r\n]*|{_SPACES}",),
    "laguna": (r"[^\n]+|[\n]+", _llama3(_DIGIT)),
    "minicpm5": (r"\p{N}{1,3}", _llama3(_NUMBER)),
    "jais-2": (_llama3(r"\p{N}{1,3}", _CASCADE + r"\s{1,2}(?!\S)|\s{1}"),),
    "seed-coder": (rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",),
    "bailingmoe bailingmoe2 llada-moe": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    "exaone-moe": (
        rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|{_OTHER}[\r\n/]?"
        r"|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    "tekken": (_cased("", _DIGIT),),
    "gpt-4o llama4 kanana2 talkie minimax-m2 granite-embed-multi-97m": (_GPT4O,),
    "tiny_aya cohere2moe": (r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O),
    "youtu": (EAST_ASIAN, _cased(f"{_ENDINGS}?", _DIGIT)),
    "deepseek-llm": (
        r"[\r\n]", rf"\s?[{CASED_LETTERS}]+", rf"\s?[{WIDE_PUNCTUATION}]+", r"\s+$", f"[{HAN_HANGUL}]+", _DIGIT,
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", f"[{HAN_HANGUL}]+", _DIGIT),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": (r"\p{N}{1,3}", f"[{HAN_KANA}]+", _DEEPSEEK3),
    "spark2_5": (
        r"\p{N}{1,3}", f"[{HAN_KANA}]+",
        rf"{_DEEPSEEK3_WORD}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+", _DIGIT,
    ),
    "bloom gpt3-finnish poro-chat": (_BLOOM,),
    "viking": (_BLOOM, _DIGIT),
    "chameleon": (
        "<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", _DIGIT,
        r"[\p{P}!-/:-@\[-`{-~]", _GPT2,
    ),
    "superbpe": (_NUMBER, r"(?=(\d{3})+(?!\d))"),
}  # fmt: skip
_ROW_OF = {name: row for names, row in _FAMILIES.items() for name in names.split()}
#: rows that are spelled in another way somewhere
_ALSO: dict[tuple[str, ...], str] = {
    (*_FAMILIES["deepseek-llm"][:-1], _NUMBER): "deepseek-llm",
    (_BLOOM.replace("|[", "|").replace("])]", ")]"),): "bloom",
}
#: other spellings of the same thing
_SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _ENDINGS),
)

PRE_NAMES: tuple[str, ...] = tuple(sorted(_ROW_OF))


def names_of(structure: Any) -> tuple[str, ...]:
    """Names of `tokenizer.ggml.pre` with the row that a tokenizer.json's "pre_tokenizer" spells, the usual one first;
    none for a row that llama.cpp does not know.

    Raises ValueError, saying what, for a step that byte-level BPE in llama.cpp does not have.
    """
    row = _row(structure)
    if row in _ALSO:
        return (_ALSO[row],)
    return next((tuple(names.split()) for names, known in _FAMILIES.items() if known == row), ())


def structure_of(name: str) -> dict[str, Any]:
    """The "pre_tokenizer" of a tokenizer.json for a name. Raises UnsupportedError for a name that has none."""
    row = _ROW_OF.get(name)
    if row is None:
        raise UnsupportedError(
            f"tokenizer.ggml.pre {escape_control(name)!r} has no form in a tokenizer.json",
            hint=f"known are {', '.join(PRE_NAMES)}",
        )
    # Falcon's files turn to bytes in the middle; elsewhere all words are cut before their bytes are spelled.
    inside = row[-1] == _GPT2 or row[0] == _PUNCTUATION
    steps = [_step(expression, inside) for expression in row]
    if not inside:
        steps.append(_byte_level(use_regex=False))
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def _step(expression: str, gpt2_is_byte_level: bool) -> dict[str, Any]:
    if expression == _GPT2 and gpt2_is_byte_level:
        return _byte_level(use_regex=True)
    if expression in (_DIGIT, _NUMBER):
        return {"type": "Digits", "individual_digits": expression == _DIGIT}
    if expression == _PUNCTUATION:
        return {"type": "Punctuation", "behavior": "Contiguous"}
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _row(structure: Any) -> tuple[str, ...]:
    """The expressions of a "pre_tokenizer", one spelling for each."""
    steps = _flat(structure, 0)
    kinds = [step.get("type") for step in steps]
    if kinds.count("ByteLevel") != 1:
        raise ValueError(f"has {kinds.count('ByteLevel')} ByteLevel steps (expected 1)")
    return tuple(e for e in map(_expression, steps) if e)


def _flat(structure: Any, depth: int) -> list[Mapping[str, Any]]:
    if not isinstance(structure, Mapping):
        raise ValueError("is missing" if structure is None else "is no object")
    if structure.get("type") != "Sequence":
        return [structure]
    inner = structure.get("pretokenizers")
    if not isinstance(inner, list) or depth > 8:
        raise ValueError("has a Sequence without its pretokenizers")
    return [step for part in inner for step in _flat(part, depth + 1)]


def _expression(step: Mapping[str, Any]) -> str:
    """What one step cuts out; nothing for a ByteLevel that only spells bytes."""
    kind = step.get("type")
    if kind == "ByteLevel":
        if step.get("add_prefix_space", True) is not False:
            raise ValueError("puts a space before every text (add_prefix_space), which llama.cpp does not")
        return _GPT2 if step.get("use_regex", True) is True else ""
    if kind == "Digits":
        return _DIGIT if step.get("individual_digits") is True else _NUMBER
    if kind == "Punctuation" and step.get("behavior") == "Contiguous":
        return _PUNCTUATION
    if kind == "Split":
        return _split_expression(step)
    raise ValueError(f"has a step {kind!r} that llama.cpp does not know")


def _split_expression(step: Mapping[str, Any]) -> str:
    pattern = step.get("pattern")
    expression = pattern.get("Regex") if isinstance(pattern, Mapping) else None
    if not isinstance(expression, str):
        raise ValueError("has a Split without a regular expression")
    for other, ours in _SPELLINGS:
        expression = expression.replace(other, ours)
    # Where the expression matches everything, taking away what lies between the matches takes nothing.
    whole = expression.endswith(r"|\s+") and step.get("behavior") == "Removed" and step.get("invert") is True
    if not whole and (step.get("behavior") != "Isolated" or step.get("invert", False) is not False):
        raise ValueError("has a Split that drops or joins what it cuts out")
    return expression
