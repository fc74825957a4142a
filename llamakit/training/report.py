"""What a training run tells while it goes on: small frozen facts, rendered by whoever runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llamakit.model import ModelConfig


@dataclass(frozen=True)
class Loading:
    """Something large is about to be read. size_bytes: of the file."""

    what: Literal["model", "text", "checkpoint"]
    path: str
    size_bytes: int


@dataclass(frozen=True)
class Remark:
    """A line for the user. level: what kind of line."""

    level: Literal["note", "warning"]
    text: str


@dataclass(frozen=True)
class ModelFacts:
    """The base model, the seed and the ranks (GGUF tensor kind -> rank, 0: not trained) of a run; no ranks: all weights
    are trained."""

    seed: int
    path: str
    config: ModelConfig
    ctx: int
    ranks: Mapping[str, int]
    alpha: float


@dataclass(frozen=True)
class Counters:
    """Where a run starts. trained_bytes: of what is trained, an adapter (lora) or a model."""

    iterations: int
    samples: int
    tokens: int
    epochs: int
    updates: int
    trained_bytes: int
    optimizer_bytes: int
    trained_parameters: int
    what: Literal["lora", "model"] = "lora"


@dataclass(frozen=True)
class DataFacts:
    """The training text."""

    path: str
    sample_start: str
    include_sample_start: bool
    n_samples: int
    n_tokens: int
    n_unique_tokens: int
    n_validation_tokens: int


@dataclass(frozen=True)
class ChatFacts:
    """Questions and answers to train on: what they are, and what became of them.

    n_records: read; schemas: how many are of which. n_samples, n_tokens, n_trained: to train on, their tokens, those
    with a loss; n_held_out, n_held_out_trained: held-out samples and their tokens with a loss. n_cut, n_cut_tokens:
    samples that lost their end, and the tokens lost; n_windowed: samples that became several; n_skipped: left out.
    n_rows: of an epoch, packed or not.
    """

    path: str
    n_records: int
    schemas: Mapping[str, int]
    n_samples: int
    n_tokens: int
    n_trained: int
    n_held_out: int
    n_held_out_trained: int
    n_cut: int
    n_cut_tokens: int
    n_windowed: int
    n_skipped: int
    n_rows: int
    packed: bool
    train_on: str


@dataclass(frozen=True)
class Verified:
    """What was trained was read from its file, an adapter was put on the base again. path: of the file; n_tokens:
    compared.

    difference: largest one of its logits to those of the model as it was trained; change: to those of the base.
    weights: of a model, how far all of its weights are from the base's: |W - W0| / |W0|.
    """

    path: str
    n_tokens: int
    difference: float
    change: float
    weights: float | None = None


@dataclass(frozen=True)
class Plan:
    """What the run will take, predicted. memory_bytes: peak resident memory of the process; step_s: seconds a step,
    from a measurement of this machine.

    memory: bytes by what they are for; trained_parameters: numbers; n_tokens: places of all rows of the run;
    trained_share: of the data's tokens, those with a loss; disk: bytes of files by kind; options: those that decide
    over memory, as they are in the end; chosen: what --max-memory made of them, and why.
    """

    device: str
    dtype: str
    threads: int
    weights_kept_dense: bool
    memory_bytes: int
    step_s: float
    n_steps: int
    memory: Mapping[str, int]
    trained_parameters: int
    n_tokens: int
    trained_share: float
    disk: Mapping[str, int]
    options: Mapping[str, object]
    chosen: str = ""

    @property
    def total_s(self) -> float:
        """Predicted seconds of all steps, saves and evaluation not counted."""
        return self.step_s * self.n_steps


@dataclass(frozen=True)
class Outcome:
    """What was predicted and what it was: the peak of the memory in bytes, the median of the steps in seconds."""

    predicted_bytes: int
    peak_bytes: int
    predicted_step_s: float
    step_s: float


@dataclass(frozen=True)
class Begin:
    """Training begins."""

    first_iteration: int
    n_steps: int


@dataclass(frozen=True)
class StepReport:
    """One iteration. loss: mean of the full batch before the update; lr: the learning rate of the update.

    sample: the first sample of the step, from 1; sched: factor on --adam-alpha; step_s: seconds of this step alone;
    tok_per_s: its tokens over these; elapsed_s: since training began; skipped: the loss or gradient was not finite,
    and nothing was changed; grad_norm: before clipping; n_tokens: trained on since the start. divergence: from the base
    on the anchor's rows, nats a token, where there is one. val_loss, val_ppl: where the held-out text was evaluated
    after the step.
    """

    step: int
    loss: float
    lr: float
    sched: float
    sample: int
    n_samples: int
    step_s: float
    tok_per_s: float
    elapsed_s: float
    steps_left: int
    skipped: bool
    grad_norm: float = 0.0
    n_tokens: int = 0
    divergence: float | None = None
    val_loss: float | None = None
    val_ppl: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and perplexity of held-out tokens. when: before the first step, at a save, or at the end.

    n_tokens: of so many held-out ones (n_held_out). step: after which; train_loss: of as many windows of the training
    text; bits_per_byte: the held-out loss over the text's UTF-8 bytes; is_best: none before was lower.
    """

    when: Literal["start", "save", "end"]
    loss: float
    ppl: float
    n_tokens: int
    n_held_out: int
    step: int = 0
    train_loss: float | None = None
    bits_per_byte: float | None = None
    is_best: bool = False


@dataclass(frozen=True)
class NewModel:
    """What `train` is about to train, on what and where; iterations, tokens: what lies behind it.

    flop_per_token: 6 for each weight of a product, and 6 T C for each layer's causal attention; peak_flop_per_s: of a
    large product on this very device. Their quotient times the tokens per second is the model FLOP utilization (MFU;
    Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
    """

    seed: int
    config: ModelConfig
    n_parameters: int
    tokens_per_iteration: int
    grad_acc: int
    batch: int
    ctx: int
    n_train_tokens: int
    n_validation_tokens: int
    device: str
    dtype: str
    threads: int
    iterations: int
    tokens: int
    flop_per_token: float
    peak_flop_per_s: float


@dataclass(frozen=True)
class Sample:
    """What the model says to a prompt after a step."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Saving:
    """A file is about to be written."""

    kind: Literal["checkpoint", "adapter", "model"]
    path: str


@dataclass(frozen=True)
class Finished:
    """The run is over. reason: why; files: the newest checkpoint and adapter; signal: the one that ended it, or 0."""

    reason: str
    total_s: float
    iterations: int
    files: tuple[str, ...]
    signal: int = 0


Report = (
    Loading
    | Remark
    | ModelFacts
    | NewModel
    | Counters
    | DataFacts
    | ChatFacts
    | Verified
    | Plan
    | Outcome
    | Begin
    | StepReport
    | Evaluation
    | Sample
    | Saving
    | Finished
)
