"""llama2.c's ckpt.pt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llamakit.errors import FormatError, UnsupportedError
from llamakit.formats.llama2c_checkpoint import Llama2cCheckpoint
from llamakit.formats.names import name_of_meta
from llamakit.formats.open import open_model
from tests.formats.torch_models import llama2c_checkpoint, meta_weights


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_checkpoint(tmp_path: Path, prefix: str) -> None:
    path = llama2c_checkpoint(tmp_path / "ckpt.pt", prefix=prefix)
    with open_model(path) as model:
        assert isinstance(model, Llama2cCheckpoint) and model.iteration == 5
        m = model.metadata
        assert (m["llama.context_length"], m["llama.embedding_length"], m["llama.feed_forward_length"]) == (24, 64, 96)
        assert m["llama.rope.freq_base"] == 10000.0 and m["llama.attention.layer_norm_rms_epsilon"] == 1e-5
        assert m["llama.attention.head_count_kv"] == 4 and m["llama.vocab_size"] == 40 and m["general.file_type"] == 0
        weights = meta_weights(dtype=torch.float32, n_kv=4)
        assert "output.weight" not in model.tensors and len(model.tensors) == len(weights) - 1
        for theirs, tensor in weights.items():
            if theirs != "output.weight":
                name = name_of_meta(theirs) or ""
                assert model.read(name).tobytes() == tensor.numpy().tobytes()
                assert model.read(name, 0, 1).shape == (1, model.tensors[name].row_bytes)
        with pytest.raises(KeyError):
            model.read("output.weight")


def test_an_output_of_its_own_and_frequencies(tmp_path: Path) -> None:
    weights = meta_weights(dtype=torch.float32, n_kv=4) | {"freqs_cos": torch.zeros(24, 4)}
    with Llama2cCheckpoint(llama2c_checkpoint(tmp_path / "ckpt.pt", model=weights)) as model:
        assert model.read("output.weight").tobytes() == weights["output.weight"].numpy().tobytes()
        assert len(model.tensors) == len(weights) - 1


def test_what_is_none(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2, 2)}, tmp_path / "x.pt")
    with pytest.raises(UnsupportedError, match=r"no checkpoint of llama2\.c"):
        open_model(tmp_path / "x.pt")
    torch.save([torch.ones(2, 2)], tmp_path / "x.pt")
    with pytest.raises(UnsupportedError, match=r"no checkpoint of llama2\.c"):
        open_model(tmp_path / "x.pt")
    path, weights = tmp_path / "ckpt.pt", meta_weights(dtype=torch.float32, n_kv=4)
    with pytest.raises(FormatError, match="model_args is no dict"):
        open_model(llama2c_checkpoint(path, model_args=3))
    with pytest.raises(FormatError, match="n_heads is missing"):
        open_model(llama2c_checkpoint(path, model_args={"dim": 64}))
    with pytest.raises(FormatError, match="no place"):
        open_model(llama2c_checkpoint(path, model=weights | {"x.weight": torch.ones(2)}))
    weights.pop("norm.weight")
    with pytest.raises(FormatError, match=r"output_norm\.weight is missing"):
        open_model(llama2c_checkpoint(path, model=weights))
