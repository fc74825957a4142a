"""Which columns of each matrix matter: the sums of squares of what a model multiplies while it reads a text.

As llama-imatrix counts them (llama.cpp of 2026, tools/imatrix/imatrix.cpp): chunks that begin with BOS, every
position, float32 sums in the order of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from llamakit.errors import FormatError, MismatchError, UsageError
from llamakit.files import check_writable, escape_control, is_same_file
from llamakit.formats.imatrix import Entry, Imatrix, read_imatrix
from llamakit.formats.imatrix_writer import write_imatrix, write_imatrix_dat
from llamakit.formats.open import check_is_model, model_files, open_stated
from llamakit.inference.chunks import cut, read_tokens, with_bos
from llamakit.inference.config import PerplexityConfig
from llamakit.inference.imatrix_config import ImatrixConfig
from llamakit.inference.perplexity import Estimate, perplexity
from llamakit.model import load_config, load_model
from llamakit.model.layers import QuantizedLinear
from llamakit.model.llama import Llama
from llamakit.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Chunk:
    """`done` of `total` chunks are read; ppl: perplexity so far, None where it is not wanted."""

    done: int
    total: int
    ppl: float | None


@dataclass(frozen=True)
class Collected:
    """The result is at `path`. ppl, ppl_error: perplexity and its standard error, None where there is none."""

    path: Path
    n_entries: int
    chunk_count: int
    ppl: float | None = None
    ppl_error: float | None = None
    warnings: tuple[str, ...] = ()


class Collector:
    """Sums and counts by tensor name, of earlier files and of what is seen now. chunk_size: tokens of a chunk."""

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        self.datasets: list[str] = []
        self._sums: dict[str, np.ndarray] = {}
        self._counts: dict[str, np.ndarray] = {}
        self._last: tuple[Tensor, np.ndarray] | None = None

    def add_file(self, path: Path) -> None:
        """Add an earlier result. Raises MismatchError where its sizes are others."""
        found = read_imatrix(path)
        for name, (sums, counts) in found.entries.items():
            scale = self.chunk_size if found.legacy else 1
            self._merge(path, name, sums * np.float32(scale), counts.astype(np.int64) * scale, found.legacy)
        self.datasets += found.datasets

    def _merge(self, path: Path, name: str, sums: np.ndarray, counts: np.ndarray, legacy: bool) -> None:
        if name not in self._sums:
            self._sums[name], self._counts[name] = sums, counts
            return
        have, have_counts = self._sums[name], self._counts[name]
        fits = legacy or len(have_counts) in (1, len(counts))
        if have.size != sums.size or not fits:
            raise MismatchError(
                f"has {sums.size} sums and {len(counts)} counts of {escape_control(name)} (expected {have.size} and "
                f"{len(have_counts)})",
                path=path,
            )
        self._counts[name] = have_counts + counts
        self._sums[name] = (have.reshape(-1) + sums.reshape(-1)).reshape(len(self._counts[name]), -1)

    def add(self, name: str, x: Tensor) -> None:
        """Add the rows (..., n_in) that a matrix was multiplied with. Raises FormatError for NaN and infinity."""
        if self._last is None or self._last[0] is not x:
            self._last = x, x.detach().reshape(-1, x.shape[-1]).float().square().cpu().numpy()
        squares = self._last[1]
        sums = self._sums.get(name, np.zeros((1, squares.shape[1]), np.float32)).reshape(1, -1)
        counts = self._counts.get(name, np.zeros(1, np.int64))
        if sums.shape[1] != squares.shape[1] or (counts != counts[0]).any():
            raise MismatchError(f"--in-file has {sums.shape[1]} sums of {name} (expected {squares.shape[1]})")
        # Along the outer axis numpy adds row after row, as llama-imatrix does.
        total = np.add.reduce(np.concatenate((sums, squares)), axis=0, keepdims=True)
        if not np.isfinite(total).all():
            raise FormatError(f"the inputs of {name} are no finite numbers")
        self._sums[name], self._counts[name] = total, counts[:1] + len(squares)

    @property
    def chunk_count(self) -> int:
        """Chunks that the fullest count stands for, earlier files included."""
        return max((int(counts.max()) for counts in self._counts.values()), default=0) // self.chunk_size

    def result(self) -> Imatrix:
        """What has been summed so far."""
        entries = {name: Entry(sums, self._counts[name].astype(np.float32)) for name, sums in self._sums.items()}
        return Imatrix(entries, tuple(self.datasets), self.chunk_count, self.chunk_size)

    def watch(self, model: Llama, *, process_output: bool) -> None:
        """Collect from every matrix of the blocks from now on, and from output.weight where that is wanted.

        llama.cpp calls a tied output token_embd.weight, and measures no matrix of that name.
        """
        for path, module in model.named_modules():
            if path.startswith("blk.") and isinstance(module, QuantizedLinear):
                module.register_forward_pre_hook(self._hook(f"{path}.weight"))
        if process_output and not model.config.tied_output:
            model.output_norm.register_forward_hook(self._output_hook)

    def _output_hook(self, _: Module, __: Any, hidden: Tensor) -> None:
        self.add("output.weight", hidden)

    def _hook(self, name: str) -> Callable[[Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: self.add(name, inputs[0])


def imatrix(
    config: ImatrixConfig, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Iterator[Chunk | Collected]:
    """Measure, or merge, and write `config.output`; a report for each chunk, and one of the result.

    Raises what reading a model, a text or an importance matrix raises; UsageError for a text that is too short, and
    for an output that is the model or the text; SaveError.
    """
    _check_output(config)
    collector = Collector(config.ctx)
    for path in config.in_files:
        collector.add_file(path)
    warnings, last = [], None
    if config.file is not None and config.model is not None:
        collector.datasets.append(str(config.file))
        with open_stated(config.model, n_ctx=config.ctx, rope_theta=config.rope_freq_base) as source:
            check_is_model(source)
            load_config(source)
            tokenizer = load_tokenizer(source)
            chunks = _chunks(config, config.file, tokenizer)
            model = load_model(source, device=device, dtype=dtype)
        warnings += [f"{config.model}: {warning}" for warning in tokenizer.warnings]
        if config.ctx > model.config.n_ctx:
            warnings.append(f"{config.model} was trained for {model.config.n_ctx} tokens, a chunk has {config.ctx}: -c")
        if config.process_output and model.config.tied_output:
            warnings.append(f"{config.model} has no output.weight (token_embd.weight serves as such): no entry of it")
        collector.watch(model, process_output=config.process_output)
        for done, last in enumerate(_estimates(config, model, chunks, with_bos(chunks, tokenizer), collector), 1):
            yield Chunk(done, len(chunks), last.ppl if last else None)
    result = collector.result()
    warnings += [*_warnings(config, result)]
    _save(config, config.output, result)
    ppl, error = (last.ppl, last.error or None) if last else (None, None)
    yield Collected(config.output, _n_stored(config, result), result.chunk_count, ppl, error, tuple(warnings))


def _check_output(config: ImatrixConfig) -> None:
    """An earlier result may be replaced by the one that it is part of; a model or a text may not."""
    check_writable(config.output)
    inputs = [] if config.model is None else model_files(config.model)
    for path in (*inputs, *([] if config.file is None else [config.file])):
        if is_same_file(config.output, path):
            raise UsageError("would be overwritten by the result", path=path, hint="name another file with -o")


def _chunks(config: ImatrixConfig, path: Path, tokenizer: Tokenizer) -> np.ndarray:
    """The text as int32 (chunks, ctx), after the chunks that are skipped; two at least must be left."""
    tokens = read_tokens(path, tokenizer, parse_special=config.parse_special)
    least = (config.chunk + 2) * config.ctx
    if config.chunk and len(tokens) <= least:
        raise UsageError(
            f"the text has {len(tokens)} tokens (expected more than {least}, {config.chunk} + 2 chunks)",
            path=path,
            hint="skip fewer: --chunk",
        )
    return cut(tokens[config.chunk * config.ctx :], config.ctx, chunks=config.chunks, source=path)


def _estimates(
    config: ImatrixConfig, model: Llama, chunks: np.ndarray, seen: np.ndarray, collector: Collector
) -> Iterator[Estimate | None]:
    """Read all chunks, and save on the way, whenever a multiple of a frequency has been passed."""
    before = collector.chunk_count
    for estimate in _forward(config, model, chunks, seen):
        now = collector.chunk_count  # counts whole batches, at the first chunk of each
        if before // config.output_frequency != now // config.output_frequency:
            _save(config, config.output, collector.result())
        if config.save_frequency and before // config.save_frequency != now // config.save_frequency:
            _save(config, config.output.with_name(f"{config.output.name}.at_{now}"), collector.result())
        before = now
        yield estimate


def _forward(config: ImatrixConfig, model: Llama, chunks: np.ndarray, seen: np.ndarray) -> Iterator[Estimate | None]:
    """The model over every chunk; the running perplexity after each, None where it is not wanted."""
    if config.ppl:
        yield from perplexity(model, chunks, seen, PerplexityConfig(ctx=config.ctx, batch=config.batch))
        return
    device, step = next(model.output_norm.parameters()).device, max(1, config.batch // config.ctx)
    for start in range(0, len(seen), step):
        batch = torch.from_numpy(seen[start : start + step].astype(np.int64)).to(device)
        with torch.inference_mode():
            model(batch)
        yield from [None] * len(batch)


def _save(config: ImatrixConfig, path: Path, result: Imatrix) -> None:
    (write_imatrix_dat if config.output_format == "dat" else write_imatrix)(path, result)


def _n_stored(config: ImatrixConfig, result: Imatrix) -> int:
    """Entries in the file: a .dat has no place for one without data."""
    return sum(config.output_format != "dat" or bool(counts.any()) for _, counts in result.entries.values())


def _warnings(config: ImatrixConfig, result: Imatrix) -> Iterator[str]:
    """What is missing in the file: experts that saw nothing, entries left out; a name that promises another format."""
    for name, (_, counts) in sorted(result.entries.items()):
        if not counts.any() and config.output_format == "dat":
            yield f"entry {escape_control(name)} has no data - skipping"
        elif not counts.all():
            share = 100 * np.count_nonzero(counts) / len(counts)
            yield f"entry {escape_control(name)} has partial data ({share:.2f}%)"
    n_stored = _n_stored(config, result)
    if n_stored < len(result.entries):
        yield f"storing only {n_stored} out of {len(result.entries)} entries"
    if config.output_format is None and config.output.suffix.lower() != ".gguf":
        yield f"{config.output} is in the GGUF format, whatever its name says; --output-format dat writes the older one"
