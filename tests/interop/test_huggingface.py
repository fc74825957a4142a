"""transformers loads what we write and means the same by it, and we mean the same by what transformers writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llamakit.formats.gguf import copied_tensor
from llamakit.formats.huggingface import HuggingFaceModel
from llamakit.formats.huggingface_writer import write_huggingface
from llamakit.model import load_model
from tests.hf import ROPES, VARIANTS, tiny_hf

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [interop])")
TOKENS = [1, *np.random.default_rng(0).integers(3, 40, 99).tolist()]


def theirs(path: Path) -> Any:
    """The logits (T, V) of transformers, and its model."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(torch.tensor([TOKENS])).logits[0], model


def ours(path: Path) -> torch.Tensor:
    with HuggingFaceModel(path) as file, torch.no_grad():
        model = load_model(file, dtype=torch.float32)
        return model.logits(model(torch.tensor([TOKENS])))[0]


@pytest.mark.parametrize("generation", [4, 5])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_logits(tmp_path: Path, name: str, generation: int) -> None:
    options = {"generation": generation} | VARIANTS[name]
    if name == "mistral":
        options["sliding_window"] = None  # GGUF has no place for it
    source = tiny_hf(tmp_path / "source", **options)
    with HuggingFaceModel(source) as model:
        tensors = [copied_tensor(model, n) for n in model.tensors]
        write_huggingface(tmp_path / "target", metadata=model.metadata, tensors=tensors)
    before, _ = theirs(source)
    after, _ = theirs(tmp_path / "target")
    assert torch.equal(before, after)
    assert (ours(source).log_softmax(-1) - before.log_softmax(-1)).abs().max() < 1e-4


@pytest.mark.parametrize("rope", ["default", *ROPES])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_transformers_saves(tmp_path: Path, rope: str, dtype: str) -> None:
    parameters = {"rope_type": rope.partition("-")[0], "rope_theta": 10000.0, **ROPES.get(rope, {})}
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rope_parameters=parameters, attention_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    saved = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    saved.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    before, _ = theirs(tmp_path / "source")
    with HuggingFaceModel(tmp_path / "source") as model:
        assert len(model.files) > 1
        tokens = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
        tensors = [copied_tensor(model, n) for n in model.tensors]
        write_huggingface(tmp_path / "target", metadata={**model.metadata, **tokens}, tensors=tensors)
    after, again = theirs(tmp_path / "target")
    assert torch.equal(before, after)
    assert again.generation_config.eos_token_id == saved.generation_config.eos_token_id
    kept, was = again.config.to_dict(), saved.config.to_dict()
    for key in ("_name_or_path", "transformers_version", "dtype"):
        kept.pop(key, None), was.pop(key, None)
    assert kept == was
    assert (ours(tmp_path / "source").log_softmax(-1) - before.log_softmax(-1)).abs().max() < 1e-4
