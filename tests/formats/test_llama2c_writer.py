"""What llama2.c's own export.py writes for the same weights, byte for byte, and what its format cannot hold."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from llamakit.errors import FormatError, MismatchError, SaveError, UnsupportedError
from llamakit.formats.base import TensorData
from llamakit.formats.gguf_reader import GGUFFile
from llamakit.formats.gguf_values import GGUFValueType
from llamakit.formats.gguf_writer import Typed, copied_tensor, typed_metadata, write_gguf
from llamakit.formats.llama2c import Llama2cFile
from llamakit.formats.llama2c_writer import llama2c_notes, write_llama2c
from llamakit.ggml import GGMLType
from tests.tokenizer.vocabularies import shared

#: sizes of two models; the second's rows of 172 are no whole groups of 64
SIZES = {
    "small": {"dim": 8, "hidden": 12, "layers": 2, "heads": 2, "kv_heads": 1, "vocab": 10, "ctx": 6, "tied": False},
    "wide": {"dim": 64, "hidden": 172, "layers": 1, "heads": 8, "kv_heads": 4, "vocab": 40, "ctx": 20, "tied": True},
}
#: sha256 of what export.py (llama2.c, 350e04f) writes for `weights(...)`; of version 0 without the rotary tables,
#: whose last bit depends on the processor
EXPORTED = {
    ("small", 0): "3c09a68d55124694ab65dc4d5f04e52e80c98d093b57c45d5a36286df7cf56dc",
    ("small", 1): "20dd94e04cf92736e21016a98eab5d9c7d54966263c6166e893b157f4bb18f77",
    ("small", 2): "04c38796f5bec239eacd86fb056cc351430925557e9a874299039203a1a05844",
    ("wide", 0): "d4ee4aa29b92808e2d050f3422c7e8bcd2b9087b4162d3d95e8eb320a6009cd9",
    ("wide", 1): "2040bd8d2c5af96621ef81506c74bd3c2db505aa753f18f3e39b319b5f54fce0",
    ("wide", 2): "39229ccba70d571ec2de19ecb6e91913b849a831b24541c1e0969bb76b98dbc4",
}


def metadata(size: str, **changes: object) -> dict[str, object]:
    s = SIZES[size]
    return {
        "general.architecture": "llama",
        "llama.block_count": s["layers"],
        "llama.context_length": s["ctx"],
        "llama.embedding_length": s["dim"],
        "llama.feed_forward_length": s["hidden"],
        "llama.attention.head_count": s["heads"],
        "llama.attention.head_count_kv": s["kv_heads"],
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    } | {f"llama.{key.replace('__', '.')}": value for key, value in changes.items()}


def weights(size: str) -> dict[str, np.ndarray]:
    """Numbers in (-1, 1) that are the same everywhere: multiples of 2^-23 from Knuth's multiplicative hash."""
    s = SIZES[size]
    d, h, kv = s["dim"], s["hidden"], s["dim"] // s["heads"] * s["kv_heads"]
    layer = {
        "attn_norm": (d,), "attn_q": (d, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, d),
        "ffn_norm": (d,), "ffn_gate": (h, d), "ffn_down": (d, h), "ffn_up": (h, d),
    }  # fmt: skip
    shapes = {"token_embd.weight": (s["vocab"], d), "output_norm.weight": (d,)}
    shapes |= {} if s["tied"] else {"output.weight": (s["vocab"], d)}
    shapes |= {f"blk.{i}.{n}.weight": shape for i in range(s["layers"]) for n, shape in layer.items()}
    result, start = {}, 1
    for name, shape in shapes.items():
        n = int(np.prod(shape))
        hashed = np.arange(start, start + n, dtype=np.uint32) * np.uint32(2654435761) >> np.uint32(8)
        result[name] = ((hashed.astype(np.float64) - 2**23) / 2**23).astype(np.float32).reshape(shape)
        start += n
    return result


def tensors(arrays: dict[str, np.ndarray], sliced: bool = False) -> list[TensorData]:
    """As a converter gives them; sliced: matrices come in three pieces."""

    def data(a: np.ndarray):
        return (lambda: iter(np.array_split(a, 3))) if sliced and a.ndim == 2 else a

    return [TensorData(n, a.shape, GGMLType.F32, data(a)) for n, a in arrays.items()]


def without_tables(raw: bytes, size: str) -> tuple[bytes, np.ndarray]:
    """Version 0 split into everything else, and cos and sin, (2, ctx, head_dim/2)."""
    s = SIZES[size]
    half = s["dim"] // s["heads"] // 2
    last = 0 if s["tied"] else 4 * s["vocab"] * s["dim"]
    end, n = len(raw) - last, 8 * s["ctx"] * half
    return raw[: end - n] + raw[end:], np.frombuffer(raw[end - n : end], "<f4").reshape(2, s["ctx"], half)


@pytest.mark.parametrize(("size", "version"), EXPORTED)
@pytest.mark.parametrize("sliced", [False, True])
def test_the_bytes_are_export_py_s(tmp_path: Path, size: str, version: int, sliced: bool) -> None:
    path = tmp_path / "m.bin"
    write_llama2c(path, metadata=metadata(size), tensors=tensors(weights(size), sliced), version=version)
    raw = path.read_bytes()
    if version == 0:
        raw, tables = without_tables(raw, size)
        angles = np.arange(SIZES[size]["ctx"])[:, None] * 10000.0 ** -(np.arange(tables.shape[2]) / tables.shape[2])
        assert np.abs(tables - [np.cos(angles), np.sin(angles)]).max() < 2e-6
    assert hashlib.sha256(raw).hexdigest() == EXPORTED[size, version]


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_what_was_written_is_read(tmp_path: Path, size: str, version: int) -> None:
    arrays = weights(size)
    path = tmp_path / "m.bin"
    write_llama2c(path, metadata=metadata(size), tensors=tensors(dict(reversed(arrays.items()))), version=version)
    with Llama2cFile(path) as file:
        assert {k: v for k, v in file.metadata.items() if k in metadata(size)} == metadata(size)
        assert set(file.tensors) == set(arrays)
        for name, array in arrays.items():
            read = file.read(name).view("<f4").reshape(array.shape)
            if version == 2 and array.ndim == 2:
                assert np.abs(read - array).max() <= 0.5 / 127 + 1e-6
            else:
                assert read.tobytes() == array.tobytes()


def float_file(path: Path) -> Path:
    """Version 0 of `small`, laid out here by hand: what llama2.c would write."""
    w, s = weights("small"), SIZES["small"]
    half = s["dim"] // s["heads"] // 2
    angles = torch.outer(torch.arange(s["ctx"]), 1.0 / 10000.0 ** (torch.arange(0, 2 * half, 2).float() / (2 * half)))
    order = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_down", "ffn_up"]
    parts = [w["token_embd.weight"], *(w[f"blk.{i}.{n}.weight"] for n in order for i in range(s["layers"]))]
    parts += [w["output_norm.weight"], angles.cos().numpy(), angles.sin().numpy(), w["output.weight"]]
    header = struct.pack("<7i", 8, 12, 2, 2, 1, -10, 6)
    path.write_bytes(header + b"".join(p.tobytes() for p in parts))
    return path


def through_gguf(source: Path, tmp_path: Path) -> Path:
    with Llama2cFile(source) as file:
        write_gguf(tmp_path / "m.gguf", metadata=file.metadata, tensors=[copied_tensor(file, n) for n in file.tensors])
    with GGUFFile(tmp_path / "m.gguf") as file:
        copies = [copied_tensor(file, n) for n in file.tensors]
        write_llama2c(tmp_path / "back.bin", metadata=typed_metadata(file), tensors=copies)
    return tmp_path / "back.bin"


def test_through_gguf_and_back(tmp_path: Path) -> None:
    source = float_file(tmp_path / "m.bin")
    assert through_gguf(source, tmp_path).read_bytes() == source.read_bytes()


def test_stories260k_through_gguf_and_back(tmp_path: Path) -> None:
    source = shared("models/stories260K.bin")
    assert through_gguf(source, tmp_path).read_bytes() == source.read_bytes()


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1e6, 123456.0, float(np.float32(26000.5)), 1e7])
def test_a_base_of_the_rotary_embedding_comes_back(tmp_path: Path, theta: float) -> None:
    changed = metadata("wide", rope__freq_base=Typed(theta, GGUFValueType.FLOAT32))
    write_llama2c(tmp_path / "m.bin", metadata=changed, tensors=tensors(weights("wide")))
    back = through_gguf(tmp_path / "m.bin", tmp_path)
    assert back.read_bytes() == (tmp_path / "m.bin").read_bytes()
    with GGUFFile(tmp_path / "m.gguf") as file:
        assert file.metadata["llama.rope.freq_base"] == theta


def test_a_group_of_zeros_is_zeros(tmp_path: Path) -> None:
    arrays = weights("small")
    arrays["blk.0.attn_q.weight"][:3] = 0  # export.py: 0/0
    arrays["blk.0.attn_k.weight"][0] = 3e-45  # a scale that rounds to 0
    arrays["blk.0.attn_k.weight"][1] = 2.4e-43  # a scale so coarse that a code would leave its byte
    write_llama2c(tmp_path / "m.bin", metadata=metadata("small"), tensors=tensors(arrays), version=2)
    with Llama2cFile(tmp_path / "m.bin") as file:
        q, k = (file.read(f"blk.0.{n}.weight").view("<f4") for n in ("attn_q", "attn_k"))
    assert not q[:3].any() and np.abs(q[3:] - arrays["blk.0.attn_q.weight"][3:]).max() < 0.005
    assert not k[0].any() and (k[1] > 0).all() and (k[1] <= 2.4e-43).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_int8_holds_finite_weights_only(tmp_path: Path, value: float) -> None:
    arrays = weights("small")
    arrays["blk.1.ffn_up.weight"][5, 5] = value
    with pytest.raises(UnsupportedError, match=r"blk\.1\.ffn_up\.weight has weights that are not finite"):
        write_llama2c(tmp_path / "m.bin", metadata=metadata("small"), tensors=tensors(arrays), version=2)
    write_llama2c(tmp_path / "m.bin", metadata=metadata("small"), tensors=tensors(arrays), version=1)


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"attention__key_length": 8}, UnsupportedError, "llama.attention.key_length is 8 .*8 / 2"),
        ({"rope__dimension_count": 2}, UnsupportedError, "llama.rope.dimension_count is 2"),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}, UnsupportedError, "yarn, factor 4"),
        ({"rope__scale_linear": 2.0}, UnsupportedError, "linear, factor 2"),
        ({"attention__sliding_window": 4096}, UnsupportedError, "sliding_window is 4096"),
        ({"expert_count": 8}, UnsupportedError, "expert_count is 8"),
        ({"feed_forward_length": np.array([12, 16])}, UnsupportedError, "feed_forward_length differs from layer"),
        ({"attention__head_count": 3}, UnsupportedError, "dim 8 does not divide into 3 heads"),
        ({"context_length": None}, FormatError, "llama.context_length is missing"),
        ({"block_count": 2.0}, FormatError, "llama.block_count is no whole number"),
        ({"block_count": 3}, FormatError, "blk.2.attn_norm.weight is missing"),
        ({"feed_forward_length": 16}, FormatError, r"ffn_gate.weight has the shape \(12, 8\) \(expected \(16, 8\)\)"),
        ({"rope__freq_base": "big"}, FormatError, "freq_base is no number"),
        ({"rope__freq_base": float("nan")}, FormatError, "freq_base is nan"),
    ],
)
def test_what_the_format_cannot_hold(tmp_path: Path, change: dict, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        write_llama2c(tmp_path / "m.bin", metadata=metadata("small", **change), tensors=tensors(weights("small")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "rope_freqs.weight"])
def test_tensors_that_have_no_place(tmp_path: Path, name: str) -> None:
    arrays = weights("small") | {name: np.zeros(8, np.float32)}
    with pytest.raises(UnsupportedError, match=f"{name}: a llama2.c model cannot hold that") as caught:
        write_llama2c(tmp_path / "m.bin", metadata=metadata("small"), tensors=tensors(arrays))
    assert caught.value.hint


def test_another_vocabulary(tmp_path: Path) -> None:
    changed = metadata("small") | {"tokenizer.ggml.tokens": ["a"] * 11}
    with pytest.raises(MismatchError, match="11 tokens, the model 10 embeddings"):
        write_llama2c(tmp_path / "m.bin", metadata=changed, tensors=tensors(weights("small")))


def test_another_architecture(tmp_path: Path) -> None:
    changed = metadata("small") | {"general.architecture": "gemma"}
    with pytest.raises(UnsupportedError, match="gemma"):
        write_llama2c(tmp_path / "m.bin", metadata=changed, tensors=tensors(weights("small")))


def test_a_caller_s_mistakes(tmp_path: Path) -> None:
    given = tensors(weights("small"))
    half = [t._replace(type=GGMLType.F16) if t.name == "output.weight" else t for t in given]
    with pytest.raises(ValueError, match=r"output\.weight' is F16"):
        write_llama2c(tmp_path / "m.bin", metadata=metadata("small"), tensors=half)
    short = [t._replace(data=np.zeros(32, np.float32)) if t.name == "output.weight" else t for t in given]
    with pytest.raises(ValueError, match="has 32 values"):
        write_llama2c(tmp_path / "m.bin", metadata=metadata("small"), tensors=short)
    with pytest.raises(ValueError, match="the same name"):
        write_llama2c(tmp_path / "m.bin", metadata=metadata("small"), tensors=[*given, given[0]])
    with pytest.raises(ValueError, match="version 3"):
        write_llama2c(tmp_path / "m.bin", metadata=metadata("small"), tensors=given, version=3)
    assert not list(tmp_path.iterdir())


def test_a_check_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(b"before")

    def verify(file: Llama2cFile) -> None:
        assert file.version == 1
        raise MismatchError("no")

    with pytest.raises(MismatchError):
        write_llama2c(path, metadata=metadata("small"), tensors=tensors(weights("small")), version=1, verify=verify)
    assert path.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(SaveError):
        write_llama2c(tmp_path / "no" / "m.bin", metadata=metadata("small"), tensors=tensors(weights("small")))


def test_notes() -> None:
    assert llama2c_notes(metadata("small")) == []
    theta, eps = llama2c_notes(
        metadata(
            "small", rope__freq_base=500000.0, attention__layer_norm_rms_epsilon=Typed(1e-6, GGUFValueType.FLOAT32)
        )
    )
    assert "llama.rope.freq_base is 500000" in theta and "finds it in the file's tables" in theta
    assert "layer_norm_rms_epsilon is 1e-06" in eps
    (theta,) = llama2c_notes(metadata("small", rope__freq_base=500000.0), version=1)
    assert "version 1 does not keep it" in theta
    (group,) = llama2c_notes(metadata("wide"), version=2)
    assert "172, no multiple of the group of 64" in group
