"""What convert writes, in the programs that it is for: llama.cpp loads every GGUF, transformers every folder."""

import numpy as np
import pytest
import torch

from llamakit.conversion.convert import convert
from llamakit.conversion.convert_config import ConvertConfig
from llamakit.formats.open import open_model
from llamakit.model import load_model
from tests.interop.llama_server import LlamaServer
from tests.smollm import smollm2_path
from tests.tiny import cached_tiny_gguf

pytestmark = pytest.mark.interop


def run(source, out, **options):
    return convert(ConvertConfig(source=source, out=out, **options)).paths[0]


def log_probs(path, tokens):
    """(T, V) float64, by our own module."""
    with open_model(path) as file, torch.no_grad():
        model = load_model(file, dtype=torch.float32)
        return model.logits(model(torch.tensor([tokens])))[0].double().log_softmax(-1).numpy()


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m", "q6_k", "iq4_xs", "tq2_0", "q2_k"])
def test_llama_cpp_loads_what_came_from_a_folder(tmp_path, outtype):
    run(cached_tiny_gguf(n_embd=256, n_ff=512, rope_base=50000.0), tmp_path / "hf", outtype="bf16")
    path = run(tmp_path / "hf", tmp_path / "m.gguf", outtype=outtype)
    tokens = [1, *range(260, 290)]
    mine = log_probs(path, tokens)
    place = next(n for n in range(len(tokens), 0, -1) if mine[n - 1].argmax() > 258)
    theirs = LlamaServer(path).log_probs(tokens[:place], mine.shape[1])
    seen = np.isfinite(theirs) & (theirs > -50)
    # Quantized matrices: llama.cpp rounds activations, too.
    assert np.abs(mine[place - 1] - theirs)[seen].max() < (1e-4 if outtype == "f32" else 0.25)


def test_llama_cpp_reads_a_llama2c_model_that_became_gguf(tmp_path):
    source = cached_tiny_gguf(n_ctx=64)
    binary = run(source, tmp_path / "m.bin")
    path = run(binary, tmp_path / "m.gguf", vocab=tmp_path / "tokenizer.bin")
    assert LlamaServer(path).greedy([1, 270, 280], 12) == LlamaServer(source).greedy([1, 270, 280], 12)


@pytest.mark.slow
def test_the_real_model_in_transformers(tmp_path):
    hf = pytest.importorskip("transformers", reason="transformers is not installed (extra [interop])")
    run(smollm2_path(), tmp_path / "hf", outtype="f32")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokens = tokenizer("Once upon a time, in 1594, a poet wrote:\n\n\tShall I compare thee?")["input_ids"]
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1).numpy()
    assert np.abs(log_probs(smollm2_path(), tokens) - theirs).max() < 1e-4
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
