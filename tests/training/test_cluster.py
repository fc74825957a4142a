"""The arithmetic of docs/scale.md, by hand."""

from __future__ import annotations

import dataclasses

import pytest

from llamakit.errors import UsageError
from llamakit.training.cluster import (
    ALLOCATOR_SHARE,
    CONTEXT_BYTES,
    Cluster,
    Job,
    activation_bytes,
    all_ways,
    job_of,
    least_ranks,
    n_adapter,
    n_parameters,
    scaled,
    shape_of,
    traffic_bytes,
)
from llamakit.training.config import FinetuneConfig
from tests.tiny import cached_tiny_gguf

#: a Llama that is counted on fingers: V 10, C 4, one block of 2 heads and 1 key/value head, F 6
TINY = shape_of("embd=4,layer=1,head=2,head-kv=1,ff=6,vocab=10")
BLOCK = 4 * 4 + 2 * 2 * 4 + 4 * 4 + 3 * 4 * 6


def cluster(**options: object) -> Cluster:
    values = {"nodes": 2, "gpus_per_node": 8, "gpu_bytes": 80 * 10**9, "bandwidth": 50e9, "flop_per_s": 400e12}
    return Cluster(**(values | options))  # pyright: ignore[reportArgumentType]


def job(**options: object) -> Job:
    values = {"shape": TINY, "base_bytes": 100, "table_bytes": 30, "adapter": 7, "rows": 2, "ctx": 3}
    return Job(**(values | options))  # pyright: ignore[reportArgumentType]


def published(name: str, **options: object) -> Job:
    shape = shape_of(name)
    tables = int(2 * shape.n_vocab * shape.n_embd * 4.5 / 8)
    values = {"base_bytes": int(n_parameters(shape) * 4.5 / 8), "table_bytes": tables, "rows": 1, "ctx": 4096}
    return job(shape=shape, adapter=n_adapter(shape, 16), **(values | options))


def test_the_published_sizes() -> None:
    """Llama 3's model cards: 8.03 and 70.6 billion parameters."""
    assert n_parameters(TINY) == 10 * 4 * 2 + BLOCK + 3 * 4
    assert n_parameters(shape_of("8b")) == 8_030_261_248
    assert n_parameters(shape_of("70B")) == 70_553_706_496
    assert n_adapter(shape_of("8b"), 16) == 41_943_040
    assert n_adapter(shape_of("70b"), 16) == 207_093_760


def test_traffic_of_each_way() -> None:
    parameters = n_parameters(TINY)
    one = job(grad_acc=3)
    assert traffic_bytes(one, 4, "full", "none") == 2 * 4 * parameters * 3 // 4
    gathered = 2 * (BLOCK + 2 * 4) + 2 * 10 * 4  # blocks forward and backward, embeddings and output once each
    assert traffic_bytes(one, 4, "full", "full") == 3 * (2 * gathered + 4 * parameters) * 3 // 4
    assert traffic_bytes(one, 4, "lora", "none") == 2 * 4 * 7 * 3 // 4
    assert traffic_bytes(one, 4, "lora", "full") == (3 * (2 * 70 + 30) + 2 * 4 * 7) * 3 // 4
    held = job(grad_acc=3, anchored=2)  # through the base and with the adapter, forward, and back
    more = 2 * (3 * 70 + 2 * 30)
    assert traffic_bytes(held, 4, "lora", "full") == (3 * (2 * 70 + 30) + more + 2 * 4 * 7) * 3 // 4
    assert traffic_bytes(held, 4, "lora", "none") == traffic_bytes(one, 4, "lora", "none")
    tied = job(grad_acc=3, shape=dataclasses.replace(TINY, tied_output=True))
    assert traffic_bytes(tied, 4, "lora", "full") == (3 * (2 * 70 + 2 * 30) + 2 * 4 * 7) * 3 // 4
    assert {traffic_bytes(one, 1, what, shard) for what in ("full", "lora") for shard in ("none", "full")} == {0}


def test_memory_of_each_way() -> None:
    parameters = n_parameters(TINY)
    full, full_sharded, lora, lora_sharded = (w.memory for w in all_ways(job(), cluster(nodes=1, gpus_per_node=4)))
    assert (full["trained"], full_sharded["trained"]) == (16 * parameters, 4 * parameters)
    assert full["gathered"] == 2 * parameters
    assert lora["trained"] == lora_sharded["trained"] == 16 * 7
    assert (lora["base"], lora_sharded["base"]) == (100, 25)
    assert lora["gathered"] == 2 * 4 * 6 and lora_sharded["gathered"] > lora["gathered"]
    for memory in (full, lora):
        assert memory["context"] == CONTEXT_BYTES
        assert memory["logits"] == 2 * 3 * 10 * 2 * 2
        assert memory["activations"] == activation_bytes(job())


def test_activations_by_hand() -> None:
    block = 2 * 4 + 2 * 4 + 2 * 2 + 2 * 6
    passing = 4 * (6 + 4)
    assert activation_bytes(job()) == int((4 + block + passing) * 6 * 2 * ALLOCATOR_SHARE)
    assert activation_bytes(job(checkpointing=False)) == int((block + passing) * 6 * 2 * ALLOCATOR_SHARE)


def test_time_is_the_longer_of_computing_and_traffic() -> None:
    way = scaled(job(), cluster(flop_per_s=1.0, bandwidth=1e30), "full", "none")
    assert way.compute_s == 6 * 8 * (BLOCK + 10 * 4 + 2 * 3 * 4 * 1)
    assert way.efficiency == 1 and way.step_s == way.compute_s
    slow = scaled(job(), cluster(flop_per_s=1e30, bandwidth=1.0), "full", "none")
    assert slow.step_s == slow.traffic_s == slow.traffic and slow.efficiency < 1e-9


def test_the_even_point_is_where_both_take_as_long() -> None:
    for name in ("8b", "70b"):
        for way in all_ways(published(name), cluster()):
            assert way.even_tokens > 0
            assert way.efficiency == pytest.approx(min(1.0, 4096 / way.even_tokens), rel=0.01)


def test_the_table_of_docs_scale() -> None:
    """16 GPUs of 80 GB, 50 GB/s, 400 TFLOP/s, one sequence of 4,096 tokens each: GB of a rank, GB of traffic."""
    found = {
        name: [(round(w.memory_bytes / 1e9, 1), round(w.traffic / 1e9, 2), w.fits) for w in all_ways(job_, cluster())]
        for name, job_ in (("8b", published("8b")), ("70b", published("70b")))
    }
    assert found == {
        "8b": [(147.9, 60.23, False), (18.6, 58.26, True), (8.7, 0.31, True), (5.0, 8.23, True)],
        "70b": [(1279.2, 529.15, False), (95.8, 525.21, False), (52.7, 1.55, True), (17.0, 74.86, True)],
    }
    assert [least_ranks(published(name), cluster(), what) for name in ("8b", "70b") for what in ("full", "lora")] == [
        2,
        1,
        21,
        1,
    ]


def test_a_job_of_finetunes_options() -> None:
    config = FinetuneConfig(batch=32, micro_batch=1, grad_acc=2, lora_r=16, ctx=512)
    found = job_of(config, cluster(), shape="8b", bits_per_weight=8.5)
    assert (found.rows, found.grad_acc, found.adapter) == (1, 4, 41_943_040)
    assert found.base_bytes == int(8_030_261_248 * 8.5 / 8)


def test_a_job_of_a_header() -> None:
    path = cached_tiny_gguf(type="Q8_0")
    found = job_of(FinetuneConfig(model_base=str(path), batch=16, ctx=16), cluster())
    assert 0 < found.base_bytes < path.stat().st_size and found.parameters == n_parameters(found.shape)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"batch": 17}, "8b", "--batch 17 does not divide among 16 ranks"),
        ({"batch": 16}, "", "--model-base is missing"),
        ({"batch": 16}, "9b", "--shape is '9b'"),
        ({"batch": 16}, "embd=4,layer=1", "--shape"),
        ({"batch": 16}, "embd=4,layer=1,head=3,head-kv=1,ff=6,vocab=10", "do not divide"),
        ({"batch": 16}, "embd=0,layer=1,head=2,head-kv=1,ff=6,vocab=10", "--shape"),
    ],
)
def test_what_cannot_be(options: dict, shape: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        job_of(FinetuneConfig(**options), cluster(), shape=shape)
