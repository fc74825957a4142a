"""A new vocabulary from text: SentencePiece's BPE with llama2.c's settings, which are those of Llama 2.

Byte fallback, every digit a token of its own, no normalization, and pieces of spaces alone: any text comes back as it
was. Spaces are kept as they are, which llama2.c leaves to SentencePiece's default of closing them up: llama.cpp and
run.c keep them, so a vocabulary that does not would give each program other ids.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator

from llamakit.errors import DataError, LlamakitError, UsageError
from llamakit.formats.sentencepiece_model import SentencePieceModel, parse_sentencepiece_model

# SentencePiece leaves out lines of more than 4192 bytes without a word.
_LONGEST_LINE = 4096
#: <unk>, <s>, </s> and the bytes
_META = 3 + 256
_TOO_SMALL = re.compile(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)")
_TOO_LARGE = re.compile(r"Vocabulary size too high.*a value <= (\d+)")
#: above what the log has levels for
_SILENT = 4
#: NUL ends a string there, U+2581 stands for a space, U+2585 for what is unknown, a tab between parts of a line
_RESERVED = str.maketrans(dict.fromkeys("\0\u2581\u2585\t", " "))


def new_vocabulary(texts: Iterable[str], vocab_size: int, character_coverage: float = 1.0) -> SentencePieceModel:
    """A vocabulary of exactly vocab_size tokens from lines of text; equal lines give an equal vocabulary.

    character_coverage: share of the characters in the text that get a token; the others are spelled in bytes.
    Raises UsageError for a size that this text cannot give, which names the smallest or the largest one, and DataError
    where there is no text.
    """
    if vocab_size <= _META:
        raise UsageError(
            f"--vocab-size is {vocab_size} (expected more than {_META}: <unk>, <s>, </s> and the 256 bytes)"
        )
    import sentencepiece

    lines = _Lines(texts)
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
            sentence_iterator=iter(lines),
            model_writer=out,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=character_coverage,
            max_sentence_length=2 * _LONGEST_LINE,
            self_test_sample_size=0,
            num_threads=1,
            minloglevel=_SILENT,
        )
    except RuntimeError as error:
        if lines.error is not None:  # it came through the library's own iterator, which makes another error of it
            raise lines.error from None
        raise _explained(str(error), vocab_size, lines.n_lines) from error
    if lines.error is not None:
        raise lines.error
    return parse_sentencepiece_model(out.getvalue(), "the new vocabulary")


def _explained(message: str, vocab_size: int, n_lines: int) -> LlamakitError:
    if n_lines == 0:
        return DataError("there is no text to make a vocabulary from")
    small, large = _TOO_SMALL.search(message), _TOO_LARGE.search(message)
    if small:
        return UsageError(
            f"--vocab-size is {vocab_size}, the smallest possible for this text is {small[1]}: "
            f"<unk>, <s>, </s>, the 256 bytes, and its {int(small[1]) - _META} characters",
            hint="a larger --vocab-size, or a --character-coverage such as 0.9995, which spells rare ones in bytes",
        )
    if large:
        return UsageError(
            f"--vocab-size is {vocab_size}, the largest possible for this text is {large[1]}: no more of it repeats",
            hint="a smaller --vocab-size, or more text",
        )
    return LlamakitError(f"SentencePiece could not make a vocabulary: {' '.join(message.split())[:200]}")


class _Lines:
    """Lines as the library takes them, and the error that ended them: it swallows what its iterator raises."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.error: BaseException | None = None
        self.n_lines = 0

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                for line in text.translate(_RESERVED).splitlines():
                    if line.strip():
                        for part in _cut(line):
                            self.n_lines += 1
                            yield part
        except BaseException as error:
            self.error = error


def _cut(line: str) -> Iterator[str]:
    """Parts of at most _LONGEST_LINE bytes, cut at spaces where there are any."""
    while len(line) * 4 > _LONGEST_LINE and len(line.encode()) > _LONGEST_LINE:
        at = len(line.encode()[:_LONGEST_LINE].decode("utf-8", "ignore"))
        space = line.rfind(" ", at // 2, at)
        yield line[: space if space > 0 else at]
        line = line[space if space > 0 else at :]
    yield line
