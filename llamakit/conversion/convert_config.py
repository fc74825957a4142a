"""What `convert` can be asked for. Torch-free: the command line takes its defaults from here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llamakit.errors import UsageError

Target = Literal["gguf", "hf", "llama2c"]


def target_of(path: Path) -> Target:
    """The form that a target's name asks for."""
    return {".gguf": "gguf", ".bin": "llama2c"}.get(path.suffix.lower(), "hf")  # pyright: ignore[reportReturnType]


def refuse_stdout(out: Path | None) -> None:
    """Raise UsageError for the name by which other programs write to standard output."""
    if out is not None and str(out) == "-":
        raise UsageError("-o -: a model is not written to standard output", hint="name a file or a folder")


def check_stated(ctx: int | None, rope_freq_base: float | None) -> None:
    """Raise UsageError, naming the flag, for numbers of a model that cannot be."""
    if ctx is not None and not 1 <= ctx < 1 << 32:
        raise UsageError(f"--ctx is {ctx} (expected at least 1)")
    if rope_freq_base is not None and not 0 < rope_freq_base < math.inf:
        raise UsageError(f"--rope-freq-base is {rope_freq_base} (expected a positive number)")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """A model, where it goes, in which form. Raises UsageError naming the flag."""

    source: Path
    """Any model that `open_model` opens; a vocabulary alone with `vocab_only`."""
    out: Path | None = None
    """The file or folder to be written; {ftype} in it becomes the outtype. By default ggml-model-OUTTYPE.gguf in the
    source's folder, for a source that is a folder."""
    to: Target | None = None
    """The form of the target. By default its name says: *.gguf, *.bin (llama2.c), anything else a Hugging Face
    folder."""
    outtype: str = "auto"
    """Type of the weights: f32, f16, bf16, q8_0, or what quantize writes, such as q4_k_m. auto: the 16-bit type that a
    checkpoint has (f16 for one in float32); a GGUF or llama2.c model keeps its types."""
    vocab: Path | None = None
    """Take the vocabulary from here: a GGUF file, a folder, tokenizer.model, tokenizer.json or tokenizer.bin."""
    vocab_type: Literal["spm", "bpe", "hfft"] | None = None
    """Which vocabulary of a folder that has several: spm is tokenizer.model, bpe and hfft are tokenizer.json."""
    pre: str | None = None
    """How BPE cuts words (tokenizer.ggml.pre), where tokenizer.json does not show it."""
    ctx: int | None = None
    """Context length, where the source has none or another."""
    rope_freq_base: float | None = None
    """Base of the rotary embedding, where the source has none or another."""
    model_name: str | None = None
    """general.name of a GGUF file."""
    vocab_only: bool = False
    """Write a GGUF file with the vocabulary alone."""
    version: int = 0
    """Version of a llama2.c file: 0 and 1 hold float32, 2 int8."""
    split_max_bytes: int | None = None
    """Write a GGUF in parts of at most this many bytes."""
    split_max_tensors: int | None = None
    """Write a GGUF in parts of at most this many tensors."""
    no_tensor_first_split: bool = False
    """Leave the first part without tensors."""

    def __post_init__(self) -> None:
        check_stated(self.ctx, self.rope_freq_base)
        refuse_stdout(self.out)
        if self.split_max_tensors is not None and self.split_max_tensors < 1:
            raise UsageError(f"--split-max-tensors is {self.split_max_tensors} (expected at least 1)")
        if self.version not in (0, 1, 2):
            raise UsageError(f"--version is {self.version} (expected 0, 1 or 2)")
        if self.target != "gguf" and (self.is_split or self.vocab_only or self.model_name is not None):
            raise UsageError("--split-max-..., --vocab-only and --model-name are for GGUF targets")
        if self.version and self.target != "llama2c":
            raise UsageError("--version is for llama2.c targets")
        if self.no_tensor_first_split and not self.is_split:
            raise UsageError("--no-tensor-first-split needs --split-max-size or --split-max-tensors")
        if self.vocab is not None and self.vocab_type is not None:
            raise UsageError("--vocab and --vocab-type exclude each other: both say where the vocabulary is")

    @property
    def target(self) -> Target:
        """The form of the target."""
        if self.to is not None:
            return self.to
        return "gguf" if self.out is None else target_of(self.out)

    @property
    def is_split(self) -> bool:
        """Whether the GGUF is written in parts."""
        return self.split_max_bytes is not None or self.split_max_tensors is not None

    def path(self, outtype: str) -> Path:
        """Where to write, for this outtype."""
        if self.out is not None:
            return Path(str(self.out).replace("{ftype}", outtype))
        if self.target != "gguf" or not self.source.is_dir():
            raise UsageError("where should it go?", hint="name the target with -o: a .gguf, a .bin, or a folder")
        return self.source / f"ggml-model-{outtype}.gguf"
