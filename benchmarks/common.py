"""What the benchmarks share: what the machine can do, what a process holds, children that work when asked."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# As the command line sets it, for both sides, before torch is loaded: libgomp's threads that spin for long take the
# core that somebody else on the machine needs.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def median_s(work: Callable[[], object], runs: int) -> float:
    """Median seconds of `work`, after one call that does not count."""
    work()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def gemm_rate(n: int = 2048, runs: int = 9) -> float:
    """The yardstick: FLOP/s of an (n, n) x (n, n) product in bf16 or float32, whichever is faster; the best counts."""
    import torch

    from llamakit.model.device import faster_dtype

    a, b = (torch.randn(n, n).to(faster_dtype(torch.device("cpu"))) for _ in range(2))
    out = a @ b
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def step_flop(shape: Any, *, batch: int, ctx: int, checkpointing: bool) -> float:
    """FLOP of one LoRA step: 4 (6 when activations are computed twice) per matmul weight and token, plus attention.

    Forward and input gradient of a frozen matrix take 2 each per weight. Causal attention takes 2 * T * C per token
    and layer forward (half of the full square), and twice that backward. shape: n_matmul, n_layer, n_embd.
    """
    passes = 2 if checkpointing else 1
    matrices = (2 + 2 * passes) * shape.n_matmul
    attention = (2 + passes) * 2 * ctx * shape.n_embd * shape.n_layer
    return batch * ctx * (matrices + attention)


def peak_rss_bytes() -> int:
    """The most memory that this process has held, file pages included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def status_bytes(key: str) -> int:
    """VmHWM, VmRSS, RssAnon or RssFile of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise KeyError(key)


def machine() -> dict[str, Any]:
    """What to write beside every figure."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load": load(),
    }


def load() -> float:
    """Runnable processes on the machine, averaged over the last minute."""
    return round(os.getloadavg()[0], 2)


def environment(threads: int) -> dict[str, str]:
    """The environment of a child that computes with so many threads and imports this checkout."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


class Worker:
    """A child process that loads once, then answers one JSON line per request; idle, it takes no CPU."""

    def __init__(
        self,
        arguments: Sequence[str],
        threads: int,
        *,
        python: str = sys.executable,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            [python, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(threads) if env is None else env,
        )

    def ask(self, request: Mapping[str, Any]) -> Any:
        """Send a request and wait for its answer. Raises RuntimeError when the child has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with exit code {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """Let the child end. Raises RuntimeError when it failed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.wait():
            raise RuntimeError(f"the worker ended with exit code {self._process.returncode}")


def serve(answer: Callable[[dict[str, Any]], Any]) -> None:
    """The child's side of Worker: answers each request; what libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=out, flush=True)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """--threads and --json."""
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to a file")


def write_json(path: str | None, results: Any) -> None:
    """Write the figures where --json says."""
    if path:
        Path(path).write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")


def huggingface_config(shape: Any, **more: Any) -> Any:
    """The hyper-parameters of a ModelConfig as transformers has them."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.n_vocab,
        hidden_size=shape.n_embd,
        intermediate_size=shape.n_ff,
        num_hidden_layers=shape.n_layer,
        num_attention_heads=shape.n_head,
        num_key_value_heads=shape.n_head_kv,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.n_ctx,
        rms_norm_eps=shape.rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_base},
        tie_word_embeddings=shape.tied_output,
        **more,
    )
