"""The verb `train`: a model from nothing, or all weights of one that is there; tells of it in reports."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from llamakit.dataset.order import SampleOrder
from llamakit.dataset.prepare import Report as PrepareReport
from llamakit.dataset.tokens import Split, hash_tokens
from llamakit.dataset.windows import Windows
from llamakit.errors import DataError, UsageError
from llamakit.files import RunLock
from llamakit.formats.base import ModelFile
from llamakit.formats.llama2c_checkpoint import AdamState, Llama2cCheckpoint
from llamakit.formats.open import check_is_model, open_model, size_on_disk
from llamakit.formats.stamps import vocabulary_stamp
from llamakit.inference.limits import gemm_peak
from llamakit.model import Llama
from llamakit.model.device import dtype_name, resolve_device, training_dtype
from llamakit.model.layers import Dropout
from llamakit.native import library
from llamakit.training.blueprint import ROPE_FREQS, Blueprint, build, from_file, from_scratch, write_model
from llamakit.training.checkpoint import (
    CheckpointManager,
    OldCheckpoint,
    Product,
    checkpoint_bytes,
    claim_outputs,
    file_name,
    read_checkpoint,
)
from llamakit.training.corpus import Corpus, known_vocabulary, open_corpus
from llamakit.training.distributed import Dist
from llamakit.training.evaluation import Evaluator
from llamakit.training.log import StepLog
from llamakit.training.loop import Control, Parameters, Trainer, agree
from llamakit.training.memory import BYTES_PER_TRAINED
from llamakit.training.optim import above_floor, decay
from llamakit.training.ranks import check_commands, check_content, find_start, origin, own_name
from llamakit.training.report import (
    Begin,
    Evaluation,
    Finished,
    Loading,
    NewModel,
    Remark,
    Report,
    Saving,
)
from llamakit.training.sharded_model import build_sharded
from llamakit.training.sharding import choose_sharding, may_shard
from llamakit.training.shares import restore, save
from llamakit.training.state import (
    Progress,
    TrainState,
    check_identity,
    check_shapes,
    flag,
    place,
    resume_remarks,
    warmup_remarks,
)
from llamakit.training.train_config import TrainConfig

SCRATCH, RESUME = "scratch", "resume"
_SETTINGS = (
    "adam_iter", "batch", "grad_acc", "adam_alpha", "adam_min_alpha", "adam_beta1", "adam_beta2", "adam_decay",
    "adam_decay_min_ndim", "adam_gclip", "warmup", "lr_schedule", "cos_decay_steps", "cos_decay_min", "dropout",
)  # fmt: skip
_OLD_CHECKPOINT = "ckpt.pt"


def train(
    config: TrainConfig, control: Control | None = None, dist: Dist | None = None
) -> Iterator[Report | PrepareReport]:
    """Train all weights of a model on text or tokens; yields what happens, ends with Finished.

    control: set `signal` to have the running step finished, everything saved and the run ended; `save` to save and
    go on. dist: the processes that train together; each calls this, and the first of them reads and writes what is on
    disk. Raises LlamakitError: UsageError, FormatError, DataError, MismatchError (exit code 2), SaveError,
    DivergedError, LostRankError.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        run = _Run(config.placed(), control or Control(), stack, started, dist or Dist())
        yield from run.prepare()
        if config.only_write_model:
            yield from run.write_model_only() if run.dist.is_main else ()
        else:
            log_file = run.config.log_file if run.dist.is_main else ""
            yield from StepLog(log_file, append=run.saved is not None, events=True).follow(run.train())
        files = run.manager.latest()
        yield Finished(run.reason, time.perf_counter() - started, run.progress.iterations, files, run.control.signal)


class _Run:
    """One run from start to end; a class because so many of its parts need each other."""

    def __init__(self, config: TrainConfig, control: Control, stack: ExitStack, started: float, dist: Dist) -> None:
        self.config, self.dist, self._stack, self._started = config, dist, stack, started
        self._given, self.control = control, Control() if dist.joined else control
        self.progress, self.reason, self._new_best = Progress(), "", False
        self._moments: AdamState | None = None

    # ---- before training -------------------------------------------------------------------------------------

    def prepare(self) -> Iterator[Report | PrepareReport]:
        """Open and check everything that can be wrong, cheapest first; the data is ready afterwards."""
        config = self.config
        if not (config.train_data or config.only_write_model):
            hint = "name a text, or a folder of tokens: --train-data FILE"
            raise UsageError("--train-data is missing", hint=hint)
        if not (config.model_out or config.checkpoint_out):
            raise UsageError("--model-out and --checkpoint-out are both empty: nothing would be written")
        self.dist.check_batch(config.batch)
        check_commands(self.dist, config)
        self.device = resolve_device(config.device)
        self.dtype = training_dtype(config.dtype, self.device)
        if self.dist.is_main:
            self._claim_outputs()
        start = find_start(self.dist, config, "train_model", self._read_checkpoint_in)
        assert not isinstance(start.state, OldCheckpoint), "only finetune has checkpoints of the old tool"
        self.saved, self.job = start.state, origin(self.dist, start)
        if start.own:
            config = self.config = dataclasses.replace(config, checkpoint_in=own_name(config))
        self.start, remarks = self._starting_model()
        self.seed = self.dist.from_main(self._seed)
        yield from remarks
        if not (config.only_write_model or config.eval_only):
            yield from warmup_remarks(config, config.adam_iter)
        vocabulary: Mapping[str, Any] = {} if self.start is None else _tokenizer_keys(self.start)
        if config.only_write_model:
            self.vocabulary = known_vocabulary(config, vocabulary)
        else:
            self.corpus = yield from self._corpus(vocabulary)
            self.vocabulary = self.corpus.vocabulary
        self.blueprint = self._blueprint()
        needed = BYTES_PER_TRAINED * sum(math.prod(shape) for shape in self.blueprint.names.values())
        choose_sharding(self.dist, config, needed, self.device)
        if self.dist.sharded and config.sample_tokens and config.sample_prompt:
            self.config = config = dataclasses.replace(config, sample_tokens=0)
            yield Remark("note", "no samples are made: they need the whole model on one device")
        write = lambda path, arrays: write_model(path, arrays, self.blueprint)  # noqa: E731
        product = Product("model", config.model_out, write)
        self.manager = CheckpointManager(config, "train_model", product, clear=self.dist.is_main)

    def _corpus(self, vocabulary: Mapping[str, Any]) -> Generator[PrepareReport, None, Corpus]:
        """Rank 0 turns a text into tokens, where that is needed; the others read what it has made."""
        resumes, corpus = self.saved is not None, None
        if self.dist.is_main:
            corpus = yield from open_corpus(self.config, vocabulary, resumes=resumes)
        self.dist.barrier()
        if corpus is None:
            corpus = yield from open_corpus(self.config, vocabulary, resumes=resumes, reads_only=True)
        return corpus

    def _claim_outputs(self) -> None:
        config = self.config
        outputs = [file_name(t, config, None) for t in (config.checkpoint_out, config.model_out) if t]
        outputs += [Path(config.log_file)] if config.log_file else []
        try:
            Path(config.out_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"the run's folder cannot be made: {error.strerror}", path=config.out_dir) from error
        sources = (config.train_data, config.vocab_model, config.init_from)
        self._stack.enter_context(claim_outputs(outputs, sources, "checkpoint, model and log"))
        self._stack.enter_context(RunLock([Path(config.out_dir) / "run"]))

    def _read_checkpoint_in(self) -> TrainState | None:
        """The checkpoint that this run goes on from: where there is one, unless --init-from says scratch."""
        config = self.config
        path = Path(config.checkpoint_in)
        if config.init_from == SCRATCH or not config.checkpoint_in or not os.path.lexists(path):
            old = Path(config.out_dir) / _OLD_CHECKPOINT
            if config.init_from == RESUME and not old.exists():
                hint = "without --init-from a run begins where there is no checkpoint"
                raise UsageError("there is no such checkpoint to resume from", path=path, hint=hint)
            return None
        state = read_checkpoint(path, "train_model", light=may_shard(self.dist, config))
        assert isinstance(state, TrainState), "only finetune has checkpoints of the old tool"
        return state

    def _starting_model(self) -> tuple[ModelFile | None, list[Report]]:
        """The model whose weights are trained on, if any: --init-from's, or the ckpt.pt of llama2.c that is resumed."""
        config = self.config
        path = config.init_from
        old = Path(config.out_dir) / _OLD_CHECKPOINT
        # What was begun from a ckpt.pt goes on with its shape, which the command line need not repeat.
        if path == RESUME and (self.saved is None or old.exists()):
            path = str(old)
        if path in ("", SCRATCH, RESUME):
            return None, []
        file = open_model(path, n_ctx=config.ctx)
        check_is_model(file)
        self._stack.callback(file.close)
        said: list[Report] = [Loading("model", path, size_on_disk(path))]
        said += [Remark("note", f"the shape of the model is {path}'s: --embd, --layer, --head, --ff and --tie have no"
                                " effect")]  # fmt: skip
        if config.init_from == RESUME and self.saved is None and isinstance(file, Llama2cCheckpoint):
            said += self._llama2c_state(file)
        return file, said

    def _llama2c_state(self, file: Llama2cCheckpoint) -> list[Report]:
        """Go on with the iteration and the moments of a ckpt.pt."""
        iteration, self._moments = file.iteration or 0, file.adam_state()
        self.progress.iterations = iteration
        taken = f"{file.path} is a checkpoint of llama2.c: its weights, "
        if self._moments is None:
            return [Remark("note", f"{taken}and its iteration {iteration} are taken, its optimizer moments are not")]
        self.progress.updates = self._moments.updates
        return [Remark("note", f"{taken}its iteration {iteration} and its optimizer moments are taken")]

    def _seed(self) -> int:
        if isinstance(self.saved, TrainState) and self.config.seed < 0:
            return int(self.saved.identity["--seed"])
        return self.config.seed if self.config.seed >= 0 else int(time.time()) & 0xFFFFFFFF

    def _blueprint(self) -> Blueprint:
        if self.start is None:
            n_vocab = len(self.vocabulary["tokenizer.ggml.tokens"])
            return from_scratch(self.config, self.vocabulary, n_vocab, self.seed)
        blueprint = from_file(self.start, self.vocabulary)
        if self.config.ctx > blueprint.shape.n_ctx:
            raise UsageError(f"--ctx {self.config.ctx} is more than the model's context of {blueprint.shape.n_ctx}")
        return blueprint

    # ---- training --------------------------------------------------------------------------------------------

    def train(self) -> Iterator[Report]:
        """Build the model, go on from the checkpoint, step."""
        config, corpus = self.config, self.corpus
        windows = Windows(corpus.data.train, config.ctx)
        if windows.count < config.batch:
            raise DataError(
                f"has {windows.count} windows of {config.ctx} tokens to train on (expected at least --batch"
                f" {config.batch})",
                path=config.train_data,
                hint="give more text, or a smaller --ctx or --batch",
            )
        if config.patience and not corpus.data.validation.n_tokens:
            hint = "hold some of the text out: --val-split 0.1"
            raise UsageError("--patience needs held-out text, and there is none", hint=hint)
        self.identity = self._identity(corpus.data.train)
        check_content(self.dist, self.identity)
        yield from self._resume()
        where = (self.device, self.dtype)
        sharded = self.dist.sharded
        model, named = build_sharded(self.blueprint, *where, self.dist) if sharded else build(self.blueprint, *where)
        model.use_checkpointing = config.use_checkpointing
        dropout = Dropout(config.dropout)
        if config.dropout:
            model.drop(dropout)
        if config.compile:
            yield from self._compile(model)
        parameters = Parameters(named, config)
        if self.saved is None and self._moments is not None:
            parameters.restore_moments(self._moments.moments, self._moments.updates)
            self._moments = None
        restore(parameters, self.saved, config.checkpoint_in, self.dist)
        order = SampleOrder(self.seed, windows.count, self.progress.order_epoch, self.progress.next_sample)
        model.train()
        trainer = Trainer(
            model, parameters, windows, order, self.progress, config, dropout, self._factor, self.dist,
            epochs_before=self.job["epochs"],
        )  # fmt: skip
        evaluator = Evaluator(model, corpus, config, self.device, self.dist)
        yield self._facts(parameters)
        if config.eval_only:
            self.reason = "the model is evaluated"
            yield evaluator.evaluate(self.progress.iterations, "end")
            return
        yield Begin(self.progress.iterations, max(0, config.adam_iter - self.progress.iterations))
        yield from self._steps(trainer, evaluator)

    def _facts(self, parameters: Parameters) -> NewModel:
        config, data, progress = self.config, self.corpus.data, self.progress
        return NewModel(
            seed=self.seed,
            config=self.blueprint.shape,
            n_parameters=parameters.n_numbers,
            tokens_per_iteration=config.grad_acc * config.batch * config.ctx,
            grad_acc=config.grad_acc,
            batch=config.batch,
            ctx=config.ctx,
            n_train_tokens=data.train.n_tokens,
            n_validation_tokens=data.validation.n_tokens,
            device=self.device.type,
            dtype=dtype_name(self.dtype),
            threads=torch.get_num_threads(),
            iterations=progress.iterations,
            tokens=progress.tokens,
            flop_per_token=self._flop_per_token(),
            peak_flop_per_s=gemm_peak(self.device) * self.dist.world,
        )

    def _flop_per_token(self) -> float:
        shape = self.blueprint.shape
        attention = self.config.ctx * shape.n_head * shape.head_dim * shape.n_layer
        return 6.0 * (shape.n_matmul + attention)

    def _compile(self, model: Llama) -> Iterator[Remark]:
        """--compile: block by block, so that a block is compiled once for all of them."""
        if self.device.type == "cpu" and library() is not None:
            yield Remark("note", "--compile has no effect on a CPU: native code does what a compiler would")
            return
        for block in model.blk:
            block.compile()

    def _identity(self, train: Split) -> dict[str, Any]:
        return {
            "text": train.sha256 or hash_tokens(train),
            **self._model_identity(),
            "--seed": self.seed,
            "--ctx": self.config.ctx,
        }

    def _model_identity(self) -> dict[str, Any]:
        shape = dataclasses.asdict(self.blueprint.shape)
        model = {key: value for key, value in shape.items() if key != "n_ctx"}
        return {"vocabulary": vocabulary_stamp(self.vocabulary), "model": model}

    def _settings(self) -> dict[str, Any]:
        return {flag(name): getattr(self.config, name) for name in _SETTINGS} | {"--dtype": dtype_name(self.dtype)}

    def _resume(self) -> Iterator[Report]:
        config, saved = self.config, self.saved
        if saved is None:
            return
        path = config.checkpoint_in
        yield Loading("checkpoint", path, checkpoint_bytes(path) if self.dist.is_main else 0)
        self.progress = saved.progress
        hint = "--init-from scratch starts afresh in this folder, another --out-dir keeps both runs"
        check_identity(saved.identity, self.identity, path=path, text_hint=hint)
        yield from resume_remarks(saved, self._settings(), place(self.device, self.dist.world))

    def _factor(self, iteration: int) -> float:
        """Share of --adam-alpha: a linear warmup, then the decay; with a time limit by whichever is further on."""
        config = self.config
        share = (iteration - config.warmup) / (config.cos_decay_steps or max(1, config.adam_iter - config.warmup))
        if self._limit_s:
            share = max(share, self._time_share())
        rising = min(1.0, iteration / config.warmup) if config.warmup else 1.0
        factor = rising * decay(config.lr_schedule, share, config.cos_decay_min)
        return above_floor(factor, config)

    @property
    def _limit_s(self) -> float:
        return 60 * self.config.max_minutes

    def _time_share(self) -> float:
        """How much of the time for steps has passed, by rank 0's clock; the run's end is left out of it."""
        now = time.perf_counter()
        room = self._limit_s - (self._began - self._started) - self._reserve_s
        return self.dist.main_number((now - self._began) / max(room, 1e-9))

    def _steps(self, trainer: Trainer, evaluator: Evaluator) -> Iterator[Report]:
        config, control, progress = self.config, self.control, self.progress
        self._began, self._reserve_s = time.perf_counter(), 0.0
        self.reason, last_save = "all iterations are done", progress.iterations
        if self._limit_s:
            self._reserve_s = evaluator.seconds_at_the_end()
        while progress.iterations < config.adam_iter:
            left = config.adam_iter - progress.iterations - 1
            report = trainer.step(left)
            agree(self.dist, self._given, control)
            yield report
            trainer.check_diverged()
            stop = trainer.why_stop(report) or ("interrupted" if control.signal else "")
            if not stop and self._limit_s and self._time_share() >= 1:
                stop = f"--max-minutes {config.max_minutes:g}: the time is over"
            last = bool(stop) or left == 0
            if not control.signal and (last or self._due(config.eval_every)):
                yield from self._evaluate(evaluator, last=last)
                if not stop and 0 < config.patience <= progress.evaluations_without_best:
                    stop = f"--patience {config.patience}: the held-out loss no longer falls"
                    if not last:
                        yield evaluator.evaluate(progress.iterations, "end")
            if stop or last or control.save or self._new_best or self._due(config.save_every):
                control.save, last_save = False, progress.iterations
                yield from self._save(trainer)
            if stop:
                self.reason = stop
                break
        missing = self.dist.from_main(lambda: not os.path.exists(self.manager.latest()[-1]))
        if last_save < progress.iterations or missing:
            yield from self._save(trainer)

    def _due(self, every: int) -> bool:
        return every > 0 and self.progress.iterations % every == 0

    def _evaluate(self, evaluator: Evaluator, *, last: bool) -> Iterator[Report]:
        progress = self.progress
        evaluation: Evaluation = evaluator.evaluate(progress.iterations, "end" if last else "save")
        best = progress.best_evaluation
        is_best = evaluation.n_tokens > 0 and (best is None or evaluation.loss < best)
        if is_best:
            progress.best_evaluation, progress.evaluations_without_best = evaluation.loss, 0
        else:
            progress.evaluations_without_best += 1
        self._new_best = is_best
        yield dataclasses.replace(evaluation, is_best=is_best)
        if self.dist.is_main:
            yield from evaluator.samples(progress.iterations)

    def _save(self, trainer: Trainer) -> Iterator[Saving]:
        """All ranks save what they hold; rank 0 tells of it."""
        here = place(self.device, self.dist.world)
        state = TrainState(self.identity, self._settings(), here, self.progress, {}, self.job)
        yield from save(self.manager, state, "train_model", trainer.parameters, self.dist)
        if self._new_best and self.dist.is_main:
            yield from self.manager.mark(self.progress, "BEST")
        self._new_best = False

    def write_model_only(self) -> Iterator[Report]:
        """--only-write-model: the model of --checkpoint-in."""
        if self.saved is None:
            raise UsageError(
                "--only-write-model needs a checkpoint: --checkpoint-in does not exist", path=self.config.checkpoint_in
            )
        check_identity(self.saved.identity, self._model_identity(), path=self.config.checkpoint_in)
        expected = {n: tuple(s) for n, s in self.blueprint.names.items() if n != ROPE_FREQS}
        check_shapes(self.saved.arrays, expected, self.config.checkpoint_in)
        self.progress, self.reason = self.saved.progress, "the model is written"
        yield from self.manager.save_product(self.saved)


def _tokenizer_keys(file: ModelFile) -> dict[str, Any]:
    has = "tokenizer.ggml.tokens" in file.metadata
    return {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")} if has else {}
