"""What a run will take, against what it takes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from llamakit.formats.open import open_model
from llamakit.model import load_model
from llamakit.model.layers import Dropout
from llamakit.training.lora import attach_trainable, initial_weights
from llamakit.training.memory import kept_numbers
from tests.helpers import ROOT
from tests.tiny import cached_tiny_gguf
from tests.training.test_gradients import ranks


def kept_bytes(model, tokens: torch.Tensor) -> int:
    """Bytes of all memory that the forward pass keeps for the backward pass, beyond the model's own."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()
        kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(tokens)
    assert hidden.requires_grad
    return sum(size for address, size in kept.items() if address not in own)


@pytest.mark.parametrize("ctx", [48, 300])
def test_the_forward_pass_keeps_what_the_plan_says(ctx: int) -> None:
    with open_model(cached_tiny_gguf(type="Q8_0", n_ctx=512)) as file:
        model = load_model(file, dtype=torch.bfloat16)
    attach_trainable(model, initial_weights(model.config, ranks(1), 7), 1.0, Dropout(0.0))
    tokens = torch.arange(4 * ctx).view(4, ctx) % model.config.n_vocab
    predicted = kept_numbers(model.config, ctx) * model.config.n_layer * tokens.numel() * 2
    assert predicted <= kept_bytes(model.train(), tokens) < 1.1 * predicted


@pytest.mark.slow
def test_training_imports_no_compiler(tmp_path) -> None:
    """torch's own optimizers and checkpointing do, which costs a second and 70 MB."""
    code = (
        "import sys; from pathlib import Path; from tests.training.runs import run;"
        f"run(Path({str(tmp_path)!r}), use_checkpointing=True);"
        "print(sorted({'torch._dynamo', 'torch._inductor', 'sympy'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert result.stdout.splitlines()[-1:] == ["[]"], result.stderr
