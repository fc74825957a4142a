"""One thread per test process: the models are tiny, and threads that wait for each other cost more than they give."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _one_torch_thread():
    import torch

    if torch.get_num_threads() != 1:  # `llamakit finetune` sets it, and runs in this process in some tests
        torch.set_num_threads(1)
