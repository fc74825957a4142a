"""A model named on a command line, made ready to generate: generate, chat, bench and run share it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llamakit.cli import render
from llamakit.cli.options import set_threads
from llamakit.errors import UsageError

if TYPE_CHECKING:
    from llamakit.formats.adapter import Adapter
    from llamakit.formats.base import ModelFile
    from llamakit.inference.engine import Engine
    from llamakit.tokenizer import Tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to generate, and what the user gets told about it. adapters: those that are on it."""

    file: ModelFile
    engine: Engine
    tokenizer: Tokenizer
    load_s: float
    is_llama2c: bool
    adapters: list[tuple[Adapter, float]]


def load(
    path: Path,
    *,
    vocabulary: Path | None = None,
    adapters: Sequence[tuple[Path, float]] = (),
    force: bool = False,
    threads: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    n_ctx: int | None = None,
    rope_theta: float | None = None,
    chat: bool = False,
    chat_template: str | None = None,
) -> Loaded:
    """Read the vocabulary, the adapters and the model, cheapest first, so that a mistake shows early.

    chat: there must be a chat template; chat_template: the one to use instead of the model's own.
    """
    from llamakit.formats.adapter import check_adapter, read_adapter
    from llamakit.formats.llama2c import Llama2cFile
    from llamakit.formats.llama2c_checkpoint import Llama2cCheckpoint
    from llamakit.formats.open import check_is_model, open_model
    from llamakit.tokenizer.chat_templates import use_chat_template

    started = time.perf_counter()  # imports are not the model's fault
    file = open_model(path, n_ctx=n_ctx, rope_theta=rope_theta)
    is_llama2c = isinstance(file, (Llama2cFile, Llama2cCheckpoint))
    check_is_model(file)
    _check_vocabulary_option(file, vocabulary, is_llama2c)
    tokenizer = _tokenizer(file, vocabulary)
    if chat:
        use_chat_template(tokenizer, chat_template)
    read = [(read_adapter(adapter, file), scale) for adapter, scale in adapters]
    for adapter, _ in read:
        for note in check_adapter(adapter, file, force=force):
            render.note(f"{adapter.path}: {note}")
    render.loading(path)
    engine = _engine(file, device, dtype, threads, rope_theta)
    engine.set_adapters(read)
    return Loaded(file, engine, tokenizer, time.perf_counter() - started, is_llama2c, read)


def _check_vocabulary_option(file: ModelFile, vocabulary: Path | None, is_llama2c: bool) -> None:
    if is_llama2c and vocabulary is None:
        raise UsageError("a llama2.c model holds no vocabulary", path=file.path, hint="name its tokenizer.bin: -z FILE")
    if not is_llama2c and vocabulary is not None:
        raise UsageError("-z is for llama2.c models: a GGUF file holds its own vocabulary", path=file.path)


def _tokenizer(file: ModelFile, vocabulary: Path | None) -> Tokenizer:
    from llamakit.tokenizer import load_llama2c_tokenizer, load_tokenizer

    if vocabulary is None:
        return load_tokenizer(file)
    return load_llama2c_tokenizer(vocabulary, n_vocab=file.tensors["token_embd.weight"].shape[0])


def _engine(file: ModelFile, device: str, dtype: str, threads: int | None, rope_theta: float | None) -> Engine:
    """Native code where there is some for this model, and no other way to compute is asked for; else torch."""
    from llamakit.files import available_memory_bytes
    from llamakit.inference.engine import TorchEngine
    from llamakit.inference.native_engine import NativeEngine, native_library
    from llamakit.model import load_config, load_model
    from llamakit.model.device import inference_dtype, resolve_device

    config = load_config(file)
    config = config if rope_theta is None else replace(config, rope_base=rope_theta)
    set_threads(threads)
    where = resolve_device(device)
    code = native_library(file, config) if where.type == "cpu" and dtype == "auto" else None
    if code is not None:
        return NativeEngine(file, config, code)
    number = inference_dtype(dtype, where, n_weights=config.n_matmul, free_bytes=available_memory_bytes())
    return TorchEngine(load_model(file, device=where, dtype=number, config=config))
