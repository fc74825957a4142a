"""Both sides of generate.py as children: our engine, transformers, and the programs llama-bench and run.

Every side answers `ask({"do": "pp" | "tg", "n": tokens, "runs": how often})` with seconds per run. As in llama-bench a
run starts with an empty context; "pp" feeds n tokens at once, "tg" one after the other.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import environment, gemm_rate, huggingface_config, serve

# The programs get libgomp as they find it: how its threads wait is our command line's choice for itself.
_OURS_ALONE = ("GOMP_SPINCOUNT", "OMP_NUM_THREADS", "PYTHONPATH")


def peer_environment() -> dict[str, str]:
    """The environment of a program that is not ours."""
    return {name: value for name, value in os.environ.items() if name not in _OURS_ALONE}


def tokens_of(n: int, n_vocab: int) -> list[int]:
    """n tokens, the same each time, none of them special."""
    return [(7 * i + 11) % (n_vocab - 3) + 3 for i in range(n)]


def read_rate(runs: int = 7) -> float:
    """Bytes per second that torch's threads read from memory, the best of a few."""
    import torch

    data = torch.ones(1 << 26)
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        torch.dot(data[: 1 << 25], data[1 << 25 :])
        seconds.append(time.perf_counter() - start)
    return data.numel() * 4 / min(seconds)


def _timed(run: Callable[[str, int], object]) -> Callable[[dict[str, Any]], Any]:
    """The answer to "pp" and "tg"."""

    def answer(request: dict[str, Any]) -> Any:
        seconds = []
        for _ in range(request["runs"]):
            start = time.perf_counter()
            run(request["do"], request["n"])
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    return answer


# ---- ours --------------------------------------------------------------------------------------------------------


def ours(model: str, threads: int, dtype: str, vocabulary: str = "") -> None:
    """A child: the engine that the command line would take. Besides, "facts", "limits", "adapter" and "greedy"."""
    from llamakit.cli.loading import load

    loaded = load(Path(model), vocabulary=Path(vocabulary) if vocabulary else None, threads=threads, dtype=dtype)
    engine = loaded.engine

    def run(do: str, n: int) -> None:
        context, tokens = engine.context(n), tokens_of(n, engine.config.n_vocab)
        for part in [tokens] if do == "pp" else ([token] for token in tokens):
            engine.feed(context, part)

    timed = _timed(run)
    others: dict[str, Callable[[dict[str, Any]], Any]] = {
        "facts": lambda _: {"engine": type(engine).__name__, **_bytes_per_token(loaded.file, engine.config)},
        "limits": lambda _: {"read_bytes_per_s": read_rate(), "gemm_flop_per_s": gemm_rate()},
        "adapter": lambda request: engine.set_adapters(_adapter(engine.config, request["rank"])),
        "greedy": lambda request: _greedy(engine, loaded.tokenizer.bos_id, request["n"]),
    }
    run("pp", 32)
    run("tg", 4)
    serve(lambda request: others.get(request["do"], timed)(request))


def _greedy(engine: Any, bos: int | None, n: int) -> dict[str, float]:
    """Tokens per second of the likeliest continuation, counted as run.c does: from the second position on."""
    context, token, start, steps = engine.context(n), bos or 1, 0.0, 0
    for position in range(n):
        token = int(engine.feed(context, [token]).argmax())
        if position == 0:
            start = time.perf_counter()
        steps = position
        if token == 1:
            break
    return {"tok_per_s": steps / (time.perf_counter() - start)}


def _bytes_per_token(file: Any, config: Any) -> dict[str, Any]:
    """What has to be read for a token: every matrix, the look-up table only where it is the output too."""
    from llamakit.ggml import row_bytes

    n_bytes = 0
    for name, info in file.tensors.items():
        if name != "token_embd.weight" or config.tied_output:
            n_bytes += row_bytes(info.shape[-1], info.type) * (info.n_elements // info.shape[-1])
    return {"bytes_per_token": n_bytes, "n_matmul": config.n_matmul}


def _adapter(config: Any, rank: int) -> list[tuple[Any, float]]:
    """A random LoRA of so many ranks on the seven matrices of every block; none for rank 0."""
    import numpy as np

    from llamakit.formats.adapter import Adapter

    rng = np.random.default_rng(0)

    def part(*shape: int) -> Any:
        return 0.01 * rng.standard_normal(shape, dtype=np.float32)

    shapes = {name: s for name, s in config.tensor_shapes().items() if name.startswith("blk.") and len(s) == 2}
    pairs = {name: (part(rank, n_in), part(n_out, rank)) for name, (n_out, n_in) in shapes.items()}
    return [(Adapter(float(rank), pairs), 1.0)] if rank else []


# ---- transformers ------------------------------------------------------------------------------------------------


def transformers(model: str, threads: int, dtype: str) -> None:
    """A child: transformers' Llama with the file's weights, decoded to f32 or bf16."""
    import torch
    from transformers import DynamicCache

    torch.set_num_threads(threads)
    llama = hf_model(Path(model), torch.float32 if dtype == "f32" else torch.bfloat16)

    @torch.inference_mode()
    def run(do: str, n: int) -> None:
        ids, cache = torch.tensor([tokens_of(n, llama.config.vocab_size)]), DynamicCache(config=llama.config)
        for part in ids.split(n if do == "pp" else 1, dim=1):
            llama(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].float().numpy()

    run("pp", 32)
    run("tg", 4)
    serve(_timed(run))


def hf_model(path: Path, dtype: Any) -> Any:
    """LlamaForCausalLM with the weights of a GGUF in dtype, q and k with their rows in its order."""
    import torch
    from transformers import LlamaForCausalLM

    from llamakit.formats.names import huggingface_name, rope_rows_back, rotary_heads
    from llamakit.formats.open import open_model
    from llamakit.model import load_config
    from llamakit.quant import dequantize

    file = open_model(path)
    shape, weights = load_config(file), {}
    for name, info in file.tensors.items():
        theirs = huggingface_name(name)
        if theirs is not None:
            values = dequantize(torch.from_numpy(file.read(name)), info.type, dtype).view(info.shape)
            turned = rotary_heads(name, shape.n_head, shape.n_head_kv)
            weights[theirs] = values if turned is None else values[rope_rows_back(len(values), turned)]
    config = huggingface_config(shape, dtype=dtype)
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config).to(dtype).eval()
    missing, _ = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing
    return model


# ---- programs ----------------------------------------------------------------------------------------------------


class LlamaBench:
    """llama-bench, started anew for every request; it warms up by itself."""

    def __init__(self, program: str, model: Path, threads: int) -> None:
        self._command = [program, "-m", str(model), "-t", str(threads), "-ngl", "0", "-o", "json"]

    def ask(self, request: dict[str, Any]) -> Any:
        """Seconds per run, as it says itself."""
        n_prompt, n_gen = (request["n"], 0) if request["do"] == "pp" else (0, request["n"])
        command = [*self._command, "-p", str(n_prompt), "-n", str(n_gen), "-r", str(request["runs"])]
        ran = subprocess.run(command, env=peer_environment(), capture_output=True, check=True, text=True)
        (result,) = json.loads(ran.stdout)
        return {"seconds": [ns / 1e9 for ns in result["samples_ns"]]}

    def close(self) -> None:
        """Nothing is left running."""


def run_c(program: str, model: Path, vocabulary: Path, *, n: int, threads: int) -> float:
    """Tokens per second that llama2.c's run says it reached, without sampling."""
    command = [program, str(model), "-z", str(vocabulary), "-t", "0", "-n", str(n)]
    env = {**peer_environment(), "OMP_NUM_THREADS": str(threads)}
    ran = subprocess.run(command, env=env, capture_output=True, check=True)
    found = re.search(rb"achieved tok/s: ([0-9.]+)", ran.stderr)
    assert found is not None, ran.stderr.decode(errors="replace")
    return float(found[1])


def process_seconds(arguments: Sequence[str], threads: int) -> float:
    """Seconds from the start to the end of a Python process of this checkout."""
    start = time.perf_counter()
    subprocess.run(arguments, env=environment(threads), capture_output=True, check=True)
    return time.perf_counter() - start


@contextmanager
def closing(sides: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Sides that are closed at the end, when all went well."""
    yield sides
    for side in sides.values():
        side.close()
