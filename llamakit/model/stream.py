"""A forward pass that reads one layer at a time: for looking at a model that need not fit into memory.

Shapes: T tokens, C n_embd, V n_vocab.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llamakit.formats.base import ModelFile
from llamakit.model.layers import Scratch
from llamakit.model.llama import Block
from llamakit.model.load import load_config, load_leaf, load_vector
from llamakit.model.rope import Rope
from llamakit.quant import dequantize

# Rows of the output matrix that are multiplied at a time.
_OUTPUT_BYTES = 1 << 26


@torch.inference_mode()
def streamed_logits(file: ModelFile, tokens: list[int]) -> Tensor:
    """Logits (T, V) float32 of one sequence, computed in float32 on the CPU.

    Memory beyond the result is about one layer. Raises FormatError or UnsupportedError as `load_model` does.
    """
    config, scratch = load_config(file), Scratch()
    rope = Rope(config, load_vector(file, "rope_freqs.weight") if "rope_freqs.weight" in file.tensors else None)
    rotations = rope.rotations(torch.arange(len(tokens)))
    x = torch.cat([_rows(file, "token_embd.weight", token, token + 1) for token in tokens]).unsqueeze(0)
    for i in range(config.n_layer):
        block = Block(config, i)
        for name in ("attn_norm", "ffn_norm", *config.linear_shapes()):
            block.set_submodule(name, load_leaf(file, f"blk.{i}.{name}.weight", config, scratch))
        x = block(x, rotations, None)
    hidden = load_leaf(file, "output_norm.weight", config, scratch)(x)[0]
    name = "token_embd.weight" if config.tied_output else "output.weight"
    step = max(1, _OUTPUT_BYTES // (4 * config.n_embd))
    parts = [hidden @ _rows(file, name, start, min(start + step, config.n_vocab)).T
             for start in range(0, config.n_vocab, step)]  # fmt: skip
    return torch.cat(parts, dim=1)


def _rows(file: ModelFile, name: str, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a matrix, float32 (rows, n_in)."""
    return dequantize(torch.from_numpy(file.read(name, start, stop)), file.tensors[name].type)
