"""llama2.c's `.bin` models (export versions 0, 1 and 2), seen as GGUF.

All three hold the seven integers of a `Config`, then every weight stacked over the layers in a fixed order:
float32 in versions 0 and 1, groups of int8 with float32 scales (read back as float32) in version 2. Rows of q
and k are already in GGUF's order. No version names the base of the rotary embedding, run.c takes 10000; but
version 0 stores its tables, and they tell it. Layouts: llama2.c export.py, run.c, runq.c at 350e04f.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from llamakit.errors import FormatError
from llamakit.formats.base import TensorInfo
from llamakit.formats.source import FileSource
from llamakit.ggml import GGMLType

MAGIC = struct.pack("<I", 0x616B3432)  # "ak42", versions 1 and 2
HEADER_BYTES = 256  # of versions 1 and 2
#: run.c fixes both
RMS_EPS, ROPE_FREQ_BASE = 1e-5, 10000.0
# An angle, its sine and its cosine have each been rounded to float32, by functions that may be an ulp off.
_TABLE_PRECISION, _SMALLEST_SINE = 2.0**-22, 1e-12
# Generous, and yet such that no product of them is a surprise.
_MAX_DIM, _MAX_LAYERS, _MAX_VOCAB, _MAX_CTX = 1 << 17, 1 << 10, 1 << 22, 1 << 24


@dataclass(frozen=True)
class Config:
    """The header: version, the seven integers, whether token_embd is the output too, int8 group (0:
    float32)."""

    version: int
    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_vocab: int
    n_ctx: int
    tied: bool
    group: int = 0

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.n_embd // self.n_head

    def fault(self) -> str | None:
        """What cannot be about these numbers, or None."""
        limits = {
            "dim": (self.n_embd, _MAX_DIM), "hidden_dim": (self.n_ff, 8 * _MAX_DIM),
            "n_layers": (self.n_layer, _MAX_LAYERS), "n_heads": (self.n_head, self.n_embd),
            "n_kv_heads": (self.n_head_kv, self.n_head), "vocab_size": (self.n_vocab, _MAX_VOCAB),
            "max_seq_len": (self.n_ctx, _MAX_CTX),
        }  # fmt: skip
        for name, (value, limit) in limits.items():
            if not 1 <= value <= limit:
                return f"{name} cannot be {value} (expected 1 to {limit})"
        if self.n_embd % self.n_head or self.head_dim % 2:
            return f"dim {self.n_embd} does not divide into {self.n_head} heads of even size"
        if self.n_head % self.n_head_kv:
            return f"n_heads {self.n_head} is no multiple of n_kv_heads {self.n_head_kv}"
        if self.version == 2 and (self.group < 1 or self.n_embd % self.group):
            return f"group size {self.group} does not divide dim {self.n_embd}"
        return None


def parse_header(head: bytes) -> tuple[Config, str | None] | None:
    """The header in the first 256 bytes (28 for version 0), and its fault; None when it is no such file."""
    if head[:4] == MAGIC:
        if len(head) < HEADER_BYTES:
            return None
        version, *numbers, tied, group = struct.unpack_from("<i7iBi", head, 4)
        config = Config(version, *numbers, tied=tied != 0, group=group if version == 2 else 0)
        return config, None if version in (1, 2) else f"unknown version {version} (expected 1 or 2)"
    if len(head) < 28:
        return None
    numbers = list(struct.unpack_from("<7i", head))
    tied, numbers[5] = numbers[5] > 0, abs(numbers[5])
    config = Config(0, *numbers, tied=tied)
    # Without a magic number, only sensible numbers make it a llama2.c file.
    return None if config.fault() else (config, None)


#: (GGUF name, stacked over layers?)
_LAYERED = {
    "attn_norm": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "ffn_norm": "ffn_norm", "w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up",
}  # fmt: skip
_MATRICES = ("q", "k", "v", "o", "w1", "w2", "w3")
_ORDER: dict[int, tuple[str, ...]] = {
    0: ("embd", "attn_norm", "q", "k", "v", "o", "ffn_norm", "w1", "w2", "w3", "norm", "freqs", "output"),
    1: ("attn_norm", "ffn_norm", "norm", "embd", *_MATRICES, "output"),
    2: ("attn_norm", "ffn_norm", "norm", "embd", *_MATRICES, "output"),
}


def _shape(c: Config, part: str) -> tuple[int, ...]:
    """Rows first; of one layer, where the part is stacked."""
    n_kv = c.n_head_kv * c.head_dim
    return {
        "embd": (c.n_vocab, c.n_embd), "output": (c.n_vocab, c.n_embd),
        "attn_norm": (c.n_embd,), "ffn_norm": (c.n_embd,), "norm": (c.n_embd,),
        "q": (c.n_embd, c.n_embd), "k": (n_kv, c.n_embd), "v": (n_kv, c.n_embd), "o": (c.n_embd, c.n_embd),
        "w1": (c.n_ff, c.n_embd), "w2": (c.n_embd, c.n_ff), "w3": (c.n_ff, c.n_embd),
        "freqs": (c.n_ctx, c.head_dim),  # run.c skips them
    }[part]  # fmt: skip


def walk(c: Config) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(GGUF name, shape, number of bytes) of everything after the header, in the order of the file.

    The tables of version 0 have the name "": cos, then sin, each (n_ctx, head_dim/2) float32.
    """
    top = {"embd": "token_embd.weight", "norm": "output_norm.weight", "output": "output.weight", "freqs": ""}
    for part in _ORDER[c.version]:
        if part == "output" and c.tied:
            continue
        shape = _shape(c, part)
        quantized = c.group and len(shape) == 2
        n = prod(shape)
        n_bytes = n + 4 * (n // c.group) if quantized else 4 * n
        if part in top:
            yield top[part], shape, n_bytes
        else:
            for layer in range(c.n_layer):
                yield f"blk.{layer}.{_LAYERED[part]}.weight", shape, n_bytes


class Llama2cFile:
    """A llama2.c model as a `ModelFile`: GGUF's names and keys, every tensor F32.

    Its vocabulary is in another file (tokenizer.bin), so metadata has no tokenizer keys.
    Raises UsageError when the path is no readable regular file, FormatError for an impossible header or a
    size that is off by as little as one byte.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._source = FileSource(path)
        self.path: Path = self._source.path
        try:
            head = self._source.read(0, min(HEADER_BYTES, self._source.size)).tobytes()
            self._config = self._checked(head)
            self._tensors = MappingProxyType(self._place())
            self._metadata = MappingProxyType(config_metadata(self._config, self._rope_base()))
        except BaseException:
            self._source.close()
            raise

    def _checked(self, head: bytes) -> Config:
        parsed = parse_header(head)
        if parsed is None:
            raise FormatError("is no llama2.c model: no sensible header at its start", path=self.path, offset=0)
        config, fault = parsed
        fault = fault or config.fault()
        if fault:
            raise FormatError(f"broken llama2.c header: {fault}", path=self.path, offset=0)
        return config

    def _place(self) -> dict[str, TensorInfo]:
        config = self._config
        tensors: dict[str, TensorInfo] = {}
        offset = HEADER_BYTES if config.version else 28
        for name, shape, n_bytes in walk(config):
            if name:
                tensors[name] = TensorInfo(name, shape, GGMLType.F32, offset)
            else:
                self._tables_offset = offset
            offset += n_bytes
        if offset != self._source.size:
            raise FormatError(
                f"llama2.c model (version {config.version}) of the wrong size "
                f"(expected {offset} bytes, got {self._source.size})",
                path=self.path,
                hint="the file was cut off, or is no llama2.c model at all",
            )
        return tensors

    def _rope_base(self) -> float:
        """The base of the rotary embedding, from the tables of version 0; run.c's where they tell none."""
        c, half = self._config, self._config.head_dim // 2
        if c.version or c.n_ctx < 2:  # at position 0 every angle is 0
            return ROPE_FREQ_BASE
        cos, sin = (
            self._source.read(self._tables_offset + 4 * half * row, 4 * half).view("<f4") for row in (1, c.n_ctx + 1)
        )
        return rope_base_of(cos, sin) or ROPE_FREQ_BASE

    @property
    def metadata(self) -> Mapping[str, Any]:
        """GGUF's keys, made from the header and from what llama2.c's run.c fixes."""
        return self._metadata

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """In the order of the file."""
        return self._tensors

    @property
    def version(self) -> int:
        """Export version: 0, 1 or 2."""
        return self._config.version

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) as a fresh uint8 array (rows, row_bytes) of float32 values.

        Raises KeyError for an unknown name, ValueError for rows that are not there, FormatError when the file
        is shorter than it was when opened.
        """
        info = self._tensors[name]
        start, stop = info.row_range(start, stop)
        if self._config.group and len(info.shape) == 2:
            return self._dequantized(info, start, stop)
        data = self._source.read(info.offset + start * info.row_bytes, (stop - start) * info.row_bytes)
        return data.reshape(stop - start, info.row_bytes)

    def _dequantized(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        """int8 * scale of its group; groups run over the flat tensor and may cross rows."""
        group, n = self._config.group, info.shape[-1]
        first, last = start * n, stop * n
        codes = self._source.read(info.offset + first, last - first).view(np.int8)
        group0, group1 = first // group, -(-last // group)
        scales = self._source.read(info.offset + info.n_elements + 4 * group0, 4 * (group1 - group0)).view("<f4")
        each = np.repeat(scales, group)[first - group0 * group :][: last - first]
        return (codes.astype(np.float32) * each).view(np.uint8).reshape(stop - start, info.row_bytes)

    def close(self) -> None:
        """Close the file; `read` fails afterwards."""
        self._source.close()

    def __enter__(self) -> Llama2cFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def rope_base_of(cos: np.ndarray, sin: np.ndarray) -> float | None:
    """The base of a rotary embedding from its tables' row for position 1, two arrays (head_dim/2,) float32.

    The i-th angle is base^(-2i/head_dim). Of all the bases that give this row within its precision, the one with the
    fewest digits: 500000 rather than 500000.03. None where the row is no such row, or has one angle only.
    """
    half = len(cos)
    cos, sin = cos.astype(np.float64), sin.astype(np.float64)
    exponents = (np.arange(half, dtype=np.float32) / np.float32(half)).astype(np.float64)  # rounded, as export.py's
    if half < 2 or not (_SMALLEST_SINE < sin[-1] < 1 and 0 < cos[-1] <= 1):
        return None
    measured = float(np.arctan2(sin[-1], cos[-1]) ** (-1 / exponents[-1]))
    for digits in range(1, 10):
        base = float(f"{measured:.{digits - 1}e}")
        angles = base**-exponents
        errors = np.maximum(np.abs(np.sin(angles) - sin) / np.sin(angles), np.abs(np.cos(angles) - cos))
        if errors.max() <= _TABLE_PRECISION:
            return base
    return None


def config_metadata(c: Config, rope_freq_base: float) -> dict[str, Any]:
    """GGUF's keys of a llama2.c model, in their order; its vocabulary is elsewhere."""
    return {
        "general.architecture": "llama",
        "general.type": "model",
        "llama.block_count": c.n_layer,
        "llama.context_length": c.n_ctx,
        "llama.embedding_length": c.n_embd,
        "llama.feed_forward_length": c.n_ff,
        "llama.attention.head_count": c.n_head,
        "llama.attention.head_count_kv": c.n_head_kv,
        "llama.rope.freq_base": rope_freq_base,
        "llama.rope.dimension_count": c.head_dim,
        "llama.attention.layer_norm_rms_epsilon": RMS_EPS,
        "llama.vocab_size": c.n_vocab,
        "general.file_type": 0,
    }
