"""A GGUF file in parts that may lie: what the handcrafted cases and the mutants are made of."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from llamakit.formats.gguf import GGUFValueType as V


def text(raw: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", (len(raw) if length is None else length) & (2**64 - 1)) + raw


def array(kind: int, payload: bytes, n: int) -> bytes:
    return struct.pack("<IQ", kind, n & (2**64 - 1)) + payload


@dataclass
class KV:
    key: bytes
    type: int
    payload: bytes
    key_length: int | None = None

    def pack(self) -> bytes:
        return text(self.key, self.key_length) + struct.pack("<I", self.type) + self.payload


@dataclass
class Tensor:
    name: bytes
    dims: list[int]
    type: int = 0
    offset: int = 0
    n_dims: int | None = None
    name_length: int | None = None

    def pack(self) -> bytes:
        n = len(self.dims) if self.n_dims is None else self.n_dims
        dims = b"".join(struct.pack("<Q", d & (2**64 - 1)) for d in self.dims)
        tail = struct.pack("<IQ", self.type & (2**32 - 1), self.offset & (2**64 - 1))
        return text(self.name, self.name_length) + struct.pack("<I", n) + dims + tail


@dataclass
class Raw:
    kvs: list[KV] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_kv: int | None = None
    alignment: int = 32
    cut: int | None = None

    def pack(self) -> bytes:
        counts = (
            len(self.tensors) if self.n_tensors is None else self.n_tensors,
            len(self.kvs) if self.n_kv is None else self.n_kv,
        )
        head = self.magic + struct.pack("<IQQ", self.version, *(n & (2**64 - 1) for n in counts))
        head += b"".join(kv.pack() for kv in self.kvs) + b"".join(t.pack() for t in self.tensors)
        return (head + bytes(-len(head) % self.alignment) + self.data)[: self.cut]


def u32(key: bytes, value: int) -> KV:
    return KV(key, V.UINT32, struct.pack("<I", value))


def string(key: bytes, value: bytes) -> KV:
    return KV(key, V.STRING, text(value))


def sound() -> Raw:
    """A small file with every kind of value and three tensors of three types."""
    tokens = [b"<unk>", b"a", "\u2581b".encode(), b"\xff"]
    return Raw(
        kvs=[
            string(b"general.architecture", b"llama"),
            u32(b"general.alignment", 32),
            u32(b"llama.block_count", 1),
            KV(b"llama.rope.freq_base", V.FLOAT32, struct.pack("<f", 10000.0)),
            KV(b"flag", V.BOOL, b"\1"),
            KV(b"small", V.INT8, b"\xfe"),
            KV(b"wide", V.UINT64, struct.pack("<Q", 2**63)),
            KV(b"double", V.FLOAT64, struct.pack("<d", 0.5)),
            KV(b"tokenizer.ggml.tokens", V.ARRAY, array(V.STRING, b"".join(map(text, tokens)), len(tokens))),
            KV(b"tokenizer.ggml.scores", V.ARRAY, array(V.FLOAT32, struct.pack("<4f", 0, -1, -2, -3), 4)),
            KV(b"none", V.ARRAY, array(V.INT32, b"", 0)),
        ],
        tensors=[
            Tensor(b"token_embd.weight", [32, 4], 3, 0),
            Tensor(b"output_norm.weight", [5], 0, 96),
            Tensor(b"blk.0.attn_q.weight", [2, 3], 1, 128),
        ],
        data=bytes(range(80)) + bytes(16) + struct.pack("<5f", *range(5)) + bytes(12) + bytes(range(12)) + bytes(20),
    )
