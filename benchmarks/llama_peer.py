"""llama.cpp or ik_llama.cpp, whichever binding this Python has, as a child that runs when asked.

    PYTHON benchmarks/llama_peer.py (llama_cpp | ik_llama_cpp) MODEL THREADS [--repack]

Run by generate.py in the Python where the binding is installed; it needs nothing of llamakit. Requests are JSON lines
{"do": "pp" | "tg", "n": tokens, "runs": how often}, answers {"seconds": [...]}. As in llama-bench each run starts with
an empty context; "pp" decodes n tokens at once, "tg" one after the other, and the logits of the last are waited for.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

N_CTX = 1024
Peer = tuple[Callable[[], None], Callable[[Sequence[int], int], None]]
"""`clear()`, and `decode(tokens, n_past)`, which returns when the logits are there."""


def llama_cpp(model: str, threads: int, repack: bool) -> Peer:
    """llama-cpp-python's low-level API."""
    del repack  # llama.cpp always does
    import llama_cpp as api  # pyright: ignore[reportMissingImports]

    api.llama_backend_init()
    weights = api.llama_model_load_from_file(model.encode(), api.llama_model_default_params())
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = N_CTX
    params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = threads
    context = api.llama_init_from_model(weights, params)

    def clear() -> None:
        api.llama_memory_clear(api.llama_get_memory(context), False)

    def decode(tokens: Sequence[int], n_past: int) -> None:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        assert api.llama_decode(context, api.llama_batch_get_one(array, len(tokens))) == 0
        api.llama_synchronize(context)

    return clear, decode


def ik_llama_cpp(model: str, threads: int, repack: bool) -> Peer:
    """ik-llama-cpp-python's."""
    from ik_llama_cpp import _ctypes_api as api  # pyright: ignore[reportMissingImports]
    from ik_llama_cpp._internals import make_batch_range  # pyright: ignore[reportMissingImports]

    api.llama_backend_init()
    params = api.llama_model_default_params()
    params.repack_tensors = repack
    weights = api.llama_model_load_from_file(model.encode(), params)
    options = api.llama_context_default_params()
    options.n_ctx = options.n_batch = N_CTX
    options.n_threads = options.n_threads_batch = threads
    options.flash_attn = True
    context = api.llama_init_from_model(weights, options)

    def clear() -> None:
        api.llama_kv_cache_clear(context)

    def decode(tokens: Sequence[int], n_past: int) -> None:
        batch = make_batch_range(list(tokens), pos_start=n_past)
        assert api.llama_decode(context, batch) == 0
        api.llama_get_logits_ith(context, -1)
        api.llama_batch_free(batch)

    return clear, decode


def main() -> None:
    module, model, threads = sys.argv[1:4]
    # The libraries print pages; Python's own errors still go where stderr went.
    out, sys.stderr = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(2), "w")
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    open_model = {"llama_cpp": llama_cpp, "ik_llama_cpp": ik_llama_cpp}[module]
    clear, decode = open_model(model, int(threads), "--repack" in sys.argv)

    def run(do: str, n: int) -> float:
        tokens = [7 * i % 250 + 3 for i in range(n)]
        clear()
        start = time.perf_counter()
        if do == "pp":
            decode(tokens, 0)
        else:
            for i, token in enumerate(tokens):
                decode([token], i)
        return time.perf_counter() - start

    run("pp", 32)
    run("tg", 4)
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        seconds = [run(request["do"], request["n"]) for _ in range(request["runs"])]
        print(json.dumps({"seconds": seconds}), file=out, flush=True)


if __name__ == "__main__":
    main()
