"""`llamakit convert` as people and their scripts run it, in every spelling that they have."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from llamakit.cli.compat_convert import rewrite_convert
from llamakit.errors import UsageError
from llamakit.formats.adapter import Adapter, write_adapter
from llamakit.formats.open import open_model
from llamakit.formats.vocabulary import vocabulary_only
from tests.formats.torch_models import meta_model, tiktoken_file
from tests.helpers import assert_error, called
from tests.tiny import cached_tiny_gguf, tiny_gguf

_LINE = re.compile(r"^\[ ?\d+/21\] Writing tensor \S+ +\| size [ \dx]+ \| type \S+ +\| T\+ +\d+$")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("given", "rewritten"),
    [
        ("hf -o m.gguf --outtype=q8_0", "hf -o m.gguf --outtype q8_0"),
        ("out/ --ctx 4096 --outtype q8_0 --vocab-type spm", "out/ --ctx 4096 --outtype q8_0 --vocab-type spm"),
        ("out.bin --meta-llama dir --version 1", "dir -o out.bin --version 1 --to llama2c"),
        ("out.bin --checkpoint ckpt.pt", "ckpt.pt -o out.bin --to llama2c"),
        ("out --hf dir --version -1 --dtype fp32", "dir -o out --to hf"),
        (
            "--llama2c-model m.bin --copy-vocab-from-model v.gguf --llama2c-output-model o.gguf",
            "m.bin --vocab v.gguf -o o.gguf --to gguf",
        ),
        ("--copy_vocab_from_model v --llama2c_model m.bin", "m.bin --vocab v -o ak_llama_model.bin --to gguf"),
        ("--remote user/repo --outfile x.gguf", "hf:user/repo --outfile x.gguf"),
    ],
)
def test_command_lines_of_other_converters(given: str, rewritten: str) -> None:
    assert rewrite_convert(given.split()) == rewritten.split()


def test_command_lines_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        rewrite_convert(["x", "--hf", "a", "--checkpoint", "b"])
    with pytest.raises(UsageError, match="requires an argument"):
        rewrite_convert(["x", "--outtype"])


def test_lines_and_verdict(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = called(capfd, "convert", cached_tiny_gguf(), "-o", tmp_path / "m.gguf", "--outtype", "f16")
    assert result.returncode == 0, result.stderr
    *lines, wrote, size, verified, worst, following = result.stdout.splitlines()
    assert len(lines) == 21 and all(_LINE.match(line) for line in lines)
    assert wrote == f"Wrote {tmp_path / 'm.gguf'}" and size.endswith("in all")
    assert verified.startswith("verified: 21 tensors (5 equal), vocabulary equal, max |dlogit| = ")
    assert worst.startswith("largest error: ") and following.startswith("next: llamakit generate -m ")


def test_json_is_one_object(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = called(capfd, "convert", cached_tiny_gguf(), "-o", tmp_path / "hf", "--json")
    report = json.loads(result.stdout)
    assert report["paths"] == [str(tmp_path / "hf")] and report["verify"]["passed"] is True
    assert json.loads(
        called(capfd, "convert", tmp_path / "hf", "-o", tmp_path / "m.gguf", "--dry-run", "--json").stdout
    )["types"]
    assert not (tmp_path / "m.gguf").exists()


def test_the_old_converter_writes_into_its_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    called(capfd, "convert", cached_tiny_gguf(), "-o", tmp_path / "out", "--no-verify")
    result = called(capfd, "convert", tmp_path / "out", "--ctx", "4096", "--outtype", "q8_0", "--vocab-type", "spm")
    assert result.returncode == 0, result.stderr
    with open_model(tmp_path / "out" / "ggml-model-q8_0.gguf") as file:
        assert file.metadata["llama.context_length"] == 4096 and file.metadata["general.file_type"] == 7


def test_llama2c_there_and_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = tiny_gguf(tmp_path / "source.gguf", n_ctx=64)
    assert called(capfd, "convert", "out.bin", "--hf", source, "--version", "0").returncode == 0
    assert {"out.bin", "tokenizer.bin"} <= {p.name for p in tmp_path.iterdir()}
    words = ("--llama2c-model", "out.bin", "--copy-vocab-from-model", source, "--llama2c-output-model", "back.gguf")
    assert called(capfd, "convert", *words).returncode == 0
    assert called(capfd, "verify", source, "back.gguf").returncode == 0


def test_vocabularies_and_splits_and_modelfiles(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = tiny_gguf(tmp_path / "m.gguf")
    assert called(capfd, "convert", "m.gguf", "-o", "hf").returncode == 0
    assert called(capfd, "convert", "hf/tokenizer.model", "-o", "tokenizer.bin").returncode == 0
    assert called(capfd, "convert", "hf/tokenizer.json", "-o", "v.gguf").returncode == 0
    assert (
        called(capfd, "tokenize", "-m", "v.gguf", "-p", "the king", "--ids").stdout
        == called(capfd, "tokenize", "-m", "m.gguf", "-p", "the king", "--ids").stdout
    )
    result = called(capfd, "convert", "m.gguf", "-o", "part.gguf", "--split-max-tensors", "8")
    assert "Wrote part-00003-of-00003.gguf" in result.stdout, result.stderr
    assert called(capfd, "convert", "part-00002-of-00003.gguf", "-o", "whole.gguf").returncode == 0
    assert (tmp_path / "whole.gguf").read_bytes() == source.read_bytes()
    result = called(capfd, "convert", "m.gguf", "-o", "Modelfile", "--parameter", "temperature=0.7")
    assert "ollama create m -f Modelfile" in result.stdout
    assert "PARAMETER temperature 0.7" in (tmp_path / "Modelfile").read_text()


def test_refusals_are_one_line_and_leave_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny = cached_tiny_gguf()
    assert_error(called(capfd, "convert", tiny), 2, "where should it go", "-o")
    assert_error(called(capfd, "convert", tmp_path / "no", "-o", tmp_path / "x.gguf"), 2, "cannot be opened")
    assert_error(called(capfd, "convert", tiny, "-o", tmp_path / "x.gguf", "--outtype", "q9"), 2, "unknown type")
    assert_error(called(capfd, "convert", tiny, "-o", tmp_path / "x.gguf", "--split-max-size", "9"), 2, "no size")
    assert_error(called(capfd, "convert", tiny, "-o", tmp_path / "x.gguf", "--vocab", tmp_path), 2, str(tmp_path))
    assert_error(called(capfd, "convert", tiny, "-o", tmp_path / "hf", "--vocab-only"), 2, "GGUF targets")
    other = cached_tiny_gguf(tokenizer="bpe")
    assert_error(called(capfd, "convert", tiny, "-o", tmp_path / "x.gguf", "--vocab", other), 2, "token embeddings")
    assert not list(tmp_path.iterdir())


def test_what_is_not_the_source_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    from llamakit.cli import run
    from llamakit.inference import verify as verify_module

    monkeypatch.setattr(verify_module, "compare_logits", lambda *_: (1.0, 0.5))
    code = run(["convert", str(cached_tiny_gguf()), "-o", str(tmp_path / "m.gguf")])
    assert code == 1 and not list(tmp_path.iterdir())
    assert "error: " in (error := capfd.readouterr().err) and "the weights look equal, but the logits differ" in error


def test_a_vocabulary_in_every_form(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever holds it alone becomes whatever can hold it, and what comes back is the same."""
    assert called(capfd, "convert", cached_tiny_gguf(), "-o", "v.gguf", "--vocab-only").returncode == 0
    tiktoken_file(tmp_path / "tokenizer.model")
    for source in ("v.gguf", "tokenizer.model"):
        folder = f"{source}-folder"
        assert called(capfd, "convert", source, "-o", folder).returncode == 0
        assert called(capfd, "convert", folder, "-o", "back.gguf").returncode == 0
        assert called(capfd, "convert", source, "--to", "gguf", "-o", "again").returncode == 0
        assert vocabulary_only("back.gguf")["tokenizer.ggml.tokens"][:] == vocabulary_only("again")["tokenizer.ggml.tokens"][:]  # fmt: skip
    assert called(capfd, "convert", "v.gguf", "-o", "v2.gguf").returncode == 0
    assert (tmp_path / "v2.gguf").read_bytes() == (tmp_path / "v.gguf").read_bytes()
    assert called(capfd, "convert", "v.gguf", "-o", "tokenizer.bin").returncode == 0
    assert "Llama 3.1" in called(capfd, "convert", "tokenizer.model", "-o", "t.gguf").stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("v.gguf -o x --dry-run", "--dry-run has no meaning for a vocabulary"),
        ("v.gguf -o x.gguf --ctx 5", "--ctx has no meaning for a vocabulary"),
        ("lora.gguf -o x --base m.gguf --outtype f16", "--outtype has no meaning for an adapter"),
        ("lora.gguf -o x.bin --base m.gguf", "llama2.c has no adapters"),
        ("lora.gguf -o lora.gguf --base m.gguf", "is the source itself"),
        ("v.gguf -o v.gguf", "is the source itself"),
        ("m.gguf -o x.gguf --base m.gguf", "--base has no meaning for a model"),
        ("m.gguf -o x.gguf --system Hi", "--system has no meaning for a model"),
        ("m.gguf -o Modelfile --ctx 5", "--ctx has no meaning for a Modelfile"),
        ("m.gguf -o x.gguf --version 2", "--version is for llama2.c"),
        ("m.gguf -o x.gguf --no-tensor-first-split", "--no-tensor-first-split needs"),
        ("m.gguf -o x.gguf --rope-freq-base inf", "--rope-freq-base is inf"),
        ("m.gguf -o x.gguf --ctx 4294967296", "--ctx is 4294967296"),
    ],
)
def test_no_option_is_taken_and_ignored(
    words: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(cached_tiny_gguf(), "m.gguf")
    called(capfd, "convert", "m.gguf", "-o", "v.gguf", "--vocab-only")
    with open_model("m.gguf") as base:
        pair = np.ones((2, 64), np.float32), np.ones((64, 2), np.float32)
        write_adapter("lora.gguf", Adapter(2.0, {"blk.0.attn_q.weight": pair}), base)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert_error(called(capfd, "convert", *words.split()), 2, message)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_nothing_that_the_result_is_made_of_is_overwritten(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny = cached_tiny_gguf()
    for words in (("-o", "p.gguf", "--split-max-tensors", "9"), ("-o", "hf"), ("-o", "v.gguf", "--vocab-only")):
        assert called(capfd, "convert", tiny, *words).returncode == 0
    shutil.copy(tiny, "m.gguf")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for line in (
        "p-00001-of-00003.gguf -o p-00002-of-00003.gguf",
        "p-00002-of-00003.gguf -o p.gguf --split-max-tensors 9",
        "hf -o hf/model.safetensors --to gguf",
        "hf/model.safetensors -o hf/config.json --to llama2c",
        "m.gguf -o v.gguf --vocab v.gguf",
    ):
        assert_error(called(capfd, "convert", *line.split()), 2, "is the source itself")
    assert_error(called(capfd, "convert", "m.gguf", "-o", "-"), 2, "standard output")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_names_of_targets(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny = cached_tiny_gguf()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    for name in ("M.GGUF", "link", "sp ace/mod\u00e8le \u6a21\u578b.gguf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        result = called(capfd, "convert", tiny, "-o", name)
        assert result.returncode == 0, result.stderr
        assert called(capfd, "verify", name, tiny).returncode == 0
    assert (tmp_path / "M.GGUF").is_file() and (tmp_path / "empty" / "config.json").is_file()
    assert (tmp_path / "link").is_symlink()
    bpe = called(capfd, "convert", cached_tiny_gguf(n_ctx=64, tokenizer="bpe", tied=True), "-o", "bpe.bin")
    assert bpe.stdout.splitlines()[-1] == "next: llamakit inspect bpe.bin"  # no vocabulary, nothing to generate with


def test_a_source_that_states_no_context_where_none_is_needed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    meta = meta_model(tmp_path / "meta")
    assert called(capfd, "tokenize", "-m", meta, "-p", "ab", "--ids").stdout.startswith("[")
    assert called(capfd, "convert", meta, "-o", "Modelfile").returncode == 0
    assert "FROM " in (text := (tmp_path / "Modelfile").read_text()) and "num_ctx" not in text
    assert called(capfd, "convert", meta, "-o", "v.gguf", "--vocab-only").returncode == 0
