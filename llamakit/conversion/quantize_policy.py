"""Which type each tensor gets when a model is quantized: llama-quantize's file types and their mixtures.

Facts: llama.cpp of 2026, src/llama-quant.cpp (which tensors, which type, shapes that do not fit). Pure functions of
metadata and tensor tables; nothing is read or written here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llamakit.conversion.file_types import FileType
from llamakit.errors import FormatError, UnsupportedError, UsageError
from llamakit.files import escape_control
from llamakit.formats.base import TensorInfo
from llamakit.ggml import BLOCK_SIZES, FLOAT_TYPES, GGMLType
from llamakit.quant import can_encode

T = GGMLType


def parse_tensor_type(text: str) -> GGMLType:
    """A tensor type by name, in any case. Raises UsageError for no type, UnsupportedError where there is no encoder."""
    found = GGMLType.__members__.get(text.upper())
    if found is None:
        raise UsageError(f"unknown tensor type: {escape_control(text)}")
    if not can_encode(found):
        raise UnsupportedError(f"tensor type {found.name} has no encoder")
    return found


def output_order(names: Iterable[str]) -> list[str]:
    """Tensor names as llama-quantize writes them: without a layer first, then by layer; there by the name's bytes."""
    return sorted(names, key=lambda name: (_layer(name), name.encode()))


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d{1,9})\.", name)
    return int(found[1]) if found else -1


_NEVER = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "time_mix_first.weight",
    "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_v0.weight", "time_mix_v1.weight",
    "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight", "time_mix_g1.weight",
    "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight",
    "attn_rel_b.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd",
    ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
_NEVER_WHOLE = frozenset({"position_embd.weight", "token_types.weight"})
TOKEN_EMBD = frozenset({"token_embd.weight", "per_layer_token_embd.weight"})
#: the first part of a name that is found decides
_ROLES = (
    ("attn_qkv.weight", "attn_v"), ("attn_kv_b.weight", "attn_v"), ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"), ("attn_q.weight", "attn_q"), ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"), ("ffn_gate", "ffn_gate"), ("ffn_down", "ffn_down"),
)  # fmt: skip
#: what to take where a row is not a multiple of 256; then F16 where it is not one of 32 either
_SMALLER_BLOCKS = {
    T.IQ4_XS: T.IQ4_NL, T.Q2_K: T.Q4_0, T.Q3_K: T.Q4_0, T.TQ1_0: T.Q4_0, T.TQ2_0: T.Q4_0, T.Q4_K: T.Q5_0,
    T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0,
}  # fmt: skip
#: architectures with rules of their own that are not here
_OTHER_RULES = frozenset({"falcon", "glm5-next", "bailingmoe3"})
#: architecture -> layers of its 70B model, in which attn_v gets more bits; llama's must have fewer K and V heads, too
_LAYERS_OF_70B = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}


def _role(name: str) -> str:
    if name == "output.weight":
        return "output"
    if name in TOKEN_EMBD:
        return "token_embd"
    return next((role for part, role in _ROLES if part in name), "other")


def may_quantize(name: str, shape: Sequence[int], *, leave_output_tensor: bool = False) -> bool:
    """Whether llama-quantize changes the type of such a tensor at all: matrices named *weight, but for some."""
    n_dims = next((len(shape) - axis for axis, size in enumerate(shape) if size > 1), 1)
    return (
        n_dims >= 2
        and name.endswith("weight")
        and name not in _NEVER_WHOLE
        and not (leave_output_tensor and name == "output.weight")
        and not any(part in name for part in _NEVER)
    )


def needs_imatrix(name: str, target: GGMLType, file_type: FileType) -> bool:
    """Whether llama-quantize refuses to make the tensor without an importance: Q2_K in a Q2_K_S file does."""
    return file_type.name == "Q2_K_S" and target == T.Q2_K and name not in TOKEN_EMBD and name != "output.weight"


class Mixture(NamedTuple):
    """types: name -> type, of all tensors; fallbacks: those whose rows did not fit the type that they should have."""

    types: dict[str, GGMLType]
    fallbacks: list[str]


def tensor_types(
    file_type: FileType,
    metadata: Mapping[str, Any],
    tensors: Sequence[TensorInfo],
    *,
    has_imatrix: bool = False,
    pure: bool = False,
    leave_output_tensor: bool = False,
    output_tensor_type: GGMLType | None = None,
    token_embedding_type: GGMLType | None = None,
    tensor_type_rules: Sequence[tuple[str, GGMLType]] = (),
) -> Mixture:
    """The type of every tensor, in the order given, which matters: some rules count (see `output_order`).

    tensor_type_rules: regular expressions, searched in names, and types; the first that is found counts. Rules, pure
    and mixtures are for file types of blocks only, as in llama-quantize: F32, F16 and BF16 are uniform.
    Raises FormatError for hyper-parameters that are missing or no numbers, UnsupportedError for an architecture with
    other rules, UsageError for a broken regular expression.
    """
    if file_type.default is None:
        return Mixture({info.name: info.type for info in tensors}, [])
    rules = [(_compiled(pattern), target) for pattern, target in tensor_type_rules]
    roles = {info.name: _role(info.name) for info in tensors}
    mixing = file_type.default not in FLOAT_TYPES and not pure
    state = (
        _State(file_type, _Shape.of(metadata), Counter(roles.values()), has_imatrix, output_tensor_type)
        if mixing
        else None
    )
    types, fallbacks = {}, []
    for info in tensors:
        name, role = info.name, roles[info.name]
        ruled = next((target for pattern, target in rules if pattern.search(name)), None)
        if not may_quantize(name, info.shape, leave_output_tensor=leave_output_tensor):
            types[name] = info.type
        elif role == "token_embd" and token_embedding_type is not None and not _follows_rule(name, ruled):
            types[name] = token_embedding_type
        elif role == "output" and output_tensor_type is not None:
            types[name] = output_tensor_type
        elif file_type.default in FLOAT_TYPES:
            types[name] = file_type.default
        else:
            wanted = ruled if ruled is not None else state.choose(info, role) if state else file_type.default
            types[name] = _that_fits(wanted, info.shape[-1])
            if types[name] != wanted:
                fallbacks.append(name)
    return Mixture(types, fallbacks)


def _follows_rule(name: str, ruled: GGMLType | None) -> bool:
    """Of the embeddings only the table for each layer has a rule before --token-embedding-type."""
    return ruled is not None and name == "per_layer_token_embd.weight"


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{escape_control(pattern)} is no regular expression: {error}") from error


def _that_fits(wanted: GGMLType, n_in: int) -> GGMLType:
    """The type itself, or one of smaller blocks, or F16, whichever divides rows of n_in weights."""
    for candidate in (wanted, _SMALLER_BLOCKS.get(wanted, wanted)):
        if n_in % BLOCK_SIZES[candidate][0] == 0:
            return candidate
    return T.F16


@dataclass(frozen=True)
class _Shape:
    """What the mixtures want to know of a model. n_gqa: Q heads per K head, 0 where there is no K head."""

    n_layer: int
    n_expert: int
    n_gqa: int
    is_70b: bool

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> _Shape:
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise FormatError("the metadata has no general.architecture")
        if architecture in _OTHER_RULES:
            raise UnsupportedError(f"the mixtures of {architecture} models are not supported", hint="use --pure")

        def number(key: str, default: int | None = None) -> int:
            """An integer, or the first of a list of one for each layer."""
            value = metadata.get(f"{architecture}.{key}", default)
            if not isinstance(value, (bool, str, int, float)) and value is not None and len(value):
                value = int(value[0])
            if isinstance(value, bool) or not isinstance(value, int):
                raise FormatError(f"{escape_control(f'{architecture}.{key}')} is missing or no integer")
            return value

        n_layer, n_head = number("block_count"), number("attention.head_count", 0)
        n_head_kv = number("attention.head_count_kv", n_head)
        is_70b = _LAYERS_OF_70B.get(architecture) == n_layer and (architecture != "llama" or n_head != n_head_kv)
        n_gqa = n_head // n_head_kv if n_head_kv else 0
        return cls(n_layer, number("expert_count", 0), n_gqa, is_70b)


@dataclass
class _State:
    """A mixture under way: how many tensors of a role have had their turn."""

    file_type: FileType
    shape: _Shape
    n_of_role: Counter[str]
    has_imatrix: bool
    output_tensor_type: GGMLType | None
    seen: Counter[str] = field(default_factory=Counter)

    def choose(self, info: TensorInfo, role: str) -> GGMLType:
        """The type that the tensor should have, whether its rows fit or not."""
        assert self.file_type.default is not None
        kind, default = self.file_type.name, self.file_type.default
        if role == "output" or (role == "token_embd" and not self.n_of_role["output"]):
            return self._output(info) if self.output_tensor_type is None else self.output_tensor_type
        if kind == "MXFP4_MOE":
            return T.MXFP4 if len(info.shape) > 2 and info.shape[-3] > 1 else T.Q8_0
        if role == "token_embd":
            return T.Q4_K if kind in ("TQ1_0", "TQ2_0") else default
        self.seen[role] += 1
        if role == "attn_v":
            return self._attn_v(self.seen[role] - 1)
        if role == "ffn_down":
            return self._ffn_down(self._ffn_layer(info.name, self.seen[role] - 1))
        if role == "attn_k" and self.shape.n_expert == 8:
            return T.Q8_0
        return self._attn_output() if role == "attn_output" else default

    def _output(self, info: TensorInfo) -> GGMLType:
        default = self.file_type.default
        assert default is not None
        if self.file_type.name == "MXFP4_MOE" or info.shape[-1] % BLOCK_SIZES[default][0]:
            return T.Q8_0
        return T.Q8_0 if default == T.Q8_0 else T.Q6_K

    def _attn_v(self, index: int) -> GGMLType:
        kind, many = self.file_type.name, self.shape.n_gqa >= 4
        chosen = self.file_type.default
        assert chosen is not None
        if kind == "Q2_K":
            chosen = T.Q4_K if many else T.Q3_K
        elif kind == "Q2_K_S" and many:
            chosen = T.Q4_K
        elif kind == "Q3_K_M":
            chosen = T.Q5_K if index < 2 else T.Q4_K
        elif kind == "Q3_K_L" or (kind in ("IQ4_NL", "IQ4_XS") and many) or (kind == "Q4_K_S" and index < 4):
            chosen = T.Q5_K
        elif kind in ("Q4_K_M", "Q5_K_M") and _use_more_bits(index, self.n_of_role["attn_v"]):
            chosen = T.Q6_K
        if self.shape.is_70b and chosen in (T.Q3_K, T.Q4_K):
            chosen = T.Q5_K
        return T.Q8_0 if self.shape.n_expert == 8 else chosen

    def _ffn_layer(self, name: str, index: int) -> int:
        """How many came before; with experts, the layer in the name."""
        if self.shape.n_expert <= 1:
            return index
        layer = _layer(name)
        if not 0 <= layer < self.shape.n_layer:
            last = self.shape.n_layer - 1
            raise FormatError(f"tensor {escape_control(name)} is of no layer of the model (expected 0 to {last})")
        return layer

    def _ffn_down(self, layer: int) -> GGMLType:
        kind, n = self.file_type.name, self.shape.n_layer
        early = layer < n // 8
        default = self.file_type.default
        assert default is not None
        if kind in ("Q4_K_M", "Q5_K_M"):
            return T.Q6_K if _use_more_bits(layer, n) else default
        if kind == "Q3_K_M":
            return T.Q5_K if layer < n // 16 else T.Q4_K
        if early and self.has_imatrix and kind in ("Q4_0", "Q5_0"):
            return T.Q4_1 if kind == "Q4_0" else T.Q5_1
        if early and not self.has_imatrix and kind in ("IQ4_NL", "IQ4_XS"):
            return T.Q5_K
        if early and kind in ("Q2_K_S", "Q4_K_S"):
            return T.Q4_K if kind == "Q2_K_S" else T.Q5_K
        return {"Q2_K": T.Q3_K, "Q3_K_L": T.Q5_K}.get(kind, default)

    def _attn_output(self) -> GGMLType:
        kind = self.file_type.name
        assert self.file_type.default is not None
        if self.shape.n_expert == 8:
            more = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ4_XS")
            return T.Q5_K if kind in more else self.file_type.default
        return {"Q2_K": T.Q3_K, "Q3_K_M": T.Q4_K, "Q3_K_L": T.Q5_K}.get(kind, self.file_type.default)


def _use_more_bits(index: int, count: int) -> bool:
    """The first and the last eighth, and every third in between."""
    eighth = count // 8
    return index < eighth or index >= 7 * count // 8 or (index - eighth) % 3 == 2
