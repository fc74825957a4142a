"""Runs of several ranks for the tests of this room: processes that imported torch once, on gloo."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as torch_dist

from llamakit.training.distributed import Dist, join

# Ranks come from a process that imported torch and did nothing else: starting one then takes a tenth of a second.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["llamakit.training.finetune", "llamakit.training.train", "tests.training.runs", "tests.training.train_runs"]
)


def _rank(work: Callable[..., Any], environment: Mapping[str, str], job: str, arguments: Any, answers: Any) -> None:
    os.environ.update(environment)
    rank = int(environment["RANK"])
    import torch

    torch.set_num_threads(1)
    try:
        dist = join(
            local_rank=rank, local_world=int(environment["WORLD_SIZE"]), restarts=0, job=job, device="cpu", version="0"
        )
        found = work(dist, *arguments)
        dist.leave()
        answers.put((rank, found, None))
    except Exception as error:
        answers.put((rank, None, f"{type(error).__name__}: {error}"))
    answers.close()
    answers.join_thread()
    os._exit(0)  # a broken group has threads of its own


def run_ranks(world: int, work: Callable[..., Any], *arguments: Any, job: str = "") -> list[Any]:
    """What work(dist, *arguments) gives on each of so many ranks; an error as text, `MismatchError: ...`."""
    if world == 1:
        return [work(Dist(), *arguments)]
    store = torch_dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers = PROCESSES.Queue()
    environment = {
        "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    children = [
        PROCESSES.Process(target=_rank, args=(work, environment | {"RANK": str(rank)}, job, arguments, answers))
        for rank in range(world)
    ]
    for child in children:
        child.start()
    found: dict[int, Any] = {}
    while len(found) < world:
        with contextlib.suppress(queue.Empty):
            rank, answer, error = answers.get(timeout=1)
            found[rank] = answer if error is None else error
        ended = [rank for rank, child in enumerate(children) if child.exitcode not in (None, 0) and rank not in found]
        assert not ended, f"ranks {ended} ended without an answer: {[child.exitcode for child in children]}"
    for child in children:
        child.join()
    return [found[rank] for rank in range(world)]
