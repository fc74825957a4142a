"""A chat on standard input and output: `llamakit chat`, and `generate -cnv`, which is the same."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

from llamakit.cli import render
from llamakit.cli.chat_commands import Commands, Quit, is_command
from llamakit.cli.chat_input import Lines, read_message, standard_input
from llamakit.cli.chat_options import ChatSetup
from llamakit.cli.completion_view import log_logprobs
from llamakit.errors import EXIT_OK, LlamakitError, UsageError

if TYPE_CHECKING:
    from llamakit.cli.loading import Loaded
    from llamakit.inference.config import GenerateConfig
    from llamakit.inference.continuation import Done, Token
    from llamakit.inference.conversation import Conversation, Report

AsJson = Callable[["Loaded", str, list[int], "list[Token]", str, "Done | None"], dict[str, Any]]


def converse(loaded: Loaded, config: GenerateConfig, setup: ChatSetup, *, as_json: AsJson) -> int:
    """Answer messages until there are no more, or one (--single-turn); the exit code.

    stdout has the answers alone, each with a newline at its end, or as_json of each. On a terminal a mistake is told,
    and the chat goes on; over a pipe a message that cannot be answered ends it, since answers are counted there.
    """
    from llamakit.inference.conversation import Conversation

    if config.context_shift:
        render.note("--context-shift has no effect on a chat, which forgets its oldest messages as a whole")
    conversation = Conversation(loaded.engine, loaded.tokenizer, config, system=setup.system, adapters=loaded.adapters)
    return _Chat(conversation, loaded, setup, as_json).run()


class _Chat:
    def __init__(self, conversation: Conversation, loaded: Loaded, setup: ChatSetup, as_json: AsJson) -> None:
        self._conversation, self._loaded, self._setup, self._as_json = conversation, loaded, setup, as_json
        self._commands = Commands(conversation, loaded, setup.force, setup.offline)
        self._lines: Lines = standard_input()
        self._answers: list[Done] = []

    def run(self) -> int:
        render.log(f"load: {self._loaded.load_s:.2f} s")
        if self._lines.is_terminal and not self._setup.single_turn:
            render.log("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends")
        with contextlib.suppress(Quit):
            first = self._setup.message or (self._only_message() if self._setup.single_turn else "")
            if first:
                self._turn(first, self._conversation.say)
            if not self._setup.single_turn:
                self._talk()
        self._totals()
        return EXIT_OK

    def _only_message(self) -> str:
        """The message to answer where none was given or piped in: a person is asked."""
        message = read_message(self._lines) if self._lines.is_terminal else None
        if message is None or not message[0].strip():
            raise UsageError("there is no message to answer", hint="give it with -p, or on standard input")
        return message[0]

    def _talk(self) -> None:
        n_interrupts = 0
        while n_interrupts < 2:
            try:
                message = read_message(self._lines)
                if message is None:
                    break
                n_interrupts = 0
                self._take(*message)
            except KeyboardInterrupt:
                if not self._lines.is_terminal:
                    raise
                n_interrupts += 1
                render.log("")
                if n_interrupts < 2:
                    render.log("Ctrl-C once more, or Ctrl-D, ends the chat")
        else:
            return
        if self._lines.is_terminal:
            render.log("")

    def _take(self, text: str, quoted: bool) -> None:
        """One message, or a command."""
        if not text.strip():
            return
        if quoted or not is_command(text):
            bare = text[1:] if text.startswith("//") and not quoted else text
            self._turn(bare, self._conversation.say)
            return
        try:
            reports = self._commands.run(text)
        except LlamakitError as error:
            _tell(error)
            return
        except BrokenPipeError:
            raise
        except OSError as error:  # a disk that fails is no reason to lose the conversation
            _tell(UsageError(f"{text.split(maxsplit=1)[0]} failed: {error.strerror}"))
            return
        if reports is not None:
            self._turn(text, lambda _: reports)

    def _turn(self, text: str, ask: Callable[[str], Generator[Report, None, None]]) -> None:
        """Show the answer to a text."""
        try:
            done = self._show(text, ask(text))
        except LlamakitError as error:
            if not self._lines.is_terminal or self._setup.single_turn:
                raise
            _tell(error)
            return
        if done is not None:
            self._answers.append(done)
            if done.reason == "context":
                render.note(
                    f"the context of {self._conversation.n_ctx} tokens is full: the answer ends here, and the oldest "
                    "messages make room for the next one; /clear forgets all, --ctx sets the size"
                )

    def _show(self, text: str, reports: Generator[Report, None, None]) -> Done | None:
        """Stream an answer; None where Ctrl-C stopped it, which over a pipe is raised."""
        from llamakit.inference.continuation import Done, Token

        pieces: list[str] = []
        tokens: list[Token] = []
        done, stopped = None, False
        try:
            with _one_interrupt(), contextlib.closing(reports):
                for report in reports:
                    if not isinstance(report, Token | Done):
                        _note(report)
                        continue
                    if isinstance(report, Token):
                        tokens.append(report)
                    else:
                        done = report
                    pieces.append(report.text)
                    if not self._setup.json:
                        render.stream(report.text)
        except KeyboardInterrupt:
            stopped = True
        if self._setup.json:
            prompt = self._conversation.prompt
            render.print_json(self._as_json(self._loaded, text, prompt, tokens, "".join(pieces), done))
        else:
            render.stream("\n")
            if self._conversation.config.logprobs is not None:
                log_logprobs(self._loaded.tokenizer, tokens)
        if stopped and (self._setup.single_turn or not self._lines.is_terminal):
            raise KeyboardInterrupt
        return done

    def _totals(self) -> None:
        """What all answers took together."""
        n_prompt, n_decoded = (sum(getattr(a, name) for a in self._answers) for name in ("n_prompt", "n_decoded"))
        prefill_s, decode_s = (sum(getattr(a, name) for a in self._answers) for name in ("prefill_s", "decode_s"))
        if n_prompt and prefill_s:
            render.log(f"prompt: {n_prompt} tokens in {prefill_s:.2f} s, {n_prompt / prefill_s:.1f} tok/s")
        if n_decoded and decode_s:
            render.log(f"generation: {n_decoded} tokens in {decode_s:.2f} s, {n_decoded / decode_s:.1f} tok/s")
        if self._answers and self._conversation.config.temperature > 0:
            render.log(f"seed {self._answers[-1].seed}")


def _note(report: object) -> None:
    from llamakit.inference.conversation import Dropped

    if isinstance(report, Dropped):
        render.note(
            f"the conversation outgrew the context: its oldest {report.n_messages} messages are forgotten; "
            "a larger --ctx holds more"
        )
    else:
        render.note("the template takes no system message: its text is put before the first message")


def _tell(error: LlamakitError) -> None:
    render.error(str(error))
    if error.hint:
        render.hint(error.hint)


@contextlib.contextmanager
def _one_interrupt() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt once: an impatient second one must not disturb what stops the answer."""

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN or before is None:  # nobody wants to hear it, or somebody else does
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
