"""Which columns of each matrix matter: the sums of squares of what a model multiplies while it reads a text.

As llama-imatrix counts them (llama.cpp of 2026, tools/imatrix/imatrix.cpp): chunks that begin with BOS, every
position, float32 sums in the order of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from llamakit.errors import DataError, FormatError, MismatchError
from llamakit.files import escape_control, read_text
from llamakit.formats.imatrix import Entry, Imatrix, read_imatrix
from llamakit.formats.imatrix_writer import write_imatrix, write_imatrix_dat
from llamakit.formats.open import open_model
from llamakit.inference.imatrix_config import ImatrixConfig
from llamakit.model import load_model
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

    def result(self) -> Imatrix:
        """What has been summed so far."""
        entries = {name: Entry(sums, self._counts[name].astype(np.float32)) for name, sums in self._sums.items()}
        most = max((int(counts.max()) for counts in self._counts.values()), default=0)
        return Imatrix(entries, tuple(self.datasets), most // self.chunk_size, self.chunk_size)

    def warnings(self) -> Iterator[str]:
        """One line for each entry of which some experts saw nothing."""
        for name, counts in sorted(self._counts.items()):
            if not counts.all():
                share = 100 * np.count_nonzero(counts) / len(counts)
                yield f"entry {escape_control(name)} has partial data ({share:.2f}%)"

    def watch(self, model: Llama) -> None:
        """Collect from every matrix of the blocks from now on."""
        for path, module in model.named_modules():
            if path.startswith("blk.") and isinstance(module, QuantizedLinear):
                module.register_forward_pre_hook(self._hook(f"{path}.weight"))

    def _hook(self, name: str) -> Callable[[Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: self.add(name, inputs[0])


def imatrix(
    config: ImatrixConfig, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Iterator[Chunk | Collected]:
    """Measure, or merge, and write `config.output`; a report for each chunk, and one of the result.

    Raises what reading a model, a text or an importance matrix raises; DataError for a text that is too short;
    SaveError.
    """
    collector, ppl = Collector(config.ctx), _Perplexity()
    for path in config.in_files:
        collector.add_file(path)
    if config.file is not None and config.model is not None:
        collector.datasets.append(str(config.file))
        yield from _collect(config, collector, ppl, device, dtype)
    result = collector.result()
    _save(config, config.output, result)
    value, error = ppl.value if config.ppl and ppl.n else None, ppl.error if config.ppl else None
    yield Collected(config.output, len(result.entries), result.chunk_count, value, error, tuple(collector.warnings()))


def _save(config: ImatrixConfig, path: Path, result: Imatrix) -> None:
    (write_imatrix if config.output_format == "gguf" else write_imatrix_dat)(path, result)


@torch.inference_mode()
def _collect(
    config: ImatrixConfig, collector: Collector, ppl: _Perplexity, device: str, dtype: torch.dtype
) -> Iterator[Chunk]:
    assert config.model is not None and config.file is not None
    with open_model(config.model) as source:
        tokenizer = load_tokenizer(source)
        chunks = _chunks(config, config.file, tokenizer)
        model = load_model(source, device=device, dtype=dtype)
    collector.watch(model)
    step, first = max(1, config.batch // config.ctx), config.ctx // 2
    for start in range(0, len(chunks), step):
        targets = chunks[start : start + step].to(device)
        inputs = targets.clone()
        if tokenizer.add_bos and tokenizer.bos_id is not None:
            inputs[:, 0] = tokenizer.bos_id
        hidden = model(inputs)
        if config.process_output and not model.config.tied_output:  # llama.cpp's output is token_embd where tied
            collector.add("output.weight", hidden)
        for i in range(len(targets)):
            if config.ppl:
                ppl.add(model.logits(hidden[i, first:-1]), targets[i, first + 1 :])
            yield Chunk(start + i + 1, len(chunks), ppl.value if config.ppl else None)
        _snapshot(config, collector, start, start + len(targets))


def _snapshot(config: ImatrixConfig, collector: Collector, before: int, now: int) -> None:
    """Save on the way, whenever a multiple of a frequency has been passed."""
    if before // config.output_frequency != now // config.output_frequency:
        _save(config, config.output, collector.result())
    every = config.save_frequency
    if every and before // every != now // every:
        result = collector.result()
        _save(config, config.output.with_name(f"{config.output.name}.at_{result.chunk_count}"), result)


def _chunks(config: ImatrixConfig, path: Path, tokenizer: Tokenizer) -> Tensor:
    """The text as int64 (chunks, ctx). One newline at its end is dropped, as by llama.cpp."""
    tokens = tokenizer.encode(read_text(path).removesuffix("\n"), parse_special=config.parse_special)
    least = (config.chunk + 2) * config.ctx
    if len(tokens) < least:
        raise DataError(
            f"has {len(tokens)} tokens (expected at least {least})", path=path, hint="a smaller --ctx needs fewer"
        )
    tokens = tokens[config.chunk * config.ctx :]
    n = len(tokens) // config.ctx
    n = n if config.chunks < 0 else min(n, config.chunks)
    return torch.tensor(tokens[: n * config.ctx], dtype=torch.int64).view(n, config.ctx)


class _Perplexity:
    """Of the tokens that were added; sums in float64."""

    def __init__(self) -> None:
        self.n, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, logits: Tensor, targets: Tensor) -> None:
        shifted = logits - logits.amax(-1, keepdim=True)
        sums = shifted.exp().sum(-1, dtype=torch.float64)
        nll = sums.log() - shifted.gather(-1, targets[:, None])[:, 0].double()
        self.n, self._sum, self._squares = (
            self.n + len(nll),
            self._sum + float(nll.sum()),
            self._squares + float(nll.square().sum()),
        )

    @property
    def value(self) -> float:
        return math.exp(self._sum / self.n)

    @property
    def error(self) -> float | None:
        """Standard error of the value; None where there is none."""
        if self.n < 2:
            return None
        variance = self._squares / self.n - (self._sum / self.n) ** 2
        return self.value * math.sqrt(variance / (self.n - 1)) if variance > 0 else None
