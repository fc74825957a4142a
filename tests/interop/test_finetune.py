"""Fine-tuning a folder that transformers saved: PEFT loads its adapters, transformers the models, and says the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llamakit.cli import run as llamakit
from llamakit.conversion.convert import convert
from llamakit.conversion.convert_config import ConvertConfig
from llamakit.formats.adapter import read_adapter
from llamakit.formats.open import open_model
from llamakit.inference.completion import generate
from llamakit.inference.config import GenerateConfig
from llamakit.model import Llama, load_model
from llamakit.model.lora import attach
from llamakit.tokenizer import load_tokenizer
from llamakit.training.proof import logits_of
from llamakit.training.report import Verified
from tests.tiny import cached_tiny_gguf, tiny_text
from tests.training.runs import run

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [interop])")
N_NEW = 24
STEPS: dict[str, Any] = {"adam_iter": 6, "adam_alpha": 0.02, "warmup": 0, "ctx": 32, "checkpoint_out": ""}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its tokenizer as transformers saves them."""
    place = tmp_path_factory.mktemp("hf")
    convert(ConvertConfig(source=cached_tiny_gguf(tokenizer="bpe"), out=place / "ours"))
    theirs(place / "ours").save_pretrained(place / "theirs")
    transformers.AutoTokenizer.from_pretrained(place / "ours").save_pretrained(place / "theirs")
    return place / "theirs"


def theirs(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def assert_the_same(ours: Llama, model: Any, path: Path) -> None:
    """Logits within 1e-3, and the same likeliest continuation."""
    with open_model(path) as file:
        tokenizer = load_tokenizer(file)
    ids = tokenizer.encode("The old king watched a", add_special=True)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    assert (logits_of(ours, torch.tensor(ids)) - expected).abs().max() < 1e-3
    said = model.generate(torch.tensor([ids]), max_new_tokens=N_NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    config = GenerateConfig(n_predict=N_NEW, temperature=0.0, ignore_eos=True)
    text = "".join(token.text for token in generate(ours.eval(), tokenizer, ids, config))
    assert text == tokenizer.decode(said[0, len(ids) :].tolist())


@pytest.mark.parametrize("options", [{}, {"rslora": True, "lora_targets": ("attn_*=6", "ffn_*=3"), "rank_out": None}])
def test_peft_loads_the_adapter_of_a_run(tmp_path: Path, folder: Path, options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (extra [interop])")
    out = str(tmp_path / "lora-ITERATION")
    run(tmp_path, model_base=str(folder), lora_format="peft", lora_out=out, lora_alpha=6.0, **STEPS, **options)
    latest = tmp_path / "lora-LATEST"
    assert json.loads((latest / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
    with open_model(folder) as base:
        model = load_model(base)
        plain = logits_of(model, torch.arange(9))
        attach(model, read_adapter(latest, base))
    assert (logits_of(model, torch.arange(9)) - plain).abs().max() > 0.1
    assert_the_same(model, peft.PeftModel.from_pretrained(theirs(folder), str(latest)), folder)


def test_transformers_loads_the_model_of_a_full_run(tmp_path: Path, folder: Path) -> None:
    defaults = {"lora_out": "ggml-lora-ITERATION-f32.gguf", "model_out": str(tmp_path / "model-ITERATION.gguf")}
    reports = run(tmp_path, model_base=str(folder), full=True, **defaults, **(STEPS | {"adam_alpha": 2e-3}))
    assert [r.difference < 1e-3 < r.change for r in reports if isinstance(r, Verified)] == [True]
    convert(ConvertConfig(source=tmp_path / "model-LATEST.gguf", out=tmp_path / "out"))
    with open_model(tmp_path / "model-6.gguf") as file:
        assert_the_same(load_model(file), theirs(tmp_path / "out"), tmp_path / "model-6.gguf")


def test_the_whole_way_from_a_folder(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """finetune, merge, quantize, Modelfile, answer: on questions and answers, with an adapter of either format."""
    monkeypatch.chdir(tmp_path)
    words = tiny_text(4000, 3).split(". ")
    pairs = [{"prompt": words[2 * i][:16], "completion": words[2 * i + 1][:12]} for i in range(8)]
    Path("chat.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    base = ["--model-base", str(folder), "--train-data", "chat.jsonl", "--chat-template", "chatml", "--ctx", "128"]
    steps = ["--adam-iter", "2", "--warmup", "0", "--batch", "1", "--checkpoint-out", "", "--checkpoint-in", ""]
    assert llamakit(["finetune", *base, *steps, "--lora-format", "peft", "--lora-out", "lora"]) == 0
    assert llamakit(["finetune", *base, *steps, "--lora-out", "lora.gguf", "--merge-out", "merged.gguf"]) == 0
    assert llamakit(["merge", "-m", str(folder), "--lora", "lora", "-o", "model.gguf"]) == 0
    assert llamakit(["quantize", "model.gguf", "q8_0.gguf", "Q8_0"]) == 0
    assert llamakit(["convert", "q8_0.gguf", "-o", "Modelfile"]) == 0
    assert llamakit(["generate", "-m", "q8_0.gguf", "-p", "The", "-n", "4"]) == 0
