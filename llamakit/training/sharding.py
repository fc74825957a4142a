"""A frozen model of which each rank holds its rows: packed blocks as raw bytes, gathered packed for the time of a use.

torch's FSDP2 gathers and frees; a block is a group, and so are the embeddings and the output matrix. What is decoded is
decoded after the gather, so that a Q4 base crosses the wire with 4.5 bits for a weight and not with 16. Rows are never
cut: GGML's blocks lie along them. Norms and biases, which are small, are on every rank.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llamakit.errors import UnsupportedError, UsageError
from llamakit.formats.base import ModelFile
from llamakit.model import Llama, ModelConfig, load_model
from llamakit.model.layers import PackedWeight
from llamakit.model.load import free_bytes
from llamakit.quant import QTensor
from llamakit.training.config import FinetuneConfig
from llamakit.training.distributed import Dist

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# What a whole packed model may take of a rank's free memory: the rest is for activations and the system.
_SHARE = 0.6


def choose_sharding(dist: Dist, config: FinetuneConfig, file: ModelFile, device: torch.device) -> None:
    """Set dist.sharded to what --shard comes to; `auto`: sharded where a rank has no room for the whole packed model.

    Raises UsageError for what a sharded model cannot do, UnsupportedError where all of its weights are trained.
    """
    if config.full and config.shard == "full" and dist.world > 1:
        reason = "--shard full is for adapters: --full keeps all weights and moments on every device"
        raise UnsupportedError(reason, hint="give --shard none, or more memory to each device")
    dist.sharded = (
        dist.world > 1
        and not config.full
        and (config.shard == "full" or (config.shard == "auto" and _too_large(dist, file, device)))
    )
    if dist.sharded and (config.micro_batch or config.max_memory):
        name = "--micro-batch" if config.micro_batch else "--max-memory"
        raise UsageError(f"{name} is for a base that lies whole on each device", hint="leave it out, or --shard none")
    if dist.sharded and config.sample_prompt:
        raise UsageError("--sample-prompt needs the whole model on one device", hint="leave it out, or --shard none")


def _too_large(dist: Dist, file: ModelFile, device: torch.device) -> bool:
    free = free_bytes(device)
    mine = math.inf if free is None else free / (1 if device.type == "cuda" else dist.local_world)
    packed = sum(info.n_bytes for info in file.tensors.values())
    return dist.most([packed > _SHARE * mine])[0] > 0


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
    for name, module in matrices.items():
        if name == "output" and config.tied_output:
            module.weight = nn.Parameter(model.token_embd.weight.data, requires_grad=False)  # pyright: ignore
        else:
            _fill(module, file, f"{name}.weight", device, mesh)
    return model


def _described(file: ModelFile, name: str, _device: torch.device | str) -> QTensor:
    """A packed matrix that is known, and not read."""
    info = file.tensors[name]
    rows, row_bytes = info.shape[0], info.n_bytes // info.shape[0]
    return QTensor(torch.empty(rows, row_bytes, dtype=torch.uint8, device="meta"), info.type, info.shape)


def _fill(module: PackedWeight, file: ModelFile, name: str, device: torch.device, mesh: DeviceMesh) -> None:
    """Read this rank's rows, which are torch's to choose."""
    from torch.distributed.tensor import DTensor, Shard

    described = module.weight
    assert isinstance(described, DTensor)
    first, rows = _own_rows(len(described), mesh)
    local: Tensor = torch.from_numpy(file.read(name, first, first + rows)).to(device)
    shape, stride = described.shape, described.stride()
    whole = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
    module.weight = nn.Parameter(whole, requires_grad=False)


def _own_rows(n: int, mesh: DeviceMesh) -> tuple[int, int]:
    """First and number of a rank's rows as torch.chunk shares them out: all the same but the last ones."""
    each = -(-n // mesh.size())
    first = min(n, mesh.get_local_rank() * each)
    return first, min(n, first + each) - first
