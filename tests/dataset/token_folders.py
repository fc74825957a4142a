"""Small folders of tokens, ours and llama2.c's, and llama2.c's way of reading them, written from its description."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llamakit.dataset.tokens_writer import TokenSpool, WrittenShard
from llamakit.files import atomic_directory
from llamakit.formats.vocabulary import vocabulary_only
from tests.tiny import cached_tiny_gguf

BOS = 1


def documents(count: int, seed: int = 0, n_vocab: int = 300) -> list[np.ndarray]:
    """Random documents of 1 to 60 tokens, none of which is BOS."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, n_vocab, rng.integers(1, 60)) for _ in range(count)]


def tiny_vocabulary() -> dict[str, Any]:
    """The vocabulary of a tiny model."""
    return vocabulary_only(cached_tiny_gguf())


def write_folder(path: Path, texts: list[np.ndarray], **options: Any) -> list[WrittenShard]:
    """Write a folder of ours; options as for `TokenSpool.finish`, and dtype."""
    options = {"val_split": 0.1, "seed": 1, **options}
    with atomic_directory(path) as folder:
        spool = TokenSpool(folder, options.pop("dtype", "uint16"), BOS)
        for text in texts:
            spool.begin()
            spool.add(text, 2 * len(text))
        return list(spool.finish(folder, tiny_vocabulary(), **options))


def llama2c_windows(folder: Path, split: str, max_seq_len: int) -> list[np.ndarray]:
    """Every window that llama2.c's train.py draws from, in the order of the files: max_seq_len + 1 tokens each."""
    names = sorted(str(path) for path in folder.glob("*.bin"))
    windows = []
    for name in names[1:] if split == "train" else names[:1]:
        m = np.memmap(name, dtype=np.uint16, mode="r")
        for ix in range(len(m) // max_seq_len - 1):
            start = ix * max_seq_len
            windows.append(m[start : start + max_seq_len + 1].astype(np.int64))
    return windows
