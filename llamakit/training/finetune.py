"""The verb `finetune`: checks everything, loads, resumes, trains, saves; tells of it in reports."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamakit.dataset.order import SampleOrder
from llamakit.errors import UsageError
from llamakit.formats.open import check_is_model, model_files, open_model, size_on_disk
from llamakit.formats.peft import FILES as PEFT_FILES
from llamakit.formats.stamps import base_stamps
from llamakit.inference.config import GenerateConfig
from llamakit.model import Llama, ModelConfig, RopeScaling, load_config
from llamakit.model.device import dtype_name, resolve_device, training_dtype
from llamakit.model.layers import Dropout
from llamakit.tokenizer import load_tokenizer
from llamakit.training.answers import Answers
from llamakit.training.checkpoint import (
    CheckpointManager,
    OldCheckpoint,
    TrainingType,
    checkpoint_bytes,
    claim_outputs,
    file_name,
    read_checkpoint,
)
from llamakit.training.config import FinetuneConfig
from llamakit.training.distributed import Dist
from llamakit.training.finetune_data import FinetuneData, read_anchor, read_data
from llamakit.training.finetune_full import FullSubject
from llamakit.training.finetune_lora import LoraSubject
from llamakit.training.log import StepLog
from llamakit.training.loop import Control, Parameters, Trainer, agree
from llamakit.training.memory import BYTES_PER_TRAINED
from llamakit.training.optim import schedule
from llamakit.training.outcome import with_outcome
from llamakit.training.plan import footprint, held_out_tokens, make_plan
from llamakit.training.proof import N_TOKENS, logits_of
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
)
from llamakit.training.sharding import choose_sharding, may_shard
from llamakit.training.shares import restore, save
from llamakit.training.state import (
    Progress,
    TrainState,
    check_identity,
    check_shapes,
    make_identity,
    make_settings,
    place,
    resume_remarks,
    warmup_remarks,
)
from llamakit.training.subject import Subject
from llamakit.training.validation import HeldOut


def finetune(config: FinetuneConfig, control: Control | None = None, dist: Dist | None = None) -> Iterator[Report]:
    """Train a LoRA adapter on a frozen, packed model, or all of its weights; yields what happens, ends with Finished.

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
        if config.only_write:
            yield from run.write_product_only() if run.dist.is_main else ()
        else:
            log_file = config.log_file if run.dist.is_main else ""
            yield from with_outcome(StepLog(log_file, append=run.saved is not None).follow(run.train()))
        yield Finished(
            run.reason,
            time.perf_counter() - started,
            run.progress.iterations,
            run.manager.latest(),
            run.control.signal,
        )


def plan_finetune(config: FinetuneConfig) -> Iterator[Report]:
    """What `finetune` of these options would take: its reports up to the Plan. No weights are loaded, nothing is
    written. Raises what `finetune` raises before it loads its base."""
    with ExitStack() as stack:
        run = _Run(config, Control(), stack, Dist(), writes=False)
        yield from run.prepare()
        yield from run.plan(run.read_data())


class _Run:
    """One run from start to end; a class because so many of its parts need each other."""

    def __init__(
        self, config: FinetuneConfig, control: Control, stack: ExitStack, dist: Dist, *, writes: bool = True
    ) -> None:
        self.config, self.dist, self._stack, self._writes = config, dist, stack, writes
        self._given, self.control = control, Control() if dist.joined else control
        self.progress, self.reason = Progress(), ""

    # ---- before training -------------------------------------------------------------------------------------

    def prepare(self) -> Iterator[Report]:
        """Open and check everything that can be wrong, cheapest first."""
        config = self.config
        if not config.model_base:
            raise UsageError("--model-base is missing", hint="name the GGUF model to train on: --model-base FILE")
        if not config.train_data and not config.only_write:
            raise UsageError("--train-data is empty", hint="name the text to train on: --train-data FILE")
        out, name = ("--model-out", "model") if config.full else ("--lora-out", "lora")
        if config.save_best and config.pattern_fn_it not in Path(config.product_out).name:
            hint = f"such as {out} {name}-{config.pattern_fn_it}.gguf"
            raise UsageError(f"--save-best needs {config.pattern_fn_it} in the name of {out}", hint=hint)
        if not (config.product_out or config.checkpoint_out):
            raise UsageError(f"{out} and --checkpoint-out are both empty: nothing would be written")
        self.dist.check_batch(config.batch)
        check_commands(self.dist, config)
        # A source that states no context takes any: the model's own is only a bound of --ctx.
        self.base = open_model(config.model_base, n_ctx=config.ctx, rope_theta=config.rope_freq_base)
        check_is_model(self.base)
        yield Loading("model", config.model_base, size_on_disk(config.model_base))
        self.shape = _overridden(load_config(self.base), config)
        self.device = resolve_device(config.device)
        self.dtype = training_dtype(config.dtype, self.device)
        choose_sharding(self.dist, config, self._held_bytes(), self.device)
        if self._writes:
            if self.dist.is_main:
                self._claim_outputs()
            self.stamps = base_stamps(self.base)
        start = find_start(self.dist, config, self._kind, self._read_checkpoint_in)
        self.saved, self.job = start.state, origin(self.dist, start)
        if start.own:
            config = self.config = dataclasses.replace(config, checkpoint_in=own_name(config))
        self.subject = self._subject()
        self.seed = self.dist.from_main(self._seed)
        if self._writes:
            product, clear = self.subject.product, self.dist.is_main
            self.manager = CheckpointManager(config, self._kind, product, clear=clear)
        yield ModelFacts(self.seed, config.model_base, self.shape, config.ctx, self.subject.ranks, self.subject.alpha)
        yield from self._remarks()

    def _held_bytes(self) -> int:
        """What a rank holds of a whole base, which is packed, or trained."""
        tensors = self.base.tensors.values()
        if self.config.full:
            return BYTES_PER_TRAINED * sum(info.n_elements for info in tensors)
        return sum(info.n_bytes for info in tensors)

    @property
    def _kind(self) -> TrainingType:
        return "finetune_full" if self.config.full else "finetune_lora"

    def _subject(self) -> Subject:
        if self.config.full:
            return FullSubject(self.config, self.base, self.shape)
        return LoraSubject(self.config, self.base, self.shape, self.saved)

    def _claim_outputs(self) -> None:
        config = self.config
        outputs = [file_name(t, config, None) for t in (config.checkpoint_out, config.product_out) if t]
        outputs += [Path(path) for path in (config.log_file, config.merge_out) if path]
        sources = (*model_files(config.model_base), config.train_data, config.val_data, config.lora_init)
        folders = {file_name(config.lora_out, config, None): PEFT_FILES} if config.lora_format == "peft" else {}
        for path in folders:
            if path.is_dir() and not path.is_symlink() and path != file_name(config.lora_out, config, 0):
                raise UsageError("is a folder, a link to the newest one is to be put there", path=path)
        lock = claim_outputs(outputs, sources, "checkpoint, adapter, model and log", folders)
        self._stack.enter_context(lock)

    def _read_checkpoint_in(self) -> TrainState | OldCheckpoint | None:
        path = self.config.checkpoint_in
        light = may_shard(self.dist, self.config)
        return read_checkpoint(Path(path), self._kind, light=light) if path and os.path.lexists(path) else None

    def _seed(self) -> int:
        given = self.config.seed
        if given >= 0:
            return given
        if isinstance(self.saved, TrainState):
            return int(self.saved.identity["--seed"])
        return int(time.time()) & 0xFFFFFFFF

    def _remarks(self) -> Iterator[Remark]:
        config = self.config
        if self.saved is None and config.checkpoint_in:
            yield Remark("note", f"no checkpoint at {config.checkpoint_in}: starting afresh")
        yield from self.subject.remarks()
        if not config.only_write:
            yield from warmup_remarks(config, self.job["first"] + config.adam_iter)

    # ---- training --------------------------------------------------------------------------------------------

    def read_data(self) -> FinetuneData:
        """What is trained on and held out."""
        config = self.config
        self.tokenizer = load_tokenizer(self.base)
        data = read_data(config, self.tokenizer, n_vocab=self.shape.n_vocab, seed=self.seed)
        self.anchor = read_anchor(config, self.tokenizer, n_vocab=self.shape.n_vocab, seed=self.seed)
        if (config.patience or config.save_best) and data.held_out is None:
            name = "--patience" if config.patience else "--save-best"
            hint = "hold some of it out (--val-split 0.1), or name some: --val-data FILE"
            raise UsageError(f"{name} needs held-out data, and there is none", hint=hint)
        return data

    def plan(self, data: FinetuneData) -> Iterator[Report]:
        """What the run will take, in the way that fits into --max-memory; before the base is loaded."""
        mine = dataclasses.replace(self.config, batch=self.config.batch // self.dist.world)
        run = footprint(
            mine,
            self.shape,
            self.base,
            trained=sum(math.prod(shape) for shape in self.subject.shapes().values()),
            dtype=self.dtype,
            device=self.device,
            held_out=held_out_tokens(data.facts, self.config.ctx),
            full=self.config.full,
            n_shares=self.dist.world if self.dist.sharded else 1,
        )
        where = {"dtype": self.dtype, "device": self.device, "n_ranks": self.dist.world}
        mine, plan = make_plan(mine, self.base, run, data.facts, **where)
        self.config = dataclasses.replace(mine, batch=self.config.batch)
        yield from data.remarks
        yield data.facts
        yield plan

    def train(self) -> Iterator[Report]:
        """Load text and model, go on from the checkpoint, and step."""
        source = self.config.train_data
        yield Loading("text", source, os.path.getsize(source) if os.path.isfile(source) else 0)
        data = self.read_data()
        anchored = {"the anchor": self.anchor.sha256} if self.anchor else {}
        identity = data.identity | anchored | self._identity(data.sha256)
        check_content(self.dist, identity)
        yield from self._resume(identity)
        yield from self.plan(data)
        config, tokenizer = self.config, self.tokenizer
        dropout = Dropout(config.lora_dropout)
        model, named = self.subject.build(
            self.seed, self.device, self.dtype, dropout=dropout, weight_cache=config.weight_cache, dist=self.dist
        )
        before = self.job["first"]
        trainer = self._trainer(model, named, data, dropout)
        is_chat = isinstance(data.facts, ChatFacts)
        likeliest = GenerateConfig(n_predict=config.sample_tokens, temperature=0.0, seed=0)
        answers = Answers(model, tokenizer, config.sample_prompt, likeliest, as_messages=is_chat)
        yield from self._facts(trainer)
        whole = config.save_best or config.patience > 0  # evaluations are held against each other
        held_out = HeldOut(data.held_out, model, self.device, self.dist, whole=whole)
        if held_out and not self.progress.iterations:
            yield held_out.evaluate("start")
        if self.dist.is_main:
            yield from answers.samples(self.progress.iterations)
        yield from self._steps(trainer, held_out, answers, identity)
        trained = self.progress.iterations > before and not self.control.signal
        if self.subject.product.template and trained and (self.dist.is_main or self.dist.sharded):
            some = data.first[: min(N_TOKENS, config.ctx)].astype(np.int64).clip(0, self.shape.n_vocab - 1)
            tokens = torch.from_numpy(some).to(self.device)
            logits = logits_of(model, tokens)
            del model, trainer, held_out, answers  # the base is loaded once more
            path = file_name(self.subject.product.template, config, self.progress.iterations)
            together = self.dist if self.dist.sharded else Dist()
            yield from self.subject.prove(path, tokens, logits, named, together)
            if self.dist.is_main:
                yield from self.subject.finish(self._best(path))

    def _identity(self, text_hash: str) -> dict[str, Any]:
        return (
            make_identity(
                self.config,
                seed=self.seed,
                base_model=self.stamps.model,
                base_file=self.stamps.file,
                text=text_hash,
            )
            | self.subject.identity
        )

    def _settings(self) -> dict[str, Any]:
        return make_settings(self.config, dtype_name(self.dtype))

    def _resume(self, identity: dict[str, Any]) -> Iterator[Report]:
        config, saved = self.config, self.saved
        if saved is None:
            return
        path = config.checkpoint_in
        yield Loading("checkpoint", path, checkpoint_bytes(path) if self.dist.is_main else 0)
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

    def _trainer(self, model: Llama, named: dict[str, Tensor], data: FinetuneData, dropout: Dropout) -> Trainer:
        config = self.config
        model.use_checkpointing = config.use_checkpointing
        parameters = Parameters(named, config)
        restore(parameters, self.saved, config.checkpoint_in, self.dist)
        order = SampleOrder(self.seed, data.n_samples, self.progress.order_epoch, self.progress.next_sample)
        factor = partial(schedule, config=config)
        return Trainer(
            model.train(), parameters, data.batches, order, self.progress, config, dropout, factor, self.dist,
            epochs_before=self.job["epochs"], anchor=self.anchor,
        )  # fmt: skip

    def _facts(self, trainer: Trainer) -> Iterator[Report]:
        config, progress = self.config, self.progress
        trained = trainer.parameters.n_numbers
        yield Counters(
            progress.iterations, progress.samples, progress.tokens, progress.epochs, progress.updates,
            4 * trained, 8 * trained, trained, "model" if config.full else "lora",
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
        """All ranks save what they hold; rank 0 tells of it."""
        state = TrainState(identity, self._settings(), place(self.device, self.dist.world), self.progress, {}, self.job)
        yield from save(self.manager, state, self._kind, trainer.parameters, self.dist)
        if is_best and self.dist.is_main:
            yield from self.manager.mark(self.progress, "BEST")

    def _best(self, path: Path) -> Path:
        """The product of the best evaluation where it was kept, else the last, which is at path."""
        config, template = self.config, self.subject.product.template
        return Path(template.replace(config.pattern_fn_it, "BEST", 1)) if config.save_best else path

    def _judged(self, evaluation: Evaluation) -> Evaluation:
        """An evaluation, and whether it is the best so far."""
        progress = self.progress
        is_best = progress.best_evaluation is None or evaluation.loss < progress.best_evaluation
        if is_best:
            progress.best_evaluation, progress.evaluations_without_best = evaluation.loss, 0
        else:
            progress.evaluations_without_best += 1
        return dataclasses.replace(evaluation, is_best=is_best)

    def write_product_only(self) -> Iterator[Report]:
        """--only-write-lora, --only-write-model: the adapter or model of --checkpoint-in."""
        config, saved = self.config, self.saved
        if saved is None:
            name = "--only-write-model" if config.full else "--only-write-lora"
            raise UsageError(f"{name} needs a checkpoint: --checkpoint-in does not exist", path=config.checkpoint_in)
        if isinstance(saved, TrainState):
            bases = {"base model": self.stamps.model, "base file": self.stamps.file}
            check_identity(saved.identity, bases | self.subject.identity, path=config.checkpoint_in)
        check_shapes(saved.arrays, self.subject.shapes(), config.checkpoint_in)
        self.progress, self.reason = saved.progress, f"the {self.subject.product.kind} is written"
        yield from self.manager.save_product(TrainState({}, {}, {}, saved.progress, saved.arrays))
        path = file_name(self.subject.product.template, config, saved.progress.iterations)
        yield from self.subject.finish(self._best(path))


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
