"""PEFT as the judge of its own folders: what it loads of ours, what it merges, and what we make of what it saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llamakit.conversion.merge import merge
from llamakit.conversion.merge_config import MergeConfig
from llamakit.formats.adapter import Adapter, read_adapter, write_adapter, write_adapter_folder
from llamakit.formats.names import huggingface_name
from llamakit.formats.open import open_model
from tests.interop.hf_models import hf_model, hf_weights
from tests.interop.llama_server import LlamaServer
from tests.tiny import cached_tiny_gguf

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def random_(parameters: Any, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in parameters:
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def random_adapter(path: Path, *, rank: int = 4, alpha: float = 8.0, norms: bool = False, std: float = 0.1) -> Adapter:
    """A pair for every matrix of a model, of rank 1 for its norms."""
    rng = np.random.default_rng(7)
    pairs = {}
    with open_model(path) as base:
        for name, info in base.tensors.items():
            if info.n_rows > 1 or norms:
                r = rank if info.n_rows > 1 else 1
                a, b = rng.normal(0, std, (r, info.shape[-1])), rng.normal(0, std, (info.n_rows, r))
                pairs[name] = (a.astype(np.float32), b.astype(np.float32))
    return Adapter(alpha, pairs)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": LINEAR},
        {"r": 6, "lora_alpha": 5, "target_modules": [*LINEAR, "embed_tokens", "lm_head"], "use_rslora": True},
        {
            "r": 8,
            "lora_alpha": 16,
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.(up|down)_proj": 3, "^model.layers.0.self_attn.v_proj": 16},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 1, "k_proj": 12},
        },
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm", "k_proj"]},
    ],
    ids=("plain", "rslora", "patterns", "modules_to_save"),
)  # fmt: skip
def test_a_saved_folder_merges_as_in_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (extra [interop])")
    path = cached_tiny_gguf()
    model = peft.get_peft_model(hf_model(path), peft.LoraConfig(**options))
    random_(model.named_parameters())
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.05
    model.save_pretrained(tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()
    list(merge(MergeConfig(model=path, lora=(tmp_path / "adapter",), out=tmp_path / "merged.gguf")))
    merged, base = hf_weights(tmp_path / "merged.gguf"), hf_weights(path)
    assert merged.keys() == set(expected)
    for name, weights in merged.items():
        assert (weights - expected[name]).abs().max() <= 2e-7 * max(1.0, float(weights.abs().max())), name
    changed = {name for name in merged if not torch.equal(merged[name], base[name])}
    wanted = [*options["target_modules"], *options.get("modules_to_save", [])]
    assert changed == {name for name in base if name.split(".")[-2] in wanted}


@pytest.mark.parametrize("alpha", [8.0, 0.0, 5.5])
def test_peft_loads_our_folder(tmp_path: Path, alpha: float) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (extra [interop])")
    path = cached_tiny_gguf()
    adapter = random_adapter(path, alpha=alpha)
    for name in ("blk.1.attn_q.weight", "output.weight"):
        a, b = adapter.tensors[name]
        adapter.tensors[name] = (np.tile(a, (2, 1)), np.tile(b, (1, 2)))
    with open_model(path) as base:
        write_adapter_folder(tmp_path / "adapter", adapter, base, base_model="some/where")
        again = read_adapter(tmp_path / "adapter", base)
        write_adapter(tmp_path / "one.gguf", adapter, base)
        write_adapter(tmp_path / "two.gguf", again, base)
    if alpha:
        assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    model = peft.PeftModel.from_pretrained(hf_model(path), tmp_path / "adapter")
    assert model.peft_config["default"].base_model_name_or_path == "some/where"
    merged = model.merge_and_unload().state_dict()
    list(merge(MergeConfig(model=path, lora=(tmp_path / "one.gguf",), out=tmp_path / "merged.gguf")))
    ours = hf_weights(tmp_path / "merged.gguf")
    assert {huggingface_name(name) for name in adapter.tensors} <= ours.keys()
    for name, weights in ours.items():
        assert (weights - merged[name]).abs().max() <= 2e-7 * max(1.0, float(weights.abs().max())), name


def test_llama_cpp_computes_the_same_with_the_merged_file(tmp_path: Path) -> None:
    path = cached_tiny_gguf()
    adapter = random_adapter(path, std=0.2)
    with open_model(path) as base:
        n_vocab = base.tensors["token_embd.weight"].shape[0]
        write_adapter(tmp_path / "lora.gguf", adapter, base)
    list(merge(MergeConfig(model=path, lora=(tmp_path / "lora.gguf",), out=tmp_path / "merged.gguf")))
    with_adapter, merged = (
        LlamaServer(path, lora=[(tmp_path / "lora.gguf", 1.0)]),
        LlamaServer(tmp_path / "merged.gguf"),
    )
    plain = LlamaServer(path)
    for prompt in ("The old king", "A river"):
        text = with_adapter.greedy(prompt, 24)
        assert merged.greedy(prompt, 24) == text != plain.greedy(prompt, 24)
    there, here = (server.log_probs([5, 300, 301, 302], n_vocab) for server in (with_adapter, merged))
    assert np.abs(np.exp(there) - np.exp(here)).max() < 1e-4
    assert np.abs(there - here).max() < 2e-2
