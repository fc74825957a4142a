"""Several processes for one training run: starting them with torch's launcher, and being one of them.

`--devices N` starts the launcher in this process; `torchrun ... -m llamakit finetune ...` starts it outside. Either way
each rank runs the same command line, rank 0 speaks for all, and the first rank that fails says why.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import llamakit
from llamakit.cli import render
from llamakit.errors import (
    EXIT_DIVERGED,
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_MEMORY,
    EXIT_OK,
    EXIT_SAVE,
    EXIT_TERMINATED,
    EXIT_USAGE,
    LostRankError,
    UsageError,
)

if TYPE_CHECKING:
    from llamakit.training.distributed import Dist

#: set for the ranks that this module starts: their launcher says which of them was killed
_OURS = "LLAMAKIT_LAUNCHED"
_PR_SET_PDEATHSIG = 1
_TOLD = (EXIT_USAGE, EXIT_SAVE, EXIT_DIVERGED, EXIT_MEMORY, EXIT_TERMINATED, EXIT_INTERRUPTED)


@dataclass(frozen=True)
class Place:
    """What torch's launcher tells a process about itself in its environment."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    restarts: int
    job: str


def place() -> Place | None:
    """This process among the ranks of a launcher; None where nobody launched it. Raises UsageError for numbers that
    are none."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return None
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    except ValueError as error:
        raise UsageError(f"the launcher's environment is not as torchrun makes it: {error}") from error
    return Place(rank, world, local_rank, local_world, restarts, _job())


def _job() -> str:
    """A name that stays when the launcher starts its ranks anew, and that no earlier run had."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name not in ("", "none"):
        return name
    try:  # the launcher's own start: field 22 of proc(5)
        started = Path(f"/proc/{os.getppid()}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19]
    except (OSError, ValueError, IndexError):
        return ""
    return f"{os.getppid()}-{started}"


class _State:
    """The command line, whether this process is a rank, and what it joined: errors are told before and after that."""

    argv: Sequence[str] = ()
    place: Place | None = None
    dist: Dist | None = None
    was_joined = False


# ---- being a rank ----------------------------------------------------------------------------------------------------


def prepare(argv: list[str]) -> None:
    """Before anything is said: ranks but 0 say nothing on stdout, and errors alone on stderr. A rank whose launcher is
    killed gets SIGTERM: it saves and ends."""
    _State.argv, _State.place, _State.dist, _State.was_joined = argv, place(), None, False
    if _State.place is None:
        return
    if _State.place.rank:
        render.be_silent()
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def repeats() -> bool:
    """Whether the launcher is this very command, which has said already what there is to say of the command line."""
    return _OURS in os.environ


def threads_of_a_rank(threads: int) -> int:
    """CPU threads of this process: the ranks of a machine share its cores."""
    if _State.place is None:
        return threads
    return max(1, min(threads, len(os.sched_getaffinity(0)) // _State.place.local_world))


@contextmanager
def joined(device: str) -> Iterator[Dist]:
    """The ranks of this run, for a with statement around all of it; a `Dist` that does nothing where it runs alone."""
    from llamakit.training.distributed import Dist, join

    here = _State.place
    if here is None:
        yield Dist()
        return
    dist = _State.dist = join(
        local_rank=here.local_rank,
        local_world=here.local_world,
        restarts=here.restarts,
        job=here.job,
        device=device,
        version=llamakit.__version__,
    )
    _State.was_joined = True
    yield dist
    dist.leave()
    _State.dist = None


class Silent:
    """What a rank shows that says nothing."""

    training, speaks = False, False

    def __enter__(self) -> Silent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def show(self, report: object) -> None:
        """Nothing, but know when the steps begin: a signal then ends the run after one, saved."""
        self.training = self.training or type(report).__name__ == "Begin"


def may_tell(error: BaseException, code: int) -> bool:
    """Whether this process is the one that says what went wrong: one rank does, the first."""
    here, dist = _State.place, _State.dist
    if here is None:
        return True
    if isinstance(error, LostRankError) and os.environ.get(_OURS):
        return False
    if dist is None:  # a wrong command line is wrong on every rank
        return here.rank == 0 or code != EXIT_USAGE
    return dist.claim()


def rank_prefix() -> str:
    """What an error's message begins with: `rank 1: ` in a run of several."""
    here = _State.place
    return f"rank {here.rank}: " if here is not None and here.world > 1 else ""


def told() -> None:
    """The error is said: the other ranks need not wait any longer."""
    if _State.dist is not None:
        _State.dist.said()


def end(code: int) -> None:
    """Leave a run of several ranks at once with its exit code.

    gloo's threads outlive their group where anything else holds it, such as a sharded model. After an error they could
    keep the process; at the end of Python they would abort it, if they then let go of a tensor.
    """
    if _State.was_joined:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ---- starting them ---------------------------------------------------------------------------------------------------


def number_of_ranks(devices: str, device: str) -> int:
    """How many processes --devices asks for. Raises UsageError for what is no number, or more than there are GPUs."""
    here = _State.place
    if here is not None:
        if devices not in ("1", "all", str(here.local_world)):
            raise UsageError(
                f"--devices {devices}, and the launcher has started {here.local_world} ranks on this machine",
                hint="leave --devices out under torchrun",
            )
        return 1
    if devices == "1":
        return 1
    if devices != "all" and not (devices.isascii() and devices.isdigit() and int(devices) > 0):
        raise UsageError(f"--devices is {devices!r} (expected a number from 1, or all)")
    import torch

    n_gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if devices == "all":
        return max(1, n_gpus)
    if n_gpus and int(devices) > n_gpus:
        raise UsageError(f"--devices {devices}: this machine has {n_gpus} GPUs", hint="give fewer, or --device cpu")
    return int(devices)


def launch(n_ranks: int, batch: int) -> int:
    """Run this very command line in n_ranks processes; returns the exit code of all of them.

    SIGTERM and Ctrl-C go to every rank, which save and end; SIGUSR1 has them save. Raises UsageError for a batch that
    does not divide, before anything is started.
    """
    import logging

    from llamakit.training.distributed import Dist

    Dist(0, n_ranks).check_batch(batch)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // n_ranks)))
    os.environ[_OURS] = "1"
    options = ["--standalone", f"--nproc-per-node={n_ranks}", "--max-restarts=0", "--signals-to-handle=SIGHUP,SIGQUIT"]
    with _passing_signals_on(), tempfile.TemporaryDirectory(prefix="llamakit-ranks-") as logs:
        options.append(f"--log-dir={logs}")  # torch's own would stay behind
        try:
            run.run(run.parse_args([*options, "-m", "llamakit", *_State.argv]))
        except ChildFailedError as error:
            return _code(error)
        finally:
            del os.environ[_OURS]
    return EXIT_OK


def _code(error: Any) -> int:
    """The exit code of a run whose ranks failed; says which of them was killed, since it could not."""
    failures = error.failures
    for rank, failure in failures.items():
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            name = signal.Signals(-failure.exitcode).name
            render.error(f"rank {rank} was ended by {name}; the last checkpoint is intact")
            if name == "SIGKILL":
                render.hint("the system may have run out of memory")
            return EXIT_FAILURE
    codes = {failure.exitcode for failure in failures.values()}
    return next((code for code in _TOLD if code in codes), EXIT_FAILURE)


@contextmanager
def _passing_signals_on() -> Iterator[None]:
    def pass_on(number: int, _frame: object) -> None:
        for child in _children():
            try:
                os.kill(child, number)
            except ProcessLookupError:
                continue

    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, pass_on) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _children() -> list[int]:
    """The processes that this one has started: the ranks."""
    me = os.getpid()
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[1]) == me:
                found.append(int(path.parent.name))
        except (OSError, ValueError, IndexError):
            continue
    return found
