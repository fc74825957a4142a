"""A frozen model of which each rank holds its rows: packed blocks as raw bytes, gathered packed for the time of a use.

torch's FSDP2 gathers and frees; a block is a group, and so are the embeddings and the output matrix. What is decoded is
decoded after the gather, so that a Q4 base crosses the wire with 4.5 bits for a weight and not with 16. Rows are never
cut: GGML's blocks lie along them. Norms and biases, which are small, are on every rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from llamakit.errors import UsageError
from llamakit.formats.base import ModelFile
from llamakit.model import Llama, ModelConfig, load_model
from llamakit.model.layers import PackedWeight
from llamakit.model.load import free_bytes
from llamakit.quant import QTensor
from llamakit.training.config import FinetuneConfig, LoopOptions
from llamakit.training.distributed import Dist
from llamakit.training.optim import like_rows, row_range

# What a whole model may take of a rank's free memory: the rest is for activations and the system.
_SHARE = 0.6


def may_shard(dist: Dist, config: LoopOptions) -> bool:
    """Whether a run may come to be sharded: then no rank may read a whole checkpoint into its memory."""
    return dist.world > 1 and config.shard != "none"


def choose_sharding(dist: Dist, config: LoopOptions, needed: int, device: torch.device) -> None:
    """Set dist.sharded to what --shard comes to; `auto`: sharded where a rank has no room for all that there is.

    needed: bytes of the packed base, or of all weights with gradients and moments where these are trained. Raises
    UsageError for what a sharded model cannot do.
    """
    dist.sharded = may_shard(dist, config) and (config.shard == "full" or _too_large(dist, needed, device))
    max_memory = config.max_memory if isinstance(config, FinetuneConfig) else ""
    if dist.sharded and (config.micro_batch or max_memory):
        name = "--micro-batch" if config.micro_batch else "--max-memory"
        raise UsageError(f"{name} is for a model that lies whole on each device", hint="leave it out, or --shard none")
    if dist.sharded and isinstance(config, FinetuneConfig) and config.sample_prompt:
        raise UsageError("--sample-prompt needs the whole model on one device", hint="leave it out, or --shard none")


def _too_large(dist: Dist, needed: int, device: torch.device) -> bool:
    free = free_bytes(device)
    mine = math.inf if free is None else free / (1 if device.type == "cuda" else dist.local_world)
    return dist.most([needed > _SHARE * mine])[0] > 0


def load_sharded(
    file: ModelFile, *, device: torch.device, dtype: torch.dtype, config: ModelConfig, dist: Dist
) -> Llama:
    """Read a rank's rows of a model, and nothing else of its matrices; products decode for each use.

    Raises FormatError or UnsupportedError as `load_model` does.
    """
    from torch.distributed.device_mesh import init_device_mesh  # these load torch's compiler: only who shards waits
    from torch.distributed.fsdp import fully_shard

    model = load_model(
        file, device=device, dtype=dtype, weight_cache="none", config=config, for_training=True, packed=_described
    )
    mesh = init_device_mesh(device.type, (dist.world,))
    matrices = {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}
    everywhere = {p for p in model.parameters() if not p.is_meta}
    for part in (model.token_embd, *model.blk):
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=everywhere)
    # The loss applies the output matrix to as many chunks as a rank has: it is gathered and freed around them.
    fully_shard(model.output, mesh=mesh, reshard_after_forward=False, ignored_params=everywhere)
    model.output.set_reshard_after_backward(False)  # pyright: ignore[reportCallIssue]
    fully_shard(model, mesh=mesh, ignored_params=everywhere)  # without a root each part would keep its last gather
    prepare_backward(model, device)
    for name, module in matrices.items():
        if name == "output" and config.tied_output:
            module.weight = nn.Parameter(model.token_embd.weight.data, requires_grad=False)  # pyright: ignore
        else:
            packed = torch.from_numpy(file.read(f"{name}.weight", *row_range(module.weight))).to(device)
            module.weight = nn.Parameter(like_rows(module.weight, packed), requires_grad=False)
    return model


def prepare_backward(model: Llama, device: torch.device) -> None:
    """How the parts of a wrapped model come back for its backward pass: computed again once where --checkpointing asks
    for it and, on a CPU, each gathered when it is needed.

    There gathering ahead takes the cores that compute, and wins nothing for its memory. torch has a list of what a part
    gathers ahead, where none means the next: here a part has itself in it, which is there already.
    """
    from torch.distributed.fsdp import FSDPModule

    model.recompute = _recomputed_once
    if device.type == "cpu":
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.set_modules_to_backward_prefetch([part])


def _recomputed_once(module: nn.Module, x: Tensor, *arguments: Tensor | None) -> Tensor:
    """torch's own checkpointing, which FSDP2 knows: a block is gathered for the backward pass, computed again, and
    freed only behind it."""
    from torch.utils.checkpoint import checkpoint

    return checkpoint(module, x, *arguments, use_reentrant=False, preserve_rng_state=False)


def _described(file: ModelFile, name: str, _device: torch.device | str) -> QTensor:
    """A packed matrix that is known, and not read."""
    info = file.tensors[name]
    rows, row_bytes = info.shape[0], info.n_bytes // info.shape[0]
    return QTensor(torch.empty(rows, row_bytes, dtype=torch.uint8, device="meta"), info.type, info.shape)
