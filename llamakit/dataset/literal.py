"""Texts that hold the tokens of a chat template as they stand: which family it is, and where the answers are."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llamakit.tokenizer import Tokenizer


@dataclass(frozen=True)
class Literal:
    """How a family of templates looks in a text. marks: what gives it away; answer: an answer, without its header."""

    name: str
    marks: tuple[str, ...]
    answer: re.Pattern[str]


def _literal(name: str, marks: str, header: str, ends: str) -> Literal:
    """ends: what may follow an answer, separated by spaces; the end of the text always may."""
    after = "|".join(re.escape(end) for end in ends.split())
    return Literal(name, tuple(marks.split()), re.compile(f"{re.escape(header)}(.*?)(?={after}|\\Z)", re.DOTALL))


#: the first whose marks are there
LITERALS = (
    _literal("Llama-2", "[INST] [/INST] <<SYS>>", "[/INST]", "</s> <s> [INST]"),
    _literal("ChatML", "<|im_start|> <|im_end|>", "<|im_start|>assistant\n", "<|im_end|> <|im_start|>"),
    _literal(
        "Llama-3",
        "<|start_header_id|> <|end_header_id|> <|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|> <|start_header_id|> <|end_of_text|>",
    ),
    _literal("Gemma", "<start_of_turn> <end_of_turn>", "<start_of_turn>model\n", "<end_of_turn> <start_of_turn>"),
    _literal(
        "Zephyr",
        "<|assistant|> <|user|>",
        "<|assistant|>\n",
        "</s> <|end|> <|endoftext|> <|user|> <|system|>",
    ),
)


def find_literal(text: str) -> Literal | None:
    """The family whose marks stand in a text, None where no family's do."""
    return next((family for family in LITERALS if any(mark in text for mark in family.marks)), None)


def literal_answers(text: str, family: Literal) -> list[tuple[int, int]]:
    """(begin, end) of every answer in a text, in characters: from behind its header to before what ends it."""
    return [match.span(1) for match in family.answer.finditer(text)]


def marks_in(text: str, tokenizer: Tokenizer) -> list[str]:
    """What of a text a model reads as something else than text: marks of any family, and BOS and EOS written out."""
    ids = [id for id in (tokenizer.bos_id, tokenizer.eos_id) if id is not None]
    own = [tokenizer.piece(id, special=True).decode("utf-8", "replace") for id in ids]
    marks = dict.fromkeys([*own, *(mark for family in LITERALS for mark in family.marks)])
    return [mark for mark in marks if mark and mark in text]


def foreign_marks(text: str, tokenizer: Tokenizer) -> list[str]:
    """The marks in angle brackets in a text that are no special tokens of the vocabulary: it would spell them out."""
    special = {tokenizer.vocabulary.tokens[id] for id in tokenizer.vocabulary.special_ids}
    marks = (mark for mark in marks_in(text, tokenizer) if mark.startswith("<") and mark != "<<SYS>>")
    return [mark for mark in marks if mark not in special]
