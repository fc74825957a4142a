"""llama-server's options that `serve` has under other names, need not have, or cannot have."""

from __future__ import annotations

ALIASES = {
    "--model": "-m",
    "-c": "--ctx",
    "--ctx-size": "--ctx",
    "-a": "--alias",
    "-to": "--timeout",
    "-t": "--threads",
    "--tokenizer": "-z",
    "--chat-template-file": "--chat-template",
}

_ALWAYS = "it is always so"
_PAGE = "the page is a small file, and always there"
_MEMORY = "the file is read once and its weights stay packed in memory"
_BY_ITSELF = "llamakit decides this by itself"
_THREADS = "--threads sets the threads of everything"
_LOG = "what a server says goes to stderr: 2>/dev/null silences it"
#: option -> (number of values, what the note says)
NO_EFFECT: dict[str, tuple[int, str]] = {
    **dict.fromkeys(
        ("-cb", "--cont-batching", "--metrics", "--props", "--slots", "--jinja", "--cache-prompt"), (0, _ALWAYS)
    ),
    **dict.fromkeys(("-kvu", "--kv-unified"), (0, _BY_ITSELF)),
    **dict.fromkeys(("--webui", "--no-webui", "--ui", "--no-ui"), (0, _PAGE)),
    **dict.fromkeys(("--mlock", "--mmap", "--no-mmap"), (0, _MEMORY)),
    **dict.fromkeys(("--warmup", "--no-warmup", "-nkvo", "--no-kv-offload"), (0, _BY_ITSELF)),
    **dict.fromkeys(("-b", "--batch-size", "-ub", "--ubatch-size", "--numa", "--cache-reuse"), (1, _BY_ITSELF)),
    **dict.fromkeys(("-sps", "--slot-prompt-similarity", "-cram", "--cache-ram"), (1, _BY_ITSELF)),
    **dict.fromkeys(("-tb", "--threads-batch", "--threads-http"), (1, _THREADS)),
    **dict.fromkeys(("--log-disable", "--log-prefix", "--log-timestamps", "-v", "--verbose"), (0, _LOG)),
    "--no-context-shift": (0, "a full context ends a text"),
}

_SAMPLING = "requests say how to sample; a model file's general.sampling.* are what they leave out"
_PROXY = "put a program that speaks TLS, such as a reverse proxy, before the server"
#: option -> what to do instead
REFUSED: dict[str, str] = {
    "--api-key": "everybody can read it in the list of processes: --api-key-file FILE, or LLAMAKIT_API_KEY",
    **dict.fromkeys(("--ssl-key-file", "--ssl-cert-file"), _PROXY),
    **dict.fromkeys(("--temp", "--top-k", "--top-p", "--min-p", "--repeat-penalty", "--seed", "-s", "-n"), _SAMPLING),
    **dict.fromkeys(("--embedding", "--embeddings", "--rerank", "--reranking"), "the model writes text alone"),
    "--context-shift": "a full context ends a text; --ctx sets its size",
    "--api-prefix": "paths are as in the APIs; a reverse proxy can put others before them",
    "--lora-init-without-apply": "--lora-scaled FILE:0 loads an adapter that a request can put on",
}
