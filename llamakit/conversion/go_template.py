"""A model's chat template in the language of Ollama: Jinja -> Go.

No Jinja is parsed. The template is asked: it renders a few conversations of marked messages, and what stands between
the marks are the pieces of a prompt. The pieces are taken only if the prompts made of them are the template's own, on
other conversations, to the last character. What Ollama offers to a template: docs/template.mdx and template/template.go
of Ollama, .Messages with .Role and .Content, .System with all system messages, Go's own functions and no other that
helps here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from llamakit.errors import FormatError, UnsupportedError
from llamakit.tokenizer import Tokenizer
from llamakit.tokenizer.chat import Messages, render_chats


class Family(NamedTuple):
    """A way to write a conversation. marks: what its prompts hold; stops: what never stands in an answer."""

    name: str
    marks: tuple[str, ...]
    stops: tuple[str, ...]


#: the first whose marks are all there
FAMILIES = (
    Family("Llama-3", ("<|start_header_id|>",), ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")),
    Family("ChatML", ("<|im_start|>",), ("<|im_end|>", "<|im_start|>")),
    Family("Llama-2", ("[INST]", "<<SYS>>"), ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")),
    Family("Mistral", ("[INST]",), ("[INST]", "[/INST]")),
    Family("Phi-3", ("<|user|>", "<|end|>"), ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")),
    Family("Zephyr", ("<|user|>", "<|assistant|>"), ("<|system|>", "<|user|>", "<|assistant|>")),
)


@dataclass(frozen=True)
class GoTemplate:
    """text: for TEMPLATE; family: None where it is none of `FAMILIES`; takes_system: whether a system message is
    shown; notes: what it cannot do."""

    text: str
    family: Family | None
    takes_system: bool
    notes: tuple[str, ...]


def go_template(tokenizer: Tokenizer) -> GoTemplate:
    """The Go template that writes the same prompts as the vocabulary's chat template.

    The same for conversations of a system message or none, and then of users and assistants; without the BOS token
    that the tokenizer adds itself. After a last message of the assistant it stops, for the model to go on.
    Raises UnsupportedError where there is none, or none that is known to be the same, and says why; FormatError for a
    template that cannot be rendered.
    """
    jinja = tokenizer.chat_template or ""
    if not jinja:
        raise UnsupportedError("the model has no chat template")
    if any("\ud800" <= letter <= "\udfff" for letter in jinja):
        raise UnsupportedError("the chat template is not UTF-8")
    if "strftime_now" in jinja:
        raise UnsupportedError("the chat template writes today's date, which Ollama's templates cannot")
    id = tokenizer.bos_id
    bos = "" if id is None else tokenizer.piece(id, special=True).decode("utf-8", "replace")
    prompts = _prompts(tokenizer, bos)
    pieces = _pieces(prompts, bos)
    notes = _check(prompts, pieces)
    if not pieces.system_place:
        notes.append("the chat template takes no system message: Ollama will leave one out")
    if "tool" in jinja:
        notes.append("the chat template's tool calls are not translated")
    text = _go(pieces)
    family = next((f for f in FAMILIES if all(mark in text for mark in f.marks)), None)
    return GoTemplate(text, family, bool(pieces.system_place), tuple(notes))


@dataclass(frozen=True)
class _Pieces:
    """What stands before and after the content of each role's message.

    start: before everything. absent: in place of a first message that is no system message. system_place: "own" for
    a message like the others, "first" and "last" for the beginning of the first or last user's message, "" where the
    template takes none. generation: what makes the assistant speak.
    """

    start: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation: str
    absent: str = ""
    system_place: str = ""
    system: tuple[str, str] = ("", "")

    def prompt(self, messages: Messages) -> str:
        """What the Go template gives, for the check."""
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system").join(self.system)
        first = next((i for i, m in enumerate(messages) if m["role"] == "user"), -1)
        in_user = {"first": first, "last": len(messages) - 1}.get(self.system_place, -1)
        has_system = any(m["role"] == "system" for m in messages)
        text = self.start + (self.absent if messages[0]["role"] != "system" else "")
        for i, message in enumerate(messages):
            role, content, is_last = message["role"], message["content"], i == len(messages) - 1
            if role == "system" and self.system_place == "own":
                text += content.join(self.system)
            elif role == "user":
                text += self.user[0] + (system if has_system and i == in_user else "") + content + self.user[1]
            elif role == "assistant":
                text += self.assistant[0] + content + ("" if is_last else self.assistant[1])
            text += self.generation if is_last and role != "assistant" else ""
        return text


def _conversation(roles: str, contents: Iterable[str]) -> list[dict[str, str]]:
    """Messages of some roles, by their initials."""
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[role], "content": content} for role, content in zip(roles, contents, strict=False)]


#: contents that a template might change: quotes, lines, braces, tags of thoughts, letters beyond ASCII
_CONTENTS = (
    'Say "hello"\n\n- to {{ .Name }}', "It's <b>`here`</b>\\n", "<think>\nhm\n</think>\n\n{% if x %}'yes'", "a\tb\r\nc",
    "\u65e5\u672c, \u00e9, \U0001f600", "[x] & <|y|>", "end.",
)  # fmt: skip
_ORDERS = ("u", "uau", "uauau", "su", "suau", "suauau")
_MARKS = [f"mark{i}mark" for i in range(4)]

#: what the template is asked: name -> (messages, add_generation_prompt)
_TURNS, _WHOLE = _conversation("uau", _MARKS), _conversation("suau", _MARKS)
_QUESTIONS: dict[str, tuple[Messages, bool]] = {
    "turns": (_TURNS, True),
    "whole": (_WHOLE, True),
    "after user": (_TURNS[:1], False),
    "after assistant": (_TURNS[:2], False),
    **{f"{roles} {i}": (_conversation(roles, _CONTENTS[i:]), True) for roles in _ORDERS for i in (0, 1)},
    # what is left when Ollama cuts a long conversation from its front
    "assistant first": (_conversation("au", _CONTENTS), True),
    "spaces": (_conversation("u", ["  a\n"]), True),
}
Prompts = dict[str, str | FormatError]


def _prompts(tokenizer: Tokenizer, bos: str) -> Prompts:
    """The template's answers, without the BOS that the tokenizer will add again."""
    added = bos if tokenizer.vocabulary.add_bos else ""
    rendered = render_chats(tokenizer, list(_QUESTIONS.values()))
    stripped = (text.removeprefix(added) if isinstance(text, str) else text for text in rendered)
    return dict(zip(_QUESTIONS, stripped, strict=True))


def _between(text: str | FormatError, messages: Messages) -> list[str] | None:
    """What stands before, between and after the contents of messages, None where they are not all there, in order."""
    parts = []
    for message in messages:
        before, found, text = text.partition(message["content"]) if isinstance(text, str) else ("", "", "")
        if not found:
            return None
        parts.append(before)
    assert isinstance(text, str)
    return [*parts, text]


def _pieces(prompts: Prompts, bos: str) -> _Pieces:
    """The pieces of a prompt. Raises UnsupportedError, or the FormatError of the template itself."""
    turns = prompts["turns"]
    if isinstance(turns, FormatError):
        raise turns
    between = _between(turns, _TURNS)
    if between is None:
        raise UnsupportedError("the chat template does not show every message as it is")
    before, to_assistant, to_user, after = between
    # Where one message ends and the next begins is seen from a conversation that ends there, if it tells.
    end, shared = _end(prompts["after user"], _TURNS[:1]), _common(to_assistant, after)
    user_end = end if shared.startswith(end) else shared
    rest = to_user.removeprefix(_end(prompts["after assistant"], _TURNS[:2]))
    user_start = _common(before[::-1], rest[::-1])[::-1]
    pieces = _Pieces(
        start=before.removesuffix(user_start),
        user=(user_start, user_end),
        assistant=(to_assistant.removeprefix(user_end), to_user.removesuffix(user_start)),
        generation=after.removeprefix(user_end),
    )
    return _with_system(pieces, bos, prompts["whole"], to_user)


def _common(a: str, b: str) -> str:
    """The beginning that two texts share."""
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


def _end(text: str | FormatError, messages: Messages) -> str:
    """What stands after the last message of a conversation that ends with it; "" where that cannot be seen."""
    return (_between(text, messages) or [""])[-1]


def _with_system(pieces: _Pieces, bos: str, text: str | FormatError, to_user: str) -> _Pieces:
    """The pieces, with the place of the system's message, from the prompt of `_WHOLE`."""
    user_start = pieces.user[0]
    if between := _between(text, _WHOLE):
        before, after = between[:2]
        if after.endswith(user_start):
            start = bos if before.startswith(bos) and pieces.start.startswith(bos) else ""
            return replace(
                pieces,
                start=start,
                absent=pieces.start.removeprefix(start),
                system_place="own",
                system=(before.removeprefix(start), after.removesuffix(user_start)),
            )
        return replace(pieces, system_place="first", system=(before.removeprefix(pieces.start + user_start), after))
    system, user, assistant, last = _WHOLE
    if between := _between(text, [user, assistant, system, last]):
        return replace(pieces, system_place="last", system=(between[2].removeprefix(to_user), between[3]))
    return pieces


def _check(prompts: Prompts, pieces: _Pieces) -> list[str]:
    """Raise UnsupportedError unless the pieces give the template's own prompts; what differs beyond, one line each."""
    for roles in _ORDERS if pieces.system_place else _ORDERS[:3]:
        for name in (f"{roles} 0", f"{roles} 1"):
            if prompts[name] != pieces.prompt(_QUESTIONS[name][0]):
                raise UnsupportedError(
                    "the chat template does more than can be translated for certain: a conversation of "
                    f"{len(roles)} message{'s' if len(roles) > 1 else ''} would come out differently"
                )
    notes = {
        "assistant first": "a conversation that begins with the assistant's message gets another prompt",
        "spaces": "the chat template strips the spaces around a message, Ollama's cannot",
    }
    return [
        note
        for name, note in notes.items()
        if isinstance(prompts[name], str) and prompts[name] != pieces.prompt(_QUESTIONS[name][0])
    ]


def _go(p: _Pieces) -> str:
    """The Go template. All in one line but for the line ends of the prompt: `{{-` would swallow these."""
    system, user, assistant = ([_literal(text) for text in pair] for pair in (p.system, p.user, p.assistant))
    in_user = {
        "first": _if("$system", system[0], _do("$system"), system[1], _do('$system = ""')),
        "last": _if("and $last $.System", system[0], _do("$.System"), system[1]),
    }.get(p.system_place, "")
    own = [_do('if eq .Role "system"'), system[0], _do(".Content"), system[1], _do('else if eq .Role "user"')]
    return "".join(
        [
            _do("$system := .System") if p.system_place == "first" else "",
            _literal(p.start),
            _do("range $i, $_ := .Messages"),
            _do("$last := eq (len (slice $.Messages $i)) 1"),
            _if('and (eq $i 0) (ne .Role "system")', _literal(p.absent)),
            *(own if p.system_place == "own" else [_do('if eq .Role "user"')]),
            *(user[0], in_user, _do(".Content"), user[1], _do('else if eq .Role "assistant"')),
            *(assistant[0], _do(".Content"), _if("not $last", assistant[1]), _do("end")),
            _if('and $last (ne .Role "assistant")', _literal(p.generation)),
            _do("end"),
        ]
    )


def _do(action: str) -> str:
    return "{{ " + action + " }}"


def _if(condition: str, *then: str) -> str:
    """Nothing at all where there is nothing to be written."""
    return "".join([_do(f"if {condition}"), *then, _do("end")]) if any(then) else ""


#: what a Go template or a Modelfile might not take as it is: opening braces, three quotes, and what is not printable
_SPECIAL = re.compile(r'\{+|"{3,}|[^\n\t -~]')


def _literal(text: str) -> str:
    """Text as it may stand between a Go template's actions, in a Modelfile's triple quotes."""

    def plain(match: re.Match[str]) -> str:
        if match[0][0] not in '{"' and match[0].isprintable():
            return match[0]
        return _do('"' + "".join(_escape(letter) for letter in match[0]) + '"')

    return _SPECIAL.sub(plain, text)


def _escape(letter: str) -> str:
    return "\\" + letter if letter == '"' else letter if letter.isprintable() else f"\\U{ord(letter):08x}"
