"""Texts that end a generation, also where they stand across the border of two tokens."""

from __future__ import annotations

from collections.abc import Sequence

from llamakit.tokenizer import Tokenizer


class Stops:
    """What may end a text as it grows piece by piece.

    stop: texts that are cut off, with all that follows; what may be the beginning of one is held back until it is
    known. reverse_prompt: texts that stay, with the rest of their token, as in llama.cpp's completion; one may begin
    in the prompt, and has to end behind it. A text that is a single token ends the generation by its id, too, since
    control tokens have no text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], reverse_prompt: Sequence[str], prompt: str) -> None:
        self._stop, self._reverse = stop, reverse_prompt
        self._held = ""
        self._tail = prompt  # the last characters before what comes, as many as a reverse prompt can reach back
        self._reach = max((len(text) for text in reverse_prompt), default=1) - 1
        self._ids = {}
        for text in (*reverse_prompt, *stop):
            ids = tokenizer.encode(text, add_special=False, parse_special=True)
            if len(ids) == 1:
                self._ids.setdefault(ids[0], text)

    def push(self, id: int, piece: str) -> tuple[str, str | None]:
        """One more token, and the text that it adds: what can be shown now, and which text has been found."""
        text = self._held + piece
        found = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            self._held = ""
            return text[:at], stop
        reverse = self._find_reverse(piece) or self._ids.get(id)
        n_held = 0 if reverse else self._n_open(text)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held], reverse

    def finish(self) -> str:
        """What is held back still, at the end of a text."""
        held, self._held = self._held, ""
        return held

    def _find_reverse(self, piece: str) -> str | None:
        if not self._reverse or not piece:
            return None
        tail = self._tail[len(self._tail) - self._reach :] if self._reach < len(self._tail) else self._tail
        text = tail + piece
        self._tail = text
        # An occurrence has to end in the new piece: it starts no earlier than that.
        return next((r for r in self._reverse if text.find(r, max(0, len(tail) - len(r) + 1)) >= 0), None)

    def _n_open(self, text: str) -> int:
        """How many characters at the end of a text may be the beginning of a stop."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for n in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[len(text) - n :]) for stop in self._stop):
                return n
        return 0
