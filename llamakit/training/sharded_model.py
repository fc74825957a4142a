"""A model all of whose weights are trained: each rank holds its rows, float32, with their gradient and moments.

torch's FSDP2 gathers a group of matrices in the dtype of the computation for the time of its use, and scatters their
gradient, added up over the ranks in float32. A block is a group; so are the embeddings and the output matrix, which one
group are where they are tied. Norms and biases, which are small, are on every rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llamakit.model import Llama
from llamakit.model.trained import TiedLinear, TrainedEmbedding
from llamakit.training.blueprint import ROPE_FREQS, Blueprint, assemble
from llamakit.training.distributed import Dist
from llamakit.training.optim import like_rows, row_range
from llamakit.training.sharding import prepare_backward

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def build_sharded(
    blueprint: Blueprint, device: torch.device, dtype: torch.dtype, dist: Dist
) -> tuple[Llama, dict[str, Tensor]]:
    """The model as `build` makes it, and its tensors by name: matrices as DTensors, of which this rank makes or reads
    its own rows alone."""
    from torch.distributed.device_mesh import init_device_mesh

    named = {
        name: nn.Parameter(torch.empty(shape, device="meta") if len(shape) == 2 else blueprint.first(name).to(device))
        for name, shape in blueprint.names.items()
        if name != ROPE_FREQS
    }
    model = assemble(blueprint, named, dtype)
    if blueprint.shape.tied_output:
        assert isinstance(model.token_embd, TrainedEmbedding)
        model.output = TiedLinear(model.token_embd)
    mesh = init_device_mesh(device.type, (dist.world,))
    _wrap(model, mesh, dtype)
    prepare_backward(model, device)
    for name, parameter in named.items():
        if parameter.is_meta:
            leaf: Any = model.get_submodule(name.removesuffix(".weight"))
            rows = blueprint.first(name, *row_range(leaf.weight)).to(device)
            leaf.weight = named[name] = nn.Parameter(like_rows(leaf.weight, rows))
    return model, dict(named)


def _wrap(model: Llama, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    narrow = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
    everywhere = {parameter for parameter in model.parameters() if not parameter.is_meta}
    where: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "ignored_params": everywhere}
    for part in (model.token_embd, *model.blk):
        fully_shard(part, reshard_after_forward=True, **where)
    embeddings: Any = model.token_embd
    embeddings.set_unshard_in_backward(False)  # a look-up's gradient does not need them
    if not isinstance(model.output, TiedLinear):
        # The loss applies the output matrix to as many chunks as a rank has: it is gathered and freed around them.
        output: Any = fully_shard(model.output, reshard_after_forward=False, **where)
        output.set_reshard_after_backward(False)
    whole: Any = fully_shard(model, **where)
    # The loss weighs by the trained tokens of all ranks: gradients are sums, not means. gloo has no sum with a factor.
    for part in whole.modules():
        if hasattr(part, "set_gradient_divide_factor"):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
