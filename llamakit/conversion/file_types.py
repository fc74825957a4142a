"""What a model can be quantized to: llama-quantize's names, numbers and aliases. Torch-free.

Facts: llama.cpp of 2026, tools/quantize/quantize.cpp (names, their order) and include/llama.h (numbers).
"""

from __future__ import annotations

from typing import NamedTuple

from llamakit.errors import UnsupportedError, UsageError
from llamakit.files import escape_control
from llamakit.ggml import FILE_TYPES, GGMLType

T = GGMLType


class FileType(NamedTuple):
    """What a user asks for: the name, `general.file_type`, and the type of most tensors. COPY has no number."""

    name: str
    number: int | None
    default: GGMLType | None


_DEFAULTS = {
    "F32": T.F32, "F16": T.F16, "BF16": T.BF16, "Q4_0": T.Q4_0, "Q4_1": T.Q4_1, "Q5_0": T.Q5_0, "Q5_1": T.Q5_1,
    "Q8_0": T.Q8_0, "Q2_K": T.Q2_K, "Q2_K_S": T.Q2_K, "Q3_K_S": T.Q3_K, "Q3_K_M": T.Q3_K, "Q3_K_L": T.Q3_K,
    "Q4_K_S": T.Q4_K, "Q4_K_M": T.Q4_K, "Q5_K_S": T.Q5_K, "Q5_K_M": T.Q5_K, "Q6_K": T.Q6_K, "IQ4_NL": T.IQ4_NL,
    "IQ4_XS": T.IQ4_XS, "TQ1_0": T.TQ1_0, "TQ2_0": T.TQ2_0, "MXFP4_MOE": T.MXFP4,
}  # fmt: skip
_NUMBERS = {name: number for number, name in FILE_TYPES.items()}
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
#: llama.cpp's types that llamakit does not make -> the one nearest in size that it makes of any model
_NEAREST = {
    "Q1_0": "TQ1_0", "Q2_0": "TQ2_0", "IQ1_S": "Q2_K", "IQ1_M": "Q2_K", "IQ2_XXS": "Q2_K", "IQ2_XS": "Q2_K",
    "IQ2_S": "Q2_K", "IQ2_M": "Q2_K", "IQ3_XXS": "Q2_K", "IQ3_XS": "Q3_K_S", "IQ3_S": "Q3_K_S", "IQ3_M": "Q3_K_M",
    "NVFP4": "IQ4_NL",
}  # fmt: skip
#: by name, with COPY; aliases are not in it
QUANTIZE_TYPES: dict[str, FileType] = {
    **{name: FileType(name, _NUMBERS[name], default) for name, default in _DEFAULTS.items()},
    "COPY": FileType("COPY", None, None),
}
#: bits per weight of Llama 3.1 8B, embeddings and norms included; MXFP4_MOE packs experts in 4.25, the rest in Q8_0
BITS_PER_WEIGHT = {
    "F32": 32.00, "F16": 16.00, "BF16": 16.00, "Q8_0": 8.50, "Q6_K": 6.56, "Q5_K_M": 5.70, "Q5_K_S": 5.57,
    "Q5_1": 6.04, "Q5_0": 5.57, "Q4_K_M": 4.89, "Q4_K_S": 4.67, "Q4_1": 5.10, "Q4_0": 4.64, "IQ4_NL": 4.68,
    "IQ4_XS": 4.46, "MXFP4_MOE": 8.50, "Q3_K_L": 4.30, "Q3_K_M": 4.00, "Q3_K_S": 3.64, "Q2_K": 3.16, "Q2_K_S": 2.97,
    "TQ2_0": 2.52, "TQ1_0": 2.19,
}  # fmt: skip


def parse_file_type(text: str) -> FileType:
    """A name, in any case, an alias, or a number of `general.file_type`.

    Raises UnsupportedError for a type of llama.cpp's that llamakit does not make, UsageError for anything else.
    """
    name = _name(text)
    name = _ALIASES.get(name, name)
    if name in QUANTIZE_TYPES:
        return QUANTIZE_TYPES[name]
    if name in _NEAREST:
        raise UnsupportedError(f"quantizing to {name} is not supported", hint=f"the nearest that is: {_NEAREST[name]}")
    offered = f"one of {', '.join([*QUANTIZE_TYPES, *_ALIASES])}"
    raise UsageError(f"unknown type to quantize to: {escape_control(text)}", hint=f"take {offered}")


def given_name(text: str) -> str:
    """How llama-quantize spells a type that was given as `text` in a file's name: an alias stays one, a number is the
    alias where there is one. Raises what `parse_file_type` raises."""
    found = parse_file_type(text)
    if text.upper() in _ALIASES or text.upper() == found.name:
        return text.upper()
    return next((alias for alias, name in _ALIASES.items() if name == found.name), found.name)


def _name(text: str) -> str:
    name = text.upper()
    return FILE_TYPES.get(int(name[:9]), name) if name.isascii() and name.isdigit() else name


def types_table() -> str:
    """Every type with its number, the bits per weight that it takes, and what there is to know of it."""
    notes = {alias_of: f"also {alias}" for alias, alias_of in _ALIASES.items()}
    notes |= {
        "Q2_K_S": "needs --imatrix",
        "MXFP4_MOE": "experts 4.25, the rest Q8_0",
        "TQ1_0": "for models trained in -1, 0, 1",
        "TQ2_0": "for models trained in -1, 0, 1",
        "COPY": "every tensor as it is",
    }
    rows = [(name, QUANTIZE_TYPES[name].number, f"{bits:.2f}") for name, bits in BITS_PER_WEIGHT.items()]
    lines = [f"{'type':<10} {'number':>6}  {'bits per weight':>15}"]
    for name, number, bits in [*rows, ("COPY", "", "")]:
        lines.append(f"{name:<10} {number:>6}  {bits:>15}  {notes.get(name, '')}".rstrip())
    return "\n".join([*lines, "", "Bits per weight are those of Llama 3.1 8B."])
