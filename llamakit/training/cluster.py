"""What training on many GPUs takes: memory of each, traffic, time; arithmetic alone, explained in docs/scale.md.

A rank is a process with a GPU of its own; W ranks, P parameters, A of them in an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llamakit.errors import UsageError
from llamakit.formats.open import check_is_model, open_model
from llamakit.model import ModelConfig, load_config
from llamakit.training.config import FinetuneConfig
from llamakit.training.lora import trained_tensors
from llamakit.training.loss import CHUNK_TOKENS
from llamakit.training.memory import BYTES_PER_TRAINED, gradient_bytes, kept_numbers
from llamakit.training.plan import anchor_operations, step_operations

What = Literal["full", "lora"]
Shard = Literal["none", "full"]

#: published shapes: C, layers, heads, key/value heads, F, V (config.json of Llama-3-8B and Llama-3-70B)
SHAPES = {"8b": (4096, 32, 32, 8, 14336, 128256), "70b": (8192, 80, 64, 8, 28672, 128256)}

_BF16, _F32 = 2, 4
_TABLES = ("token_embd.weight", "output.weight")
#: assumed, not measured: CUDA's context, cuBLAS' and NCCL's buffers; holes between tensors of a caching allocator
CONTEXT_BYTES, ALLOCATOR_SHARE = 10**9, 1.1
#: blocks whose gathered weights are there at a time: the one that computes, and the next, fetched meanwhile
_GATHERED_BLOCKS = 2


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """gpu_bytes: memory of a GPU; bandwidth: bytes a second that a rank sends and receives over the slowest link;
    flop_per_s: of a rank's products, as measured or assumed."""

    nodes: int
    gpus_per_node: int
    gpu_bytes: int
    bandwidth: float
    flop_per_s: float

    @property
    def ranks(self) -> int:
        """Processes, one for each GPU."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, kw_only=True)
class Job:
    """shape: of the model; base_bytes: of its packed tensors; table_bytes: of those with the vocabulary, embeddings and
    output; adapter: numbers in the adapter.

    rows: sequences of ctx tokens that a rank computes at a time, grad_acc times before an update. anchored: rows of
    --anchor-data that a rank compares with the base in a step, one at a time.
    """

    shape: ModelConfig
    base_bytes: int
    table_bytes: int
    adapter: int
    rows: int
    ctx: int
    grad_acc: int = 1
    anchored: int = 0
    checkpointing: bool = True

    @property
    def parameters(self) -> int:
        """P."""
        return n_parameters(self.shape)

    @property
    def tokens(self) -> int:
        """Tokens of a rank and step."""
        return self.rows * self.ctx * self.grad_acc


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """memory: bytes of a rank by what they are for; traffic: bytes that a rank receives in a step.

    compute_s, traffic_s: seconds of both, of which step_s is the longer one; efficiency: the share of a step in which
    the rank computes; even_tokens: tokens of a rank and step from which traffic takes no longer than computing.
    """

    what: What
    shard: Shard
    memory: dict[str, int]
    fits: bool
    traffic: int
    compute_s: float
    traffic_s: float
    even_tokens: int

    @property
    def memory_bytes(self) -> int:
        """All of a rank's memory."""
        return sum(self.memory.values())

    @property
    def step_s(self) -> float:
        """Traffic and computing at the same time."""
        return max(self.compute_s, self.traffic_s)

    @property
    def efficiency(self) -> float:
        """Share of a step in which a rank computes."""
        return self.compute_s / self.step_s


def shape_of(text: str) -> ModelConfig:
    """8b, 70b, or `embd=C,layer=N,head=N,head-kv=N,ff=F,vocab=V`. Raises UsageError."""
    names = ("embd", "layer", "head", "head-kv", "ff", "vocab")
    if text.lower() in SHAPES:
        numbers = SHAPES[text.lower()]
    else:
        given = {name: value for name, _, value in (part.partition("=") for part in text.split(","))}
        if set(given) != set(names) or not all(v.isdecimal() and 0 < int(v) < 2**31 for v in given.values()):
            raise UsageError(
                f"--shape is {text!r} (expected {', '.join(SHAPES)}, or {','.join(f'{name}=N' for name in names)})"
            )
        numbers = tuple(int(given[name]) for name in names)
    n_embd, n_layer, n_head, n_head_kv, n_ff, n_vocab = numbers
    if n_embd % n_head or n_head % n_head_kv:
        raise UsageError(f"--shape: {n_embd} channels, {n_head} heads and {n_head_kv} key/value heads do not divide")
    return ModelConfig(
        n_vocab=n_vocab, n_ctx=8192, n_embd=n_embd, n_head=n_head, n_head_kv=n_head_kv, head_dim=n_embd // n_head,
        n_layer=n_layer, n_ff=n_ff, rms_eps=1e-5, rope_base=500000.0, tied_output=False,
    )  # fmt: skip


def n_parameters(shape: ModelConfig) -> int:
    """Numbers of all tensors."""
    return sum(_product(sizes) for sizes in shape.tensor_shapes().values())


def n_adapter(shape: ModelConfig, rank: int) -> int:
    """Numbers of an adapter of one rank on the seven matrices of each block."""
    return shape.n_layer * sum(rank * (n_out + n_in) for n_out, n_in in shape.linear_shapes().values())


def _product(sizes: tuple[int, ...]) -> int:
    return sizes[0] * (sizes[1] if len(sizes) == 2 else 1)


def _block(shape: ModelConfig) -> int:
    return sum(n_out * n_in for n_out, n_in in shape.linear_shapes().values()) + 2 * shape.n_embd


def scaled(job: Job, cluster: Cluster, what: What, shard: Shard) -> Scaled:
    """One way to train: all weights or an adapter, with a whole copy on each rank or a share of it."""
    memory = _memory(job, cluster.ranks, what, shard)
    traffic = traffic_bytes(job, cluster.ranks, what, shard)
    full = what == "full"
    operations = step_operations(job.shape, job.tokens, job.ctx, checkpointing=job.checkpointing, full=full)
    if job.anchored and not full:
        operations += anchor_operations(job.shape, job.anchored * job.ctx, job.ctx, checkpointing=job.checkpointing)
    per_token = operations / job.tokens
    return Scaled(
        what=what,
        shard=shard,
        memory=memory,
        fits=sum(memory.values()) <= cluster.gpu_bytes,
        traffic=traffic,
        compute_s=operations / cluster.flop_per_s,
        traffic_s=traffic / cluster.bandwidth,
        even_tokens=-(-int(traffic / cluster.bandwidth * cluster.flop_per_s) // max(1, int(per_token))),
    )


def all_ways(job: Job, cluster: Cluster) -> list[Scaled]:
    """Full and LoRA training, replicated and sharded."""
    return [scaled(job, cluster, what, shard) for what in ("full", "lora") for shard in ("none", "full")]


def traffic_bytes(job: Job, ranks: int, what: What, shard: Shard) -> int:
    """Bytes that a rank receives in a step, over a ring: (W - 1)/W of what is gathered or scattered, twice that of what
    is reduced to all.

    Replicated: the float32 gradients of what is trained are reduced to all, once. Sharded: each micro-step gathers the
    blocks twice, forward and backward, and the tables of the vocabulary once for each use, one that is embeddings and
    output twice. All weights are gathered in bf16, and their float32 gradients scattered; a frozen base is gathered
    packed as in the file, and the adapter, which every rank has whole, reduces its gradients. A row of an anchor goes
    through the base once more, forward.
    """
    trained = job.parameters if what == "full" else job.adapter
    reduced = 2 * _F32 * trained
    if shard == "none":
        moved = reduced
    elif what == "full":
        blocks, tables = job.shape.n_layer * _block(job.shape), 2 * job.shape.n_vocab * job.shape.n_embd
        moved = job.grad_acc * (_BF16 * (2 * blocks + tables) + _F32 * trained)
    else:
        blocks, uses = job.base_bytes - job.table_bytes, 2 if job.shape.tied_output else 1
        moved = job.grad_acc * (2 * blocks + uses * job.table_bytes) + reduced
        moved += job.anchored * (3 * blocks + 2 * uses * job.table_bytes)
    return moved * (ranks - 1) // ranks


def _memory(job: Job, ranks: int, what: What, shard: Shard) -> dict[str, int]:
    shape, parameters = job.shape, job.parameters
    share = ranks if shard == "full" else 1
    gathered_share = (_GATHERED_BLOCKS * _block(shape) + shape.n_vocab * shape.n_embd) / parameters
    if what == "full":
        base, trained = 0, BYTES_PER_TRAINED * parameters // share
        copies = _BF16 * parameters
    else:
        base, trained = job.base_bytes // share, BYTES_PER_TRAINED * job.adapter
        copies = 0 if shard == "none" else job.base_bytes
    # A whole bf16 copy of trained weights that are replicated; else what is gathered at a time, and the gradient of it.
    gathered = copies if shard == "none" else int(copies * gathered_share)
    if what == "full" and shard == "full":
        gathered += gradient_bytes(_BF16) * max(_block(shape), shape.n_vocab * shape.n_embd)
    decoded = 0 if what == "full" else _BF16 * max(n_out * n_in for n_out, n_in in shape.linear_shapes().values())
    return {
        "context": CONTEXT_BYTES,
        "base": base,
        "trained": trained,
        "gathered": gathered + decoded,
        "activations": activation_bytes(job),
        # of a chunk of the loss, and the copy in which their gradient is formed
        "logits": min(CHUNK_TOKENS, job.rows * job.ctx) * shape.n_vocab * _BF16 * 2,
    }


def activation_bytes(job: Job) -> int:
    """Activations of a rank in bf16: every block's input and one block's, or all blocks'; and twice what a block's
    backward pass makes on its way, 4 (F + C) numbers a token."""
    shape, block = job.shape, kept_numbers(job.shape, job.ctx, native=False)
    kept = shape.n_embd * shape.n_layer + block if job.checkpointing else block * shape.n_layer
    passing = 4 * (shape.n_ff + shape.n_embd)
    return int((kept + passing) * job.rows * job.ctx * _BF16 * ALLOCATOR_SHARE)


def least_ranks(job: Job, cluster: Cluster, what: What) -> int | None:
    """The fewest ranks whose memory holds the job sharded; None where no number of them does."""
    fixed = _memory(job, 10**9, what, "full")
    if sum(fixed.values()) > cluster.gpu_bytes:
        return None
    ranks = 1
    while sum(_memory(job, ranks, what, "full").values()) > cluster.gpu_bytes:
        ranks += 1
    return ranks


def job_of(config: FinetuneConfig, cluster: Cluster, *, shape: str = "", bits_per_weight: float = 4.5) -> Job:
    """The job of `finetune` on these ranks: --batch is that of all of them. shape: as `shape_of` takes it, else the
    header of --model-base is read.

    Raises UsageError for a batch that does not divide, and for neither a shape nor a base, and what reading a header
    raises.
    """
    if config.batch % cluster.ranks:
        raise UsageError(
            f"--batch {config.batch} does not divide among {cluster.ranks} ranks",
            hint=f"give a multiple of {cluster.ranks}: --batch is that of all GPUs together",
        )
    if shape:
        model = shape_of(shape)
        base_bytes = int(n_parameters(model) * bits_per_weight / 8)
        table_bytes = int(2 * model.n_vocab * model.n_embd * bits_per_weight / 8)
    elif config.model_base:
        with open_model(config.model_base, n_ctx=config.ctx, rope_theta=config.rope_freq_base) as file:
            check_is_model(file)
            model, sizes = load_config(file), {name: info.n_bytes for name, info in file.tensors.items()}
        base_bytes, table_bytes = sum(sizes.values()), sum(sizes.get(name, 0) for name in _TABLES)
    else:
        raise UsageError("--model-base is missing", hint="name a model, or a shape such as --shape 8b")
    each = config.batch // cluster.ranks
    rows = min(config.micro_batch or each, each)
    ranks = config.rank_of()
    if model.tied_output:
        ranks["output"] = 0
    pairs = trained_tensors(model, ranks).values()
    return Job(
        shape=model,
        base_bytes=base_bytes,
        table_bytes=table_bytes,
        adapter=sum(rank * (n_out + n_in) for rank, n_out, n_in in pairs),
        rows=rows,
        ctx=config.ctx,
        grad_acc=config.grad_acc * -(-each // rows),
        anchored=-(-config.anchor_batch // cluster.ranks) if config.anchor_data else 0,
        checkpointing=config.use_checkpointing,
    )
