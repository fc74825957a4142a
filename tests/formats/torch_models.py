"""Tiny checkpoints as Meta's and llama2.c's training write them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch

from llamakit.formats.sentencepiece_model import SentencePieceModel, write_sentencepiece_model
from tests.formats.vocabulary_folders import pieces

DIM, N_HEAD, N_KV, N_FF, N_LAYER = 64, 8, 8, 96, 2


def meta_weights(n_vocab: int = 40, dtype: torch.dtype = torch.bfloat16, n_kv: int = N_KV) -> dict[str, torch.Tensor]:
    """Meta's name -> random weights."""
    random, kv = torch.Generator().manual_seed(0), DIM // N_HEAD * n_kv
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (n_vocab, DIM), "norm.weight": (DIM,)}
    parts = {
        "attention.wq": (DIM, DIM), "attention.wk": (kv, DIM), "attention.wv": (kv, DIM), "attention.wo": (DIM, DIM),
        "feed_forward.w1": (N_FF, DIM), "feed_forward.w2": (DIM, N_FF), "feed_forward.w3": (N_FF, DIM),
        "attention_norm": (DIM,), "ffn_norm": (DIM,),
    }  # fmt: skip
    for i in range(N_LAYER):
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in parts.items()}
    shapes["output.weight"] = (n_vocab, DIM)
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}


def split(weights: dict[str, torch.Tensor], n_shards: int, *, embedding_axis: int = 1) -> list[dict[str, torch.Tensor]]:
    """The shards of model parallelism, as fairscale's layers cut them."""
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(n_shards)]
    for name, tensor in weights.items():
        axis = 1 if ".wo." in name or ".w2." in name else embedding_axis if "tok_emb" in name else 0
        parts = [tensor] * n_shards if tensor.dim() == 1 else torch.chunk(tensor, n_shards, axis)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.clone()
    return shards


def meta_folder(directory: Path, shards: list[dict[str, torch.Tensor]], **params: Any) -> Path:
    """params.json and the shards; a parameter that is None is left out."""
    directory.mkdir(parents=True, exist_ok=True)
    usual = {"dim": DIM, "n_layers": N_LAYER, "n_heads": N_HEAD, "vocab_size": -1, "norm_eps": 1e-5, "multiple_of": 32}
    stated = {name: value for name, value in {**usual, **params}.items() if value is not None}
    (directory / "params.json").write_text(json.dumps(stated))
    for i, shard in enumerate(shards):
        torch.save(shard, directory / f"consolidated.{i:02d}.pth")
    return directory


def meta_model(directory: Path, *, n_shards: int = 2, **params: Any) -> Path:
    """A checkpoint of Meta's with a SentencePiece vocabulary; like the real ones it states no context."""
    folder = meta_folder(directory, split(meta_weights(len(pieces())), n_shards), **params)
    write_sentencepiece_model(folder / "tokenizer.model", SentencePieceModel(pieces()))
    return folder


TIKTOKENS = [*(bytes([b]) for b in range(256)), b"th", b" t", b"he", b" the", b"the", "é".encode()]


def tiktoken_file(path: Path, tokens: list[bytes] = TIKTOKENS) -> Path:
    """tiktoken's lines."""
    path.write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)))
    return path


def llama2c_checkpoint(path: Path, *, prefix: str = "", **changes: Any) -> Path:
    """What train.py saves; the output is the embedding itself."""
    weights = meta_weights(dtype=torch.float32, n_kv=4)
    weights["output.weight"] = weights["tok_embeddings.weight"]
    args = {"dim": DIM, "n_layers": N_LAYER, "n_heads": N_HEAD, "n_kv_heads": 4, "vocab_size": 40, "multiple_of": 32,
            "max_seq_len": 24, "dropout": 0.0}  # fmt: skip
    saved = {
        "model": {prefix + name: tensor for name, tensor in weights.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.zeros(3, 2)}}, "param_groups": []},
        "model_args": args, "iter_num": 5, "best_val_loss": torch.tensor(1.5), "config": {"device": "cuda"},
    }  # fmt: skip
    torch.save(saved | changes, path)
    return path
