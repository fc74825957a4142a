"""A llama2.c model with the vocabulary of a GGUF file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llamakit.errors import MismatchError, UsageError
from llamakit.formats.borrowed import with_vocabulary
from llamakit.formats.gguf_reader import GGUFFile
from llamakit.formats.gguf_writer import copied_tensor, typed_metadata, write_gguf
from llamakit.formats.llama2c import Llama2cFile
from tests.formats.files import llama2c_file

VOCABULARY = {
    "general.name": "another",
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [f"t{i}" for i in range(10)],
    "tokenizer.ggml.scores": np.zeros(10, np.float32),
    "tokenizer.chat_template": "{{ messages }}",
}


def test_the_keys_of_both(tmp_path: Path) -> None:
    """What convert-llama2c-to-ggml is for; the context is the file's, and a tied output stays tied."""
    with Llama2cFile(llama2c_file(tmp_path / "m.bin", tied=True)) as model:
        file = with_vocabulary(model, VOCABULARY)
        tensors = [copied_tensor(file, n) for n in file.tensors]
        write_gguf(tmp_path / "m.gguf", metadata=typed_metadata(file), tensors=tensors)
        with GGUFFile(tmp_path / "m.gguf") as gguf:
            assert list(gguf.metadata) == [*model.metadata, *(k for k in VOCABULARY if k.startswith("tokenizer."))]
            assert gguf.metadata["tokenizer.ggml.tokens"] == VOCABULARY["tokenizer.ggml.tokens"]
            assert "general.name" not in gguf.metadata and "output.weight" not in gguf.tensors
            assert (gguf.metadata["llama.context_length"], gguf.metadata["llama.rope.dimension_count"]) == (6, 4)
            for name in gguf.tensors:
                assert gguf.read(name, 0, 1).tobytes() == file.read(name, 0, 1).tobytes()


def test_its_own_vocabulary_gives_way(tmp_path: Path) -> None:
    with Llama2cFile(llama2c_file(tmp_path / "m.bin")) as model:
        first = with_vocabulary(model, VOCABULARY)
        second = with_vocabulary(first, {"tokenizer.ggml.tokens": ["x"] * 10})
        assert "tokenizer.chat_template" not in second.metadata and second.path == model.path


def test_closing_it_closes_the_model(tmp_path: Path) -> None:
    model = Llama2cFile(llama2c_file(tmp_path / "m.bin"))
    with with_vocabulary(model, VOCABULARY):
        pass
    with pytest.raises(ValueError, match="closed"):
        model.read("output_norm.weight")


def test_numbers_that_differ(tmp_path: Path) -> None:
    with Llama2cFile(llama2c_file(tmp_path / "m.bin")) as model:
        with pytest.raises(MismatchError, match=r"m\.bin: has 10 token embeddings, the vocabulary of v\.gguf 3 tokens"):
            with_vocabulary(model, {"tokenizer.ggml.tokens": ["a", "b", "c"]}, source="v.gguf")
        with pytest.raises(UsageError, match=r"v\.gguf: holds no vocabulary"):
            with_vocabulary(model, {"general.name": "x"}, source="v.gguf")


def test_a_file_without_tensors(tmp_path: Path) -> None:
    write_gguf(tmp_path / "v.gguf", metadata=VOCABULARY, tensors=[])
    with GGUFFile(tmp_path / "v.gguf") as file, pytest.raises(UsageError, match="holds no model"):
        with_vocabulary(file, VOCABULARY)
