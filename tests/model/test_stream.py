"""One layer at a time gives what the whole model gives."""

import pytest
import torch

from llamakit.formats.open import open_model
from llamakit.model import load_model
from llamakit.model.stream import streamed_logits
from tests.tiny import cached_tiny_gguf


@pytest.mark.parametrize(
    "options",
    [{}, {"tied": True, "biases": True, "rope": "yarn"}, {"type": "Q4_K", "rope": "llama3"}, {"head_dim": 24}],
)
def test_streamed_logits_are_the_models(options):
    tokens = [1, 5, 7, 300, 5, 42, 0, 11]
    with open_model(cached_tiny_gguf(**options)) as file:
        model = load_model(file)
        with torch.inference_mode():
            whole = model.logits(model(torch.tensor([tokens])))[0]
        assert torch.allclose(streamed_logits(file, tokens), whole, rtol=0, atol=5e-5)
