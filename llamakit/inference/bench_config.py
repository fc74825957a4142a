"""What `bench` can be asked for. Torch-free: the command line takes its defaults from here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from llamakit.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class BenchTest:
    """One thing to measure: so many tokens as a prompt, then so many one at a time, after so many that do not count.

    n_batch: tokens handed over at once at most; n_ubatch: tokens computed at once at most.
    """

    n_prompt: int
    n_gen: int
    n_depth: int
    n_batch: int
    n_ubatch: int

    @property
    def name(self) -> str:
        """As llama-bench calls it: pp512, tg128, pp512+tg128 @ d1024."""
        parts = [f"{word}{n}" for word, n in (("pp", self.n_prompt), ("tg", self.n_gen)) if n]
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def chunk(self) -> int:
        """Tokens of a prompt that are computed at once."""
        return min(self.n_batch, self.n_ubatch)


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured, with llama-bench's defaults; every combination of the lists. Raises UsageError."""

    n_prompt: tuple[int, ...] = (512,)
    """Lengths of prompts, each a test of its own; 0 is none."""
    n_gen: tuple[int, ...] = (128,)
    """Tokens to generate, each a test of its own; 0 is none."""
    n_pg: tuple[tuple[int, int], ...] = ()
    """Prompts and what is generated after them, as one test each."""
    n_depth: tuple[int, ...] = (0,)
    """Tokens that the context holds before a test."""
    n_batch: tuple[int, ...] = (2048,)
    """Prompt tokens handed to the engine at once."""
    n_ubatch: tuple[int, ...] = (512,)
    """Prompt tokens computed at once."""
    repetitions: int = 5
    """How often each test is measured."""
    delay: int = 0
    """Seconds to wait before each test."""
    warmup: bool = True
    """Run each test once before it counts."""

    def __post_init__(self) -> None:
        _require(self.repetitions >= 1, "-r", self.repetitions, "1 or more")
        _require(self.delay >= 0, "--delay", self.delay, "0 or more")
        for flag, values, least in (
            ("-p", self.n_prompt, 0),
            ("-n", self.n_gen, 0),
            ("-d", self.n_depth, 0),
            ("-b", self.n_batch, 1),
            ("-ub", self.n_ubatch, 1),
            ("-pg", [n for pair in self.n_pg for n in pair], 0),
        ):
            for value in values:
                _require(value >= least, flag, value, f"{least} or more")
        if not any(True for _ in self.tests()):
            raise UsageError("nothing is left to measure: -p and -n are 0, and there is no -pg")

    def tests(self) -> Iterator[BenchTest]:
        """Every test, in llama-bench's order."""
        lengths = [(n, 0) for n in self.n_prompt] + [(0, n) for n in self.n_gen] + list(self.n_pg)
        for n_batch, n_ubatch, n_depth in product(self.n_batch, self.n_ubatch, self.n_depth):
            for n_prompt, n_gen in lengths:
                if n_prompt + n_gen:
                    yield BenchTest(n_prompt=n_prompt, n_gen=n_gen, n_depth=n_depth, n_batch=n_batch, n_ubatch=n_ubatch)


def _require(holds: bool, flag: str, value: object, expected: str) -> None:
    if not holds:
        raise UsageError(f"{flag} is {value} (expected {expected})")
