"""`llamakit plan`: what a fine-tuning run would take, on this machine or on many GPUs, before anything is loaded.

It has the options of `finetune`, and its own: the same words say what is planned and what is then run.
"""

from __future__ import annotations

import inspect
from typing import Annotated, Any, get_type_hints

import typer

from llamakit import hub
from llamakit.cli import finetune as finetuning
from llamakit.cli.sources import local
from llamakit.training.config import FinetuneConfig, size_bytes

_PANEL = "Many GPUs"


def _many(
    nodes: Annotated[
        int, typer.Option("--nodes", min=0, help="Plan for N machines instead of this one.", rich_help_panel=_PANEL)
    ] = 0,
    gpus_per_node: Annotated[
        int, typer.Option("--gpus-per-node", min=1, help="GPUs of each of them.", rich_help_panel=_PANEL)
    ] = 8,
    gpu_memory: Annotated[
        str, typer.Option("--gpu-memory", metavar="SIZE", help="Memory of a GPU.", rich_help_panel=_PANEL)
    ] = "80G",
    bandwidth: Annotated[
        str,
        typer.Option(
            "--bandwidth",
            metavar="SIZE",
            help="Bytes a second that a GPU receives over the slowest link.",
            rich_help_panel=_PANEL,
        ),
    ] = "50G",
    flops: Annotated[
        str,
        typer.Option(
            "--flops", metavar="SIZE", help="Operations a second of a GPU's products.", rich_help_panel=_PANEL
        ),
    ] = "400T",
    shape: Annotated[
        str,
        typer.Option(
            "--shape",
            metavar="8b|70b|KEY=N,...",
            help="Shape of the model instead of --model-base: embd, layer, head, head-kv, ff and vocab.",
            rich_help_panel=_PANEL,
        ),
    ] = "",
    bits_per_weight: Annotated[
        float,
        typer.Option("--bits-per-weight", min=1, help="Of the packed base, with --shape.", rich_help_panel=_PANEL),
    ] = 4.5,
) -> None:
    """The options of a plan for many GPUs."""


def plan(**values: Any) -> None:
    """Say what a fine-tuning run would take, memory, disk and time, before anything is loaded; on many GPUs, too.

    Example: llamakit plan --model-base base.gguf --train-data shakespeare.txt --ctx 512 --max-memory 3G
    """
    many = {name: values.pop(name) for name in inspect.signature(_many).parameters}
    if many["nodes"] or many["shape"]:
        _plan_many(values, **many)
    else:
        finetuning.finetune(**values, plan=True)


def _signature() -> tuple[inspect.Signature, dict[str, Any]]:
    """Finetune's options but --plan, and those of a plan."""
    parameters, hints = {}, {}
    for function in (finetuning.finetune, _many):
        parameters |= inspect.signature(function).parameters
        hints |= get_type_hints(function, include_extras=True)
    del parameters["plan"], hints["plan"]
    typed = [p.replace(annotation=hints[name], kind=p.KEYWORD_ONLY) for name, p in parameters.items()]
    return inspect.Signature(typed), hints


plan.__signature__, plan.__annotations__ = _signature()  # pyright: ignore[reportFunctionMemberAccess]


def _plan_many(
    values: dict[str, Any],
    *,
    nodes: int,
    gpus_per_node: int,
    gpu_memory: str,
    bandwidth: str,
    flops: str,
    shape: str,
    bits_per_weight: float,
) -> None:
    """A plan of N machines; the run's own options are those of `finetune`, --batch being that of all ranks."""
    names = FinetuneConfig.__dataclass_fields__
    given: dict[str, Any] = {name: value for name, value in values.items() if name in names}
    given |= {name: tuple(values[name] or ()) for name in ("sample_prompt", "lora_targets")}
    if hub.is_remote(given["model_base"]):
        given["model_base"] = str(local(given["model_base"], offline=values["offline"]))
    config = FinetuneConfig(**given)
    sizes = {
        "gpu_bytes": size_bytes("--gpu-memory", gpu_memory),
        "bandwidth": size_bytes("--bandwidth", bandwidth, "bytes a second"),
        "flop_per_s": size_bytes("--flops", flops, "operations a second"),
    }

    from llamakit.cli.cluster_view import show_cluster
    from llamakit.training.cluster import Cluster, job_of

    cluster = Cluster(nodes=max(1, nodes), gpus_per_node=gpus_per_node, **sizes)
    job = job_of(config, cluster, shape=shape, bits_per_weight=bits_per_weight)
    show_cluster(job, cluster, config, name=shape or config.model_base, json=values["json"])
