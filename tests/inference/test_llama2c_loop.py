"""The loops of run.c over an engine that says what it was fed; run.c's own text stands in tests/cli."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from llamakit.errors import LlamakitError
from llamakit.formats.gguf import GGUFFile
from llamakit.formats.llama2c_vocab import write_llama2c_vocabulary
from llamakit.inference.engine import TorchEngine
from llamakit.inference.llama2c_loop import RunConfig, Speed, chat, complete
from llamakit.model import load_model
from llamakit.tokenizer import Tokenizer, load_llama2c_tokenizer, load_tokenizer
from tests.tiny import cached_tiny_gguf


class Fed(TorchEngine):
    """The tiny model, and every call of `feed`."""

    def __init__(self, path: Path, forced: Sequence[int] = (), change: Callable | None = None) -> None:
        super().__init__(load_model(GGUFFile(path)))
        self.calls: list[list[int]] = []
        self._forced, self._change = list(forced), change

    def feed(self, context, tokens):
        """As it is; then the likeliest token is the next of those that are forced."""
        self.calls.append(list(tokens))
        logits = super().feed(context, tokens)
        if self._forced:
            logits[self._forced.pop(0)] = 1e4
        return self._change(logits) if self._change else logits


@pytest.fixture(scope="module")
def path() -> Path:
    return cached_tiny_gguf(n_ctx=64)


@pytest.fixture(scope="module")
def tokenizer(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file, vocabulary = GGUFFile(path), tmp_path_factory.mktemp("llama2c") / "tokenizer.bin"
    write_llama2c_vocabulary(vocabulary, file.metadata)
    return load_llama2c_tokenizer(vocabulary, n_vocab=len(file.metadata["tokenizer.ggml.tokens"]))


def text(engine: Fed, tokenizer: Tokenizer, prompt: str, steps: int, temperature: float = 0) -> tuple[str, int]:
    speed = Speed()
    config = RunConfig(temperature=temperature, steps=steps, seed=1)
    pieces = b"".join(complete(engine, tokenizer, prompt, config, speed))
    return pieces.decode(), speed.n_steps


def test_what_run_c_makes_of_its_settings() -> None:
    def settled(**settings: float) -> RunConfig:
        return RunConfig(**settings).settled(512)  # pyright: ignore[reportArgumentType]

    assert [settled(steps=n).steps for n in (0, -1, 5, 512, 513)] == [512, 512, 5, 512, 512]
    assert [settled(temperature=t).temperature for t in (-1, 0.5, 1e-50, 1e50)] == [0, 0.5, 0, np.inf]
    assert [settled(top_p=p).top_p for p in (0, 1, 0.5, 1 + 1e-12)] == [0, 1, 0.5, 1]
    assert [settled(top_p=p).top_p for p in (-0.1, 1.1, np.nan)] == [float(np.float32(0.9))] * 3
    assert [settled(seed=s).seed for s in (7, -1, 3_000_000_000, 2**33 + 5)] == [7, 2**64 - 1, 2**64 - 1294967296, 5]
    assert abs(settled(seed=0).seed - time.time()) < 60 and abs(settled(seed=2**32).seed - time.time()) < 60


def test_the_prompt_is_printed_and_every_step_is_fed_once(path: Path, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The old king")
    engine = Fed(path)
    shown, n_steps = text(engine, tokenizer, "The old king", len(ids) + 3)
    assert shown.startswith("The old king") and n_steps == len(ids) + 3
    assert engine.calls[:2] == [ids[:1], ids[1:]] and [len(call) for call in engine.calls[2:]] == [1, 1, 1]
    assert sum(map(len, engine.calls)) == n_steps


def test_steps_may_end_within_the_prompt(path: Path, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The old king")
    for steps in range(1, len(ids)):
        shown, n_steps = text(Fed(path), tokenizer, "The old king", steps)
        assert (shown, n_steps) == (tokenizer.decode(ids[: steps + 1]), steps)


def test_bos_ends_a_text_and_is_not_shown(path: Path, tokenizer: Tokenizer) -> None:
    assert text(Fed(path, [261, 262, 1]), tokenizer, "", 20)[1] == 3
    assert text(Fed(path, [1]), tokenizer, "", 20) == ("", 1)
    assert text(Fed(path, [2, 1]), tokenizer, "", 20)[0] == "\n</s>\n"  # as run.c: EOS is a token like others


def test_the_end_of_another_vocabulary_is_an_end(path: Path) -> None:
    gguf = load_tokenizer(GGUFFile(path))
    assert gguf.eos_id is not None
    assert text(Fed(path, [300, gguf.eos_id]), gguf, "", 20)[1] == 2


def test_lone_bytes_are_printed_as_far_as_run_c_does(path: Path, tokenizer: Tokenizer) -> None:
    e_acute = [3 + byte for byte in "é".encode()]
    forced = [3 + 0x41, 3 + 0x0A, 3 + 0x1B, *e_acute, 3 + 0x42, 1]
    assert text(Fed(path, list(forced)), tokenizer, "", 30)[0] == "A\nB"
    gguf = load_tokenizer(GGUFFile(path))
    assert text(Fed(path, [*forced[:-1], 2]), gguf, "", 30)[0] == "A\néB"


def test_logits_that_are_not_finite_are_an_error(path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(LlamakitError, match="no finite number"):
        text(Fed(path, change=lambda logits: logits * np.float32("nan")), tokenizer, "", 5)


def test_a_chat_asks_and_answers_in_llama_2s_format(path: Path, tokenizer: Tokenizer) -> None:
    first = tokenizer.encode("[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nhello [/INST]")
    second = tokenizer.encode("[INST] more [/INST]")
    # An answer of two tokens and EOS; the token drawn after EOS is shown, too, before the next question.
    forced = [*[300] * (len(first) - 1), 3 + 0x41, 3 + 0x42, 2, 3 + 0x43, *[300] * (len(second) - 1), 3 + 0x44]
    engine = Fed(cached_tiny_gguf(n_ctx=256), forced)
    shown: list[bytes] = []

    def ask(question: str) -> str | None:
        shown.append(question.encode())
        return {"E": "be kind"}.get(question[0], "hello" if len(shown) < 4 else "more")

    config = RunConfig(temperature=0, steps=len(forced))
    for piece in chat(engine, tokenizer, config, user=None, system=None, ask=ask):
        shown.append(piece)
    expected = "Enter system prompt (optional): User: Assistant: AB\nCUser: Assistant: D\n"
    assert b"".join(shown).decode() == expected
    assert [id for (id,) in engine.calls] == [*first, 3 + 0x41, 3 + 0x42, 2, *second]


def test_a_chat_whose_input_ends_says_the_last_message_again(path: Path, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("[INST] hi [/INST]")
    engine = Fed(cached_tiny_gguf(n_ctx=256), [*[300] * (len(ids) - 1), 2, 300] * 2)
    shown = b"".join(chat(engine, tokenizer, RunConfig(temperature=0, steps=2 * len(ids) + 2), user="hi", system="",
                          ask=lambda question: None))  # fmt: skip
    assert shown.count(b"Assistant: ") == 2
    assert [id for (id,) in engine.calls] == [*ids, 2, *ids, 2]
