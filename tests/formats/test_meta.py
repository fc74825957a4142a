"""Meta's checkpoints: shards put together bit for bit, and nothing guessed that params.json does not state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llamakit.errors import FormatError, LlamakitError, MismatchError, UnsupportedError, UsageError
from llamakit.formats.meta import MetaModel
from llamakit.formats.names import name_of_meta
from llamakit.formats.open import open_model, sniff
from llamakit.formats.sentencepiece_model import NORMAL, Piece, SentencePieceModel, write_sentencepiece_model
from tests.formats.torch_models import TIKTOKENS, meta_folder, meta_weights, split, tiktoken_file
from tests.formats.vocabulary_folders import pieces


def raw_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("n_shards", [1, 2, 4, 8])
@pytest.mark.parametrize("embedding_axis", [0, 1])
def test_shards_reassemble_bit_for_bit(tmp_path: Path, n_shards: int, embedding_axis: int) -> None:
    weights = meta_weights()
    folder = meta_folder(tmp_path / "m", split(weights, n_shards, embedding_axis=embedding_axis))
    with MetaModel(folder, n_ctx=64) as model:
        assert len(model.files) == n_shards
        assert list(model.tensors) == [name_of_meta(name) for name in weights]
        for theirs, tensor in weights.items():
            name = name_of_meta(theirs) or ""
            assert model.tensors[name].shape == tuple(tensor.shape)
            assert model.read(name).tobytes() == raw_of(tensor)
            n = model.tensors[name].n_rows
            for start, stop in [(0, n), (n // 3, n // 2 + 1), (n - 1, n), (n, n)]:
                rows = tensor.reshape(n, -1)[start:stop]
                got = model.read(name, start, stop)
                assert got.shape == (stop - start, model.tensors[name].row_bytes) and got.tobytes() == raw_of(rows)


def test_metadata(tmp_path: Path) -> None:
    folder = meta_folder(tmp_path / "tiny", split(meta_weights(n_kv=2), 2), n_kv_heads=2, rope_theta=1e6)
    with MetaModel(folder, n_ctx=64) as model:
        m = model.metadata
        assert m["general.name"] == "tiny" and m["general.file_type"] == 32
        assert m["llama.context_length"] == 64 and m["llama.vocab_size"] == 40
        assert m["llama.attention.head_count"] == 8 and m["llama.attention.head_count_kv"] == 2
        assert m["llama.feed_forward_length"] == 96 and m["llama.rope.freq_base"] == 1e6
        assert not any(key.startswith("tokenizer.") for key in m)
    stated = meta_folder(tmp_path / "stated", split(meta_weights(), 1), rope_theta=1e6, max_seq_len=77)
    with MetaModel(stated, n_ctx=64, rope_theta=5e5) as model:  # both are for what is not stated
        assert model.metadata["llama.rope.freq_base"] == 1e6 and model.metadata["llama.context_length"] == 77
    with MetaModel(folder, n_ctx=0) as model:
        assert "llama.context_length" not in model.metadata


def test_scaled_rope(tmp_path: Path) -> None:
    def freqs(**params: Any) -> np.ndarray:
        folder = meta_folder(tmp_path / "m", split(meta_weights(), 1), rope_theta=5e5, use_scaled_rope=True, **params)
        with MetaModel(folder, n_ctx=131072) as model:
            assert next(iter(model.tensors)) == "rope_freqs.weight"
            return model.read("rope_freqs.weight").view("<f4")[0]

    # llama-models, apply_scaling: wavelengths 2 pi 5e5^(i/4) = 6.28, 167, 4443, 118143 against 2048 and 8192
    scaled = freqs()
    assert scaled[0] == scaled[1] == 1 and scaled[3] == 8 and 1 < scaled[2] < 8
    smooth = (8192 / (2 * np.pi * 5e5**0.5) - 1) / 3
    assert scaled[2] == pytest.approx(1 / ((1 - smooth) / 8 + smooth), rel=1e-5)
    assert freqs(rope_scaling_factor=32.0)[3] == 32


def test_what_is_not_stated_is_asked_for(tmp_path: Path) -> None:
    folder = meta_folder(tmp_path / "m", split(meta_weights(), 1))
    with pytest.raises(UsageError, match="does not state the context") as caught:
        MetaModel(folder)
    assert "--ctx" in str(caught.value.hint)
    with MetaModel(folder, n_ctx=9) as model:
        assert model.metadata["llama.rope.freq_base"] == 10000.0
    code = meta_folder(tmp_path / "code", split(meta_weights(32016), 1))
    with pytest.raises(UsageError, match="does not state rope_theta") as caught:
        MetaModel(code, n_ctx=16384)
    assert "--rope-freq-base" in str(caught.value.hint)
    with open_model(code / "consolidated.00.pth", n_ctx=16384, rope_theta=1e6) as model:
        assert model.metadata["llama.rope.freq_base"] == 1e6


def test_opened_by_content(tmp_path: Path) -> None:
    folder = meta_folder(tmp_path / "m", split(meta_weights(), 2), max_seq_len=77)
    assert sniff(folder) == "meta" and sniff(folder / "consolidated.01.pth") == "zip"
    for path in (folder, folder / "consolidated.01.pth"):
        with open_model(path) as model:
            assert isinstance(model, MetaModel) and model.metadata["llama.context_length"] == 77
    (folder / "params.json").unlink()
    with pytest.raises(UnsupportedError, match=r"no checkpoint of llama2\.c") as caught:
        open_model(folder / "consolidated.00.pth")
    assert "params.json" in str(caught.value.hint)


def test_vocabularies(tmp_path: Path) -> None:
    spm = pieces()
    folder = meta_folder(tmp_path / "above" / "m", split(meta_weights(len(spm)), 2))
    write_sentencepiece_model(tmp_path / "above" / "tokenizer.model", SentencePieceModel(spm))
    with MetaModel(folder, n_ctx=9) as model:
        assert model.metadata["tokenizer.ggml.model"] == "llama"
        assert len(model.metadata["tokenizer.ggml.tokens"]) == len(spm)
    write_sentencepiece_model(folder / "tokenizer.model", SentencePieceModel([*spm, Piece("more", 0.0, NORMAL)]))
    with pytest.raises(MismatchError, match=f"has {len(spm) + 1} tokens"):
        MetaModel(folder, n_ctx=9)
    n_vocab = len(TIKTOKENS) + 256
    folder = meta_folder(tmp_path / "three", split(meta_weights(n_vocab), 2, embedding_axis=0), rope_theta=5e5)
    tiktoken_file(folder / "tokenizer.model")
    with MetaModel(folder, n_ctx=9) as model:
        assert model.metadata["tokenizer.ggml.pre"] == "llama-bpe"
        assert len(model.metadata["tokenizer.ggml.tokens"]) == n_vocab
    tiktoken_file(folder / "tokenizer.model", TIKTOKENS[:-1])
    with pytest.raises(MismatchError, match="special ones"):
        MetaModel(folder, n_ctx=9)


def _without(name: str) -> Any:
    return lambda shards: shards[1].pop(name)


def _replaced(name: str, make: Any) -> Any:
    return lambda shards: shards[1].update({name: make(shards[1][name])})


BROKEN: dict[str, tuple[Any, dict[str, Any], type[LlamakitError], str]] = {
    "a tensor missing in one": (_without("norm.weight"), {}, FormatError, "not in every shard"),
    "norms that differ": (_replaced("norm.weight", lambda t: t + 1), {}, FormatError, "not the same in every"),
    "a part of another width": (_replaced("output.weight", lambda t: t[:, 1:]), {}, FormatError, "does not join"),
    "a part of another height": (_replaced("output.weight", lambda t: t[1:]), {}, FormatError, "output.weight has shap"),
    "another type": (_replaced("output.weight", lambda t: t.half()), {}, UnsupportedError, "is F16"),
    "whole numbers": (_replaced("output.weight", lambda t: t.int()), {}, UnsupportedError, "is I32"),
    "another name": (lambda s: [x.update({"x.weight": torch.ones(2)}) for x in s], {}, FormatError, "no place"),
    "a layer missing": (lambda s: None, {"n_layers": 3}, FormatError, r"blk\.2\.attn_norm\.weight is missing"),
    "no epsilon": (lambda s: None, {"norm_eps": None}, FormatError, "norm_eps is missing"),
    "no dim": (lambda s: None, {"dim": None}, FormatError, "dim is missing"),
    "another dim": (lambda s: None, {"dim": 32}, FormatError, "has shape"),
    "heads that do not fit": (lambda s: None, {"n_kv_heads": 3}, FormatError, "do not fit"),
    "experts": (lambda s: None, {"moe": {"n": 8}}, UnsupportedError, "moe"),
    "another vocabulary": (lambda s: None, {"vocab_size": 41}, FormatError, "has shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_refused(tmp_path: Path, name: str) -> None:
    change, params, error, reason = BROKEN[name]
    shards = split(meta_weights(), 2)
    change(shards)
    with pytest.raises(error, match=reason):
        MetaModel(meta_folder(tmp_path / "m", shards, **params), n_ctx=9)


def test_shards_that_are_missing(tmp_path: Path) -> None:
    folder = meta_folder(tmp_path / "m", split(meta_weights(), 2))
    (folder / "consolidated.00.pth").rename(tmp_path / "x.pth")
    with pytest.raises(FormatError, match=r"no consolidated\.00\.pth"):
        MetaModel(folder, n_ctx=9)
    (folder / "consolidated.00.pth").symlink_to(tmp_path / "x.pth")
    with pytest.raises(FormatError, match="leaves the folder"):
        MetaModel(folder, n_ctx=9)
    with pytest.raises(FormatError, match="has no weights"):
        MetaModel(tmp_path, n_ctx=9)
    with pytest.raises(UsageError, match="is no folder"):
        MetaModel(tmp_path / "y", n_ctx=9)
