"""Small files of the formats that llamakit only reads, and split ones."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from llamakit.formats.gguf import GGUFFile, copied_tensor, typed_metadata, write_gguf_split

LLAMA2C = {"dim": 8, "hidden": 12, "layers": 2, "heads": 2, "kv_heads": 1, "vocab": 10, "ctx": 6}


def llama2c_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """GGUF name -> float32 weights of the little model."""
    rng = np.random.default_rng(seed)
    d, h, kv, v = LLAMA2C["dim"], LLAMA2C["hidden"], 4, LLAMA2C["vocab"]
    layer = {
        "attn_norm": (d,), "attn_q": (d, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, d),
        "ffn_norm": (d,), "ffn_gate": (h, d), "ffn_down": (d, h), "ffn_up": (h, d),
    }  # fmt: skip
    shapes = {"token_embd.weight": (v, d), "output_norm.weight": (d,), "output.weight": (v, d)}
    shapes |= {f"blk.{i}.{n}.weight": s for i in range(LLAMA2C["layers"]) for n, s in layer.items()}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def _stacked(weights: dict[str, np.ndarray], *names: str) -> list[np.ndarray]:
    return [weights[f"blk.{i}.{n}.weight"] for n in names for i in range(LLAMA2C["layers"])]


def _seven(tied: bool) -> bytes:
    numbers = list(LLAMA2C.values())
    numbers[5] *= 1 if tied else -1
    return struct.pack("<7i", *numbers)


def llama2c_file(path: Path, version: int = 0, tied: bool = True, seed: int = 0) -> Path:
    """Written as llama2.c's export.py lays it out; version 2 in groups of 4."""
    w = llama2c_weights(seed)
    matrices = _stacked(w, "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_down", "ffn_up")
    last = [] if tied else [w["output.weight"]]
    if version == 0:
        freqs = [np.zeros((LLAMA2C["ctx"], 4), np.float32)]
        head, first = _seven(tied), [w["token_embd.weight"], *_stacked(w, "attn_norm")]
        rest = [
            *matrices[:8],
            *_stacked(w, "ffn_norm"),
            *matrices[8:],
            w["output_norm.weight"],
            *freqs,
            *last,
        ]
        path.write_bytes(head + b"".join(a.tobytes() for a in [*first, *rest]))
        return path
    head = b"24ka" + struct.pack("<i", version) + _seven(True) + bytes([tied])
    head += struct.pack("<i", 4) if version == 2 else b""
    norms = [*_stacked(w, "attn_norm", "ffn_norm"), w["output_norm.weight"]]
    body = [a.tobytes() for a in norms]
    for matrix in [w["token_embd.weight"], *matrices, *last]:
        body += quantized(matrix)[:2] if version == 2 else [matrix.tobytes()]
    path.write_bytes(head + bytes(256 - len(head)) + b"".join(body))
    return path


def quantized(matrix: np.ndarray) -> tuple[bytes, bytes, np.ndarray]:
    """(int8 codes, float32 scales, the values they stand for), in groups of 4."""
    groups = matrix.reshape(-1, 4)
    scale = (np.abs(groups).max(1, keepdims=True) / 127).astype(np.float32)
    codes = np.round(groups / scale).astype(np.int8)
    return codes.tobytes(), scale.tobytes(), (codes * scale).astype(np.float32).reshape(matrix.shape)


def ggla_file(
    path: Path,
    tensors: dict[str, np.ndarray] | None = None,
    *,
    rank: int = 2,
    alpha: int = 4,
    version: int = 1,
) -> Path:
    """An old adapter; tensors as stored (rows first), by default one pair."""
    if tensors is None:
        rng = np.random.default_rng(1)
        tensors = {
            "blk.0.attn_q.weight.loraA": rng.standard_normal((8, 2), np.float32),
            "blk.0.attn_q.weight.loraB": rng.standard_normal((6, 2), np.float32),
        }
    raw = struct.pack("<IIii", 0x67676C61, version, rank, alpha)
    for name, matrix in tensors.items():
        ne = tuple(reversed(matrix.shape))
        raw += struct.pack(f"<3I{len(ne)}I", len(ne), len(name), int(matrix.dtype == np.float16), *ne) + name.encode()
        raw += bytes(-len(raw) % 32) + matrix.tobytes()
    path.write_bytes(raw)
    return path


def split_gguf(target: Path, source: Path, max_tensors: int) -> list[Path]:
    """The parts of a GGUF file."""
    with GGUFFile(source) as file:
        tensors = [copied_tensor(file, name) for name in file.tensors]
        return write_gguf_split(target, metadata=typed_metadata(file), tensors=tensors, max_tensors=max_tensors)
