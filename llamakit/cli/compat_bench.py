"""llama-bench's options that `bench` has no use for: without effect, or refused where they would change what is
measured (tools/llama-bench/llama-bench.cpp)."""

from __future__ import annotations

_READ_ONCE = "the file is read once and its weights stay packed in memory"
_ONE_DEVICE = "all layers are on one device: --device"
_KV_TYPES = frozenset({"f16", "bf16", "f32"})
_KV = "keys and values have the type that type_k names: --dtype sets it"

#: spelling -> (number of values, what the note says). Accepted, without effect on what is measured.
NO_EFFECT: dict[str, tuple[int, str]] = {
    **dict.fromkeys(("-fa", "--flash-attn"), (1, "the fastest exact attention is always used")),
    **dict.fromkeys(
        ("-mmp", "--mmap", "-dio", "--direct-io", "-lm", "--load-mode", "-lzm", "--lazy-mode"), (1, _READ_ONCE)
    ),
    **dict.fromkeys(
        ("-sm", "--split-mode", "-mg", "--main-gpu", "-ts", "--tensor-split", "-ncmoe", "--n-cpu-moe"),
        (1, _ONE_DEVICE),
    ),
    **dict.fromkeys(("-nopo", "--no-op-offload", "--no-host"), (1, _ONE_DEVICE)),
    **dict.fromkeys(("--repack", "--poll", "--cpu-strict"), (1, "llamakit decides this by itself")),
    **dict.fromkeys(("-hft", "--hf-token"), (1, "the token is taken from HF_TOKEN")),
}

#: spelling -> (values that say what is the case anyway, the note for them, what to do instead of another)
ONLY_AS_IT_IS: dict[str, tuple[frozenset[str], str, str]] = {
    **dict.fromkeys(("-ctk", "--cache-type-k", "-ctv", "--cache-type-v"), (_KV_TYPES, _KV, _KV)),
    **dict.fromkeys(("-nkvo", "--no-kv-offload"), (frozenset({"0"}), _ONE_DEVICE, "--device cpu: all of it")),
    **dict.fromkeys(("-embd", "--embeddings"), (frozenset({"0"}), "logits are computed", "there are no embeddings")),
    **dict.fromkeys(("-C", "--cpu-mask"), (frozenset({"0x0"}), "all cores may be used", "taskset chooses the cores")),
    "--prio": (frozenset({"0"}), "the priority is left as it is", "nice sets the priority"),
    "--numa": (frozenset({"disabled"}), "memory is left where it is", "numactl places it"),
}

#: spelling -> what to do instead
REFUSED: dict[str, str] = {
    **dict.fromkeys(("-ot", "--override-tensor"), "all tensors are on one device: --device"),
    **dict.fromkeys(("-rpc", "--rpc"), "llamakit computes on this machine"),
    **dict.fromkeys(
        ("-fitt", "--fit-target", "-fitc", "--fit-ctx"), "the whole model is on one device: --device chooses it"
    ),
    "--list-devices": "llamakit doctor says what is in use",
}
