"""One thread per test process: the models are tiny, and threads that wait for each other cost more than they give."""

import functools
import os
import shutil
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def _speed_of_the_machine() -> Iterator[None]:
    """Measured once, and not by each of the hundreds of runs that the tests train: it takes half a second."""
    from llamakit.training import train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "gemm_peak", functools.cache(train.gemm_peak))
        yield


def pytest_sessionfinish() -> None:
    """A worker of pytest-xdist leaves without what `atexit` would do."""
    from tests.tiny import session_directory

    shutil.rmtree(session_directory(), ignore_errors=True)


@pytest.fixture(autouse=True)
def _one_torch_thread():
    import torch

    if torch.get_num_threads() != 1:  # `llamakit finetune` sets it, and runs in this process in some tests
        torch.set_num_threads(1)
