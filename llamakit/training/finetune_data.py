"""What `finetune` trains on and what it holds out: a plain text, or questions and answers."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from llamakit.dataset.chat_data import ChatCounts, ChatData, hold_out, read_chat_data
from llamakit.dataset.chat_records import is_chat_file
from llamakit.dataset.config import ChatOptions
from llamakit.dataset.packing import ChatBatches
from llamakit.dataset.text import BatchBuilder, read_training_text
from llamakit.errors import UnsupportedError, UsageError
from llamakit.files import read_text
from llamakit.tokenizer import Tokenizer
from llamakit.training.anchor import Anchor
from llamakit.training.config import FinetuneConfig
from llamakit.training.loop import Batches
from llamakit.training.report import ChatFacts, DataFacts, Remark
from llamakit.training.state import SAMPLE_FLAGS, flag
from llamakit.training.validation import ChatPart, HeldOutPart, TextPart

_MOST_TOLD = 10


@dataclass(frozen=True)
class FinetuneData:
    """sha256: of what is trained on. identity: of the data, besides that, what a checkpoint must agree on. batches: of
    the samples; n_samples: how many a `SampleOrder` counts. held_out: None where nothing is. first: tokens of the data,
    to try a model on. remarks: what there is to say about it."""

    sha256: str
    identity: dict[str, Any]
    batches: Batches
    n_samples: int
    held_out: HeldOutPart | None
    first: np.ndarray
    facts: DataFacts | ChatFacts
    remarks: tuple[Remark, ...]


def read_data(config: FinetuneConfig, tokenizer: Tokenizer, *, n_vocab: int, seed: int) -> FinetuneData:
    """Read --train-data and --val-data, whatever they are.

    Raises DataError and UsageError for data that cannot be used, UsageError for options of the other kind of data, and
    what `read_chat_data` raises.
    """
    is_chat = is_chat_file(config.train_data)
    _check_options(config, is_chat)
    if config.val_data and is_chat_file(config.val_data) != is_chat:
        kinds = ("a plain text", "questions and answers")
        raise UsageError(f"--val-data is {kinds[not is_chat]}, --train-data {kinds[is_chat]}", path=config.val_data)
    return (_read_chat if is_chat else _read_text)(config, tokenizer, n_vocab, seed)


def _check_options(config: FinetuneConfig, is_chat: bool) -> None:
    """Raises UsageError for an option that this kind of data does not listen to."""
    names = SAMPLE_FLAGS if is_chat else [field.name for field in fields(ChatOptions)]
    defaults = {field.name: field.default for field in fields(config)}
    changed = next((name for name in names if getattr(config, name) != defaults[name]), None)
    if changed is not None:
        kinds = ("a plain text", "questions and answers (JSON, JSON lines, CSV)")
        raise UsageError(f"{flag(changed)} is for {kinds[not is_chat]}", path=config.train_data)


def read_anchor(config: FinetuneConfig, tokenizer: Tokenizer, *, n_vocab: int, seed: int) -> Anchor | None:
    """--anchor-data, where it is given: a plain text in windows of ctx, or records, of which every token counts.

    Raises what `read_data` raises.
    """
    if not config.anchor_data:
        return None
    of_records: dict[str, Any] = {
        "chat_template": config.chat_template, "train_on": "all", "long_samples": "window", "on_error": config.on_error,
    }  # fmt: skip
    wanted = FinetuneConfig(
        model_base=config.model_base,
        train_data=config.anchor_data,
        val_data=config.anchor_data,
        ctx=config.ctx,
        **(of_records if is_chat_file(config.anchor_data) else {}),
    )
    data = read_data(wanted, tokenizer, n_vocab=n_vocab, seed=seed)
    assert data.held_out is not None, "it was named"
    rows = [row for rows, _ in data.held_out.rows(None) for _, row in rows.parts(1)]
    return Anchor(rows, config.anchor_weight, config.anchor_batch, seed, data.sha256)


def bos_of(tokenizer: Tokenizer, path: str) -> int:
    """BOS, or EOS where there is none. Raises UnsupportedError for a vocabulary without both."""
    bos = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if bos is None:
        raise UnsupportedError("the vocabulary has neither a BOS nor an EOS token", path=path)
    return bos


# ---- a text ------------------------------------------------------------------------------------------------------


def _read_text(config: FinetuneConfig, tokenizer: Tokenizer, n_vocab: int, _seed: int) -> FinetuneData:
    options = dataclasses.replace(config, val_split=0.0) if config.val_data else config
    text = read_training_text(config.train_data, tokenizer, options)
    validation, identity = text.validation, {}
    if config.val_data:
        held_out = read_text(config.val_data)
        validation = np.array(tokenizer.encode(held_out, add_special=False, parse_special=False), dtype=np.int32)
        if not len(validation):
            raise UsageError("--val-data is empty: there is nothing to evaluate", path=config.val_data)
        identity = {"held-out data": hashlib.sha256(held_out.encode()).hexdigest()}
    bos = bos_of(tokenizer, config.model_base)
    eos = bos if tokenizer.eos_id is None else tokenizer.eos_id
    return FinetuneData(
        sha256=text.sha256,
        identity=identity,
        batches=BatchBuilder(text.train, config, bos=bos, eos=eos, n_vocab=n_vocab),
        n_samples=len(text.train.begins),
        held_out=TextPart(validation, config.ctx, bos) if len(validation) else None,
        first=text.train.tokens,
        facts=DataFacts(
            config.train_data,
            config.sample_start,
            config.include_sample_start,
            len(text.train.begins),
            len(text.train.tokens),
            len(np.unique(text.train.tokens)),
            len(validation),
        ),
        remarks=tuple(Remark("warning", warning) for warning in text.warnings),
    )


# ---- questions and answers ---------------------------------------------------------------------------------------


def _read_chat(config: FinetuneConfig, tokenizer: Tokenizer, _n_vocab: int, seed: int) -> FinetuneData:
    everything, counts = read_chat_data([config.train_data], tokenizer, config, ctx=config.ctx)
    remarks = list(_remarks(config.train_data, counts))
    identity: dict[str, Any] = {flag(name): getattr(config, name) for name in ("train_on", "long_samples", "pack")}
    if not config.pack:  # which samples share a row of like lengths depends on it
        identity["--batch"] = config.batch
    if config.val_data:
        data = everything
        held_out, more = read_chat_data([config.val_data], tokenizer, config, ctx=config.ctx)
        identity["held-out data"] = held_out.sha256
        remarks += _remarks(config.val_data, more)
    else:
        data, held_out = hold_out(everything, config.val_split, seed)
    template = hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest()
    bos = bos_of(tokenizer, config.model_base)
    pad = bos if tokenizer.eos_id is None else tokenizer.eos_id
    batches = ChatBatches(data, ctx=config.ctx, pack=config.pack, pad=pad)
    part = None if held_out is None else ChatPart(held_out, config.ctx, pack=config.pack, pad=pad)
    return FinetuneData(
        sha256=everything.sha256,
        identity={"chat template": template, **identity},
        batches=batches,
        n_samples=batches.count,
        held_out=part,
        first=data.sample(0)[0],
        facts=_chat_facts(config, counts, data, held_out, batches.n_rows(seed, 0)),
        remarks=tuple(remarks),
    )


def _chat_facts(
    config: FinetuneConfig, counts: ChatCounts, data: ChatData, held_out: ChatData | None, n_rows: int
) -> ChatFacts:
    return ChatFacts(
        path=config.train_data,
        n_records=counts.n_records,
        schemas=counts.schemas,
        n_samples=data.count,
        n_tokens=len(data.tokens),
        n_trained=data.n_trained,
        n_held_out=0 if held_out is None else held_out.count,
        n_held_out_trained=0 if held_out is None else held_out.n_trained,
        n_cut=counts.n_cut,
        n_cut_tokens=counts.n_cut_tokens,
        n_windowed=counts.n_windowed,
        n_skipped=len(counts.skipped),
        n_rows=n_rows,
        packed=config.pack,
        train_on=config.train_on,
    )


def _remarks(path: str, counts: ChatCounts) -> Iterator[Remark]:
    """What became of the data that its owner may not have meant."""
    for problem in counts.skipped[:_MOST_TOLD]:
        yield Remark("warning", f"skipped: {problem.error()}")
    if len(counts.skipped) > _MOST_TOLD:
        yield Remark("warning", f"skipped: {len(counts.skipped) - _MOST_TOLD} more; llamakit data check lists them all")
    for n, what in (
        (counts.n_cut, f"samples were longer than --ctx and cut: {counts.n_cut_tokens} tokens are lost"),
        (counts.not_ended, "samples have an answer without an end token: a model trained on it does not know when to"
         " stop"),
        (counts.double_bos, "samples began with two BOS tokens: one was taken away"),
        (counts.changed, "answers were changed by the template"),
        (counts.unlike, "answers are asked for in another way than the template writes them"),
        (counts.dropped, "messages were left out by the template"),
        (len(counts.aside), "files of the folder are no data and were left aside"),
    ):  # fmt: skip
        if n:
            yield Remark("warning", f"{path}: {n} {what}")
