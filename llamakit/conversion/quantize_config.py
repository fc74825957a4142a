"""What `quantize` can be asked for. Torch-free: the command line takes its defaults from here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llamakit.conversion.convert_config import check_stated
from llamakit.conversion.file_types import FileType, given_name, parse_file_type
from llamakit.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """A model and the type that it gets, with llama-quantize's options. Raises UsageError naming the flag,
    UnsupportedError for a type that llamakit does not make."""

    source: Path
    """The model: a GGUF file or any part of a split one, or whatever else `open_model` opens."""
    type: str
    """A type's name, alias or number (`file_types`)."""
    out: Path | None = None
    """The file to be written; with `keep_split` what the parts' names begin with. By default ggml-model-TYPE.gguf in
    the source's folder, or in the source where that is a folder."""
    vocab: Path | None = None
    """Take the vocabulary from here: a GGUF file, a folder, tokenizer.model, tokenizer.json or tokenizer.bin."""
    ctx: int | None = None
    """Context length, where the source has none or another."""
    rope_freq_base: float | None = None
    """Base of the rotary embedding, where the source has none or another."""
    allow_requantize: bool = False
    """Quantize what is quantized already."""
    leave_output_tensor: bool = False
    """Keep output.weight as it is."""
    pure: bool = False
    """No mixture: every matrix gets the same type."""
    imatrix: str | None = None
    """Importance matrix: a path, which is recorded in the file as it is given."""
    include_weights: tuple[str, ...] = ()
    """Use the importance matrix for tensors with this in their name alone."""
    exclude_weights: tuple[str, ...] = ()
    """Do not use the importance matrix for tensors with this in their name."""
    output_tensor_type: str | None = None
    """Type of output.weight."""
    token_embedding_type: str | None = None
    """Type of the token embedding."""
    tensor_type: tuple[str, ...] = ()
    """NAME=TYPE: the type of tensors in whose name the regular expression is found; the first that is found counts."""
    tensor_type_file: tuple[Path, ...] = ()
    """Files of such rules, separated by white space; they come after those of `tensor_type`."""
    prune_layers: str | None = None
    """Numbers of layers to leave out, separated by commas."""
    keep_split: bool = False
    """Write the parts that the source has."""
    override_kv: tuple[str, ...] = ()
    """KEY=TYPE:VALUE: metadata of the result; the type is int, float, bool or str."""

    def __post_init__(self) -> None:
        if self.include_weights and self.exclude_weights:
            raise UsageError("--include-weights and --exclude-weights exclude each other")
        check_stated(self.ctx, self.rope_freq_base)
        _ = self.file_type, self.pruned_layers

    @property
    def file_type(self) -> FileType:
        """What `type` names."""
        return parse_file_type(self.type)

    @property
    def target(self) -> Path:
        """The file to be written, or with `keep_split` what the parts' names begin with, without .gguf."""
        suffix = "" if self.keep_split else ".gguf"
        if self.out is None:
            folder = self.source if self.source.is_dir() else self.source.parent
            return folder / f"ggml-model-{given_name(self.type)}{suffix}"
        return self.out.with_name(self.out.name.removesuffix(".gguf")) if self.keep_split else self.out

    @property
    def pruned_layers(self) -> frozenset[int]:
        """The layers to leave out."""
        words = [] if self.prune_layers is None else self.prune_layers.split(",")
        if not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
            raise UsageError(f"--prune-layers is {self.prune_layers!r} (expected numbers of layers, such as 3,4,5)")
        return frozenset(map(int, words))
