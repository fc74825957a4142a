"""PEFT folders: what they scale by, what they are turned into and back, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamakit.errors import FormatError, LlamakitError, MismatchError, UnsupportedError, UsageError
from llamakit.formats.adapter import Adapter, check_adapter, read_adapter, write_adapter, write_adapter_folder
from llamakit.formats.base import ModelFile, TensorData
from llamakit.formats.gguf import write_gguf
from llamakit.formats.open import open_model, sniff
from llamakit.formats.peft import read_peft
from llamakit.formats.safetensors import SafetensorsFile, write_safetensors
from llamakit.ggml import GGMLType
from tests.tiny import cached_tiny_gguf

Q, K, V = "blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"
HF_Q, HF_K, HF_V = (f"base_model.model.model.layers.0.self_attn.{part}_proj" for part in "qkv")
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "none"}


@pytest.fixture
def base() -> ModelFile:
    """2 layers, 64 wide, 4 heads of 16, 2 of them for k and v."""
    return open_model(cached_tiny_gguf())


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def pair(module: str = HF_Q, rank: int = 2, n_out: int = 64, n_in: int = 64) -> dict[str, np.ndarray]:
    return {f"{module}.lora_A.weight": values(rank, n_in), f"{module}.lora_B.weight": values(n_out, rank)}


def folder(path: Path, tensors: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    """A PEFT folder with one pair, unless other tensors are given; config: what differs from CONFIG."""
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    data = [TensorData(n, t.shape, GGMLType.F32, t) for n, t in (pair() if tensors is None else tensors).items()]
    write_safetensors(path / "adapter_model.safetensors", tensors=data)
    return path


def test_names_scale_and_rows(tmp_path: Path, base: ModelFile) -> None:
    tensors = pair(HF_Q) | pair(HF_K, n_out=32) | pair(HF_V, n_out=32)
    weights = read_peft(folder(tmp_path / "x", tensors), base)
    assert (weights.alpha, list(weights.tensors), weights.replaced) == (6.0, [K, Q, V], {})
    for name, module, heads in ((Q, HF_Q, 4), (K, HF_K, 2)):
        a, b = weights.tensors[name]
        stored = tensors[f"{module}.lora_B.weight"]
        assert np.array_equal(a, tensors[f"{module}.lora_A.weight"])
        for head in range(heads):  # in Hugging Face's order the second halves of all pairs follow the first ones
            for i in range(8):
                assert np.array_equal(b[16 * head + 2 * i], stored[16 * head + i])
                assert np.array_equal(b[16 * head + 2 * i + 1], stored[16 * head + 8 + i])
    assert np.array_equal(weights.tensors[V][1], tensors[f"{HF_V}.lora_B.weight"])


def test_embedding_and_output(tmp_path: Path, base: ModelFile) -> None:
    n_vocab = base.tensors["output.weight"].shape[0]
    module = "base_model.model.model.embed_tokens"
    tensors = {f"{module}.lora_embedding_A": values(2, n_vocab), f"{module}.lora_embedding_B": values(64, 2)}
    tensors |= pair("base_model.model.lm_head", n_out=n_vocab)
    tensors[f"{module}.base_layer.weight"] = values(n_vocab, 64)  # the base's own, saved beside it
    weights = read_peft(folder(tmp_path / "x", tensors), base)
    a, b = weights.tensors["token_embd.weight"]
    assert np.array_equal(a, tensors[f"{module}.lora_embedding_B"].T)
    assert np.array_equal(b, tensors[f"{module}.lora_embedding_A"].T)
    assert weights.tensors["output.weight"][1].shape == (n_vocab, 2) and not weights.replaced


def test_patterns_and_rslora(tmp_path: Path, base: ModelFile) -> None:
    tensors = pair(HF_Q, 4) | pair(HF_K, n_out=32) | pair(HF_V, n_out=32)
    config: dict[str, Any] = {
        "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {r"layers\.\d+\.self_attn\.(q|k)_proj": 3},
    }
    x = folder(tmp_path / "x", tensors, **config)
    plain = read_adapter(folder(tmp_path / "plain", tensors, rank_pattern={"q_proj": 4}), base)
    adapter = read_adapter(x, base)
    assert adapter.alpha == 6
    for name, halved in ((Q, True), (K, True), (V, False)):
        # half of lora_alpha: a power of two, so B takes it up exactly
        assert np.array_equal(adapter.tensors[name][1], plain.tensors[name][1] / (2 if halved else 1))
    # PEFT: alpha / sqrt(r)
    adapter = read_adapter(folder(x, tensors, use_rslora=True, **config), base)
    for name, alpha, rank in ((Q, 3, 4), (K, 3, 2), (V, 6, 2)):
        a, b = adapter.tensors[name]
        _, unscaled = plain.tensors[name]
        ours, theirs = adapter.scale(name) * b @ a, alpha / rank**0.5 * unscaled @ a
        assert np.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_pattern_matches_whole_names_or_their_ends(tmp_path: Path, base: ModelFile) -> None:
    for pattern, hit in (
        ("q_proj", True), ("self_attn.q_proj", True), ("^model.layers.0.self_attn.q_proj", True), (".*q_proj", True),
        ("_proj", False), ("q_pro", False), ("^self_attn.q_proj", False), ("layers.[1-9].*", False),
    ):  # fmt: skip
        path = folder(tmp_path / "x", alpha_pattern={pattern: 12})
        scaled = read_peft(path, base).tensors[Q][1]
        once = read_peft(folder(tmp_path / "x"), base).tensors[Q][1]
        assert np.array_equal(scaled, once * (2 if hit else 1)), pattern


def test_where_the_folder_may_be_named(tmp_path: Path, base: ModelFile) -> None:
    path = folder(tmp_path / "x")
    assert sniff(path) == "peft"
    (path / "config.json").write_text("{}")  # of the model: some trainers copy it there
    assert sniff(path) == "peft"
    (path / "model.safetensors").touch()  # a model and an adapter in one folder
    assert sniff(path) == "huggingface" and read_adapter(path, base).path == path
    (path / "model.safetensors").unlink()
    one, two = read_adapter(path, base), read_adapter(path / "adapter_model.safetensors", base)
    assert one.architecture == "llama" and one.path == two.path == path and one.stamps is None
    assert np.array_equal(one.tensors[Q][1], two.tensors[Q][1])
    assert check_adapter(one, base) == []
    with pytest.raises(UsageError, match="without its base"):
        read_adapter(path)
    with pytest.raises(UnsupportedError, match="LoRA adapter"):
        open_model(path)
    (path / "adapter_model.safetensors").rename(path / "other.safetensors")
    with pytest.raises(UsageError, match=r"adapter_model\.safetensors"):
        read_adapter(path, base)
    with pytest.raises(UnsupportedError, match="got safetensors"):
        read_adapter(path / "other.safetensors", base)


def test_old_weights(tmp_path: Path, base: ModelFile) -> None:
    import torch

    path = folder(tmp_path / "x")
    expected = read_adapter(path, base).tensors[Q]
    (path / "adapter_model.safetensors").unlink()
    torch.save({n: torch.from_numpy(t) for n, t in pair().items()}, path / "adapter_model.bin")
    for place in (path, path / "adapter_model.bin"):
        assert all(np.array_equal(x, y) for x, y in zip(read_adapter(place, base).tensors[Q], expected, strict=True))


def _hf(base: ModelFile, name: str) -> np.ndarray:
    return base.read(name).view("<f4").reshape(base.tensors[name].n_rows, -1)


def test_modules_to_save(tmp_path: Path, base: ModelFile) -> None:
    same = _hf(base, "output.weight").copy()
    tensors = pair() | {"base_model.model.lm_head.weight": same, "base_model.model.model.norm.weight": values(64)}
    path = folder(tmp_path / "x", tensors, modules_to_save=["lm_head", "norm"])
    adapter = read_adapter(path, base)
    assert list(adapter.replaced) == ["output_norm.weight"] and adapter.replaced["output_norm.weight"].shape == (1, 64)
    with pytest.raises(UnsupportedError, match=r"whole tensors \(modules_to_save\): output_norm.weight") as caught:
        write_adapter(tmp_path / "x.gguf", adapter, base)
    assert "merge" in str(caught.value.hint) and not (tmp_path / "x.gguf").exists()
    with pytest.raises(UnsupportedError, match="whole tensors"):
        write_adapter_folder(tmp_path / "y", adapter, base)
    same[3, 5] += 1
    assert list(read_adapter(folder(path, tensors), base).replaced) == ["output.weight", "output_norm.weight"]
    packed = open_model(cached_tiny_gguf(type="Q8_0"))
    assert "output.weight" in read_adapter(path, packed).replaced  # never said to be equal


REFUSED = [
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA', expected LORA"),
    ({"peft_type": None}, "peft_type is None"),
    ({"use_dora": True}, "uses DoRA"),
    ({"bias": "lora_only"}, "trains biases"),
    ({"lora_bias": True}, "a bias on lora_B"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"target_parameters": ["x"]}, "target_parameters"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"use_qalora": True}, "QALoRA"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ({"init_lora_weights": "olora"}, "weights were changed at the start"),
    ({"init_lora_weights": [1]}, "weights were changed at the start"),
    ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
    ({"r": 0}, "r is 0"),
    ({"r": True}, "r is True"),
    ({"r": 3}, "has rank 2 .expected 3"),
    ({"lora_alpha": 0}, "lora_alpha is 0"),
    ({"lora_alpha": "x\x1b"}, r"lora_alpha is 'x\\x1b'"),
    ({"lora_alpha": 1e300}, "lora_alpha is 1e\\+300"),
    ({"rank_pattern": [1]}, "rank_pattern is"),
    ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern is 1.5"),
    ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern is None"),
    ({"alpha_pattern": {"(a+)+$": 1}}, "more than names, dots"),
    ({"alpha_pattern": {"(.|.)" * 40: 1}}, "more than names, dots"),
    ({"alpha_pattern": {".*.*.*.*x": 1}}, "more than names, dots"),
    ({"alpha_pattern": {"(?i)q_proj": 1}}, "more than names, dots"),
    ({"alpha_pattern": {"x" * 300: 1}}, "more than names, dots"),
    ({"alpha_pattern": {f"{i}.*": 1 for i in range(40)}}, "more than names, dots"),
    ({"alpha_pattern": {"(q_proj": 1}}, "broken pattern"),
]


@pytest.mark.parametrize(("config", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_refuses_by_name(tmp_path: Path, base: ModelFile, config: dict[str, Any], reason: str) -> None:
    with pytest.raises((FormatError, UnsupportedError), match=reason) as caught:
        read_peft(folder(tmp_path / "x", **config), base)
    assert str(caught.value.path).endswith("adapter_config.json") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({}, "without any LoRA tensor"),
        ({f"{HF_Q}.lora_A.weight": values(2, 64)}, r"is not whole \(it has A\)"),
        (pair("base_model.model.model.layers.0.mlp.gate"), "a Llama does not have"),
        (pair("base_model.model.vision\x1b"), r"adapts 'vision\\x1b'"),
        (
            pair("base_model.model.model.layers.7.self_attn.q_proj"),
            "blk.7.attn_q.weight, which the base model .* does not",
        ),
        (pair() | {f"{HF_Q}.lora_magnitude_vector": values(64)}, "trains DoRA"),
        (pair() | {f"{HF_Q}.lora_B.bias": values(64)}, "trains biases"),
        (pair() | {"base_model.model.x.trainable_tokens_delta": values(64)}, "trains single tokens"),
        (pair() | {"prompt_embeddings": values(64)}, "is no part of a LoRA"),
        (pair(n_out=32), r"wrong shape .*expected 64 x 64, got 32 x 64"),
        (pair(n_in=32), r"wrong shape .*expected 64 x 64, got 64 x 32"),
        (pair() | {f"{HF_Q}.lora_A.default.weight": values(2, 64)}, "two tensors are lora_A"),
        (pair("base_model.model.model.embed_tokens", n_out=64), "is not of an embedding"),
        ({f"{HF_Q}.lora_A.weight": values(2, 64), f"{HF_Q}.lora_B.weight": values(64, 3)}, "differ in rank"),
        ({f"{HF_Q}.lora_A.weight": values(2, 1, 64), f"{HF_Q}.lora_B.weight": values(64, 2)}, "is no matrix"),
        ({"base_model.model.lm_head.weight": values(420, 64)}, r"wrong shape .*got 420 x 64"),
        (pair("model.layers.0.self_attn.q_proj") | pair(), "two tensors are lora_A"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_tensors(tmp_path: Path, base: ModelFile, tensors: dict[str, np.ndarray], reason: str) -> None:
    with pytest.raises((FormatError, UnsupportedError, MismatchError), match=reason):
        read_peft(folder(tmp_path / "x", tensors), base)


def test_refuses_other_types_and_bases(tmp_path: Path, base: ModelFile) -> None:
    path = folder(tmp_path / "x")
    raw = (path / "adapter_model.safetensors").read_bytes()
    (path / "adapter_model.safetensors").write_bytes(raw.replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(UnsupportedError, match=r"has the type I32 \(expected F32, F16 or BF16\)"):
        read_peft(path, base)
    (path / "adapter_model.safetensors").write_bytes(raw.replace(b'"F32"', b'"U32"', 1))
    with pytest.raises(UnsupportedError, match=r"has the type U32"):
        read_peft(path, base)
    folder(path)
    for metadata, reason in (
        ({"general.architecture": "qwen2"}, "is a 'qwen2' model"),
        ({"general.architecture": "llama", "llama.attention.head_count": "4"}, "no single number of heads"),
        ({"general.architecture": "llama", "llama.attention.head_count": 48}, "expected a multiple of 96"),
    ):
        other = tmp_path / "other.gguf"
        tensor = TensorData(Q, (64, 64), GGMLType.F32, values(64, 64))
        write_gguf(other, metadata=metadata, tensors=[tensor])
        with pytest.raises((UnsupportedError, MismatchError), match=reason):
            read_peft(path, open_model(other))
    tied = open_model(cached_tiny_gguf(tied=True))
    n_vocab = base.tensors["output.weight"].shape[0]
    with pytest.raises(MismatchError, match=r"does not have \(its output is its embedding\)"):
        read_peft(folder(path, pair("base_model.model.lm_head", n_out=n_vocab)), tied)


def test_damaged_folders(tmp_path: Path, base: ModelFile) -> None:
    """Every byte that somebody may have changed: an error of ours, or a sound adapter."""
    path = folder(tmp_path / "x", alpha_pattern={"q_proj": 3}, rank_pattern={"k_proj": 2})
    rng = random.Random(0)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        whole = (path / name).read_bytes()
        for _ in range(150):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 3)):
                data[rng.randrange(min(len(data), 600))] = rng.randrange(256)
            (path / name).write_bytes(data[: rng.choice((len(data), rng.randrange(len(data))))])
            try:
                read_peft(path, base)
            except LlamakitError as error:
                assert error.exit_code == 2 and str(error).isprintable()
        (path / name).write_bytes(whole)


def some_adapter(base: ModelFile, alpha: float = 8.0) -> Adapter:
    pairs = {}
    for i, name in enumerate(("output.weight", Q, "blk.1.attn_k.weight", "blk.1.ffn_down.weight", "token_embd.weight")):
        info, rank = base.tensors[name], 2 + (i == 1)
        pairs[name] = (values(rank, info.shape[-1], seed=i), values(info.n_rows, rank, seed=i))
    return Adapter(alpha, pairs)


@pytest.mark.parametrize("alpha", [8.0, 0.1])
def test_there_and_back_is_the_same_file(tmp_path: Path, base: ModelFile, alpha: float) -> None:
    adapter = some_adapter(base, float(np.float32(alpha)))
    write_adapter(tmp_path / "one.gguf", adapter, base)
    write_adapter_folder(tmp_path / "x", adapter, base, base_model="a/b")
    write_adapter_folder(tmp_path / "y", adapter, base, base_model="a/b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()
    write_adapter(tmp_path / "two.gguf", read_adapter(tmp_path / "x", base), base)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["rank_pattern"] == {"model.layers.0.self_attn.q_proj": 3}
    assert config["base_model_name_or_path"] == "a/b" and config["lora_alpha"] == adapter.alpha
    assert config["target_modules"] == [
        "model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj",
        "model.layers.1.mlp.down_proj", "lm_head",
    ]  # fmt: skip
    with SafetensorsFile(tmp_path / "x" / "adapter_model.safetensors") as file:
        assert "base_model.model.model.embed_tokens.lora_embedding_A" in file.tensors


def test_an_adapter_without_alpha(tmp_path: Path, base: ModelFile) -> None:
    """GGUF's alpha of 0 is a scale of 1, which PEFT has where alpha is the rank."""
    adapter = some_adapter(base, 0.0)
    write_adapter_folder(tmp_path / "x", adapter, base)
    again = read_adapter(tmp_path / "x", base)
    for name, (a, b) in adapter.tensors.items():
        assert np.allclose(again.scale(name) * again.tensors[name][1], b, rtol=1e-6) and np.array_equal(
            again.tensors[name][0], a
        )


def test_what_a_folder_cannot_hold(tmp_path: Path, base: ModelFile) -> None:
    adapter = some_adapter(base)
    adapter.tensors["blk.0.attn_norm.weight"] = (values(1, 64), values(1, 1))
    with pytest.raises(UnsupportedError, match="has no LoRA pair for"):
        write_adapter_folder(tmp_path / "x", adapter, base)
    assert list(tmp_path.iterdir()) == []
    adapter.tensors = {"blk.9.attn_q.weight": (values(2, 64), values(64, 2))}
    with pytest.raises(MismatchError, match=r"blk\.9\.attn_q\.weight, which the base model"):
        write_adapter_folder(tmp_path / "x", adapter, base)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "y").touch()
    with pytest.raises(UsageError, match="is not empty"):
        write_adapter_folder(tmp_path / "x", some_adapter(base), base)
