"""How a plan for many GPUs looks."""

from __future__ import annotations

from llamakit.cli import render
from llamakit.training.cluster import Cluster, Job, Scaled, all_ways, least_ranks
from llamakit.training.config import FinetuneConfig

_WAYS = {"full": "all weights", "lora": "adapter"}
_SHARDS = {"none": "replicated", "full": "sharded"}


def show_cluster(job: Job, cluster: Cluster, config: FinetuneConfig, *, name: str, json: bool) -> None:
    """Print what each way of training takes on these GPUs."""
    ways = all_ways(job, cluster)
    least = {what: least_ranks(job, cluster, what) for what in ("full", "lora")}
    if json:
        plans = [
            vars(w) | {"memory_bytes": w.memory_bytes, "step_s": w.step_s, "efficiency": w.efficiency} for w in ways
        ]
        facts = {"parameters": job.parameters, "base_bytes": job.base_bytes, "adapter": job.adapter}
        render.print_json(facts | {"ranks": cluster.ranks, "least_ranks": least, "ways": plans})
        return
    base = render.human_bytes(job.base_bytes)
    adapter = f"adapter {render.human_count(job.adapter)}"
    render.say(f"{'model':<10} {name}: {render.human_count(job.parameters)} parameters, packed {base}, {adapter}")
    limits = f"{render.human_bytes(cluster.gpu_bytes)} each, {render.human_bytes(cluster.bandwidth)}/s"
    speed = f"{cluster.flop_per_s / 1e12:g} TFLOP/s assumed"
    render.say(f"{'ranks':<10} {cluster.nodes} x {cluster.gpus_per_node} GPUs, {limits}, {speed}")
    tokens = f"{job.grad_acc} micro-steps of {job.rows} x {job.ctx} tokens a rank"
    render.say(f"{'step':<10} {tokens}, {job.tokens * cluster.ranks} of all ranks")
    render.say()
    headers = ("trained", "weights", "memory", "fits", "traffic", "step", "efficiency", "even from")
    render.table(headers, [_row(way) for way in ways], right=(2, 4, 5, 6, 7))
    render.say()
    for what, count in least.items():
        enough = f"fits sharded from {count} ranks on" if count else "fits on no number of these GPUs"
        render.say(f"{_WAYS[what]}: {_advice(ways, what)}; {enough}")
    render.say(
        "Arithmetic, not a measurement: docs/scale.md has the formulas. Even from: tokens of a rank and step from"
    )
    render.say("which the traffic takes no longer than the computing.")


def _row(way: Scaled) -> tuple[str, ...]:
    return (
        _WAYS[way.what],
        _SHARDS[way.shard],
        render.human_bytes(way.memory_bytes),
        "yes" if way.fits else "no",
        render.human_bytes(way.traffic),
        render.human_duration(way.step_s),
        f"{100 * way.efficiency:.0f} %",
        str(way.even_tokens),
    )


def _advice(ways: list[Scaled], what: str) -> str:
    """Which way to take: sharding pays where replicas do not fit."""
    whole, shared = (next(w for w in ways if (w.what, w.shard) == (what, shard)) for shard in ("none", "full"))
    if whole.fits:
        return "replicas fit, sharding is not needed" + (" but faster" if shared.step_s < whole.step_s else "")
    return "replicas do not fit, shard" if shared.fits else "fits neither way"
