"""Adapters: both formats, their orientations, their errors, and whose they are."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from llamakit.errors import FormatError, LlamakitError, MismatchError, UnsupportedError, UsageError
from llamakit.formats.adapter import Adapter, check_adapter, read_adapter, transposed_pair, write_adapter
from llamakit.formats.gguf import GGUFFile, TensorData, Typed, typed_metadata, write_gguf
from llamakit.formats.gguf import GGUFValueType as V
from llamakit.formats.stamps import base_stamps
from llamakit.ggml import GGMLType
from tests.formats.files import ggla_file

SHAPES = {
    "token_embd.weight": (10, 32),
    "blk.0.attn_norm.weight": (32,),
    "blk.0.attn_q.weight": (32, 32),
    "blk.0.attn_k.weight": (16, 32),
    "blk.0.ffn_down.weight": (32, 64),
}
LORA = {
    "general.architecture": "llama",
    "general.type": "adapter",
    "adapter.type": "lora",
    "adapter.lora.alpha": 4.0,
}


def _random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def _base(path: Path, kind: str = "F32", *, seed: int = 0, **changes: object) -> GGUFFile:
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(10)],
    } | changes
    qtype = gguf.GGMLQuantizationType[kind]
    tensors = []
    for name, shape in SHAPES.items():
        values = _random(*shape, seed=seed)
        if len(shape) == 1:
            tensors.append(TensorData(name, shape, GGMLType.F32, values))
        else:
            tensors.append(TensorData(name, shape, GGMLType[kind], gguf.quants.quantize(values, qtype)))
    write_gguf(path, metadata=metadata, tensors=tensors)
    return GGUFFile(path)


def _adapter() -> Adapter:
    pairs = {
        "blk.0.attn_k.weight": (_random(2, 32), _random(16, 2)),
        "token_embd.weight": (_random(3, 32), _random(10, 3)),
        "blk.0.attn_norm.weight": (_random(1, 32), _random(1, 1)),
        "blk.0.ffn_down.weight": (_random(1, 64), _random(32, 1)),
    }
    return Adapter(4.0, pairs)


def _same(one: Adapter, other: Adapter) -> None:
    assert set(one.tensors) == set(other.tensors)
    for name, (a, b) in one.tensors.items():
        assert np.array_equal(a, other.tensors[name][0])
        assert np.array_equal(b, other.tensors[name][1])


def test_round_trip_and_stored_orientation(tmp_path: Path) -> None:
    base, adapter = _base(tmp_path / "base.gguf"), _adapter()
    write_adapter(tmp_path / "lora.gguf", adapter, base)
    again = read_adapter(tmp_path / "lora.gguf")
    _same(adapter, again)
    assert (again.alpha, again.architecture, again.stamps) == (4.0, "llama", base_stamps(base))
    assert check_adapter(again, base) == []
    stored = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "lora.gguf").tensors}
    # in the base's order, a before b, whatever the order of the dictionary
    assert list(stored)[:4] == [
        "token_embd.weight.lora_a", "token_embd.weight.lora_b",
        "blk.0.attn_norm.weight.lora_a", "blk.0.attn_norm.weight.lora_b",
    ]  # fmt: skip
    a, b = adapter.tensors["token_embd.weight"]
    assert np.array_equal(stored["token_embd.weight.lora_a"], b)
    assert np.array_equal(stored["token_embd.weight.lora_b"], a.T)
    assert stored["blk.0.attn_k.weight.lora_a"].shape == (2, 32)
    assert stored["blk.0.attn_k.weight.lora_b"].shape == (16, 2)
    assert stored["blk.0.attn_norm.weight.lora_b"].shape == (1, 1)


def test_bytes_depend_on_the_state_alone(tmp_path: Path) -> None:
    base, adapter = _base(tmp_path / "base.gguf"), _adapter()
    write_adapter(tmp_path / "a.gguf", adapter, base)
    adapter.tensors = dict(reversed(adapter.tensors.items()))
    adapter.metadata = {"general.name": "x"}
    write_adapter(tmp_path / "b.gguf", adapter, base)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_scale_and_sizes() -> None:
    adapter = _adapter()
    assert adapter.rank("token_embd.weight") == 3
    assert adapter.scale("blk.0.attn_k.weight", 0.5) == 0.5 * 4 / 2
    assert adapter.n_parameters == 2 * 32 + 16 * 2 + 3 * 32 + 10 * 3 + 32 + 1 + 64 + 32
    adapter.alpha = 0.0
    assert adapter.scale("blk.0.attn_k.weight", 0.5) == 0.5
    assert adapter.stamps is None


def _write(path: Path, tensors: dict[str, np.ndarray], kind: GGMLType = GGMLType.F32, **changes: object) -> Path:
    metadata = {
        k: v for k, v in (LORA | {k.replace("__", "."): v for k, v in changes.items()}).items() if v is not None
    }
    data = [TensorData(n, t.shape, kind, t) for n, t in tensors.items()]
    write_gguf(path, metadata=metadata, tensors=data)
    return path


def _pair(name: str = "blk.0.attn_q.weight", a: np.ndarray | None = None) -> dict[str, np.ndarray]:
    return {f"{name}.lora_a": _random(2, 32) if a is None else a, f"{name}.lora_b": _random(32, 2)}


@pytest.mark.parametrize(
    ("tensors", "changes", "reason"),
    [
        (_pair(), {"general__type": "model"}, "expected general.type to be 'adapter', got 'model'"),
        (_pair(), {"general__type": None}, "expected general.type to be 'adapter', got nothing"),
        (
            _pair(),
            {"adapter__type": "control\x1b"},
            r"expected adapter.type to be 'lora', got 'control\\x1b'",
        ),
        (_pair(), {"training__type": "finetune_lora"}, r"is a training checkpoint \(finetune_lora\)"),
        (_pair(), {"adapter__lora__alpha": float("nan")}, "adapter.lora.alpha is no finite number"),
        (_pair(), {"adapter__lora__alpha": "x"}, "adapter.lora.alpha is no finite number"),
        (_pair(), {"adapter__alora__invocation_tokens": np.ones(2, np.uint32)}, "aLoRA"),
        ({}, {}, "without any LoRA tensor"),
        (_pair() | {"x.weight": _random(2, 2)}, {}, "'x.weight' has an unexpected suffix"),
        ({"x.lora_a": _random(2, 2)}, {}, "the LoRA pair of 'x' has no .lora_b tensor"),
        ({"x.lora_b": _random(2, 2)}, {}, "the LoRA pair of 'x' has no .lora_a tensor"),
        (_pair(a=_random(32, 2)), {}, "is not transposed"),
        (_pair(a=_random(3, 32)), {}, r"differ in rank \(3, 2\)"),
        (_pair("token_embd.weight"), {}, "differ in rank"),
        (_pair(a=_random(2, 1, 32)), {}, "is no matrix"),
        (_pair(a=np.empty((0, 32), np.float32)), {}, "is no matrix"),
    ],
)
def test_refuses(tmp_path: Path, tensors: dict, changes: dict, reason: str) -> None:
    path = _write(tmp_path / "lora.gguf", tensors, **changes)
    with pytest.raises((FormatError, UnsupportedError), match=reason) as caught:
        read_adapter(path)
    assert caught.value.exit_code == 2


def test_other_types(tmp_path: Path) -> None:
    pair = _pair()
    halves = {n: t.astype(np.float16) for n, t in pair.items()}
    a = read_adapter(_write(tmp_path / "f16.gguf", halves, GGMLType.F16)).tensors["blk.0.attn_q.weight"][0]
    assert a.dtype == np.float32
    assert np.array_equal(a, halves["blk.0.attn_q.weight.lora_a"].astype(np.float32))
    cut = {n: (t.view(np.uint32) >> 16).astype(np.uint16) for n, t in pair.items()}
    a = read_adapter(_write(tmp_path / "bf16.gguf", cut, GGMLType.BF16)).tensors["blk.0.attn_q.weight"][0]
    assert np.array_equal(a.view(np.uint32), pair["blk.0.attn_q.weight.lora_a"].view(np.uint32) & 0xFFFF0000)
    raw = TensorData("x.lora_a", (1, 32), GGMLType.Q8_0, np.zeros((1, 34), np.uint8))
    write_gguf(tmp_path / "q.gguf", metadata=LORA, tensors=[raw])
    with pytest.raises(UnsupportedError, match=r"has the type Q8_0 \(expected F32, F16 or BF16\)"):
        read_adapter(tmp_path / "q.gguf")


def test_vectors_are_rows(tmp_path: Path) -> None:
    """Writers in C drop outer axes of size 1."""
    tensors = {"n.weight.lora_a": _random(32), "n.weight.lora_b": _random(4, 1)}
    a, b = read_adapter(_write(tmp_path / "lora.gguf", tensors)).tensors["n.weight"]
    assert (a.shape, b.shape) == ((1, 32), (4, 1))


def test_what_is_no_adapter_at_all(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_adapter(tmp_path / "missing")
    for raw, reason in ((b"", "got empty"), (b"a text\n", "got text"), (b"PK\3\4", "got zip")):
        (tmp_path / "x").write_bytes(raw)
        with pytest.raises(LlamakitError, match=reason):
            read_adapter(tmp_path / "x")


def test_old_adapters(tmp_path: Path) -> None:
    a, b, norm_a, norm_b = _random(32, 2), _random(16, 2), _random(32, 1), _random(1)
    tensors = {
        "blk.0.attn_k.weight.loraA": a, "blk.0.attn_k.weight.loraB": b.astype(np.float16),
        "blk.0.attn_norm.weight.loraA": norm_a, "blk.0.attn_norm.weight.loraB": norm_b,
    }  # fmt: skip
    adapter = read_adapter(ggla_file(tmp_path / "lora.bin", tensors, rank=2, alpha=4))
    assert adapter.alpha == 4
    assert np.array_equal(adapter.tensors["blk.0.attn_k.weight"][0], a.T)
    assert np.array_equal(adapter.tensors["blk.0.attn_k.weight"][1], b.astype(np.float16))
    # The format scales all tensors with alpha / r of the header: 2, for the norm of rank 1 too.
    down, up = adapter.tensors["blk.0.attn_norm.weight"]
    expected = 2 * norm_b.reshape(1, 1) @ norm_a.T
    assert np.allclose(adapter.scale("blk.0.attn_norm.weight") * up @ down, expected)
    assert check_adapter(adapter, _base(tmp_path / "base.gguf")) == []


@pytest.mark.parametrize(
    ("at", "raw", "reason"),
    [
        (4, b"\2", "unknown ggla version"),
        (8, b"\0\0\0\0", "impossible rank 0"),
        (12, b"\xff\xff\xff\xff", "alpha -1"),
        (16, b"\3", r"3 dimensions \(expected 1 or 2\)"),
        (20, b"\xff", "name has 255 bytes"),
        (24, b"\2", r"type 2 \(expected 0, F32, or 1, F16\)"),
        (28, b"\xff\xff\xff\xff", "needs bytes"),
        (28, b"\0\0\0\0", "needs bytes"),
        (36, b"\xff", "is not UTF-8"),
        (36 + 24, b"C", "unexpected suffix"),
    ],
)
def test_broken_old_adapters(tmp_path: Path, at: int, raw: bytes, reason: str) -> None:
    path = ggla_file(tmp_path / "lora.bin")
    data = bytearray(path.read_bytes())
    data[at : at + len(raw)] = raw
    path.write_bytes(data)
    with pytest.raises((FormatError, UnsupportedError), match=reason):
        read_adapter(path)


def test_truncated_old_adapters(tmp_path: Path) -> None:
    path = ggla_file(tmp_path / "lora.bin")
    whole = path.read_bytes()
    for n in range(4, len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(FormatError):
            read_adapter(path)


def test_duplicate_and_unequal_ranks_in_old_adapters(tmp_path: Path) -> None:
    path = ggla_file(tmp_path / "lora.bin", {"x.loraA": _random(4, 2), "x.loraB": _random(4, 3)})
    with pytest.raises(FormatError, match="differ in rank"):
        read_adapter(path)
    one = ggla_file(path, {"x.loraA": _random(4, 4)}).read_bytes()
    path.write_bytes(one + bytes(-len(one) % 32) + one[16:])
    with pytest.raises(FormatError, match=r"duplicate tensor 'x\.loraA'"):
        read_adapter(path)


def test_transposed_pair() -> None:
    a, b = transposed_pair(_random(32, 2), _random(16, 2))
    assert (a.shape, b.shape) == ((2, 32), (16, 2))
    assert a.flags.c_contiguous


def test_another_base_is_refused(tmp_path: Path) -> None:
    adapter, base = _adapter(), _base(tmp_path / "base.gguf")
    adapter.architecture = "gemma"
    with pytest.raises(MismatchError, match="architecture 'gemma', the model is 'llama'"):
        check_adapter(adapter, base)
    adapter.architecture = "llama"
    adapter.tensors["blk.1.attn_q.weight"] = (_random(2, 32), _random(32, 2))
    with pytest.raises(MismatchError, match=r"'blk\.1\.attn_q\.weight' does not exist in the base model"):
        check_adapter(adapter, base)
    del adapter.tensors["blk.1.attn_q.weight"]
    adapter.tensors["blk.0.attn_k.weight"] = (_random(2, 16), _random(32, 2))
    with pytest.raises(MismatchError, match=r"wrong shape .* \(expected 16 x 32, got 32 x 16\)"):
        check_adapter(adapter, base)
    with pytest.raises(MismatchError, match="wrong shape"):
        write_adapter(tmp_path / "lora.gguf", adapter, base)


def test_stamps(tmp_path: Path) -> None:
    base = _base(tmp_path / "base.gguf")
    write_adapter(tmp_path / "lora.gguf", _adapter(), base)
    adapter = read_adapter(tmp_path / "lora.gguf")
    quantized = _base(tmp_path / "q.gguf", "Q4_1", **{"general.file_type": 3, "general.name": "other"})
    assert check_adapter(adapter, quantized) == ["the adapter was trained on another quantization of this model"]
    other = _base(tmp_path / "o.gguf", **{"tokenizer.ggml.tokens": [f"u{i}" for i in range(10)]})
    with pytest.raises(MismatchError, match="trained on another model") as caught:
        check_adapter(adapter, other)
    assert base_stamps(base).model[:16] in str(caught.value)
    assert base_stamps(other).model[:16] in str(caught.value)
    assert "--force" in str(caught.value.hint)
    assert len(check_adapter(adapter, other, force=True)) == 1
    assert check_adapter(_adapter(), other) == []  # foreign, without stamps


def test_what_the_model_stamp_depends_on(tmp_path: Path) -> None:
    def stamp(**changes: object) -> str:
        with _base(tmp_path / "x.gguf", **changes) as file:
            return base_stamps(file).model

    same = stamp()
    assert stamp(**{"general.name": "x", "general.quantization_version": 2}) == same
    assert stamp(**{"llama.block_count": Typed(1, V.UINT64)}) == same
    assert stamp(**{"llama.attention.layer_norm_rms_epsilon": Typed(float(np.float32(1e-5)), V.FLOAT64)}) == same
    assert stamp(seed=1) == same  # other weights: the second stamp's business
    assert stamp(**{"llama.block_count": 2}) != same
    assert stamp(**{"llama.attention.layer_norm_rms_epsilon": 1e-6}) != same
    assert stamp(**{"tokenizer.ggml.tokens": [f"t{i}" for i in range(9)]}) != same
    one, two = _base(tmp_path / "a.gguf"), _base(tmp_path / "b.gguf", seed=1)
    assert base_stamps(one).file != base_stamps(two).file


def test_stamps_survive_a_rewritten_file(tmp_path: Path) -> None:
    with _base(tmp_path / "a.gguf") as file:
        write_gguf(
            tmp_path / "b.gguf",
            metadata=dict(reversed(typed_metadata(file).items())),
            tensors=[TensorData(n, file.tensors[n].shape, GGMLType.F32, file.read(n)) for n in sorted(file.tensors)],
        )
        with GGUFFile(tmp_path / "b.gguf") as other:
            assert base_stamps(other) == base_stamps(file)
