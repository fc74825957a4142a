"""GBNF, llama.cpp's notation of grammars (its grammars/README.md and src/llama-grammar.cpp), into Lark as llguidance
reads it.

GBNF describes characters, and an automaton for them looks at one after the other. A lexer would take the longest match
instead and never look back: it would read "foo" out of the letters before a closing "foo". So every terminal of the
result is one character, with which the two mean the same.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

from llamakit.errors import UsageError
from llamakit.files import escape_control

#: a token's text, `<think>`, to its id; raises UsageError for what is not one token
TokenId = Callable[[str], int]

_MAX_CHARACTERS = 1 << 20
_MAX_DEPTH = 200
_MAX_REPEATS = 10_000
_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_AND_NEWLINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_NAME = re.compile(r"[a-zA-Z0-9-]+")
_NUMBER = re.compile(r"[0-9]{1,9}")
_TOKEN = re.compile(r"<\[([0-9]{1,9})\]>")
_TOKEN_TEXT = re.compile(r"<[^>\r\n]*>")
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_ESCAPES = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-"}
_TIMES = {"*": (0, None), "+": (1, None), "?": (0, 1)}


@dataclass(frozen=True)
class _Item:
    """Part of a sequence: what Lark calls it, which rule that is (if any), how often it may and must stand there."""

    lark: str
    rule: str | None = None
    least: int = 1
    most: int | None = 1

    def __str__(self) -> str:
        match self.least, self.most:
            case 1, 1:
                return self.lark
            case _, 0:
                return '""'
            case 0, 1:
                return f"{self.lark}?"
            case 0, None:
                return f"{self.lark}*"
            case 1, None:
                return f"{self.lark}+"
            case least, most:
                return f"{self.lark}{{{least},{'' if most is None else most}}}"


_Alternatives = list[list[_Item]]


def gbnf_to_lark(text: str, *, name: str = "--grammar", token_id: TokenId | None = None) -> str:
    """A grammar in GBNF as one in Lark that accepts the same texts.

    name: what an error calls the text, a path for instance. token_id: looks up `<token>`; None takes any, to check a
    grammar without a vocabulary. Raises UsageError with line and column for a mistake, for a rule that is missing, is
    there twice, or cannot come to an end.
    """
    rules = _Parser(text, name, token_id).parse()
    lines = ['%llguidance {"no_forcing": true}']
    for rule, alternatives in rules.items():
        lines.append(f"{rule}: " + " | ".join(" ".join(map(str, items)) or '""' for items in alternatives))
    return "\n".join(lines) + "\n"


class _Parser:
    """Recursive descent over one text; `_at` is the place. A group becomes a rule of its own."""

    def __init__(self, text: str, name: str, token_id: TokenId | None) -> None:
        self._text, self._name, self._token_id = text, name, token_id
        self._at = 0
        self._rules: dict[str, _Alternatives] = {}
        self._names: dict[str, str] = {"root": "start"}
        self._used: dict[str, int] = {}
        self._defined: dict[str, int] = {}

    def parse(self) -> dict[str, _Alternatives]:
        if len(self._text) > _MAX_CHARACTERS:
            raise UsageError(f"is too long (expected at most {_MAX_CHARACTERS} characters)", path=self._name)
        self._skip(_SPACE_AND_NEWLINES)
        while self._at < len(self._text):
            self._rule()
        if "root" not in self._defined:
            raise UsageError("has no rule root, where every grammar begins", path=self._name)
        missing = [(at, name) for name, at in self._used.items() if name not in self._defined]
        if missing:
            at, name = min(missing)
            raise self._error(f"there is no rule {name}", at)
        self._check_ends()
        return self._rules

    def _rule(self) -> None:
        begin = self._at
        name = self._take(_NAME, "the name of a rule")
        if name in self._defined:
            raise self._error(f"the rule {name} is there already", begin)
        self._defined[name] = begin
        self._skip(_SPACE)
        self._expect("::=")
        self._skip(_SPACE_AND_NEWLINES)
        self._rules[self._symbol(name)] = self._alternatives(0)
        if self._at < len(self._text) and self._text[self._at] not in "\r\n":
            raise self._error("expected the end of the rule")
        self._skip(_SPACE_AND_NEWLINES)

    def _alternatives(self, depth: int) -> _Alternatives:
        found = [self._sequence(depth)]
        while self._peek("|"):
            self._at += 1
            self._skip(_SPACE_AND_NEWLINES)
            found.append(self._sequence(depth))
        return found

    def _sequence(self, depth: int) -> list[_Item]:
        space = _SPACE_AND_NEWLINES if depth else _SPACE
        items: list[_Item] = []
        while (item := self._item(depth)) is not None:
            self._skip(space)
            items.append(self._repeated(item, space))
        return items

    def _item(self, depth: int) -> _Item | None:
        """The next part of a sequence, None where there is none."""
        letter = self._text[self._at : self._at + 1]
        if letter == '"':
            return self._literal()
        if letter == "[":
            return self._characters()
        if letter == "(":
            return self._group(depth)
        if letter == ".":
            self._at += 1
            return _Item("/./s")
        if letter in ("<", "!"):
            return self._token()
        match = _NAME.match(self._text, self._at)
        if match is None:
            return None
        self._used.setdefault(match[0], self._at)
        self._at = match.end()
        symbol = self._symbol(match[0])
        return _Item(symbol, symbol)

    def _repeated(self, item: _Item, space: re.Pattern[str]) -> _Item:
        repeated = False
        while (times := self._times(space)) is not None:
            if repeated:
                item = self._new_rule([[item]])
            item, repeated = replace(item, least=times[0], most=times[1]), True
        return item

    def _times(self, space: re.Pattern[str]) -> tuple[int, int | None] | None:
        """How often what stands before may be there: *, +, ?, {m}, {m,} or {m,n}; None for nothing of it."""
        begin = self._at
        letter = self._text[begin : begin + 1]
        if letter in _TIMES:
            self._at += 1
            least, most = _TIMES[letter]
        elif letter == "{":
            least, most = self._bounds(space)
        else:
            return None
        if max(least, most or 0) > _MAX_REPEATS:
            raise self._error(f"more than {_MAX_REPEATS} repetitions", begin)
        self._skip(space)
        return least, most

    def _bounds(self, space: re.Pattern[str]) -> tuple[int, int | None]:
        """{m}, {m,} or {m,n}."""
        begin = self._at
        self._at += 1
        self._skip(space)
        least = int(self._take(_NUMBER, "a number"))
        most: int | None = least
        self._skip(space)
        if self._peek(","):
            self._at += 1
            self._skip(space)
            most = None if self._peek("}") else int(self._take(_NUMBER, "a number or }"))
            self._skip(space)
        self._expect("}")
        if most is not None and most < least:
            raise self._error(f"at least {least} and at most {most} cannot be", begin)
        return least, most

    def _group(self, depth: int) -> _Item:
        if depth == _MAX_DEPTH:
            raise self._error(f"more than {_MAX_DEPTH} groups inside of each other")
        self._at += 1
        self._skip(_SPACE_AND_NEWLINES)
        alternatives = self._alternatives(depth + 1)
        self._expect(")")
        return self._new_rule(alternatives)

    def _literal(self) -> _Item:
        """ "abc": its characters one by one."""
        begin = self._at
        self._at += 1
        letters: list[str] = []
        while not self._peek('"'):
            letters.append(f"/{_hexadecimal(self._character(begin))}/")
        self._at += 1
        if len(letters) == 1:
            return _Item(letters[0])
        return _Item(f"({' '.join(letters)})" if letters else '("")')

    def _characters(self) -> _Item:
        """[a-z] or [^a-z]."""
        begin = self._at
        self._at += 1
        negated = self._peek("^")
        self._at += negated
        ranges: list[str] = []
        while not self._peek("]"):
            first = last = self._character(begin)
            if self._peek("-") and not self._text.startswith("-]", self._at):
                self._at += 1
                last = self._character(begin)
            if last < first:
                raise self._error("the range is the wrong way round", begin)
            ranges.append(f"{_hexadecimal(first)}-{_hexadecimal(last)}")
        self._at += 1
        if not ranges:
            raise self._error("expected characters between the brackets", begin)
        return _Item(f"/[{'^' if negated else ''}{''.join(ranges)}]/")

    def _character(self, opened: int) -> str:
        """A character of what begins at `opened`, or an escape."""
        if self._at >= len(self._text):
            raise self._error("this is not closed", opened)
        begin = self._at
        letter = self._text[begin : begin + 1]
        if letter == "\\":
            return self._escape()
        self._at += 1
        return self._sound(letter, begin)

    def _escape(self) -> str:
        begin = self._at
        kind = self._text[begin + 1 : begin + 2]
        if kind in _HEX_DIGITS:
            n = _HEX_DIGITS[kind]
            match = re.compile(f"[0-9a-fA-F]{{{n}}}").match(self._text, begin + 2)
            if match is None:
                raise self._error(f"expected {n} hexadecimal digits", begin + 2)
            self._at = match.end()
            code = int(match[0], 16)
            return self._sound(chr(code) if code < 0x110000 else "", begin)
        if kind not in _ESCAPES:
            raise self._error("there is no such escape", begin)
        self._at += 2
        return _ESCAPES[kind]

    def _sound(self, letter: str, at: int) -> str:
        """The letter; raises UsageError for what is no character."""
        if not letter or "\ud800" <= letter <= "\udfff":
            raise self._error("that is no Unicode character", at)
        return letter

    def _token(self) -> _Item:
        """<[123]> or <think>, and either after ! for every other token."""
        begin = self._at
        negated = self._peek("!")
        self._at += negated
        match = _TOKEN.match(self._text, self._at)
        if match is not None:
            id = int(match[1])
        else:
            match = _TOKEN_TEXT.match(self._text, self._at)
            if match is None:
                raise self._error("expected a token, <[123]> or <text>", begin)
            id = self._token_id(match[0]) if self._token_id is not None else 0
        self._at = match.end()
        return _Item(f"<[{'^' if negated else ''}{id}]>")

    def _new_rule(self, alternatives: _Alternatives) -> _Item:
        symbol = f"r{len(self._names)}"
        self._names[f"({symbol}"] = symbol  # no name of a rule in the text begins so
        self._rules[symbol] = alternatives
        return _Item(symbol, symbol)

    def _symbol(self, name: str) -> str:
        return self._names.setdefault(name, f"r{len(self._names)}")

    def _check_ends(self) -> None:
        """Raises UsageError where a rule goes on for ever: then no text at all would satisfy it."""
        waiting = [(rule, _needed(items)) for rule, found in self._rules.items() for items in found]
        users: dict[str, list[int]] = defaultdict(list)
        for i, (_, needed) in enumerate(waiting):
            for other in needed:
                users[other].append(i)
        ending: set[str] = set()
        queue = [rule for rule, needed in waiting if not needed]
        while queue:
            rule = queue.pop()
            if rule in ending:
                continue
            ending.add(rule)
            for i in users[rule]:
                user, needed = waiting[i]
                needed.discard(rule)
                if not needed:
                    queue.append(user)
        for name, at in self._defined.items():
            if self._symbol(name) not in ending:
                raise self._error(f"the rule {name} cannot come to an end: every alternative leads back to it", at)

    def _peek(self, letter: str) -> bool:
        return self._text.startswith(letter, self._at)

    def _skip(self, space: re.Pattern[str]) -> None:
        match = space.match(self._text, self._at)
        assert match is not None, "it matches nothing, too"
        self._at = match.end()

    def _take(self, pattern: re.Pattern[str], what: str) -> str:
        match = pattern.match(self._text, self._at)
        if match is None:
            raise self._error(f"expected {what}")
        self._at = match.end()
        return match[0]

    def _expect(self, word: str) -> None:
        if not self._peek(word):
            raise self._error(f"expected {word}")
        self._at += len(word)

    def _error(self, reason: str, at: int | None = None) -> UsageError:
        at = self._at if at is None else at
        line = self._text.count("\n", 0, at) + 1
        column = at - self._text.rfind("\n", 0, at)
        rest = self._text[at : at + 20].partition("\n")[0]
        found = repr(escape_control(rest)) if rest else "the end of the line" if self._text[at:] else "the end"
        return UsageError(f"column {column}: {reason}, at {found}", path=self._name, line=line)


def _needed(items: list[_Item]) -> set[str]:
    """The rules without which a sequence cannot come to an end."""
    return {item.rule for item in items if item.least and item.rule is not None}


def _hexadecimal(letter: str) -> str:
    return f"\\x{{{ord(letter):X}}}"
