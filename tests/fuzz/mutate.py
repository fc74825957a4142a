"""Structure-aware mutants of small files: parse, break one to three fields, serialise. Same seed, same mutants."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from copy import deepcopy

from tests.fuzz.raw import KV, Raw, array, sound, text

#: numbers at the edges of what the fields can hold
EDGES = [0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 255, 256, 65535, 2**16, 2**20, 2**30, 2**31 - 1, 2**31, 2**32 - 1]
EDGES += [2**32, 2**40, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 64, 2**64 - 32, 2**64 - 8, 2**64 - 1]

Mutation = Callable[[Raw, random.Random], None]


def _number(rng: random.Random) -> int:
    return rng.choice(EDGES) if rng.random() < 0.8 else rng.randrange(2 ** rng.randrange(1, 64))


def _bytes(rng: random.Random, longest: int = 80) -> bytes:
    pool = [
        b"",
        b"\0",
        b"\xff\xfe",
        b"general.alignment",
        b"split.count",
        b"GGUF.version",
        b"\x1b[2J",
        b"a" * 64,
    ]
    return rng.choice(pool) if rng.random() < 0.5 else rng.randbytes(rng.randrange(longest))


def counts(raw: Raw, rng: random.Random) -> None:
    name = rng.choice(["n_tensors", "n_kv"])
    setattr(raw, name, rng.choice([_number(rng), len(raw.tensors) + 1, max(0, len(raw.kvs) - 1)]))


def head(raw: Raw, rng: random.Random) -> None:
    if rng.random() < 0.5:
        raw.version = rng.choice([0, 1, 2, 4, 3 << 24, 2**32 - 1])
    else:
        raw.magic = rng.choice([b"FUGG", b"GGUf", b"\0\0\0\0", b"PK\3\4"])


def key(raw: Raw, rng: random.Random) -> None:
    kv = rng.choice(raw.kvs)
    if rng.random() < 0.5:
        kv.key = _bytes(rng)
    else:
        kv.key_length = _number(rng)


def value(raw: Raw, rng: random.Random) -> None:
    kv = rng.choice(raw.kvs)
    what = rng.randrange(4)
    if what == 0:
        kv.type = rng.choice([*range(14), 2**31, 2**32 - 1])
    elif what == 1:
        kv.payload = _bytes(rng)
    elif what == 2:
        kv.type, kv.payload = 9, array(rng.randrange(14), _bytes(rng, 200), _number(rng))
    else:
        kv.type, kv.payload = 8, text(_bytes(rng), _number(rng))


def nested(raw: Raw, rng: random.Random) -> None:
    kv = rng.choice(raw.kvs)
    kv.type, kv.payload = 9, array(9, b"", 1) * rng.randrange(1, 3000)


def string_array(raw: Raw, rng: random.Random) -> None:
    parts = [text(_bytes(rng, 12)) for _ in range(rng.randrange(40))]
    if parts and rng.random() < 0.5:
        parts[rng.randrange(len(parts))] = text(b"x", _number(rng))
    n = len(parts) if rng.random() < 0.5 else _number(rng)
    rng.choice(raw.kvs).__dict__.update(type=9, payload=array(8, b"".join(parts), n))


def name(raw: Raw, rng: random.Random) -> None:
    tensor = rng.choice(raw.tensors)
    if rng.random() < 0.5:
        tensor.name = _bytes(rng)
    else:
        tensor.name_length = _number(rng)


def dims(raw: Raw, rng: random.Random) -> None:
    tensor = rng.choice(raw.tensors)
    what = rng.randrange(3)
    if what == 0 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = _number(rng)
    elif what == 1:
        tensor.dims = [_number(rng) for _ in range(rng.randrange(7))]
    else:
        tensor.n_dims = _number(rng) & (2**32 - 1)


def kind(raw: Raw, rng: random.Random) -> None:
    rng.choice(raw.tensors).type = rng.choice([*range(45), 999, 2**31, 2**32 - 1])


def offset(raw: Raw, rng: random.Random) -> None:
    tensor = rng.choice(raw.tensors)
    tensor.offset = rng.choice([_number(rng), tensor.offset + 1, tensor.offset + 32, -32])


def duplicate(raw: Raw, rng: random.Random) -> None:
    items: list[KV] | list = rng.choice([raw.kvs, raw.tensors])
    items.insert(rng.randrange(len(items) + 1), deepcopy(rng.choice(items)))


def reorder(raw: Raw, rng: random.Random) -> None:
    rng.shuffle(rng.choice([raw.kvs, raw.tensors]))


def alignment(raw: Raw, rng: random.Random) -> None:
    value = _number(rng) & (2**32 - 1)
    raw.kvs.append(KV(b"general.alignment", rng.choice([4, 4, 5, 10]), struct.pack("<I", value)))
    raw.kvs[:] = [kv for kv in raw.kvs[:-1] if kv.key != b"general.alignment"] + raw.kvs[-1:]


def data(raw: Raw, rng: random.Random) -> None:
    raw.data = raw.data[: rng.randrange(len(raw.data) + 1)] if raw.data else b""


def cut(raw: Raw, rng: random.Random) -> None:
    raw.cut = rng.randrange(len(raw.pack()) + 1)


MUTATIONS: list[Mutation] = [
    counts, head, key, value, nested, string_array, name, dims, kind, offset, duplicate, reorder, alignment, data, cut,
]  # fmt: skip


def mutant(number: int, seed: int = 0) -> bytes:
    """The mutant of this number: always the same bytes."""
    rng = random.Random(f"{seed}/{number}")
    raw = sound()
    for _ in range(rng.randrange(1, 4)):
        rng.choice(MUTATIONS)(raw, rng)
    packed = raw.pack()
    if rng.random() < 0.1 and packed:
        at = rng.randrange(len(packed))
        packed = packed[:at] + rng.randbytes(1) + packed[at + 1 :]
    return packed


def scrambled(sound_file: bytes, number: int, head_bytes: int) -> bytes:
    """A file without much structure, with one to three 32-bit fields of its head replaced, or cut short."""
    rng = random.Random(number)
    raw = bytearray(sound_file)
    for _ in range(rng.randrange(1, 4)):
        at = 4 * rng.randrange(max(1, min(head_bytes, len(raw)) // 4))
        raw[at : at + 4] = struct.pack("<I", _number(rng) & (2**32 - 1))
    return bytes(raw[: rng.randrange(len(raw) + 1)] if rng.random() < 0.3 else raw)
