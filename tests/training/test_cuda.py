"""The same run on CUDA. These wait for a machine that has it."""

import numpy as np
import pytest
import torch

from llamakit.formats.adapter import read_adapter
from llamakit.formats.open import open_model
from llamakit.inference.completion import generate
from llamakit.inference.config import GenerateConfig
from llamakit.model import load_model
from llamakit.tokenizer import load_tokenizer
from tests.tiny import cached_tiny_gguf
from tests.training.runs import losses, run

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]


@pytest.mark.parametrize("weight_cache", ["bf16", "none"])
def test_a_run_gives_the_losses_and_the_adapter_of_the_cpu(tmp_path, weight_cache):
    results = {}
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
        reports = run(tmp_path / device, device=device, weight_cache=weight_cache)
        results[device] = losses(reports), read_adapter(tmp_path / device / "lora-4.bin")
    assert np.allclose(results["cpu"][0], results["cuda"][0], rtol=1e-4)
    for name, (a, b) in results["cpu"][1].tensors.items():
        other = results["cuda"][1].tensors[name]
        assert np.allclose(b @ a, other[1] @ other[0], atol=1e-4), name


def test_greedy_text_is_that_of_the_cpu():
    texts = []
    for device in ("cpu", "cuda"):
        file = open_model(cached_tiny_gguf(type="Q8_0"))
        model = load_model(file, device=device, dtype=torch.float32)
        config = GenerateConfig(n_predict=20, temperature=0.0)
        texts.append("".join(r.text for r in generate(model, load_tokenizer(file), "The old", config)))
    assert texts[0] == texts[1]


def test_packed_rows_give_the_losses_of_the_cpu(tmp_path):
    rows = [f'{{"prompt": "Who is {n}?", "completion": "The king {n}."}}' for n in range(12)]
    found = []
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
        data = tmp_path / device / "chat.jsonl"
        data.write_text("\n".join(rows))
        found.append(
            losses(run(tmp_path / device, device=device, train_data=str(data), chat_template="llama2", ctx=96))
        )
    assert np.allclose(found[0], found[1], rtol=1e-4)
