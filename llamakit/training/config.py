"""Everything that a fine-tuning run can be told; the one place where its defaults stand."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import Literal

from llamakit.dataset.config import ChatOptions, SampleOptions
from llamakit.errors import UsageError

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "f32", "bf16"]
Cache = Literal["auto", "bf16", "none"]
Shard = Literal["none", "full", "auto"]
Outtype = Literal["f32", "f16", "bf16"]
LoraFormat = Literal["gguf", "peft"]


#: of FinetuneConfig, besides those that begin with lora_ and rank_
_OF_ADAPTERS = ("anchor_data", "rslora", "merge_out", "only_write_lora", "weight_cache")
_OF_FULL = ("model_out", "outtype", "only_write_model")

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?) ?([kKmMgGtT]?)(?:i?[bB])?")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """What every training run can be told: files, steps, schedule, optimizer, place; named after llama.cpp's flags."""

    checkpoint_in: str = "checkpoint.gguf"
    """checkpoint to go on from; a fresh start where it does not exist"""
    checkpoint_out: str = "checkpoint-ITERATION.gguf"
    """name of the checkpoints; empty: none is written"""
    pattern_fn_it: str = "ITERATION"
    """what stands for the iteration in file names"""
    fn_latest: str = "LATEST"
    """what replaces it in the name of the newest file"""
    save_every: int = 10
    """save every N iterations; 0: only at the end"""
    keep_last: int = 0
    """keep only the N newest numbered checkpoints and adapters; 0: all"""
    adam_iter: int = 256
    """iterations of this run"""
    epochs: int = -1
    """stop after N passes over the samples in this run; -1: no limit"""
    batch: int = 8
    """sequences per micro-step, over all processes of a run"""
    grad_acc: int = 1
    """micro-steps per iteration"""
    seed: int = -1
    """seed of the sample order and the adapter's start; -1: from the clock"""
    warmup: int = 100
    """iterations over which the learning rate rises"""
    cos_decay_steps: int = 1000
    """iterations of the cosine decay after the warmup"""
    cos_decay_min: float = 0.1
    """the cosine decay ends at this share of the learning rate"""
    opt_past: int = 0
    """compare the loss with that of N iterations ago, and stop when it hardly changed; 0: never"""
    opt_delta: float = 1e-5
    """what counts as hardly changed, relative"""
    opt_max_no_improvement: int = 0
    """stop after N iterations in a row without a new best loss; 0: never"""
    adam_epsf: float = 0.0
    """stop when the loss changes by less than this share from one iteration to the next; 0: never"""
    adam_alpha: float = 1e-3
    """learning rate"""
    adam_min_alpha: float = 0.0
    """least learning rate, warmup included"""
    adam_decay: float = 0.1
    """AdamW's weight decay; 0: plain Adam"""
    adam_decay_min_ndim: int = 2
    """weight decay applies to tensors of at least N dimensions"""
    adam_beta1: float = 0.9
    """decay of the first moment"""
    adam_beta2: float = 0.999
    """decay of the second moment"""
    adam_gclip: float = 1.0
    """largest norm of the whole gradient; 0: no clipping"""
    micro_batch: int = 0
    """sequences of a micro-step that are computed at a time, to the same losses; 0: all of them"""
    use_checkpointing: bool = True
    """recompute activations in the backward pass instead of keeping them"""
    device: Device = "auto"
    """where to compute"""
    dtype: Dtype = "auto"
    """what to compute in; auto: whichever of the two the processor multiplies faster"""
    threads: int = 6
    """CPU threads, at most the cores that there are"""
    shard: Shard = "none"
    """the model whole on each device (none), or a share of its rows (full); auto: full where it does not fit"""

    def __post_init__(self) -> None:
        """Raises UsageError naming the flag whose value cannot be."""
        for flag, value, least in (
            ("--batch", self.batch, 1),
            ("--grad-acc", self.grad_acc, 1),
            ("--micro-batch", self.micro_batch, 0),
            ("--adam-iter", self.adam_iter, 0),
            ("--warmup", self.warmup, 0),
            ("--cos-decay-steps", self.cos_decay_steps, 0),
            ("--opt-past", self.opt_past, 0),
            ("--opt-max-no-improvement", self.opt_max_no_improvement, 0),
            ("--keep-last", self.keep_last, 0),
            ("--threads", self.threads, 1),
            ("--adam-alpha", self.adam_alpha, 0.0),
            ("--adam-min-alpha", self.adam_min_alpha, 0.0),
            ("--adam-decay", self.adam_decay, 0.0),
            ("--adam-gclip", self.adam_gclip, 0.0),
            ("--adam-epsf", self.adam_epsf, 0.0),
        ):
            check_least(flag, value, least)
        for flag, value in (("--adam-beta1", self.adam_beta1), ("--adam-beta2", self.adam_beta2)):
            check_share(flag, value)
        if not 0 <= self.cos_decay_min <= 1:
            raise UsageError(f"--cos-decay-min is {self.cos_decay_min} (expected a number from 0 to 1)")

    @property
    def micro_rows(self) -> int:
        """Sequences that are computed at a time."""
        return min(self.micro_batch or self.batch, self.batch)


def size_bytes(flag: str, text: str, units: str = "bytes") -> int:
    """Bytes of a size as `3G`, `1.5G` or `800M`, decimal units, or of a plain number. Raises UsageError."""
    found = _SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if size <= 0:
        raise UsageError(f"{flag} is {text!r} (expected a number of {units} with K, M, G or T, as in 3G)")
    return size


def check_least(flag: str, value: float, least: float) -> None:
    """Raises UsageError for a value below the least, or one that is no number."""
    if not (math.isfinite(value) and value >= least):
        raise UsageError(f"{flag} is {value} (expected at least {least})")


def check_share(flag: str, value: float) -> None:
    """Raises UsageError for a value outside of [0, 1)."""
    if not 0 <= value < 1:
        raise UsageError(f"{flag} is {value} (expected a number from 0 up to, but not including, 1)")


def check_positive(flag: str, value: float | None) -> None:
    """Raises UsageError for a value that is given and not above 0."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise UsageError(f"{flag} is {value} (expected a positive number)")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(SampleOptions, ChatOptions, LoopOptions):
    """Options of `finetune`, named after llama.cpp's flags; an unset rank (None) means its rule applies."""

    model_base: str = ""
    """model whose frozen weights the adapter is trained on, GGUF or another format that is read"""
    train_data: str = "shakespeare.txt"
    """UTF-8 text to train on, or questions and answers: JSON, JSON lines, CSV, or a folder with these"""
    val_data: str = ""
    """data to evaluate, of the same kind, instead of a share of the training data"""
    lora_out: str = "ggml-lora-ITERATION-f32.gguf"
    """name of the adapters; empty: none is written"""
    lora_format: LoraFormat = "gguf"
    """what an adapter is: a GGUF file, or the folder of PEFT"""
    anchor_data: str = ""
    """text or records on which the adapter is to change nothing: the divergence from the base is added to the loss"""
    anchor_weight: float = 1.0
    """weight of that divergence"""
    anchor_batch: int = 1
    """rows of it that are compared in an iteration"""
    save_best: bool = False
    """keep the adapter, or model, of the best held-out loss, with BEST in place of the pattern"""
    patience: int = 0
    """stop after N evaluations in a row without a better held-out loss; 0: never"""
    sample_prompt: tuple[str, ...] = ()
    """what the model is asked before, at each save and at the end; questions for a chat, beginnings for a text"""
    sample_tokens: int = 64
    """tokens of each of its answers at most"""
    only_write_lora: bool = False
    """write the adapter of --checkpoint-in and end"""
    full: bool = False
    """train all weights of the base, and write a model instead of an adapter"""
    model_out: str = "model-ITERATION.gguf"
    """name of the models that --full writes; empty: none is written"""
    outtype: Outtype = "f32"
    """type of the matrices in them"""
    only_write_model: bool = False
    """write the model of --checkpoint-in, a checkpoint of --full, and end"""
    log_file: str = ""
    """JSONL file with one object per step"""
    force_reshuffle: bool = False
    """begin a new shuffled epoch when going on from a checkpoint"""
    restart_data: bool = False
    """accept another text than the checkpoint was trained on, from its beginning"""
    cos_decay_restart: float = 1.1
    """each restarted period is this many times as long as the one before"""
    enable_restart: bool = False
    """start the cosine decay again when it is over"""

    lora_r: int = 4
    """rank of the adapter's matrices"""
    lora_alpha: float | None = None
    """scale of the adapter is alpha / rank; the default is --lora-r"""
    rslora: bool = False
    """scale of the adapter is alpha / sqrt(rank)"""
    lora_targets: tuple[str, ...] = ()
    """what is trained, instead of the seven matrices: kinds, names or patterns, =RANK behind one for its own rank"""
    lora_init: str = ""
    """adapter to begin with: its tensors and ranks are trained on"""
    merge_out: str = ""
    """GGUF file with the finished adapter merged into the base; empty: none"""
    lora_dropout: float = 0.0
    """share of the adapter's inputs dropped at random in training"""
    rank_att_norm: int | None = None
    """rank for the attention norms (default: not trained; llama.cpp ignores it)"""
    rank_ffn_norm: int | None = None
    """rank for the feed-forward norms (default: not trained; llama.cpp ignores it)"""
    rank_out_norm: int | None = None
    """rank for the output norm (default: not trained; llama.cpp ignores it)"""
    rank_tok_embd: int | None = None
    """rank for the token embeddings (default: not trained)"""
    rank_out: int | None = None
    """rank for the output matrix (default: not trained)"""
    rank_wq: int | None = None
    """rank for attn_q (default: --lora-r)"""
    rank_wk: int | None = None
    """rank for attn_k (default: --lora-r)"""
    rank_wv: int | None = None
    """rank for attn_v (default: --lora-r)"""
    rank_wo: int | None = None
    """rank for attn_output (default: --lora-r)"""
    rank_ffn_gate: int | None = None
    """rank for ffn_gate (default: --lora-r)"""
    rank_ffn_down: int | None = None
    """rank for ffn_down (default: --lora-r)"""
    rank_ffn_up: int | None = None
    """rank for ffn_up (default: --lora-r)"""
    norm_rms_eps: float | None = None
    """epsilon of the norms instead of the model's own"""
    rope_freq_base: float | None = None
    """base of the rotary frequencies instead of the model's own"""
    rope_freq_scale: float | None = None
    """factor on the rotary frequencies instead of the model's own scaling"""
    weight_cache: Cache = "auto"
    """keep the decoded weights once (bf16), decode them for each use (none), or decide by the free memory (auto)"""
    max_memory: str = ""
    """compute in a way that fits into so much memory, as in 3G; empty: as the other options say"""

    def __post_init__(self) -> None:
        """Raises UsageError naming the flag whose value cannot be."""
        super().__post_init__()
        check_least("--ctx", self.ctx, 1)
        check_least("--cos-decay-steps", self.cos_decay_steps, 1)
        check_least("--cos-decay-restart", self.cos_decay_restart, 1.0)
        check_least("--lora-r", self.lora_r, 1)
        check_least("--patience", self.patience, 0)
        check_least("--anchor-batch", self.anchor_batch, 1)
        check_positive("--anchor-weight", self.anchor_weight)
        check_least("--sample-tokens", self.sample_tokens, 1)
        for name, rank in self._ranks().items():
            if rank is not None:
                check_least(f"--{name.replace('_', '-')}", rank, 0)
        for flag, value in (("--lora-dropout", self.lora_dropout), ("--val-split", self.val_split)):
            check_share(flag, value)
        for flag, value in (
            ("--lora-alpha", self.lora_alpha),
            ("--norm-rms-eps", self.norm_rms_eps),
            ("--rope-freq-base", self.rope_freq_base),
            ("--rope-freq-scale", self.rope_freq_scale),
        ):
            check_positive(flag, value)
        for _, rank in self.targets():
            if rank is not None:
                check_least("--lora-targets", rank, 1)
        if self.max_memory:
            size_bytes("--max-memory", self.max_memory)
        self._check_together()

    @property
    def max_memory_bytes(self) -> int:
        """--max-memory in bytes; 0: none was given."""
        return size_bytes("--max-memory", self.max_memory) if self.max_memory else 0

    def _check_together(self) -> None:
        """Raises UsageError for options that say different things."""
        self._check_full()
        if self.lora_init and (self.lora_targets or any(rank is not None for rank in self._ranks().values())):
            raise UsageError("--lora-init brings its tensors and ranks: --lora-targets and --rank-* cannot be given")
        if self.lora_format == "peft" and self.lora_out.endswith(".gguf"):
            hint = f"such as --lora-out lora-{self.pattern_fn_it}"
            raise UsageError(f"--lora-format peft writes folders, and --lora-out is {self.lora_out}", hint=hint)
        if self.merge_out and not self.lora_out:
            raise UsageError("--merge-out needs an adapter to merge, and --lora-out is empty")
        for name in ("norm_rms_eps", "rope_freq_base", "rope_freq_scale") if self.merge_out else ():
            if getattr(self, name) is not None:
                raise UsageError(
                    f"--merge-out cannot be given with --{name.replace('_', '-')}: the base has another one"
                )

    def _check_full(self) -> None:
        """Raises UsageError for an option of an adapter with --full, and for one of --full without it."""
        of_adapters = [f.name for f in fields(self) if f.name.startswith(("lora_", "rank_")) or f.name in _OF_ADAPTERS]
        defaults = {field.name: field.default for field in fields(self)}
        for name in of_adapters if self.full else _OF_FULL:
            if getattr(self, name) != defaults[name]:
                flag = f"--{name.replace('_', '-')}"
                if self.full:
                    hint = "--model-out names the models" if name == "lora_out" else None
                    raise UsageError(f"{flag} is for an adapter, and --full trains all weights", hint=hint)
                raise UsageError(f"{flag} needs --full: without it an adapter is trained")

    @property
    def product_out(self) -> str:
        """The name of what is trained: --model-out with --full, else --lora-out."""
        return self.model_out if self.full else self.lora_out

    @property
    def only_write(self) -> bool:
        """Whether the run writes what a checkpoint holds, and ends."""
        return self.only_write_lora or self.only_write_model

    def targets(self) -> list[tuple[str, int | None]]:
        """(pattern, its rank or None) of --lora-targets, which may have commas in them. Raises UsageError."""
        found: list[tuple[str, int | None]] = []
        for part in (part.strip() for target in self.lora_targets for part in target.split(",")):
            pattern, equals, rank = part.partition("=")
            if not pattern or (equals and not rank.isdecimal()):
                raise UsageError(f"--lora-targets has {part!r} (expected a kind, name or pattern, and =RANK perhaps)")
            found.append((pattern, int(rank) if equals else None))
        return found

    def _ranks(self) -> dict[str, int | None]:
        return {name: value for name, value in vars(self).items() if name.startswith("rank_")}

    @property
    def alpha(self) -> float:
        """The adapter's alpha: --lora-alpha, or --lora-r."""
        return float(self.lora_r if self.lora_alpha is None else self.lora_alpha)

    def rank_of(self) -> dict[str, int]:
        """Rank by GGUF tensor kind (attn_q, token_embd, ...); 0 where nothing is trained."""
        matrices = {
            "attn_q": self.rank_wq,
            "attn_k": self.rank_wk,
            "attn_v": self.rank_wv,
            "attn_output": self.rank_wo,
            "ffn_gate": self.rank_ffn_gate,
            "ffn_up": self.rank_ffn_up,
            "ffn_down": self.rank_ffn_down,
        }
        rest = {
            "token_embd": self.rank_tok_embd,
            "output_norm": self.rank_out_norm,
            "output": self.rank_out,
            "attn_norm": self.rank_att_norm,
            "ffn_norm": self.rank_ffn_norm,
        }
        ranks = {kind: self.lora_r if rank is None else rank for kind, rank in matrices.items()}
        return ranks | {kind: rank or 0 for kind, rank in rest.items()}
