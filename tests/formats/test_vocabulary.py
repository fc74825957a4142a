from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from llamakit.errors import FormatError, MismatchError, UnsupportedError, UsageError
from llamakit.formats.gguf import write_gguf
from llamakit.formats.huggingface_vocab import write_vocabulary
from llamakit.formats.llama2c_vocab import write_llama2c_vocabulary
from llamakit.formats.vocabulary import vocabulary_only
from tests.formats.torch_models import TIKTOKENS, tiktoken_file
from tests.tokenizer.vocabularies import bpe_metadata, spm_metadata
from tests.tokenizer.vocabularies import write_vocabulary as write_gguf_vocabulary

PIECES = [("\u2581", -1.0), ("a", -2.0), ("\u2581a", -3.5)]
STATED = {f"tokenizer.ggml.{k}_token_id": i for i, k in enumerate(("unknown", "bos", "eos"))}


def tokens(metadata) -> list[str]:
    return list(metadata["tokenizer.ggml.tokens"])


def test_every_source_gives_the_same(tmp_path: Path) -> None:
    metadata = spm_metadata(PIECES) | STATED
    folder = tmp_path / "folder"
    folder.mkdir()
    write_vocabulary(folder, metadata)
    shutil.copy(folder / "tokenizer.model", tmp_path / "other name")
    write_llama2c_vocabulary(tmp_path / "tokenizer.bin", metadata)
    gguf = write_gguf_vocabulary(tmp_path / "v.gguf", metadata | {"general.architecture": "bert"})
    sources = [gguf, folder, folder / "tokenizer.model", tmp_path / "other name", tmp_path / "tokenizer.bin"]
    for source in sources:
        found = vocabulary_only(source, 262)
        assert tokens(found) == tokens(metadata)
        for key in ("scores", "token_type"):
            assert np.array_equal(found[f"tokenizer.ggml.{key}"], metadata[f"tokenizer.ggml.{key}"]), source
        assert STATED.items() <= found.items() and all(key.startswith("tokenizer.") for key in found)


def test_tokenizer_json_with_what_stands_beside_it(tmp_path: Path) -> None:
    write_vocabulary(tmp_path, spm_metadata(PIECES) | STATED)
    found = vocabulary_only(tmp_path / "tokenizer.json")
    assert tokens(found) == tokens(spm_metadata(PIECES)) and STATED.items() <= found.items()
    (tmp_path / "tokenizer.model").unlink()
    assert tokens(vocabulary_only(tmp_path, 264))[-2:] == ["[PAD262]", "[PAD263]"]
    bpe = tmp_path / "bpe"
    bpe.mkdir()
    write_vocabulary(bpe, bpe_metadata(["a b"], pre="qwen2"))
    assert vocabulary_only(bpe / "tokenizer.json")["tokenizer.ggml.pre"] == "qwen2"
    assert vocabulary_only(bpe / "tokenizer.json", pre="olmo")["tokenizer.ggml.pre"] == "olmo"


def test_refusals(tmp_path: Path) -> None:
    empty, text = tmp_path / "empty", tmp_path / "a.txt"
    empty.mkdir()
    text.write_text("hello")
    with pytest.raises(UsageError, match=r"no tokenizer.model and no tokenizer.json$"):
        vocabulary_only(empty)
    (empty / "tekken.json").write_text("{}")
    with pytest.raises(UsageError, match=r"there is a tekken.json"):
        vocabulary_only(empty)
    with pytest.raises(UnsupportedError, match=r"is no vocabulary that llamakit knows .text"):
        vocabulary_only(text)
    with pytest.raises(UsageError, match="cannot be opened"):
        vocabulary_only(tmp_path / "nonesuch")
    write_gguf(tmp_path / "m.gguf", metadata={"general.architecture": "llama"}, tensors=[])
    with pytest.raises(FormatError, match="holds no vocabulary"):
        vocabulary_only(tmp_path / "m.gguf")
    write_llama2c_vocabulary(tmp_path / "t.bin", spm_metadata(PIECES))
    with pytest.raises(UsageError, match="does not say how many"):
        vocabulary_only(tmp_path / "t.bin")


def test_tiktokens_list_is_llama_3s(tmp_path: Path) -> None:
    path = tiktoken_file(tmp_path / "tokenizer.model")
    found = vocabulary_only(path)
    assert len(tokens(found)) == len(TIKTOKENS) + 256 and "<|eom_id|>" in tokens(found)
    assert tokens(vocabulary_only(path, len(TIKTOKENS) + 256)) == tokens(found)
    with pytest.raises(MismatchError, match="special ones"):
        vocabulary_only(path, 300)
    write_vocabulary(tmp_path, bpe_metadata(["a b"], pre="qwen2"))  # the folder's tokenizer.json says more
    assert vocabulary_only(tmp_path)["tokenizer.ggml.pre"] == "qwen2"
