"""Random Llama GGUFs of true shapes for the benchmarks: python benchmarks/models.py 1b-q8_0 --dir /tmp/models

The weights are blocks quantized from N(0, 0.02), the norms are 1, the vocabulary is a small SPM one padded to its full
size, so that `llamakit finetune` runs on the file as on a real one. Files are streamed: memory holds one slab of
packed weights, whatever the size of the model.
"""

from __future__ import annotations

import argparse
import shutil
import string
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import gguf
import numpy as np

from llamakit.formats.gguf import TensorData, write_gguf
from llamakit.ggml import BLOCK_SIZES, GGMLType

# Weights of the random slab that all matrices are cut from: quantized in a second, repeated at other offsets.
_SLAB_WEIGHTS = 1 << 22
_WORD_LETTERS = string.ascii_lowercase
_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Hyper-parameters of a Llama under GGUF's names."""

    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int
    n_ctx: int = 2048

    def matrices(self) -> dict[str, tuple[int, int]]:
        """The seven matrices of a block: name -> (n_out, n_in)."""
        kv = self.n_embd // self.n_head * self.n_head_kv
        return {
            "attn_q": (self.n_embd, self.n_embd),
            "attn_k": (kv, self.n_embd),
            "attn_v": (kv, self.n_embd),
            "attn_output": (self.n_embd, self.n_embd),
            "ffn_gate": (self.n_ff, self.n_embd),
            "ffn_up": (self.n_ff, self.n_embd),
            "ffn_down": (self.n_embd, self.n_ff),
        }

    @property
    def n_matmul(self) -> int:
        """Weights that take part in matrix products, the output matrix included."""
        return self.n_layer * sum(map(prod, self.matrices().values())) + self.n_vocab * self.n_embd


SHAPES = {
    "15m": Shape(n_embd=288, n_layer=6, n_head=6, n_head_kv=6, n_ff=768, n_vocab=32000, n_ctx=256),
    "1b": Shape(n_embd=2048, n_layer=22, n_head=32, n_head_kv=4, n_ff=5632, n_vocab=32000),
    "7b": Shape(n_embd=4096, n_layer=32, n_head=32, n_head_kv=32, n_ff=11008, n_vocab=32000),
    "tiny": Shape(n_embd=64, n_layer=2, n_head=4, n_head_kv=2, n_ff=128, n_vocab=400, n_ctx=256),
}


@cache
def _slab(type: GGMLType) -> np.ndarray:
    """Packed blocks of N(0, 0.02), (n_blocks, block_bytes) uint8."""
    weights = np.random.default_rng(0).standard_normal(_SLAB_WEIGHTS, dtype=np.float32) * np.float32(0.02)
    packed = gguf.quants.quantize(weights.reshape(-1, 1024), gguf.GGMLQuantizationType(int(type)))
    return packed.reshape(-1).view(np.uint8).reshape(-1, BLOCK_SIZES[type][1])


def _blocks(type: GGMLType, n_blocks: int, start: int) -> Iterator[np.ndarray]:
    """n_blocks blocks of the slab from block `start` on, around and around."""
    slab = _slab(type)
    start %= len(slab)
    while n_blocks > 0:
        part = slab[start : start + n_blocks]
        yield part
        n_blocks, start = n_blocks - len(part), 0


def _tensors(shape: Shape, type: GGMLType) -> Iterator[TensorData]:
    def matrix(name: str, size: tuple[int, int], number: int) -> TensorData:
        n_blocks = prod(size) // BLOCK_SIZES[type][0]
        # A stride that is prime to the slab's size, so that no two matrices begin alike.
        return TensorData(f"{name}.weight", size, type, partial(_blocks, type, n_blocks, 7919 * number))

    def norm(name: str) -> TensorData:
        return TensorData(f"{name}.weight", (shape.n_embd,), GGMLType.F32, np.ones(shape.n_embd, np.float32))

    yield matrix("token_embd", (shape.n_vocab, shape.n_embd), 0)
    for i in range(shape.n_layer):
        yield norm(f"blk.{i}.attn_norm")
        yield norm(f"blk.{i}.ffn_norm")
        for j, (name, size) in enumerate(shape.matrices().items(), start=1):
            yield matrix(f"blk.{i}.{name}", size, 7 * i + j)
    yield norm("output_norm")
    yield matrix("output", (shape.n_vocab, shape.n_embd), 7 * shape.n_layer + 1)


def _vocabulary(n_vocab: int) -> dict[str, Any]:
    """An SPM vocabulary: three specials, the bytes, printable ASCII, and made-up words up to n_vocab."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3] + [6] * 256
    tokens += ["\u2581", *map(chr, range(0x21, 0x7F))]
    tokens += [_word(i) for i in range(n_vocab - len(tokens))]
    assert len(tokens) == n_vocab == len(set(tokens)), "the vocabulary is smaller than its letters"
    kinds += [1] * (n_vocab - len(kinds))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": -np.arange(n_vocab, dtype=np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, dtype=np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": _CHAT_TEMPLATE,
    }


def _word(number: int) -> str:
    """The number-th word behind SPM's space; without its last letter it is an earlier word, so that merges reach it."""
    letters = ""
    number += 1
    while number:
        number, letter = divmod(number - 1, len(_WORD_LETTERS))
        letters += _WORD_LETTERS[letter]
    return f"\u2581{letters}"


def write_model(path: Path, shape: Shape, type: GGMLType) -> Path:
    """Write a random model with every matrix in `type`, one that `gguf.quants` can quantize to; returns the path."""
    metadata = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": path.stem,
        "llama.vocab_size": shape.n_vocab,
        "llama.context_length": shape.n_ctx,
        "llama.embedding_length": shape.n_embd,
        "llama.block_count": shape.n_layer,
        "llama.feed_forward_length": shape.n_ff,
        "llama.rope.dimension_count": shape.n_embd // shape.n_head,
        "llama.attention.head_count": shape.n_head,
        "llama.attention.head_count_kv": shape.n_head_kv,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "general.quantization_version": 2,
        **_vocabulary(shape.n_vocab),
    }
    write_gguf(path, metadata=metadata, tensors=_tensors(shape, type))
    return path


def make(name: str, directory: Path) -> Path:
    """The model `SHAPE-TYPE` (`1b-q8_0`, `7b-q4_0`, ...) in a directory, written unless it is there."""
    shape, _, type = name.partition("-")
    path = directory / f"{name}.gguf"
    if not path.exists():
        write_model(path, SHAPES[shape], GGMLType[type.upper()])
    return path


def make_text(path: Path, n_bytes: int = 60_000) -> Path:
    """A text of made-up words, the same each time."""
    rng = np.random.default_rng(1)
    words = [_word(int(i))[1:] for i in rng.integers(0, 20_000, n_bytes // 3)]
    lines = [" ".join(words[at : at + 12]) for at in range(0, len(words), 12)]
    path.write_text("\n".join(lines)[:n_bytes], encoding="utf-8")
    return path


@contextmanager
def workplace(directory: str | None, keep: bool) -> Iterator[Path]:
    """A directory for large files: a given one, whose new entries are deleted unless `keep`, or a temporary one."""
    path = Path(mkdtemp(prefix="llamakit-bench-") if directory is None else directory)
    path.mkdir(parents=True, exist_ok=True)
    before = set(path.iterdir())
    try:
        yield path
    finally:
        if directory is None and not keep:
            shutil.rmtree(path)
        for new in set(path.iterdir()) - before if directory is not None and not keep else ():
            shutil.rmtree(new) if new.is_dir() else new.unlink()


def add_place_options(parser: argparse.ArgumentParser) -> None:
    """--dir and --keep, which `workplace` takes."""
    parser.add_argument("--dir", help="where the models are written, and looked for (default: a temporary directory)")
    parser.add_argument("--keep", action="store_true", help="do not delete what was written")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random GGUF model of a true shape.")
    parser.add_argument("name", help=f"SHAPE-TYPE: one of {', '.join(SHAPES)}, and a type such as q8_0 or q4_0")
    parser.add_argument("--dir", default=".", help="where to (default: here)")
    arguments = parser.parse_args()
    directory = Path(arguments.dir)
    directory.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    path = make(arguments.name, directory)
    print(f"{path}: {path.stat().st_size / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
