"""The benchmarks run: each one's help, and a tiny round of each, most of them in `make prove`. What they measure is
no test's business."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamakit.formats.gguf import GGUFFile
from llamakit.tokenizer.chat_templates import find_chat_template
from tests.helpers import ROOT
from tests.smollm import smollm2_path
from tests.tiny import cached_tiny_gguf, tiny_text

BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = (
    "models.py", "finetune.py", "instruct.py", "convert.py", "generate.py", "instruct_journey.py", "scale.py", "serve.py",
    "seven_b.py", "startup.py",
)  # fmt: skip


def bench(script: str, *arguments: str | os.PathLike[str], timeout_s: float = 250) -> str:
    """Run a benchmark with one thread and return what it printed."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *map(os.fspath, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
        text=True,
        timeout=timeout_s,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str) -> None:
    assert "usage:" in bench(script, "--help")


@pytest.mark.slow
def test_a_random_model_has_its_shape_and_type(tmp_path: Path) -> None:
    assert "tiny-q4_0.gguf" in bench("models.py", "tiny-q4_0", "--dir", tmp_path)
    with GGUFFile(tmp_path / "tiny-q4_0.gguf") as file:
        assert file.tensors["blk.1.ffn_down.weight"].shape == (64, 128)
        assert file.tensors["output.weight"].type.name == "Q4_0"
        assert len(set(file.metadata["tokenizer.ggml.tokens"])) == 400


@pytest.mark.prove
def test_seven_b_on_a_tiny_model(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = ("--model", "tiny-q4_0", "--steps", "2", "--threads", "1", "--dir", tmp_path / "work")
    assert "seconds a step" in bench("seven_b.py", *arguments, "--json", report)
    results = json.loads(report.read_text())["results"]
    assert len(results["job"]["step_s"]) == 2
    assert results["parts"]["decode_s"] > 0
    assert not list((tmp_path / "work").iterdir()), "what was written is deleted without --keep"


@pytest.mark.prove
def test_scale_on_a_tiny_model(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = ("--rounds", "1", "--steps", "2", "--threads", "2", "--ctx", "16", "--batch", "2", "--memory", "2")
    bench("scale.py", "--model", cached_tiny_gguf(type="Q4_K"), *arguments, "--dir", tmp_path, "--json", report)
    results = json.loads(report.read_text())["results"]
    assert results["speed"]["median"] > 0 and results["memory"]["2"]["share"] > 0


@pytest.mark.slow
def test_startup_on_a_tiny_model(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    bench("startup.py", "--model", "tiny-q8_0", "--runs", "1", "--threads", "1", "--json", report)
    results = json.loads(report.read_text())["results"]
    assert results["torch_imported"] is False
    assert results["loading_peak_bytes"] > results["imports_bytes"]


@pytest.mark.prove
@pytest.mark.interop
def test_generate_and_transformers_take_the_same_tokens(tmp_path: Path) -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed (pip install -e .[interop])")
    report = tmp_path / "report.json"
    work = (
        "--rounds",
        "1",
        "--runs",
        "1",
        "--prompt",
        "16",
        "--gen",
        "4",
        "--threads",
        "1",
        "--dir",
        tmp_path / "work",
    )
    arguments = ("tiny-q8_0", "--transformers", "--lora", "4", "--first-token", *work, "--json", report)
    assert "ratio" in bench("generate.py", *arguments)
    speed, lora, first = json.loads(report.read_text())["results"]
    assert speed["rates"].keys() == {"llamakit", "transformers"}
    assert all(len(rates["pp"]) == len(rates["tg"]) == 1 for rates in speed["rates"].values())
    assert 0 < speed["bytes_per_token"] < speed["bytes"]
    assert lora["lora"]["tg"].keys() == {"4"}
    assert first["first_token_s"].keys() == {"generate", "import torch"}
    assert not list((tmp_path / "work").iterdir()), "what was written is deleted without --keep"


@pytest.mark.prove
@pytest.mark.interop
def test_finetune_and_peft_take_the_same_steps(tmp_path: Path) -> None:
    for module in ("transformers", "peft"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed (pip install -e .[interop])")
    report = tmp_path / "report.json"
    arguments = ("--case", "tiny", "--rounds", "2", "--threads", "1", "--json", report)
    assert "ratio" in bench("finetune.py", *arguments)
    (results,) = json.loads(report.read_text())["results"]
    losses = results["losses"]
    # The same weights, batches, start and optimizer: what is apart is bf16's rounding.
    assert losses["ours"] == pytest.approx(losses["peft"], abs=0.02)


@pytest.mark.prove
@pytest.mark.interop
def test_instruct_and_trl_learn_from_the_same_samples(tmp_path: Path) -> None:
    if importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed (pip install -e .[bench])")
    report = tmp_path / "report.json"
    arguments = ("--case", "tiny", "--rounds", "1", "--threads", "1", "--dir", tmp_path / "work", "--json", report)
    assert "ratio" in bench("instruct.py", *arguments)
    (results,) = json.loads(report.read_text())["results"]
    assert len(results["trl"]["tried"]) == 3
    # Their rows are not ours, the model, the samples, the template and the loss are.
    firsts = [way["first_loss"] for way in results["trl"]["tried"].values()]
    assert firsts == pytest.approx([results["losses"]["ours"][0]] * 3, abs=0.05)
    assert not list((tmp_path / "work").iterdir()), "what was written is deleted without --keep"


@pytest.mark.prove
@pytest.mark.interop
def test_convert_and_the_numpy_way_on_a_tiny_folder(tmp_path: Path) -> None:
    if importlib.util.find_spec("safetensors") is None:
        pytest.skip("safetensors is not installed (pip install -e .[interop])")
    report = tmp_path / "report.json"
    arguments = ("--shape", "tiny", "--rounds", "1", "--outtypes", "q8_0", "--threads", "1", "--dir", tmp_path / "work")
    assert "times ours" in bench("convert.py", *arguments, "--json", report)
    figures = json.loads(report.read_text())["results"]["q8_0"]
    assert figures.keys() == {"ours", "numpy", "ours, verified"}
    assert all(side["wall_s"] > 0 and side["peak_bytes"] > 0 for side in figures.values())
    assert not list((tmp_path / "work").iterdir()), "what was written is deleted without --keep"


@pytest.mark.slow
def test_serve_on_a_tiny_model(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    model = str(cached_tiny_gguf())
    amounts = ("--clients", "3", "--slots", "2", "--ctx", "200", "--gen", "5", "--rounds", "1", "--prompt", "5")
    assert "3 clients" in bench("serve.py", model, "--alone", *amounts, "--threads", "1", "--json", report)
    (results,) = json.loads(report.read_text())["results"]
    assert results["sides"]["llamakit"]["many"][0]["tok_per_s"] > 0


@pytest.mark.slow
def test_the_journey_of_an_instruction_set_on_a_tiny_folder(tmp_path: Path) -> None:
    report, text = tmp_path / "report.json", tmp_path / "text.txt"
    text.write_text(tiny_text(6000), encoding="utf-8")
    template = find_chat_template("chatml")
    model = cached_tiny_gguf(n_layer=11, n_ctx=1024, tokenizer="bpe", chat_template=template)
    options = ("--seeds", "7", "--chunks", "1", "--threads", "1", "--option=--adam-iter=1", "--dir", tmp_path / "work")
    arguments = ("--model", model, "--hf", "--text", text, *options)
    assert "| 7 | " in bench("instruct_journey.py", *arguments, "--json", report)
    results = json.loads(report.read_text())["results"]
    seed = results["seeds"]["7"]
    assert len(seed["answers"]) == len(results["base"]["answers"]) == 60
    assert (
        seed["seconds"].keys() == {"finetune", "merge", "quantize", "convert", "generate"} and seed["processor_s"] > 0
    )
    assert not list((tmp_path / "work").iterdir()), "what was written is deleted without --keep"


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_the_journey_of_the_instruction_set_on_smollm2(tmp_path: Path, record_property) -> None:
    smollm2_path()
    report = tmp_path / "report.json"
    bench("instruct_journey.py", "--seeds", "1", "--threads", "2", "--json", report, timeout_s=3500)
    results = json.loads(report.read_text())["results"]
    base, seed = results["base"]["answers"], results["seeds"]["1"]
    record_property("right answers to 60 paraphrases", round(60 * seed["right"]))
    record_property("of the base", sum(answer["right"] for answer in base))
    record_property("rise in perplexity", f"{100 * seed['rise']:.1f} %")
    record_property("seconds, of processors", f"{seed['wall_s']:.0f}, {seed['processor_s']:.0f}")
    assert sum(answer["right"] for answer in base) < 0.2 * len(base)
    assert seed["right"] >= 0.75 and seed["rise"] < 0.05
