"""`adapter_config.json` of PEFT: what it scales each module by, and what no GGUF adapter can carry, refused by name.

Meanings: PEFT's LoraConfig, tuners/lora/model.py and utils/other.py (0.21).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamakit.errors import FormatError, UnsupportedError
from llamakit.files import escape_control

_MAX_RANK = 1 << 16
# A pattern is a regular expression from a stranger: no group is repeated, and there are few choices, so none runs long.
_PIECE = re.compile(
    r"(?:\\[dw.\-_]|\[\^?[\w.\-]+\]|[\w.\-])(?P<repeat>[*+?]|\{\d{1,3}\})?|(?P<group>\((?:\?:)?)|[)|^$]"
)
_MAX_PATTERNS, _MAX_PATTERN_CHARS, _MAX_CHOICES, _MAX_WITH_CHOICES = 1 << 12, 256, 3, 32
#: what a config may ask for that is more than a pair of matrices -> what it is
_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias on lora_B",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "target_parameters": "parameters that belong to no linear layer (target_parameters)",
    "trainable_token_indices": "single trained tokens (trainable_token_indices)",
    "layer_replication": "replicated layers (layer_replication)",
    "alora_invocation_tokens": "an activated LoRA (alora_invocation_tokens)",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow routing",
}
#: starts that leave the base's weights as they are; the others train against a changed base
_HARMLESS_STARTS = {"gaussian", "eva", "orthogonal", "mica", "loftq"}


@dataclass(frozen=True)
class PeftConfig:
    """Rank and scale of every module.

    r, lora_alpha: of a module that no pattern names; ranks, alphas: (compiled pattern, value), in the file's order.
    rslora: the scale is alpha / sqrt(r) instead of alpha / r.
    """

    path: Path
    r: int
    lora_alpha: float
    rslora: bool
    ranks: tuple[tuple[re.Pattern[str], int], ...]
    alphas: tuple[tuple[re.Pattern[str], float], ...]

    @property
    def alpha(self) -> float:
        """The alpha of a GGUF adapter, whose scale is alpha / r, for a module that no pattern names."""
        return self.lora_alpha * math.sqrt(self.r) if self.rslora else self.lora_alpha

    def rank_of(self, module: str) -> int:
        """The rank that the config gives a module, such as model.layers.0.self_attn.q_proj."""
        return next((rank for pattern, rank in self.ranks if pattern.match(module)), self.r)

    def alpha_of(self, module: str) -> float:
        """The alpha for which alpha / rank is PEFT's scale of this module."""
        alpha = next((value for pattern, value in self.alphas if pattern.match(module)), self.lora_alpha)
        return alpha * math.sqrt(self.rank_of(module)) if self.rslora else alpha


def parse_config(path: Path, values: Mapping[str, Any]) -> PeftConfig:
    """The parsed adapter_config.json at `path`.

    Raises UnsupportedError, by name, for what is more than pairs of matrices; FormatError for what makes no sense.
    """
    _refuse_other_kinds(path, values)
    rslora = values.get("use_rslora") or False
    if not isinstance(rslora, bool):
        raise FormatError(f"use_rslora is {_shown(rslora)} (expected true or false)", path=path)
    return PeftConfig(
        path=path,
        r=_rank(path, "r", values.get("r", 8)),
        lora_alpha=_alpha(path, "lora_alpha", values.get("lora_alpha", 8)),
        rslora=rslora,
        ranks=tuple((p, _rank(path, "rank_pattern", v)) for p, v in _patterns(path, values, "rank_pattern")),
        alphas=tuple((p, _alpha(path, "alpha_pattern", v)) for p, v in _patterns(path, values, "alpha_pattern")),
    )


def _refuse_other_kinds(path: Path, values: Mapping[str, Any]) -> None:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"is no LoRA adapter (peft_type is {_shown(kind)}, expected LORA)", path=path)
    for key, what in _REFUSED.items():
        if values.get(key):
            raise UnsupportedError(f"uses {what}, which is not supported", path=path, hint=_MERGE_THERE)
    bias = values.get("bias")
    if bias not in (None, "none"):
        raise UnsupportedError(
            f"trains biases (bias is {_shown(bias)}, expected none), which is not supported",
            path=path,
            hint=_MERGE_THERE,
        )
    start = values.get("init_lora_weights", True)
    if not (start is None or isinstance(start, bool) or (isinstance(start, str) and start in _HARMLESS_STARTS)):
        raise UnsupportedError(
            f"belongs to a base whose weights were changed at the start (init_lora_weights is {_shown(start)})",
            path=path,
            hint="save it in PEFT with path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
        )


_MERGE_THERE = "merge it in PEFT (merge_and_unload), and use the model"


def _patterns(path: Path, values: Mapping[str, Any], key: str) -> list[tuple[re.Pattern[str], Any]]:
    """PEFT's patterns: each matches whole module names, or their ends after a dot."""
    table = values.get(key) or {}
    if not isinstance(table, dict) or len(table) > _MAX_PATTERNS:
        raise FormatError(f"{key} is {_shown(table)} (expected an object of up to {_MAX_PATTERNS} entries)", path=path)
    found = []
    n_with_choices = 0
    for pattern, value in table.items():
        n_choices = _choices(pattern)
        n_with_choices += n_choices > 0
        if n_choices > _MAX_CHOICES or n_with_choices > _MAX_WITH_CHOICES:
            raise UnsupportedError(
                f"{key} has the pattern {_shown(pattern)}, which is more than names, dots, classes and a few repeats",
                path=path,
                hint="name the modules one by one",
            )
        try:
            found.append((re.compile(rf"(.*\.)?({pattern})$"), value))
        except re.error as error:
            raise FormatError(f"{key} has the broken pattern {_shown(pattern)} ({error})", path=path) from error
    return found


def _choices(pattern: str) -> int:
    """Repeats and groups of a pattern, 1000 where it has anything else or is too long."""
    at, n = 0, 0
    while at < len(pattern) <= _MAX_PATTERN_CHARS:
        piece = _PIECE.match(pattern, at)
        if piece is None:
            break
        n += (piece["repeat"] or piece["group"]) is not None
        at = piece.end()
    return n if at == len(pattern) else 1000


def _rank(path: Path, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_RANK:
        raise FormatError(f"{key} is {_shown(value)} (expected a rank of 1 to {_MAX_RANK})", path=path)
    return value


def _alpha(path: Path, key: str, value: Any) -> float:
    """0 is refused: the adapter would do nothing, and GGUF's alpha of 0 means that there is no scale."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < abs(value) <= 1e30:
        raise FormatError(f"{key} is {_shown(value)} (expected a number other than 0)", path=path)
    return float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return escape_control(text if len(text) <= 80 else f"{text[:77]}...")
