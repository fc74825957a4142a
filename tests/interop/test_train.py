"""Training beside transformers: from the same weights, on the same batches, the same losses and the same text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llamakit.conversion.convert import convert
from llamakit.conversion.convert_config import ConvertConfig
from llamakit.dataset.order import SampleOrder
from llamakit.dataset.tokens import open_tokens
from llamakit.dataset.windows import Windows
from llamakit.formats.open import open_model
from llamakit.model import load_model
from llamakit.training.report import StepReport
from tests.interop.llama_server import LlamaServer
from tests.tiny import cached_tiny_gguf
from tests.training.train_runs import run_train

pytestmark = pytest.mark.interop
TOKENS, N_PREDICT = [1, 270, 280], 10


def test_losses_are_those_of_plain_torch(tmp_path: Path) -> None:
    """20 steps of AdamW on a LlamaForCausalLM, decay on matrices alone, clipped at 1."""
    hf = pytest.importorskip("transformers", reason="transformers is not installed (extra [interop])")
    base = cached_tiny_gguf(n_layer=2)
    convert(ConvertConfig(source=base, out=tmp_path / "hf", outtype="f32"))
    options = {"init_from": str(base), "vocab_model": "", "adam_iter": 20, "lr_schedule": "constant", "warmup": 0}
    reports = run_train(tmp_path, **options, adam_alpha=1e-3, eval_every=0, save_every=0, sample_tokens=0)
    mine = [report.loss for report in reports if isinstance(report, StepReport)]
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).train()
    windows = Windows(open_tokens(tmp_path / "out/data").train, 16)
    order = SampleOrder(7, windows.count)
    groups = [[p for p in model.parameters() if (p.dim() >= 2) == decays] for decays in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    theirs = []
    for _ in range(20):
        batch = windows.build(order, 2)
        order.advance(2)
        logits = model(torch.from_numpy(batch.inputs)).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.targets).flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        theirs.append(float(loss.detach()))
    assert mine == pytest.approx(theirs, rel=2e-4)
    assert mine[-1] < mine[0]


def greedy(path: Path) -> list[int]:
    """Our own greedy tokens of a model file in any format."""
    with open_model(path) as file, torch.no_grad():
        model, tokens = load_model(file, dtype=torch.float32), list(TOKENS)
        for _ in range(N_PREDICT):
            tokens.append(int(model.logits(model(torch.tensor([tokens])))[0, -1].argmax()))
    return tokens


def logits(path: Path) -> torch.Tensor:
    """Of the tokens, (T, V) float32."""
    with open_model(path) as file, torch.no_grad():
        model = load_model(file, dtype=torch.float32)
        return model.logits(model(torch.tensor([TOKENS])))[0]


@pytest.mark.parametrize("tie", [True, False])
def test_every_export_gives_the_same_greedy_text(tmp_path: Path, tie: bool) -> None:
    """GGUF in llama.cpp, a folder in transformers, run.c's oldest version in our reader."""
    hf = pytest.importorskip("transformers", reason="transformers is not installed (extra [interop])")
    run_train(tmp_path, tie=tie, adam_iter=60, head_kv=4, adam_alpha=1e-2, ctx=32, eval_every=0, save_every=0)
    model = tmp_path / "out/model-LATEST.gguf"
    expected = greedy(model)
    with open_model(model) as file:
        from llamakit.tokenizer import load_tokenizer

        text = load_tokenizer(file).decode(expected[len(TOKENS) :])
    assert LlamaServer(model, n_ctx=32).greedy(TOKENS, N_PREDICT).strip() == text.strip()
    convert(ConvertConfig(source=model, out=tmp_path / "hf", outtype="f32"))
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    found = theirs.generate(torch.tensor([TOKENS]), max_new_tokens=N_PREDICT, do_sample=False, eos_token_id=None)
    assert found[0].tolist() == expected
    for version in (0, 1):
        binary = convert(ConvertConfig(source=model, out=tmp_path / f"m{version}.bin", version=version)).paths[0]
        assert greedy(binary) == expected
    # Version 2 rounds to int8, which the text need not survive: its logits are near those of the model.
    binary = convert(ConvertConfig(source=model, out=tmp_path / "m2.bin", version=2)).paths[0]
    assert float((logits(binary) - logits(model)).abs().max()) < 0.05 * float(logits(model).abs().max())
