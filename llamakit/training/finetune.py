"""The verb `finetune`: checks everything, loads, resumes, trains, saves; tells of it in reports."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llamakit.conversion.merge import MergePlan, merge
from llamakit.conversion.merge_config import MergeConfig
from llamakit.dataset.order import SampleOrder
from llamakit.errors import MismatchError, UsageError
from llamakit.formats.adapter import write_adapter
from llamakit.formats.open import check_is_model, model_files, open_model, size_on_disk
from llamakit.formats.stamps import base_stamps
from llamakit.inference.config import GenerateConfig
from llamakit.model import Llama, ModelConfig, RopeScaling, load_config, load_model
from llamakit.model.device import dtype_name, resolve_device, training_dtype
from llamakit.model.layers import Dropout
from llamakit.tokenizer import load_tokenizer
from llamakit.training.answers import Answers
from llamakit.training.checkpoint import (
    CheckpointManager,
    OldCheckpoint,
    Product,
    claim_outputs,
    file_name,
    read_checkpoint,
)
from llamakit.training.config import Cache, FinetuneConfig
from llamakit.training.distributed import Dist
from llamakit.training.finetune_data import FinetuneData, read_data
from llamakit.training.log import StepLog
from llamakit.training.loop import Control, Parameters, Trainer, agree
from llamakit.training.lora import as_adapter, attach_trainable, named_pairs, rank_field
from llamakit.training.lora_plan import plan_lora
from llamakit.training.loss import gathered
from llamakit.training.optim import schedule
from llamakit.training.plan import make_plan
from llamakit.training.proof import N_TOKENS, logits_of, prove
from llamakit.training.ranks import check_commands, check_content, find_start, origin, own_name
from llamakit.training.report import (
    Begin,
    ChatFacts,
    Counters,
    Evaluation,
    Finished,
    Loading,
    ModelFacts,
    Remark,
    Report,
    Saving,
)
from llamakit.training.sharding import choose_sharding, load_sharded
from llamakit.training.state import (
    Progress,
    TrainState,
    check_identity,
    check_shapes,
    make_identity,
    make_settings,
    place,
    resume_remarks,
)
from llamakit.training.validation import HeldOut

_NOT_IN_ADAPTER_USE = ("attn_norm", "ffn_norm", "output_norm")


def finetune(config: FinetuneConfig, control: Control | None = None, dist: Dist | None = None) -> Iterator[Report]:
    """Train a LoRA adapter on a frozen, packed model; yields what happens, ends with Finished.

    control: set `signal` to have the running step finished, everything saved and the run ended; `save` to save and
    go on. Nothing is written before the base, the text, the checkpoint and the outputs are known to be good.
    dist: the processes that train together; each calls this, and the first of them reads and writes what is on disk.
    Raises LlamakitError: UsageError, FormatError, DataError, MismatchError (exit code 2), SaveError, DivergedError,
    LostRankError.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        run = _Run(config, control or Control(), stack, dist or Dist())
        yield from run.prepare()
        if config.only_write_lora:
            yield from run.write_adapter_only() if run.dist.is_main else ()
        else:
            log_file = config.log_file if run.dist.is_main else ""
            yield from StepLog(log_file, append=run.saved is not None).follow(run.train())
        yield Finished(
            run.reason,
            time.perf_counter() - started,
            run.progress.iterations,
            run.manager.latest(),
            run.control.signal,
        )


class _Run:
    """One run from start to end; a class because so many of its parts need each other."""

    def __init__(self, config: FinetuneConfig, control: Control, stack: ExitStack, dist: Dist) -> None:
        self.config, self.dist, self._stack = config, dist, stack
        self._given, self.control = control, Control() if dist.joined else control
        self.progress, self.reason = Progress(), ""

    # ---- before training -------------------------------------------------------------------------------------

    def prepare(self) -> Iterator[Report]:
        """Open and check everything that can be wrong, cheapest first."""
        config = self.config
        if not config.model_base:
            raise UsageError("--model-base is missing", hint="name the GGUF model to train on: --model-base FILE")
        if not config.train_data and not config.only_write_lora:
            raise UsageError("--train-data is empty", hint="name the text to train on: --train-data FILE")
        if config.save_best and config.pattern_fn_it not in Path(config.lora_out).name:
            hint = f"such as --lora-out lora-{config.pattern_fn_it}.gguf"
            raise UsageError(f"--save-best needs {config.pattern_fn_it} in the name of --lora-out", hint=hint)
        if not (config.lora_out or config.checkpoint_out):
            raise UsageError("--lora-out and --checkpoint-out are both empty: nothing would be written")
        self.dist.check_batch(config.batch)
        check_commands(self.dist, config)
        # A source that states no context takes any: the model's own is only a bound of --ctx.
        self.base = open_model(config.model_base, n_ctx=config.ctx, rope_theta=config.rope_freq_base)
        check_is_model(self.base)
        yield Loading("model", config.model_base, size_on_disk(config.model_base))
        self.shape = _overridden(load_config(self.base), config)
        self.device = resolve_device(config.device)
        self.dtype = training_dtype(config.dtype, self.device)
        choose_sharding(self.dist, config, self.base, self.device)
        if self.dist.is_main:
            self._claim_outputs()
        self.stamps = base_stamps(self.base)
        start = find_start(self.dist, config, "finetune_lora", self._read_checkpoint_in)
        self.saved = start.state
        if start.own:
            config = self.config = dataclasses.replace(config, checkpoint_in=own_name(config))
        self.job = origin(self.dist, start)
        self.lora = plan_lora(config, self.shape, self.base, self._ranks())
        self.ranks, self.alpha = self.lora.kinds, self.lora.alpha
        self.seed = self.dist.from_main(self._seed)
        product = Product("adapter", config.lora_out, self._write_adapter)
        self.manager = CheckpointManager(config, "finetune_lora", product, clear=self.dist.is_main)
        yield ModelFacts(self.seed, config.model_base, self.shape, config.ctx, self.ranks, self.alpha)
        yield from self._remarks()

    def _claim_outputs(self) -> None:
        config = self.config
        outputs = [file_name(t, config, None) for t in (config.checkpoint_out, config.lora_out) if t]
        outputs += [Path(path) for path in (config.log_file, config.merge_out) if path]
        sources = (*model_files(config.model_base), config.train_data, config.val_data, config.lora_init)
        lock = claim_outputs(outputs, sources, "checkpoint, adapter, merged model and log")
        self._stack.enter_context(lock)

    def _read_checkpoint_in(self) -> TrainState | OldCheckpoint | None:
        path = self.config.checkpoint_in
        return read_checkpoint(Path(path)) if path and os.path.lexists(path) else None

    def _ranks(self) -> dict[str, int]:
        ranks = self.config.rank_of()
        if isinstance(self.saved, OldCheckpoint):
            given = {k for k, v in vars(self.config).items() if k.startswith("rank_") and v is not None}
            ranks |= {k: r for k, r in self.saved.ranks.items() if k in ranks and rank_field(k) not in given}
            for kind, rank in self.saved.ranks.items():
                if ranks.get(kind) != rank:
                    raise MismatchError(
                        f"rank of {kind} is {rank} in the checkpoint, and {ranks.get(kind)} in this run",
                        path=self.config.checkpoint_in,
                    )
        if self.shape.tied_output:
            if self.config.rank_out:
                raise UsageError("--rank-out: this model has no output matrix of its own (it uses token_embd)")
            ranks["output"] = 0
        if not any(ranks.values()):
            raise UsageError("every rank is 0: there is nothing to train")
        return ranks

    def _seed(self) -> int:
        given = self.config.seed
        if given >= 0:
            return given
        if isinstance(self.saved, TrainState):
            return int(self.saved.identity["--seed"])
        return int(time.time()) & 0xFFFFFFFF

    def _remarks(self) -> Iterator[Remark]:
        config = self.config
        yield from (Remark("warning", text) for text in self.lora.remarks)
        path = config.checkpoint_in
        if self.saved is None:
            if path:
                yield Remark("note", f"no checkpoint at {path}: starting afresh")
        elif isinstance(self.saved, OldCheckpoint):
            yield Remark("note", f"{path} is a checkpoint of llama.cpp's finetune: its LoRA tensors and counters are"
                         " taken, its shuffle state and optimizer moments are not")  # fmt: skip
            if any(rank and self.alpha != rank for rank in self.ranks.values()):
                yield Remark("warning", "the old tool trained without the factor alpha / rank that was applied when"
                             f" its adapters were used; --lora-alpha {self.alpha:g} is part of it here")  # fmt: skip
        norms = [kind for kind in _NOT_IN_ADAPTER_USE if self.ranks[kind]]
        if norms:
            yield Remark("warning", f"llama.cpp ignores the trained changes of {', '.join(norms)}: an adapter without"
                         " them is what it runs; llamakit applies them")  # fmt: skip
        if self.ranks["token_embd"] and self.shape.tied_output:
            yield Remark("warning", "this model uses token_embd as its output matrix too: llama.cpp of 2026 ends with a"
                         " failed assertion on adapters that change it")  # fmt: skip
        last = self.job["first"] + config.adam_iter
        if last < config.warmup and not config.only_write_lora:
            peak = schedule(last, config) * config.adam_alpha if last else 0.0
            yield Remark("warning", f"--warmup {config.warmup} is longer than the run, which ends at iteration {last}:"
                         f" the learning rate will reach {peak:.3g}, not {config.adam_alpha:g}")  # fmt: skip

    # ---- training --------------------------------------------------------------------------------------------

    def train(self) -> Iterator[Report]:
        """Load text and model, go on from the checkpoint, and step."""
        config = self.config
        tokenizer = load_tokenizer(self.base)
        text_bytes = os.path.getsize(config.train_data) if os.path.isfile(config.train_data) else 0
        yield Loading("text", config.train_data, text_bytes)
        data = read_data(config, tokenizer, n_vocab=self.shape.n_vocab, seed=self.seed)
        if (config.patience or config.save_best) and data.held_out is None:
            name = "--patience" if config.patience else "--save-best"
            hint = "hold some of it out (--val-split 0.1), or name some: --val-data FILE"
            raise UsageError(f"{name} needs held-out data, and there is none", hint=hint)
        identity = data.identity | self._identity(data.sha256)
        check_content(self.dist, identity)
        yield from self._resume(identity)
        model = self._load(config.weight_cache, for_training=True)
        before = self.job["first"]
        trainer = self._trainer(model, data)
        is_chat = isinstance(data.facts, ChatFacts)
        likeliest = GenerateConfig(n_predict=config.sample_tokens, temperature=0.0, seed=0)
        answers = Answers(model, tokenizer, config.sample_prompt, likeliest, as_messages=is_chat)
        yield from self._facts(data, trainer)
        whole = config.save_best or config.patience > 0  # evaluations are held against each other
        held_out = HeldOut(data.held_out, model, self.device, self.dist, whole=whole)
        if held_out and not self.progress.iterations:
            yield held_out.evaluate("start")
        if self.dist.is_main:
            yield from answers.samples(self.progress.iterations)
        yield from self._steps(trainer, held_out, answers, identity)
        trained = self.progress.iterations > before and not self.control.signal
        if config.lora_out and trained and (self.dist.is_main or self.dist.sharded):
            some = data.first[: min(N_TOKENS, config.ctx)].astype(np.int64).clip(0, self.shape.n_vocab - 1)
            tokens = torch.from_numpy(some).to(self.device)
            logits = logits_of(model, tokens)
            del model, trainer, held_out, answers  # the base is loaded once more
            yield from self._proof(tokens, logits)

    def _identity(self, text_hash: str) -> dict[str, Any]:
        return make_identity(
            self.config,
            seed=self.seed,
            ranks=self.ranks,
            base_model=self.stamps.model,
            base_file=self.stamps.file,
            text=text_hash,
        ) | {"--lora-alpha": self.alpha, "--rslora": self.config.rslora}

    def _settings(self) -> dict[str, Any]:
        return make_settings(self.config, dtype_name(self.dtype))

    def _resume(self, identity: dict[str, Any]) -> Iterator[Report]:
        config, saved = self.config, self.saved
        if saved is None:
            return
        path = config.checkpoint_in
        yield Loading("checkpoint", path, os.path.getsize(path) if self.dist.is_main else 0)
        self.progress = saved.progress
        if isinstance(saved, OldCheckpoint):
            return
        check_identity(saved.identity, identity, path=path, restart_data=config.restart_data)
        if saved.identity["text"] != identity["text"]:
            yield Remark("note", "the training text is another one: beginning with its first sample")
            self.progress.next_sample, self.progress.order_epoch = 0, self.progress.order_epoch + 1
        elif config.force_reshuffle:
            self.progress.next_sample, self.progress.order_epoch = 0, self.progress.order_epoch + 1
        yield from resume_remarks(saved, self._settings(), place(self.device, self.dist.world))

    def _trainer(self, model: Llama, data: FinetuneData) -> Trainer:
        config = self.config
        model.use_checkpointing = config.use_checkpointing
        dropout = Dropout(config.lora_dropout)
        pairs = attach_trainable(
            model, self.lora.initial(self.shape, self.seed), self.alpha, dropout, rslora=config.rslora
        )
        parameters = Parameters(named_pairs(pairs), config)
        if self.saved is not None and self.dist.is_main:
            check_shapes(self.saved.arrays, parameters.shapes, config.checkpoint_in)
            parameters.restore(self.saved.arrays, self.progress.updates)
            self.saved.arrays.clear()
        parameters.send(self.dist)
        order = SampleOrder(self.seed, data.n_samples, self.progress.order_epoch, self.progress.next_sample)
        factor = partial(schedule, config=config)
        return Trainer(
            model.train(), parameters, data.batches, order, self.progress, config, dropout, factor, self.dist,
            epochs_before=self.job["epochs"],
        )  # fmt: skip

    def _facts(self, data: FinetuneData, trainer: Trainer) -> Iterator[Report]:
        config, progress = self.config, self.progress
        trained = trainer.parameters.n_numbers
        yield Counters(
            progress.iterations, progress.samples, progress.tokens, progress.epochs, progress.updates,
            4 * trained, 8 * trained, trained,
        )  # fmt: skip
        yield from data.remarks
        yield data.facts
        mine = dataclasses.replace(config, batch=config.batch // self.dist.world)
        with gathered(trainer.model.blk[0]):
            yield make_plan(
                trainer.model, mine, dtype=self.dtype, dtype_name=dtype_name(self.dtype), device=self.device,
                trained=trained,
            )  # fmt: skip
        yield Begin(progress.iterations, self._n_left)

    def _steps(
        self, trainer: Trainer, held_out: HeldOut, answers: Answers, identity: dict[str, Any]
    ) -> Iterator[Report]:
        config, control, progress = self.config, self.control, self.progress
        last_save, self.reason = progress.iterations, "all iterations are done"
        for left in range(self._n_left - 1, -1, -1):
            report = trainer.step(left)
            agree(self.dist, self._given, control)
            stop = trainer.why_stop(report) or ("interrupted" if control.signal else "")
            due = config.save_every > 0 and progress.iterations - last_save >= config.save_every
            if not (due or stop or control.save or left == 0) or trainer.diverged:
                yield report
            else:
                evaluation = None
                if held_out and not control.signal:
                    evaluation = self._judged(held_out.evaluate("end" if stop or left == 0 else "save", report.step))
                    report = dataclasses.replace(report, val_loss=evaluation.loss, val_ppl=evaluation.ppl)
                    if 0 < config.patience <= progress.evaluations_without_best:
                        stop = stop or f"--patience {config.patience}: the held-out loss no longer falls"
                yield report
                if evaluation is not None:
                    yield evaluation
                if not control.signal and self.dist.is_main:
                    yield from answers.samples(report.step)
                control.save, last_save = False, progress.iterations
                is_best = config.save_best and evaluation is not None and evaluation.is_best
                yield from self._save(trainer, identity, is_best=is_best)
            trainer.check_diverged()
            if stop or control.signal:
                self.reason = stop or "interrupted"
                break
        if last_save < progress.iterations:  # the signal came between a step and the next
            yield from self._save(trainer, identity)

    @property
    def _n_left(self) -> int:
        return max(0, self.job["first"] + self.config.adam_iter - self.progress.iterations)

    def _save(self, trainer: Trainer, identity: dict[str, Any], *, is_best: bool = False) -> Iterator[Report]:
        """Rank 0 has all that there is to save."""
        if self.dist.is_main:
            yield from self.manager.save(self._state(trainer, identity))
            if is_best:
                yield from self.manager.mark(self.progress.iterations, "BEST")

    def _proof(self, tokens: torch.Tensor, logits: torch.Tensor) -> Iterator[Report]:
        """The adapter that was just written, on a fresh base; logits: what the trained model says to tokens."""
        together = self.dist if self.dist.sharded else Dist()
        path = file_name(self.config.lora_out, self.config, self.progress.iterations)
        verified = prove(path, self.base, lambda: self._load("none"), tokens, logits, self.dtype, together)
        yield verified
        if not verified.change:
            yield Remark("warning", f"the adapter is so small that no logit changes in {dtype_name(self.dtype)}")
        if self.config.merge_out and self.dist.is_main:
            yield from self._merged(path)

    def _load(self, weight_cache: Cache, *, for_training: bool = False) -> Llama:
        """The base, or this rank's share of it."""
        where: dict[str, Any] = {"device": self.device, "dtype": self.dtype, "config": self.shape}
        if self.dist.sharded:
            return load_sharded(self.base, dist=self.dist, **where)
        more: dict[str, Any] = {"for_training": for_training, "n_sharing": self.dist.local_world}
        return load_model(self.base, weight_cache=weight_cache, **where, **more)

    def _merged(self, path: Path) -> Iterator[Report]:
        """--merge-out: the best adapter where it was kept, else the last, merged into the base."""
        config = self.config
        if config.save_best:
            path = Path(config.lora_out.replace(config.pattern_fn_it, "BEST", 1))
        yield Saving("model", config.merge_out)
        for report in merge(MergeConfig(model=Path(config.model_base), lora=(path,), out=Path(config.merge_out))):
            if isinstance(report, MergePlan):
                yield from (Remark("warning", text) for text in report.warnings)

    def _judged(self, evaluation: Evaluation) -> Evaluation:
        """An evaluation, and whether it is the best so far."""
        progress = self.progress
        is_best = progress.best_evaluation is None or evaluation.loss < progress.best_evaluation
        if is_best:
            progress.best_evaluation, progress.evaluations_without_best = evaluation.loss, 0
        else:
            progress.evaluations_without_best += 1
        return dataclasses.replace(evaluation, is_best=is_best)

    def _state(self, trainer: Trainer, identity: dict[str, Any]) -> TrainState:
        here, arrays = place(self.device, self.dist.world), trainer.parameters.snapshot()
        return TrainState(identity, self._settings(), here, self.progress, arrays, self.job)

    def _write_adapter(self, path: Path, arrays: Mapping[str, np.ndarray]) -> None:
        write_adapter(path, as_adapter(arrays, self.alpha, rslora=self.config.rslora), self.base)

    def write_adapter_only(self) -> Iterator[Report]:
        """--only-write-lora: the adapter of --checkpoint-in."""
        config, saved = self.config, self.saved
        if saved is None:
            raise UsageError(
                "--only-write-lora needs a checkpoint: --checkpoint-in does not exist",
                path=config.checkpoint_in,
            )
        if isinstance(saved, TrainState):
            mine = self._identity(saved.identity["text"])
            adapter_keys = {
                k: v for k, v in mine.items() if k.startswith(("base ", "rank ", "--lora-alpha", "--rslora"))
            }
            check_identity(saved.identity, adapter_keys, path=config.checkpoint_in, restart_data=False)
        start = {name: (w.a, w.b) for name, w in self.lora.initial(self.shape, 0).items()}
        check_shapes(saved.arrays, {n: x.shape for n, x in named_pairs(start).items()}, config.checkpoint_in)
        self.progress, self.reason = saved.progress, "the adapter is written"
        yield from self.manager.save_product(TrainState({}, {}, {}, saved.progress, saved.arrays))
        if config.merge_out:
            yield from self._merged(file_name(config.lora_out, config, saved.progress.iterations))


def _overridden(shape: ModelConfig, config: FinetuneConfig) -> ModelConfig:
    """The model's hyper-parameters with what the command line changes. Raises UsageError for a ctx that cannot be."""
    changes: dict[str, Any] = {}
    if config.norm_rms_eps is not None:
        changes["rms_eps"] = config.norm_rms_eps
    if config.rope_freq_base is not None:
        changes["rope_base"] = config.rope_freq_base
    if config.rope_freq_scale is not None:
        changes["rope_scaling"] = RopeScaling(type="linear", factor=1 / config.rope_freq_scale)
    elif config.ctx > shape.n_ctx:
        raise UsageError(
            f"--ctx {config.ctx} is more than the model's context of {shape.n_ctx}",
            hint="give a smaller --ctx, or stretch the positions with --rope-freq-scale",
        )
    return dataclasses.replace(shape, **changes)
