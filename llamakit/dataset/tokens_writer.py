"""Writes a folder of tokens: documents come in one after the other, are spooled to the disk, and then dealt out.

Only when the last document has come is it known how many there are, so which of them are held out, and how long a
shard becomes, is decided then. In memory are two numbers for each document, nothing of the tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamakit.dataset.order import shuffled
from llamakit.dataset.tokens import DTYPES, FORMAT, INDEX, VERSION, VOCABULARY, SplitName
from llamakit.errors import DataError, UsageError
from llamakit.formats.gguf import write_gguf
from llamakit.formats.stamps import vocabulary_stamp

_COPY_BYTES = 1 << 22
#: tokens of a shard, about; documents are not cut
SHARD_TOKENS = 1 << 26
#: which of the counter's streams decides what is held out
_HELD_OUT_STREAM = 0x5EED
# Of the documents that are drawn, so many in a row may be too long for what is left of the share.
_MISSES = 256


@dataclass(frozen=True)
class WrittenShard:
    """A shard in its place."""

    file: str
    split: SplitName
    n_tokens: int
    n_documents: int
    n_bytes: int
    sha256: str


def dtype_for(n_vocab: int, wanted: str = "auto") -> str:
    """uint16 where every id fits into it, else uint32, or what is wanted. Raises UsageError where ids do not fit."""
    name = wanted if wanted != "auto" else "uint16" if n_vocab <= 1 << 16 else "uint32"
    if n_vocab > 1 << (8 * DTYPES[name].itemsize):
        raise UsageError(
            f"the vocabulary has {n_vocab} tokens, {name} holds {1 << 16} ids",
            hint="--dtype uint32 holds them; llama2.c reads uint16 alone",
        )
    return name


def write_vocabulary(folder: Path, vocabulary: Mapping[str, Any]) -> Path:
    """A GGUF without tensors, beside the shards: `tokenizer.*` keys, so that the folder needs no model."""
    path = folder / VOCABULARY
    write_gguf(path, metadata={"general.architecture": "llama", "general.type": "model", **vocabulary}, tensors=())
    return path


class TokenSpool:
    """Documents on their way into a folder. dtype: "uint16" or "uint32"; bos: put before each document."""

    def __init__(self, folder: Path, dtype: str, bos: int) -> None:
        self._path = folder / ".spool"
        self._file = self._path.open("wb", buffering=_COPY_BYTES)
        self.dtype, self.bos, self.n_tokens = dtype, bos, 0
        self._np = DTYPES[dtype]
        self._bos = np.array([bos], self._np).tobytes()
        self._starts, self._bytes = array("q"), array("q")
        self._held_out: list[int] = []

    def close(self) -> None:
        """Close the file of a spool that is given up; `finish` has done so."""
        self._file.close()

    @property
    def n_documents(self) -> int:
        """Documents begun so far."""
        return len(self._starts)

    def begin(self, *, held_out: bool = False) -> None:
        """A new document. held_out: it is for validation, whatever the share that `finish` is asked for."""
        if held_out:
            self._held_out.append(len(self._starts))
        self._starts.append(self.n_tokens)
        self._bytes.append(0)
        self._file.write(self._bos)
        self.n_tokens += 1

    def add(self, tokens: np.ndarray, n_bytes: int) -> None:
        """More of the document: ids (n,) and the UTF-8 bytes of their text."""
        self._file.write(tokens.astype(self._np, copy=False).tobytes())
        self.n_tokens += len(tokens)
        self._bytes[-1] += n_bytes

    def sizes(self) -> np.ndarray:
        """Tokens of each document, (n,) int64, BOS included."""
        return (
            np.diff(np.frombuffer(self._starts, np.int64), append=self.n_tokens)
            if self._starts
            else np.zeros(0, np.int64)
        )

    def finish(
        self,
        folder: Path,
        vocabulary: Mapping[str, Any],
        *,
        val_split: float,
        seed: int,
        shard_tokens: int = SHARD_TOKENS,
        made: Mapping[str, Any] | None = None,
    ) -> Iterator[WrittenShard]:
        """Write shards, bounds, vocab.gguf, and index.json last; give each shard when it is written.

        vocabulary: `tokenizer.*` keys. val_split: share of the tokens that is held out, in whole documents drawn by
        `seed`; those that were begun as held out are all of it where there are any. made: how it came to be, for the
        index. Raises DataError where no document came, OSError where the disk refuses.
        """
        self.close()
        if not self._starts:
            raise DataError("there is no text in it: not one document", hint="look at what was given with: head FILE")
        held = self._choose(val_split, seed)
        written: list[WrittenShard] = []
        whole = {name: hashlib.sha256() for name in ("train", "validation")}
        plan = self._plan(held, shard_tokens)
        width = max(2, len(str(len(plan))))
        with self._path.open("rb", buffering=0) as spool:
            for number, (split, documents) in enumerate(plan, 0 if held.any() else 1):
                shard = self._write_shard(folder, f"data{number:0{width}d}", split, documents, spool, whole[split])
                written.append(shard)
                yield shard
        self._path.unlink()
        if not (folder / VOCABULARY).exists():
            write_vocabulary(folder, vocabulary)
        index = {
            "format": FORMAT, "version": VERSION, "dtype": self.dtype,
            "n_vocab": len(vocabulary["tokenizer.ggml.tokens"]), "bos": self.bos,
            "vocabulary": vocabulary_stamp(vocabulary),
            "sha256": {name: digest.hexdigest() for name, digest in whole.items()},
            "shards": [{**vars(shard), "bounds": Path(shard.file).stem + ".bounds"} for shard in written],
            "made": dict(made or {}),
        }  # fmt: skip
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="ascii")

    def _choose(self, val_split: float, seed: int) -> np.ndarray:
        """Which documents are held out, (n,) bool: drawn ones that fit into the share, the shortest where none does."""
        sizes = self.sizes()
        held = np.zeros(len(sizes), bool)
        if self._held_out:
            held[self._held_out] = True
            return held
        room = int(val_split * self.n_tokens)
        if val_split <= 0 or len(sizes) < 2:
            return held
        misses = 0
        for start in range(0, len(sizes), 4096):
            places = np.arange(start, min(start + 4096, len(sizes)))
            for document in shuffled(seed, _HELD_OUT_STREAM, places, len(sizes)).tolist():
                if sizes[document] <= room:
                    held[document], room, misses = True, room - int(sizes[document]), 0
                else:
                    misses += 1
            if misses >= _MISSES:
                break
        if not held.any():
            held[int(sizes.argmin())] = True
        if held.all():
            held[int(sizes.argmax())] = False
        return held

    def _plan(self, held: np.ndarray, shard_tokens: int) -> list[tuple[SplitName, np.ndarray]]:
        """The documents of each shard: one for validation, as many of about the same size for training as it needs."""
        train = np.flatnonzero(~held)
        sizes = self.sizes()[train]
        n_shards = max(1, -(-int(sizes.sum()) // shard_tokens))
        before = np.cumsum(sizes) - sizes
        number = before * n_shards // max(1, int(sizes.sum()))
        plan: list[tuple[SplitName, np.ndarray]] = [("validation", np.flatnonzero(held))] if held.any() else []
        return plan + [("train", train[number == n]) for n in range(n_shards) if (number == n).any()]

    def _write_shard(
        self, folder: Path, name: str, split: SplitName, documents: np.ndarray, spool: Any, whole: Any
    ) -> WrittenShard:
        sizes = self.sizes()[documents]
        bounds = np.cumsum(sizes) - sizes
        starts = np.frombuffer(self._starts, np.int64)[documents]
        # Neighbours are copied together.
        first = np.flatnonzero(np.diff(documents, prepend=-2) != 1)
        last = np.append(first[1:], len(documents)) - 1
        digest = hashlib.sha256()
        with (folder / f"{name}.bin").open("wb", buffering=_COPY_BYTES) as out:
            for a, b in zip(first.tolist(), last.tolist(), strict=True):
                size = self._np.itemsize
                for block in _copied(spool, int(starts[a]) * size, int(starts[b] + sizes[b]) * size):
                    out.write(block)
                    digest.update(block)
                    whole.update(block)
        bounds.astype("<i8").tofile(folder / f"{name}.bounds")
        n_bytes = int(np.frombuffer(self._bytes, np.int64)[documents].sum())
        return WrittenShard(f"{name}.bin", split, int(sizes.sum()), len(documents), n_bytes, digest.hexdigest())


def _copied(file: Any, start: int, stop: int) -> Iterator[bytes]:
    while start < stop:
        block = os.pread(file.fileno(), min(_COPY_BYTES, stop - start), start)
        if not block:
            raise OSError(f"the spool ends at byte {start}, {stop} were written")
        yield block
        start += len(block)
