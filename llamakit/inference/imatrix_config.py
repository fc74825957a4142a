"""What `imatrix` can be asked for. Torch-free: the command line takes its defaults from here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llamakit.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ImatrixConfig:
    """One collection, or a merge of earlier ones; llama-imatrix's meanings and defaults.

    Raises UsageError naming the flag.
    """

    model: Path | None = None
    """Model whose inputs are measured; not needed to merge files."""
    file: Path | None = None
    """Text that the model reads."""
    output: Path = Path("imatrix.gguf")
    """File to write."""
    in_files: tuple[Path, ...] = ()
    """Earlier results to add to."""
    output_format: Literal["gguf", "dat"] | None = None
    """Format to write: GGUF, or the older .dat; None is GGUF, with a warning where the name says otherwise."""
    ctx: int = 512
    """Tokens of a chunk."""
    batch: int = 2048
    """Tokens computed at once, in whole chunks."""
    chunk: int = 0
    """Chunks to skip at the start of the text."""
    chunks: int = -1
    """Chunks to read at most; -1 reads all."""
    output_frequency: int = 10
    """Save the result every so many chunks."""
    save_frequency: int = 0
    """Keep a copy, OUTPUT.at_N, every so many chunks; 0 is never."""
    process_output: bool = False
    """Measure output.weight, too."""
    parse_special: bool = False
    """Read special tokens that are written in the text as such."""
    rope_freq_base: float | None = None
    """Base of the rotary embedding, where the model has none or another."""
    ppl: bool = True
    """Report the perplexity of the text on the way."""

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--ctx", self.ctx, 4),
            ("--batch", self.batch, 1),
            ("--chunk", self.chunk, 0),
            ("--chunks", self.chunks, -1),
            ("--output-frequency", self.output_frequency, 1),
            ("--save-frequency", self.save_frequency, 0),
        ):
            if value < least:
                raise UsageError(f"{flag} is {value} (expected {least} or more)")
        if self.chunks == 0:
            raise UsageError("--chunks is 0 (expected -1, or 1 or more)")
        if self.file is None and not self.in_files:
            raise UsageError("there is no text and no --in-file", hint="give a text with -f, or files to merge")
        if self.file is not None and self.model is None:
            raise UsageError("there is no model to read the text", hint="give one with -m")
