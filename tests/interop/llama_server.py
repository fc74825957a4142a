"""llama.cpp's own greedy text through the xllamacpp wheel, computed in float32 as far as it can."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest


class LlamaServer:
    """A llama.cpp server in this process on one model file, its cache in float32, flash attention off."""

    def __init__(
        self, path: Path, *, n_ctx: int = 256, n_threads: int = 1, lora: Sequence[tuple[Path, float]] = ()
    ) -> None:
        x = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed (extra [interop])")
        params = x.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = n_ctx, 1, False, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
        params.cache_type_k = params.cache_type_v = x.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.lora_adapters = [x.CommonAdapterLoraInfo(str(file), scale) for file, scale in lora]
        self._server: Any = x.Server(params)

    def greedy(self, prompt: str | Sequence[int], n_predict: int) -> str:
        """The text that follows the prompt."""
        request = {"prompt": prompt, "n_predict": n_predict, "temperature": 0, "cache_prompt": False}
        answer = self._server.handle_completions(request)
        return answer["choices"][0]["text"] if "choices" in answer else answer["content"]

    def log_probs(self, prompt: Sequence[int], n_vocab: int) -> np.ndarray:
        """Log-probabilities of the token after the prompt, (n_vocab,) float64, normalized again: the server's sum
        to 1.0002."""
        request = {"prompt": list(prompt), "n_predict": 1, "temperature": 0, "n_probs": n_vocab, "cache_prompt": False}
        answer = self._server.handle_completions(request)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found = np.full(n_vocab, -np.inf)
        for entry in answer:
            found[entry["id"]] = entry["logprob"]
        return found - np.log(np.exp(found).sum())

    def chat(self, messages: Sequence[dict[str, str]], n_predict: int) -> tuple[str, int]:
        """The greedy answer to a conversation, in the model's own template, and how many tokens its prompt has."""
        request = {"messages": list(messages), "max_tokens": n_predict, "temperature": 0, "cache_prompt": False}
        answer = self._server.handle_chat_completions(request)
        return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]
