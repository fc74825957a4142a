"""What `merge` can be asked for. Torch-free: the command line takes its defaults from here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from llamakit.conversion.convert_config import check_stated, refuse_stdout
from llamakit.errors import UsageError
from llamakit.ggml import GGMLType


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """A base, the adapters that are put into it, and what is written. Raises UsageError naming the flag."""

    model: Path
    """The base model, any that `open_model` opens."""
    lora: tuple[Path, ...] = ()
    """Adapters with scale 1, in the order in which they are added: GGUF, PEFT folders, old `ggla` files."""
    lora_scaled: tuple[tuple[Path, float], ...] = ()
    """Adapters with a scale of the user's, added after `lora`."""
    out: Path = Path("ggml-lora-merged-f16.gguf")
    """The GGUF file to be written."""
    outtype: str | None = None
    """None: llama-export-lora's choice (a changed tensor is F32 where the base's is, else F16; the others stay). same:
    every tensor in the type that it has in the base. A tensor type's name: every matrix in that type."""
    force: bool = False
    """Take an adapter that was trained on another model."""
    vocab: Path | None = None
    """Take the vocabulary from here: a GGUF file, a folder, tokenizer.model, tokenizer.json or tokenizer.bin."""
    ctx: int | None = None
    """Context length, where the base has none or another."""
    rope_freq_base: float | None = None
    """Base of the rotary embedding, where the base has none or another."""

    def __post_init__(self) -> None:
        if not self.adapters:
            raise UsageError(
                "there is nothing to merge", hint="name an adapter: --lora FILE or --lora-scaled FILE:SCALE"
            )
        for path, scale in self.lora_scaled:
            if not math.isfinite(scale):
                raise UsageError(f"--lora-scaled has the scale {scale} for {path} (expected a finite number)")
        refuse_stdout(self.out)
        check_stated(self.ctx, self.rope_freq_base)
        if self.outtype not in (None, "same") and self.type is None:
            names = ", ".join(t.name.lower() for t in GGMLType)
            raise UsageError(f"--outtype is {self.outtype!r} (expected same or one of {names})")

    @property
    def adapters(self) -> tuple[tuple[Path, float], ...]:
        """(path, scale) of every adapter, in the order in which they are added."""
        return (*((path, 1.0) for path in self.lora), *self.lora_scaled)

    @property
    def type(self) -> GGMLType | None:
        """The type that `outtype` names, None where it names none."""
        return GGMLType.__members__.get((self.outtype or "").upper())
