"""The types of tensors in quantized files, against what llama-quantize of 2026 said with --dry-run."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from llamakit.conversion.file_types import QUANTIZE_TYPES
from llamakit.conversion.quantize_policy import (
    Mixture,
    may_quantize,
    needs_imatrix,
    output_order,
    parse_tensor_type,
    tensor_types,
)
from llamakit.errors import FormatError, UnsupportedError, UsageError
from llamakit.formats.base import TensorInfo
from llamakit.ggml import GGMLType as T

#: name -> layers, Q heads, KV heads, n_embd, n_ff, and what is special
MODELS: dict[str, tuple[int, int, int, int, int, str]] = {
    "8 layers": (8, 8, 8, 256, 512, ""),
    "8 layers, tied": (8, 8, 2, 256, 512, "tied"),
    "16 layers, 4 Q per KV": (16, 8, 2, 256, 512, ""),
    "16 layers, 2 Q per KV": (16, 8, 4, 256, 512, ""),
    "80 layers": (80, 8, 8, 256, 256, ""),
    "80 layers, 8 Q per KV": (80, 8, 1, 256, 256, ""),
    "rows of 288": (6, 6, 6, 288, 768, ""),
    "rows of 40": (2, 1, 1, 40, 72, ""),
    "8 experts": (16, 8, 2, 256, 256, "8 experts"),
    "4 experts": (16, 8, 2, 256, 256, "4 experts"),
    "attn_qkv": (8, 8, 8, 256, 512, "qkv"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "pure": {"pure": True},
    "leave output": {"leave_output_tensor": True},
    "output, embedding": {"output_tensor_type": T.F32, "token_embedding_type": T.Q5_1},
    "output": {"output_tensor_type": T.F32},
    "rules": {"tensor_type_rules": [("attn_v", T.Q8_0), (r"blk\.[0-3]\.ffn", T.Q3_K), ("attn", T.F16)]},
    "imatrix": {"has_imatrix": True},
}
#: model -> digest of what the tool said for every type; model, options -> the same
GOLDEN: dict[str, str] = {
    "8 layers": "928d0a42f742b80a",
    "8 layers, pure": "5e2e6d790202e2ae",
    "8 layers, leave output": "659eb0cafb789fc3",
    "8 layers, output, embedding": "f24e90e0dbb0ae0a",
    "8 layers, output": "3b552be0e8c15a59",
    "8 layers, rules": "87525b45bfa4757b",
    "8 layers, imatrix": "3fad7898410ccf2a",
    "8 layers, tied": "9c51032a4e7542c4",
    "8 layers, tied, pure": "19c6f46aa5c527a0",
    "8 layers, tied, leave output": "9c51032a4e7542c4",
    "8 layers, tied, output, embedding": "3b450baf9d97c40f",
    "8 layers, tied, output": "7cf89d9357e0c104",
    "8 layers, tied, rules": "709be91e50afac9c",
    "8 layers, tied, imatrix": "6c7edc3cf2a614cd",
    "16 layers, 4 Q per KV": "3f21aa86a6604d6f",
    "16 layers, 4 Q per KV, pure": "706a4116f69126db",
    "16 layers, 4 Q per KV, leave output": "9900f409e9ee1c4d",
    "16 layers, 4 Q per KV, output, embedding": "484934b77402ef71",
    "16 layers, 4 Q per KV, output": "841ce0425653ae87",
    "16 layers, 4 Q per KV, rules": "5d4a6462891a6aa6",
    "16 layers, 4 Q per KV, imatrix": "3ce859bb629a849a",
    "16 layers, 2 Q per KV": "8f55698a549b21de",
    "80 layers": "e4ae409639f6d9f6",
    "80 layers, 8 Q per KV": "f4e4678612e872d3",
    "rows of 288": "3a52bad1b3a01638",
    "rows of 288, pure": "99e42cd431ea7ee3",
    "rows of 288, leave output": "8895c7d19fafb870",
    "rows of 288, output, embedding": "f64bdebdb8d592df",
    "rows of 288, output": "d8dabca4f6dba8a2",
    "rows of 288, rules": "7d9e8511af6e350e",
    "rows of 288, imatrix": "3a52bad1b3a01638",
    "rows of 40": "98dec81409a34ee1",
    "8 experts": "7ad7038df2f4b311",
    "8 experts, pure": "03bf025b9bee09a3",
    "8 experts, leave output": "70544011237487f8",
    "8 experts, output, embedding": "b530d64ea5c0b331",
    "8 experts, output": "e403a293901e2604",
    "8 experts, rules": "663d529ee8207da1",
    "8 experts, imatrix": "3f94d8b7089925d9",
    "4 experts": "b0047aeb321880be",
    "attn_qkv": "33a1d3b4ad336681",
}


def model(name: str) -> tuple[dict[str, Any], list[TensorInfo]]:
    n_layer, n_head, n_head_kv, n_embd, n_ff, special = MODELS[name]
    n_expert = int(special[0]) if special.endswith("experts") else 0
    n_kv = n_embd // n_head * n_head_kv
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (64, n_embd), "output_norm.weight": (n_embd,)}
    if special != "tied":
        shapes["output.weight"] = (64, n_embd)
    layer: dict[str, tuple[int, ...]] = {"attn_norm": (n_embd,), "ffn_norm": (n_embd,), "attn_output": (n_embd, n_embd)}
    if special == "qkv":
        layer["attn_qkv"] = (n_embd + 2 * n_kv, n_embd)
    else:
        layer |= {"attn_q": (n_embd, n_embd), "attn_k": (n_kv, n_embd), "attn_v": (n_kv, n_embd)}
    ffn = {"ffn_gate": (n_ff, n_embd), "ffn_up": (n_ff, n_embd), "ffn_down": (n_embd, n_ff)}
    if n_expert:
        layer["ffn_gate_inp"] = (n_expert, n_embd)
        layer |= {f"{part}_exps": (n_expert, *shape) for part, shape in ffn.items()}
    else:
        layer |= ffn
    shapes |= {f"blk.{i}.{part}.weight": shape for i in range(n_layer) for part, shape in layer.items()}
    infos = [TensorInfo(n, shapes[n], T.F16 if len(shapes[n]) > 1 else T.F32, 0) for n in output_order(shapes)]
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": n_layer,
        "llama.attention.head_count": n_head,
        "llama.attention.head_count_kv": n_head_kv,
        "llama.expert_count": n_expert,
    }
    return metadata, infos


def digest(mixtures: dict[str, Mixture]) -> str:
    """Of a line for each type and tensor, and of the number of fallbacks."""
    text = hashlib.sha256()
    for kind, mixture in mixtures.items():
        lines = [f"{name} {target.name}\n" for name, target in mixture.types.items()]
        text.update(f"{kind} {len(mixture.fallbacks)}\n{''.join(lines)}".encode())
    return text.hexdigest()[:16]


def mixtures(name: str, **options: Any) -> dict[str, Mixture]:
    metadata, infos = model(name)
    return {kind: tensor_types(t, metadata, infos, **options) for kind, t in QUANTIZE_TYPES.items()}


@pytest.mark.parametrize("name", MODELS)
def test_mixtures_are_those_of_llama_quantize(name: str) -> None:
    assert digest(mixtures(name)) == GOLDEN[name]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["8 layers", "8 layers, tied", "16 layers, 4 Q per KV", "rows of 288", "8 experts"])
def test_options_do_what_they_do_there(name: str, options: str) -> None:
    assert digest(mixtures(name, **OPTIONS[options])) == GOLDEN[f"{name}, {options}"]


def test_a_mixture_in_full() -> None:
    """One that can be read: Q4_K_M of 8 layers."""
    types = mixtures("8 layers")["Q4_K_M"].types
    more = [name for name, target in types.items() if target == T.Q6_K]
    more_bits = [0, 3, 6, 7]
    assert more == ["output.weight"] + [f"blk.{i}.{part}.weight" for i in more_bits for part in ("attn_v", "ffn_down")]
    assert {types[f"blk.{i}.attn_norm.weight"] for i in range(8)} == {T.F32}
    assert set(types.values()) == {T.F32, T.Q4_K, T.Q6_K}


def test_rows_that_do_not_fit_fall_back_and_are_counted() -> None:
    mixture = mixtures("rows of 288")["Q4_K_M"]
    assert mixture.types["blk.0.attn_q.weight"] == T.Q5_0
    assert mixture.types["blk.2.attn_v.weight"] == T.Q8_0
    assert mixture.types["blk.2.ffn_down.weight"] == T.Q6_K
    assert "blk.0.attn_q.weight" in mixture.fallbacks and "blk.2.ffn_down.weight" not in mixture.fallbacks
    assert mixtures("rows of 40")["Q4_K_M"].types["blk.0.attn_q.weight"] == T.F16


def test_tensor_types_by_name() -> None:
    assert parse_tensor_type("q6_k") == T.Q6_K and parse_tensor_type("BF16") == T.BF16
    with pytest.raises(UsageError, match=r"^unknown tensor type: Q4_K_M$"):
        parse_tensor_type("Q4_K_M")
    with pytest.raises(UnsupportedError, match=r"^tensor type IQ2_S has no encoder$"):
        parse_tensor_type("iq2_s")


def test_order_of_the_output() -> None:
    names = ["blk.10.a", "blk.2.b", "blk.2.a", "token_embd.weight", "output.weight", "blk.x", "output_norm.weight"]
    expected = ["blk.x", "output.weight", "output_norm.weight", "token_embd.weight", "blk.2.a", "blk.2.b", "blk.10.a"]
    assert output_order(names) == expected


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.foo.weight", (4, 8), True),
        ("blk.0.foo.weight", (2, 4, 8), True),
        ("blk.0.foo.weight", (8,), False),
        ("blk.0.foo.weight", (1, 8), False),
        ("blk.0.foo.weight", (2, 1, 8), True),
        ("blk.0.foo.bias", (4, 8), False),
        ("foo.weight.x", (4, 8), False),
        ("blk.0.attn_q_norm.weight", (4, 8), False),
        ("blk.0.ffn_gate_inp.weight", (4, 8), False),
        ("position_embd.weight", (4, 8), False),
        ("token_types.weight", (4, 8), False),
        ("output.weight", (4, 8), True),
    ],
)
def test_what_may_be_quantized(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert may_quantize(name, shape) == expected
    assert not may_quantize("output.weight", (4, 8), leave_output_tensor=True)


def test_what_needs_an_imatrix() -> None:
    small = QUANTIZE_TYPES["Q2_K_S"]
    assert needs_imatrix("blk.0.attn_q.weight", T.Q2_K, small)
    assert not needs_imatrix("blk.0.attn_q.weight", T.Q4_0, small)
    assert not needs_imatrix("token_embd.weight", T.Q2_K, small) and not needs_imatrix("output.weight", T.Q2_K, small)
    assert not needs_imatrix("blk.0.attn_q.weight", T.Q2_K, QUANTIZE_TYPES["Q2_K"])


def test_heads_may_differ_from_layer_to_layer() -> None:
    metadata, infos = model("16 layers, 4 Q per KV")
    listed = metadata | {"llama.attention.head_count_kv": np.array([2] * 16, np.int32)}
    kind = QUANTIZE_TYPES["Q2_K"]
    assert tensor_types(kind, listed, infos) == tensor_types(kind, metadata, infos)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", 7, r"^the metadata has no general\.architecture$"),
        ("llama.block_count", "8", r"^llama\.block_count is missing or no integer$"),
        ("llama.block_count", None, r"^llama\.block_count is missing or no integer$"),
        ("llama.attention.head_count", True, r"^llama\.attention\.head_count is missing or no integer$"),
        ("llama.attention.head_count", [], r"^llama\.attention\.head_count is missing or no integer$"),
    ],
)
def test_broken_hyper_parameters_are_refused(key: str, value: object, message: str) -> None:
    metadata, infos = model("8 layers")
    with pytest.raises(FormatError, match=message):
        tensor_types(QUANTIZE_TYPES["Q4_K_M"], metadata | {key: value}, infos)


def test_other_refusals() -> None:
    metadata, infos = model("8 layers")
    kind = QUANTIZE_TYPES["Q4_K_M"]
    with pytest.raises(UnsupportedError, match=r"^the mixtures of falcon models are not supported$"):
        tensor_types(kind, {"general.architecture": "falcon"}, infos)
    assert tensor_types(kind, {"general.architecture": "falcon"}, infos, pure=True).types["output.weight"] == T.Q4_K
    with pytest.raises(UsageError, match=r"^attn\( is no regular expression: "):
        tensor_types(kind, metadata, infos, tensor_type_rules=[("attn(", T.Q8_0)])
    with pytest.raises(FormatError, match=r"^tensor blk\.9\.ffn_down_exps\.weight is of no layer of the model"):
        stray = TensorInfo("blk.9.ffn_down_exps.weight", (4, 256, 256), T.F16, 0)
        tensor_types(kind, metadata | {"llama.expert_count": 4}, [stray])
