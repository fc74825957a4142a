"""A chat on the real model: llama.cpp's answers to the same conversation, turn by turn."""

import pytest
import torch

from llamakit.formats.open import open_model
from llamakit.inference.config import GenerateConfig
from llamakit.inference.conversation import Conversation
from llamakit.inference.engine import TorchEngine
from llamakit.model import load_model
from llamakit.tokenizer import load_tokenizer
from tests.interop.llama_server import LlamaServer
from tests.smollm import smollm2_f32

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1200)]

CHATS = (
    ("", ("What is the capital of France?", "And of Italy?\nOne word.", "  Why? ")),
    ("You are a pirate. Answer in one sentence.", ("Who are you?", "Wie heißt dein Schiff? 🏴‍☠️ <|im_end|>")),
)


@pytest.mark.parametrize(
    ("chats", "n"),
    [pytest.param(CHATS[1:], 12, marks=pytest.mark.slow), pytest.param(CHATS, 40, marks=pytest.mark.prove)],
    ids=["one", "all"],
)
def test_turn_by_turn_the_answers_are_llama_cpps(chats, n):
    path = smollm2_f32()
    file = open_model(path)
    tokenizer = load_tokenizer(file)
    engine = TorchEngine(load_model(file, dtype=torch.float32))
    server = LlamaServer(path, n_ctx=1024)
    for system, questions in chats:
        config = GenerateConfig(temperature=0, n_predict=n, ctx=1024)
        conversation = Conversation(engine, tokenizer, config, system=system)
        for question in questions:
            said = "".join(report.text for report in conversation.say(question))
            theirs, n_prompt = server.chat(conversation.messages[:-1], n)
            assert len(conversation.prompt) == n_prompt, question
            assert said == theirs, question
