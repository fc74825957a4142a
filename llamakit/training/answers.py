"""What a model in training says to --sample-prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from llamakit.errors import UsageError
from llamakit.inference.completion import encode_prompt, generate
from llamakit.inference.config import GenerateConfig
from llamakit.model import Llama
from llamakit.tokenizer import Tokenizer
from llamakit.tokenizer.chat import encode_rendered, render_chats
from llamakit.training.report import Sample


class Answers:
    """The model's answers to the same prompts, whenever asked, with the same random numbers each time: they can be held
    against each other."""

    def __init__(
        self, model: Llama, tokenizer: Tokenizer, prompts: Sequence[str], settings: GenerateConfig, *, as_messages: bool
    ) -> None:
        """settings: how an answer is sampled, n_predict its tokens at most. as_messages: a prompt is what a user
        says, by the chat template; else the beginning of a text.

        Raises UsageError for a prompt that leaves no room in the context, UnsupportedError where there is no template,
        FormatError where it fails.
        """
        self._model, self._tokenizer, self._prompts = model, tokenizer, prompts
        self._ids = _encoded(tokenizer, prompts, as_messages)
        room = model.config.n_ctx - 1
        self._config = dataclasses.replace(settings, n_predict=min(settings.n_predict, room))
        for ids in self._ids:
            if len(ids) > room:
                raise UsageError(
                    f"--sample-prompt has {len(ids)} tokens (expected at most {room}, one below the context)"
                )

    def samples(self, step: int) -> Iterator[Sample]:
        """Each prompt and its answer. The model's mode and weights stay as they are."""
        training = self._model.training
        self._model.eval()
        try:
            for prompt, ids in zip(self._prompts, self._ids, strict=True):
                reports = generate(self._model, self._tokenizer, ids, self._config)
                yield Sample(step, prompt, "".join(report.text for report in reports))
        finally:
            self._model.train(training)


def _encoded(tokenizer: Tokenizer, prompts: Sequence[str], as_messages: bool) -> list[list[int]]:
    if not as_messages or not prompts:
        return [encode_prompt(tokenizer, prompt) for prompt in prompts]
    found = []
    for text in render_chats(tokenizer, [([{"role": "user", "content": prompt}], True) for prompt in prompts]):
        if not isinstance(text, str):
            raise text
        found.append(encode_rendered(tokenizer, text))
    return found
