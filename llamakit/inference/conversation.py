"""A conversation: its messages, the prompt that they make, and a context that keeps what two prompts have in common."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

from llamakit.errors import FormatError, LlamakitError, MismatchError, UsageError
from llamakit.formats.adapter import Adapter
from llamakit.inference.completion import continue_context
from llamakit.inference.config import GenerateConfig
from llamakit.inference.continuation import Done, Token
from llamakit.inference.engine import Engine
from llamakit.tokenizer import Tokenizer
from llamakit.tokenizer.chat import encode_rendered, render_chats

Message = dict[str, str]


@dataclass(frozen=True)
class Dropped:
    """The conversation outgrew the context: its oldest n_messages are forgotten, the system message is not."""

    n_messages: int


@dataclass(frozen=True)
class Folded:
    """The template has no place for a system message: it stands at the head of the first user's. Reported once."""


Report = Dropped | Folded | Token | Done


class Conversation:
    """What was said so far, and what the model says next.

    messages: {"role", "content"} each; a system message only as the first. They change when an answer begins, and not
    where none can be given. prompt: the ids of the last one. config: of each answer; its context_shift has no effect,
    since messages go as a whole. adapters: those that the engine has on. Each answer computes only the tokens behind
    what its prompt has in common with the one before and its answer.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        config: GenerateConfig | None = None,
        *,
        system: str = "",
        adapters: Sequence[tuple[Adapter, float]] = (),
    ) -> None:
        """Raises MismatchError for another model's tokenizer. config.n_predict bounds each answer."""
        if tokenizer.n_vocab != engine.config.n_vocab:
            raise MismatchError(f"the vocabulary has {tokenizer.n_vocab} tokens, the model {engine.config.n_vocab}")
        self.messages: list[Message] = []
        self.config = replace(config or GenerateConfig(), context_shift=False)  # what the context holds is known
        self.prompt: list[int] = []
        self.adapters = list(adapters)
        self._engine, self._tokenizer = engine, tokenizer
        self._context = engine.context(self.config.ctx or engine.config.n_ctx)
        self._held: list[int] = []  # what the context holds: its first n_past
        self._folds: bool | None = None  # whether the template refuses a system message; None while nobody asked
        self._n_redrawn = 0
        self.set_system(system)

    @property
    def n_ctx(self) -> int:
        """Tokens that the context holds."""
        return self._context.n_ctx

    @property
    def n_past(self) -> int:
        """Tokens that the context holds by now."""
        return self._context.n_past

    @property
    def system(self) -> str:
        """The text of the system message; empty where there is none."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else ""

    def set_system(self, text: str) -> None:
        """Put a system message at the head, or take it away with an empty text."""
        rest = self.messages[1:] if self.system else self.messages
        self.messages = [{"role": "system", "content": text}, *rest] if text else list(rest)

    def say(self, text: str) -> Generator[Report, None, None]:
        """A user's message, and the answer: Dropped or Folded where that happened, each Token, and Done.

        However the reports end (the caller stops taking them, Ctrl-C), the answer so far is the last message. Raises
        as the template does (FormatError, UnsupportedError), and UsageError for a message that has no place in the
        context: nothing has then been said.
        """
        self._n_redrawn = 0
        return self._answer([*self.messages, {"role": "user", "content": text}], self.config)

    def say_again(self) -> Generator[Report, None, None]:
        """Another answer in place of the last one, or one where the last message has none; a seed counts up.

        Raises as `say`, and at once UsageError where no user has said anything.
        """
        questions = self._without_answer()
        if not questions or questions[-1]["role"] != "user":
            raise UsageError("nothing has been asked that could be answered again")
        self._n_redrawn += 1
        seed = self.config.seed
        config = self.config if seed < 0 else replace(self.config, seed=(seed + self._n_redrawn) % 2**32)
        return self._answer(questions, config)

    def undo(self) -> str:
        """Take back the last answer and its question, which is returned. Raises UsageError where there is none."""
        questions = self._without_answer()
        if not questions or questions[-1]["role"] != "user":
            raise UsageError("there is nothing to take back")
        self.messages = questions[:-1]
        return questions[-1]["content"]

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = self.messages[:1] if self.system else []

    def set_adapters(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        """Go on with these, each times its scale, instead of those before, which stay on where this raises."""
        self._held = []
        self._context.truncate(0)
        try:
            self._engine.set_adapters(adapters)
        except LlamakitError:
            self._engine.set_adapters(self.adapters)
            raise
        self.adapters = list(adapters)

    def _without_answer(self) -> list[Message]:
        """The messages without the answers at their end."""
        n = len(self.messages)
        while n and self.messages[n - 1]["role"] == "assistant":
            n -= 1
        return self.messages[:n]

    def _answer(self, messages: list[Message], config: GenerateConfig) -> Generator[Report, None, None]:
        knew = self._folds
        ids, kept = self._prompt(messages)
        if len(kept) < len(messages):
            yield Dropped(len(messages) - len(kept))
        if self._folds and not knew:
            yield Folded()
        n_common = next((i for i, (a, b) in enumerate(zip(self._held, ids, strict=False)) if a != b), None)
        self._context.truncate(min(len(self._held), len(ids)) if n_common is None else n_common)
        before, pieces = self.messages, [""]
        self.messages = [*kept, {"role": "assistant", "content": ""}]
        self.prompt, self._held = ids, list(ids)
        try:
            for report in continue_context(self._engine, self._context, self._tokenizer, ids, config):
                if isinstance(report, Token):
                    self._held.append(report.id)
                pieces.append(report.text)
                yield report
        except LlamakitError:
            self.messages, pieces = before, []
            raise
        finally:
            self._held = self._held[: self._context.n_past]
            if pieces:
                self.messages[-1] = {"role": "assistant", "content": "".join(pieces)}

    def _prompt(self, messages: list[Message]) -> tuple[list[int], list[Message]]:
        """The ids of a prompt that leaves an eighth of the context to the answer, and the messages that are in it.

        Where that cannot be, half of what the user said is left out until the rest takes half of the context, so
        that this does not happen, and everything is computed anew, with each message.
        """
        ids = self._encoded([messages])[0]
        if len(ids) <= self.n_ctx - self.n_ctx // 8:
            return ids, messages
        asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
        head = messages[:1] if messages[0]["role"] == "system" else []
        counts = [len(asked) >> k for k in range(1, len(asked).bit_length())]
        shorter = [[*head, *messages[asked[-n] :]] for n in counts]
        for prompt, kept in zip(self._encoded(shorter), shorter, strict=True):
            ids, messages = prompt, kept
            if len(ids) <= self.n_ctx // 2:
                break
        if len(ids) >= self.n_ctx:
            raise UsageError(
                f"the message makes a prompt of {len(ids)} tokens, the context holds {self.n_ctx}",
                hint="a shorter message, or a larger --ctx",
            )
        return ids, messages

    def _encoded(self, conversations: list[list[Message]]) -> list[list[int]]:
        return [encode_rendered(self._tokenizer, text) for text in self._rendered(conversations)]

    def _rendered(self, conversations: list[list[Message]]) -> list[str]:
        """What the template makes of each conversation, all in one process."""
        if not conversations:
            return []
        with_system = conversations[0][0]["role"] == "system"
        if with_system and self._folds is None:
            return self._rendered_first(conversations[0])
        chosen = [fold_system(messages) for messages in conversations] if with_system and self._folds else conversations
        return [_text(answer) for answer in render_chats(self._tokenizer, [(c, True) for c in chosen])]

    def _rendered_first(self, messages: list[Message]) -> list[str]:
        """With a system message and without: does the template take one? It may refuse it, or leave it out."""
        system = messages[0]["content"].strip()
        plain, folded = render_chats(self._tokenizer, [(messages, True), (fold_system(messages), True)])
        if isinstance(plain, FormatError):
            folds = isinstance(folded, str)
        else:
            folds = system not in plain and isinstance(folded, str) and system in folded
        text = _text(folded if folds else plain)
        self._folds = folds
        return [text]


def fold_system(messages: list[Message]) -> list[Message]:
    """The same without a system message: its text is at the head of the first user's."""
    system, *rest = messages
    at = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
    if at is None:
        return messages
    first = {"role": "user", "content": f"{system['content']}\n\n{rest[at]['content']}"}
    return [*rest[:at], first, *rest[at + 1 :]]


def _text(answer: str | FormatError) -> str:
    if isinstance(answer, FormatError):
        raise answer
    return answer
