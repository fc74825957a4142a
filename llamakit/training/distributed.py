"""Several processes that train one model, ranks: who this one is, and what they tell one another.

torch.distributed does the work: gloo between processors, nccl between GPUs, gloo for plain facts in both cases. A run
of one process has a `Dist` too, which does nothing.
"""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from llamakit.errors import LlamakitError, LostRankError, MismatchError, UsageError

_JOIN_S = 600.0
# A rank may wait for another's preparation of a corpus or export of a model. That one is gone shows at once: the
# connection to it is closed.
_WAIT = datetime.timedelta(days=1)
_SPOKE_S = 5.0
#: gloo's threads let go of their last tensors meanwhile, for which they need Python, and it must not end before
_LET_GO_S = 0.05

T = TypeVar("T")


class Dist:
    """The place of this process among those that train one model.

    rank: from 0, which is the one that prints and writes. world: how many there are. local_world: on this machine.
    restarts: how often torch's launcher has started the ranks anew. job: what the launcher calls the run. sharded: each
    rank holds a share of the model, so that all must take part in every pass through it.
    """

    def __init__(
        self,
        rank: int = 0,
        world: int = 1,
        *,
        local_world: int = 1,
        restarts: int = 0,
        job: str = "",
        store: PrefixStore | None = None,
    ) -> None:
        self.rank, self.world, self.local_world = rank, world, local_world
        self.restarts, self.job, self.sharded = restarts, job, False
        self._store = store

    @property
    def is_main(self) -> bool:
        """Whether this rank prints, logs and writes."""
        return self.rank == 0

    @property
    def joined(self) -> bool:
        """Whether there is a process group, if only of one."""
        return self._store is not None

    # ---- shares ----------------------------------------------------------------------------------------------

    def check_batch(self, batch: int) -> None:
        """Raises UsageError for a batch that does not divide by the ranks."""
        if batch % self.world:
            more = -(-batch // self.world) * self.world
            raise UsageError(
                f"--batch {batch} does not divide by {self.world} ranks: it counts the sequences of all of them",
                hint=f"give --batch {more}, or another number of ranks",
            )

    def rows(self, n: int) -> slice:
        """Which of n rows of a global batch are this rank's: a contiguous share, even where n divides."""
        return slice(self.rank * n // self.world, (self.rank + 1) * n // self.world)

    def share(self, items: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """Every world-th of the items, beginning with the rank's number, and whether it counts.

        Where the model is sharded every rank gets as many: the last ones another's, which count there.
        """
        iterator = iter(items)
        while group := list(islice(iterator, self.world)):
            if self.rank < len(group):
                yield group[self.rank], True
            elif self.sharded:
                yield group[0], False

    # ---- collectives -----------------------------------------------------------------------------------------

    def add_up(self, tensor: Tensor) -> None:
        """The sum of all ranks' tensors, in place; the same bits on each. One collective, of the tensor's bytes."""
        if self.joined:
            with _contact():
                torch_dist.all_reduce(tensor)

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over all ranks, float64."""
        return self._reduced(values, torch_dist.ReduceOp.SUM)

    def most(self, values: Sequence[float]) -> list[float]:
        """The largest of all ranks, one by one, float64."""
        return self._reduced(values, torch_dist.ReduceOp.MAX)

    def _reduced(self, values: Sequence[float], how: Any) -> list[float]:
        if not self.joined:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        with _contact():
            torch_dist.all_reduce(tensor, how)
        return tensor.tolist()

    def main_number(self, value: float) -> float:
        """Rank 0's number: what a clock says differs between ranks."""
        return self.sum([value if self.is_main else 0.0])[0]

    def send(self, tensors: Iterable[Tensor]) -> None:
        """Rank 0's tensors to all, in place."""
        if self.joined:
            with _contact():
                for tensor in tensors:
                    torch_dist.broadcast(tensor, src=0)

    def from_main(self, make: Callable[[], T], light: Callable[[T], T] = lambda value: value) -> T:
        """What rank 0 makes. Others get light(value), pickled; what `make` raises is raised on rank 0 alone."""
        if not self.joined:
            return make()
        if self.is_main:
            made = make()
            self._broadcast(light(made))
            return made
        return self._broadcast(None)

    def _broadcast(self, value: Any) -> Any:
        held = [value]
        with _contact():
            torch_dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
        return held[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, pickled, by rank."""
        if not self.joined:
            return [value]
        everyone: list[Any] = [None] * self.world
        with _contact():
            torch_dist.all_gather_object(everyone, value)
        return everyone

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum([0.0])

    def check_same(self, facts: Mapping[str, Any], show: Callable[[Any], str]) -> None:
        """Raises MismatchError, on every rank, naming the first rank whose facts are not rank 0's.

        show: a fact's value in words.
        """
        if not self.joined:
            return
        everyone = self.gather(dict(facts))
        for rank, theirs in enumerate(everyone):
            for what, value in everyone[0].items():
                if theirs.get(what) != value:
                    raise MismatchError(
                        f"{what} is {show(theirs.get(what))} on rank {rank}, and {show(value)} on rank 0",
                        hint="every rank needs the same command, files and versions",
                    )

    # ---- the end ---------------------------------------------------------------------------------------------

    def claim(self) -> bool:
        """Whether this rank is the one that says what went wrong; True for one of them, the first that asks."""
        if self._store is None:
            return True
        try:
            if self._store.add("errors", 1) == 1:
                return True
            self._store.wait(["said"], datetime.timedelta(seconds=_SPOKE_S))  # the launcher ends us all when one ends
        except RuntimeError:  # where the store is gone, so is the machine that it was on
            return False
        return False

    def said(self) -> None:
        """The rank whose claim was taken has spoken."""
        if self._store is not None:
            try:
                self._store.set("said", "1")
            except RuntimeError:
                return

    def leave(self) -> None:
        """Wait for all, so that none is ended by the launcher while it still writes, and dissolve the group."""
        if self.joined:
            self.barrier()
            torch_dist.destroy_process_group()
            time.sleep(_LET_GO_S)


@contextmanager
def _contact() -> Iterator[None]:
    """Raises LostRankError where another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        text = " ".join(str(error).split())
        known = re.search(r"[Cc]onnection (closed|reset|refused)( by peer)?|[Tt]imed out", text)
        raise LostRankError(f"contact with another rank is lost: {known[0] if known else text[:120]}") from error


def join(
    *,
    local_rank: int,
    local_world: int,
    restarts: int,
    job: str,
    device: str,
    version: str,
    timeout_s: float = _JOIN_S,
) -> Dist:
    """Join the ranks that torch's launcher has started: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are torch's to
    read.

    device: of --device; on CUDA each rank of a machine takes the GPU of its number. version: llamakit's, which must be
    the same everywhere. Raises LlamakitError for ranks that do not come within timeout_s, UsageError for a GPU that is
    not there, MismatchError for a rank of another version.
    """
    on_cuda = device != "cpu" and torch.cuda.is_available()
    if on_cuda:
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"there is no GPU for rank {local_rank} of this machine, which has {torch.cuda.device_count()}",
                hint="start as many ranks on a machine as it has GPUs, or give --device cpu",
            )
        torch.cuda.set_device(local_rank)
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        shared, rank, world = next(rendezvous("env://", timeout=timeout))
        # The launcher keeps its store when it starts the ranks anew: gloo would find the addresses of dead ones in it.
        store = PrefixStore(f"llamakit-{restarts}-{world}", shared)
        store.set(f"here/{rank}", "1")
        store.wait([f"here/{i}" for i in range(world)], timeout)
    except (RuntimeError, ValueError) as error:
        raise _not_joined(error, timeout_s) from error
    with _contact():
        torch_dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo", store=store, rank=rank, world_size=world, timeout=_WAIT
        )
    dist = Dist(rank, world, local_world=local_world, restarts=restarts, job=job, store=store)
    kind = "CUDA" if on_cuda else "the CPU"
    dist.check_same({"llamakit": version, "torch": torch.__version__, "the device": kind}, str)
    return dist


def _not_joined(error: Exception, timeout_s: float) -> LlamakitError:
    reason = " ".join(str(error).split())[:120]
    return LlamakitError(
        f"the ranks did not come together within {timeout_s:g} s: {reason}",
        hint="MASTER_ADDR and MASTER_PORT must lead to rank 0's machine, and every rank must be started",
    )
