"""Everything that training from scratch can be told; the one place where its defaults stand."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from llamakit.dataset.prepare_config import Errors
from llamakit.errors import UsageError
from llamakit.training.config import LoopOptions, check_least, check_positive, check_share

LrSchedule = Literal["cosine", "linear", "constant"]
EXPORTS = {"llama2c": "model.bin", "hf": "hf", "modelfile": "Modelfile"}
"""--export format -> its name in the run's folder."""
OUT_DIR = "OUT_DIR"


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopOptions):
    """Options of `train`. The defaults are those of configs/shakespeare-288.toml; OUT_DIR in a name stands for
    --out-dir."""

    train_data: str = ""
    """text file, folder of texts, or tokens that `data prepare` or llama2.c wrote"""
    vocab_model: str = ""
    """model or vocabulary file whose vocabulary is taken: GGUF, tokenizer.model, tokenizer.json"""
    vocab_size: int = 0
    """train a new vocabulary of N pieces on the text; 0: the vocabulary is --vocab-model's or the tokens' own"""
    errors: Errors = "strict"
    """what becomes of bytes of the text that are no UTF-8: an error, or U+FFFD"""
    val_split: float = 0.1
    """share of a text's documents that is held out and evaluated"""
    init_from: str = ""
    """scratch, resume, or a model file whose weights are trained on; empty: resume where there is a checkpoint"""
    out_dir: str = "out"
    """folder of the run"""
    checkpoint_in: str = "OUT_DIR/checkpoint-LATEST.gguf"
    """checkpoint to go on from, where it exists"""
    checkpoint_out: str = "OUT_DIR/checkpoint-ITERATION.gguf"
    """name of the checkpoints; empty: none is written"""
    model_out: str = "OUT_DIR/model-ITERATION.gguf"
    """name of the models; empty: none is written"""
    only_write_model: bool = False
    """write the model of --checkpoint-in and end"""
    log_file: str = "OUT_DIR/metrics.jsonl"
    """JSONL file with one object per step and evaluation; empty: none"""
    export: tuple[str, ...] = ()
    """formats besides GGUF in which the last model is written: llama2c, hf, modelfile; repeatable"""
    save_every: int = 250
    """save every N iterations; 0: only at the end, and where an evaluation is the best so far"""
    keep_last: int = 2
    """keep only the N newest numbered checkpoints and models; 0: all"""

    ctx: int = 256
    """tokens per sequence, and the model's context"""
    embd: int = 288
    """width of the model"""
    layer: int = 6
    """blocks"""
    head: int = 6
    """attention heads"""
    head_kv: int = 0
    """key/value heads; 0: as many as --head"""
    ff: int = 0
    """width of the feed-forward units; 0: 8/3 of --embd, rounded up to --multiple-of"""
    multiple_of: int = 32
    """what the default of --ff is a multiple of"""
    tie: bool = True
    """use the embeddings as the output matrix too"""
    dropout: float = 0.0
    """share of embeddings, attention weights and each unit's outputs dropped at random in training, as in llama2.c"""
    norm_rms_eps: float = 1e-5
    """epsilon of the norms"""
    rope_freq_base: float = 10000.0
    """base of the rotary frequencies"""

    adam_iter: int = 5000
    """iterations in total; a resumed run goes on up to them"""
    batch: int = 8
    """sequences per micro-step"""
    seed: int = 1337
    """seed of the weights, the order and the split; -1: from the clock"""
    adam_alpha: float = 5e-4
    """learning rate"""
    adam_beta2: float = 0.95
    """decay of the second moment"""
    warmup: int = 100
    """iterations over which the learning rate rises"""
    lr_schedule: LrSchedule = "cosine"
    """how the learning rate falls after the warmup"""
    cos_decay_steps: int = 0
    """iterations of the decay after the warmup; 0: until the end of the run"""
    cos_decay_min: float = 0.0
    """the decay ends at this share of the learning rate"""
    max_minutes: float = 0.0
    """end after so much time, the learning rate decayed by then; 0: no limit"""

    eval_every: int = 250
    """evaluate every N iterations; 0: only at the end"""
    eval_iters: int = 20
    """batches of training and of held-out text that an evaluation takes; at the end all of the held-out text"""
    eval_only: bool = False
    """evaluate all of the held-out text and end"""
    patience: int = 0
    """stop after N evaluations in a row without a better held-out loss; 0: never"""
    sample_prompt: tuple[str, ...] = ("",)
    """what a sample at each evaluation begins with; repeatable"""
    sample_tokens: int = 64
    """tokens of each sample; 0: no samples"""

    use_checkpointing: bool = False
    """recompute activations in the backward pass instead of keeping them"""
    compile: bool = False
    """compile the model with torch.compile: slow to start, for CUDA"""

    def __post_init__(self) -> None:
        """Raises UsageError naming the flag whose value cannot be."""
        super().__post_init__()
        for flag, value, least in (
            ("--ctx", self.ctx, 1),
            ("--embd", self.embd, 2),
            ("--layer", self.layer, 1),
            ("--head", self.head, 1),
            ("--head-kv", self.head_kv, 0),
            ("--ff", self.ff, 0),
            ("--multiple-of", self.multiple_of, 1),
            ("--vocab-size", self.vocab_size, 0),
            ("--eval-every", self.eval_every, 0),
            ("--eval-iters", self.eval_iters, 1),
            ("--patience", self.patience, 0),
            ("--sample-tokens", self.sample_tokens, 0),
            ("--max-minutes", self.max_minutes, 0.0),
        ):
            check_least(flag, value, least)
        for flag, value in (("--val-split", self.val_split), ("--dropout", self.dropout)):
            check_share(flag, value)
        for flag, value in (("--norm-rms-eps", self.norm_rms_eps), ("--rope-freq-base", self.rope_freq_base)):
            check_positive(flag, value)
        unknown = next((form for form in self.export if form not in EXPORTS), None)
        if unknown is not None:
            raise UsageError(f"--export is {unknown!r} (expected {', '.join(EXPORTS)})")
        if self.export and not self.model_out:
            raise UsageError("--export needs a model: --model-out is empty")
        if self.embd % self.head or self.embd // self.head % 2:
            raise UsageError(f"--embd {self.embd} does not divide into --head {self.head} heads of even size")
        if self.head % self.n_head_kv:
            raise UsageError(f"--head {self.head} is no multiple of --head-kv {self.head_kv}")

    @property
    def n_head_kv(self) -> int:
        """Key/value heads: --head-kv, or --head."""
        return self.head_kv or self.head

    @property
    def n_ff(self) -> int:
        """--ff, or llama2.c's rule: 8/3 of the width, rounded up (model.py)."""
        multiple = self.multiple_of
        return self.ff or multiple * -(-int(2 * 4 * self.embd / 3) // multiple)

    def latest_model(self) -> str:
        """The name of the newest model."""
        name = self.model_out.replace(OUT_DIR, self.out_dir)
        return name.replace(self.pattern_fn_it, self.fn_latest, 1) if self.pattern_fn_it else name

    def placed(self) -> TrainConfig:
        """The same with --out-dir in the place of OUT_DIR."""
        names = ("checkpoint_in", "checkpoint_out", "model_out", "log_file")
        places = {name: getattr(self, name).replace(OUT_DIR, self.out_dir) for name in names}
        return dataclasses.replace(self, **places)


def as_toml(config: Any) -> str:
    """A dataclass of options as --config takes it, one line each; what is not set (None) is left out."""
    values = {name: value for name, value in vars(config).items() if value is not None}
    return "\n".join(f"{name} = {_toml(value)}" for name, value in values.items())


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, (int, float)):
        return repr(value)
    return json.dumps(str(value))  # a JSON string is a TOML one
