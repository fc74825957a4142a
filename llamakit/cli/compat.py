"""Old spellings: one table that rewrites a command line before Typer sees it, and never shows in the help.

Sources: llama.cpp's `finetune` of 2024 (common/train.cpp), llama.cpp's common/arg.cpp, llama2.c's run.c.
`rewrite` is a pure function of the arguments: it opens no file and prints nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal

from llamakit.cli import compat_bench, compat_data, compat_serve, compat_train
from llamakit.cli.compat_convert import rewrite_convert
from llamakit.errors import UnsupportedError, UsageError

Note = tuple[Literal["note", "warning"], str]

_CHAT = {
    "-sys": "--system",
    "--system-prompt": "--system",
    "-sysf": "--system-file",
    "--system-prompt-file": "--system-file",
    "-y": "--system",
    "-st": "--single-turn",
    "--chat-template-file": "--chat-template",
}
#: command -> old spelling -> ours. A spelling that is ours already is absent.
ALIASES: dict[str, dict[str, str]] = {
    "finetune": {
        "-t": "--threads",
        "-s": "--seed",
        "-c": "--ctx",
        "--ctx-size": "--ctx",
        "-b": "--batch",
        "--batch-size": "--batch",
        "-ngl": "--n-gpu-layers",
        "--gpu-layers": "--n-gpu-layers",
        "-m": "--model-base",
        "--model": "--model-base",
        "-f": "--train-data",
        "--file": "--train-data",
        "-epochs": "--epochs",
        "-lr": "--adam-alpha",
        "-wd": "--adam-decay",
        "-val-split": "--val-split",
    },
    "train": compat_train.ALIASES,
    "generate": {
        "--model": "-m",
        "--prompt": "-p",
        "--file": "-f",
        "--temp": "-t",
        "--temperature": "-t",
        "--predict": "-n",
        "--n-predict": "-n",
        "-c": "--ctx",
        "--ctx-size": "--ctx",
        "-s": "--seed",
        "-i": "-p",
        "--tokenizer": "-z",
        "--conversation": "-cnv",
        "-no-display-prompt": "--no-display-prompt",
        "-l": "--logit-bias",
        "--sampler-seq": "--sampling-seq",
        "--log-verbose": "--verbose",
        "--top-n-sigma": "--top-nsigma",
        "--typical-p": "--typical",
        **_CHAT,
    },
    "chat": {},  # as generate, see below
    "merge": {
        "--model": "-m",
        "--model-base": "-m",
        "--model-out": "-o",
        "--output": "-o",
        "--output-file": "-o",
        "-l": "--lora",
        "-s": "--lora-scaled",
        "-t": "--threads",
    },
    "convert": {
        "--outfile": "-o",
        "--output": "-o",
        "--vocab-dir": "--vocab",
        "--copy-vocab-from-model": "--vocab",
        "-c": "--ctx",
        "-m": "",
        "--model": "",
    },
    "quantize": {"-m": "", "--model": "", "-t": "--threads"},
    "perplexity": {
        "--model": "-m",
        "--file": "-f",
        "-t": "--threads",
        "--ctx-size": "--ctx",
        "--batch-size": "--batch",
        "--save-all-logits": "--kl-divergence-base",
    },
    "imatrix": {
        "--model": "-m",
        "--file": "-f",
        "--output": "-o",
        "--output-file": "-o",
        "-t": "--threads",
        "--ctx-size": "--ctx",
        "--batch-size": "--batch",
        "-ofreq": "--output-frequency",
        "--from-chunk": "--chunk",
    },
    "bench": {"--model": "-m"},
    "serve": compat_serve.ALIASES,
    "run": {},
    "tokenize": {"--model": "-m", "--prompt": "-p", "--file": "-f"},
    "inspect": {"-m": "", "--model": ""},
    "verify": {},
    "doctor": {},
    "plot": {},
    **compat_data.ALIASES,
}

_COMPLETION_ONLY = ("--conversation", "-no-display-prompt")
ALIASES["chat"] = {old: new for old, new in ALIASES["generate"].items() if old not in _COMPLETION_ONLY}

#: llama.cpp's -hf user/repo[:QUANT] and -hff FILE -> the option that names the model, as hf:...
_HUB_MODEL = {
    "finetune": "--model-base", "train": "--init-from", "generate": "-m", "chat": "-m", "imatrix": "-m", "merge": "-m",
    "convert": "-m", "quantize": "-m", "tokenize": "-m", "inspect": "-m", "perplexity": "-m", "bench": "-m",
    "serve": "-m",
}  # fmt: skip
_HUB_REPO, _HUB_FILE = ("-hf", "-hfr", "--hf-repo"), ("-hff", "--hf-file")

#: command -> spelling -> (number of values, what the note says). Accepted, without effect on the result.
_MEMORY = "the file is read once and its weights stay packed in memory"
_CPU = "llamakit decides this by itself"
_STREAMED = "tensors are always streamed, and take little memory"
_ONE_PLACE = "all layers are in one place: --device"
_PLACING: dict[str, tuple[int, str]] = {
    **dict.fromkeys(("-sm", "--split-mode", "-mg", "--main-gpu", "-ts", "--tensor-split"), (1, _ONE_PLACE)),
    **dict.fromkeys(("-kvo", "--kv-offload", "--op-offload", "--no-op-offload", "--no-host"), (0, _ONE_PLACE)),
    **dict.fromkeys(("--repack", "-nr", "--no-repack", "--check-tensors"), (0, _CPU)),
    **dict.fromkeys(("--poll", "--poll-batch", "--prio", "--prio-batch", "--cpu-strict"), (1, _CPU)),
}
_LOADING: dict[str, tuple[int, str]] = {
    **dict.fromkeys(("--mlock", "--mmap", "--no-mmap"), (0, _MEMORY)),
    **dict.fromkeys(("--numa", "-ub", "--ubatch-size"), (1, _CPU)),
    **dict.fromkeys(("-tb", "--threads-batch"), (1, "--threads sets the threads of everything")),
}
_MEASURING: dict[str, tuple[int, str]] = {
    **_LOADING,
    **dict.fromkeys(("-np", "--parallel"), (1, "--batch says how many chunks are computed at once")),
    **dict.fromkeys(("-ctk", "--cache-type-k", "-ctv", "--cache-type-v"), (1, "keys and values are never rounded")),
    "--warmup": (0, _CPU),
    "--no-warmup": (0, _CPU),
    "--no-escape": (0, "the text is always taken as it is"),
}
NO_OPS: dict[str, dict[str, tuple[int, str]]] = {
    "finetune": {
        **dict.fromkeys(("--use-flash", "--no-flash"), (0, "the fastest exact attention is always used")),
        "--mlock": (0, _MEMORY),
        "--no-mmap": (0, _MEMORY),
        "--mmap": (0, _MEMORY),
    },
    "generate": {
        **_LOADING,
        **dict.fromkeys(("-b", "--batch-size"), (1, _CPU)),
        "-no-cnv": (0, "the text is completed as it is unless -cnv is given"),
        "--no-conversation": (0, "the text is completed as it is unless -cnv is given"),
        "-e": (0, "escapes are processed unless --no-escape is given"),
        "--escape": (0, "escapes are processed unless --no-escape is given"),
        "--display-prompt": (0, "the prompt is shown unless --no-display-prompt is given"),
        "--color": (0, "the text is never coloured"),
        "--simple-io": (0, "input and output are always simple"),
        "--log-disable": (0, "what is no text goes to stderr: 2>/dev/null silences it"),
        "--no-perf": (0, "what is no text goes to stderr: 2>/dev/null silences it"),
        "--perf": (0, "timings are always on stderr"),
        "--warmup": (0, _CPU),
        "--no-warmup": (0, _CPU),
        "-nkvo": (0, _CPU),
        "--no-kv-offload": (0, _CPU),
        **_PLACING,
    },
    "train": compat_train.NO_OPS,
    "merge": {},
    "convert": {
        "--use-temp-file": (0, _STREAMED),
        "--no-lazy": (0, _STREAMED),
        "--concurrency": (1, _CPU),
        "--pad-vocab": (0, "a vocabulary that is too short is always padded"),
        "--verbose": (0, "the log is the same with and without it"),
        "--skip-unknown": (0, "what cannot be carried over is refused by name"),
    },
    "quantize": {"--max-buffer-size": (1, _STREAMED)},
    "perplexity": _MEASURING,
    "imatrix": _MEASURING,
    "bench": compat_bench.NO_EFFECT,
    "serve": {**_PLACING, **compat_serve.NO_EFFECT},
    "run": {},
    "tokenize": {"--log-disable": (0, "what is no token goes to stderr: 2>/dev/null silences it")},
    "inspect": {},
    "verify": {},
    "doctor": {},
    "plot": {},
    **{command: {} for command in compat_data.ALIASES},
}

NO_OPS["chat"] = {
    **{old: said for old, said in NO_OPS["generate"].items() if old not in ("-no-cnv", "--no-conversation")},
    "-cnv": (0, "this is a chat"),
    "--conversation": (0, "this is a chat"),
    "--jinja": (0, "the template is always a Jinja template"),
    "--context-shift": (0, "a chat forgets its oldest messages as a whole"),
    "--no-context-shift": (0, "a chat forgets its oldest messages as a whole"),
    "--keep": (1, "a chat keeps its system message"),
}
NO_OPS["generate"]["--jinja"] = NO_OPS["chat"]["--jinja"]
ALIASES["plan"], NO_OPS["plan"] = ALIASES["finetune"], NO_OPS["finetune"]

#: command -> option of its namesake that llamakit has not -> what to do instead
_REFUSED: dict[str, dict[str, str]] = {
    "perplexity": {
        **dict.fromkeys(
            ("--hellaswag", "--winogrande", "--multiple-choice", "--hellaswag-tasks", "--winogrande-tasks",
             "--multiple-choice-tasks", "-bf", "--binary-file"),
            "llamakit perplexity measures perplexity and divergence; llama-perplexity scores these tasks",
        ),
    },
    "bench": compat_bench.REFUSED,
    "train": compat_train.REFUSED,
    "serve": compat_serve.REFUSED,
}  # fmt: skip

# Options whose value is a text or a name, which may itself begin with a dash and is never rewritten.
_TEXT_VALUES = frozenset(
    {
        "-p", "-f", "-m", "-z", "-i", "-o", "--prompt", "--file", "--model", "--tokenizer", "--config", "--lora",
        "--log-file", "--train-data", "--sample-start", "--model-base", "--checkpoint-in", "--checkpoint-out",
        "-sys", "-sysf", "-y", "--system", "--system-file", "--system-prompt", "--system-prompt-file",
        "--chat-template", "--chat-template-file", "--lora-out", "--pattern-fn-it", "--fn-latest",
        "--vocab-model", "--model-out", "--init-from", "--out-dir", "--sample-prompt",
        "--kl-divergence-base", "--dry-sequence-breaker", "--report-dir",
        "-r", "--reverse-prompt", "--stop", "--in-prefix", "--in-suffix", "--prompts",
        "-a", "--alias", "--host", "--api-key-file", "--cors-origin",
        "--grammar", "--grammar-file", "-j", "--json-schema", "-jf", "--json-schema-file",
        *compat_data.TEXT_VALUES,
    }
)  # fmt: skip
_FLASH_WORDS = frozenset({"on", "off", "auto", "0", "1"})


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that a misspelt one most likely means, None where nothing is near; dashes count for nothing."""
    bare = {name.lstrip("-").replace("_", "-"): name for name in known}
    matches = difflib.get_close_matches(word.lstrip("-").replace("_", "-"), list(bare), n=1, cutoff=0.6)
    return bare[matches[0]] if matches else None


def rewrite(argv: list[str]) -> tuple[list[str], list[Note]]:
    """The command line in our spellings, and what to tell the user about it.

    argv: arguments after the program's name. A command without a table, and everything after `--`, stays as
    it is. Raises UsageError for an old option whose value is missing, UnsupportedError for one that is of a tool that
    llamakit is not.
    """
    at = next((i for i, word in enumerate(argv) if not word.startswith("-")), None)
    if at is not None and " ".join(argv[at : at + 2]) in ALIASES:  # a command of a group
        at += 1
        command = " ".join(argv[at - 1 : at + 1])
    else:
        command = argv[at] if at is not None else ""
    if at is None or command not in ALIASES or command == "run":  # run speaks a dialect of its own
        return argv, []
    words = argv[at + 1 :]
    notes: list[Note] = []
    words, rest = _split_at_double_dash(words)
    if command in ("generate", "chat"):
        words = _positional_model(words)
    if command in _HUB_MODEL:
        words = _hub_model(_HUB_MODEL[command], words)
    if command == "convert":
        words = rewrite_convert(words)
    if command == "train":
        words = compat_train.rewrite_train(words, notes)
    return [*argv[: at + 1], *_rewrite_words(command, words, notes), *rest], notes


def _split_at_double_dash(words: list[str]) -> tuple[list[str], list[str]]:
    end = words.index("--") if "--" in words else len(words)
    return words[:end], words[end:]


def _rewrite_words(command: str, words: list[str], notes: list[Note]) -> list[str]:
    out: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        if equals:
            queue.insert(0, value)
        if word.startswith("-") and word != "-":
            name = name.replace("_", "-") if name.startswith("--") else name
            _rewrite_option(command, name, bool(equals), queue, out, notes)
        else:
            out.append(word)
    return out


def _rewrite_option(
    command: str, name: str, attached: bool, queue: list[str], out: list[str], notes: list[Note]
) -> None:
    """Move one option from the queue to `out`, with its value where that is a text or came as NAME=VALUE."""
    if name in _REFUSED.get(command, {}):
        raise UnsupportedError(f"{name} is not supported", hint=_REFUSED[command][name])
    if name in NO_OPS[command]:
        n_values, reason = NO_OPS[command][name]
        _take(name, n_values, queue)
        notes.append(("note", f"{name} has no effect: {reason}"))
        return
    if command == "bench" and name in compat_bench.ONLY_AS_IT_IS:
        _check_is_as_it_is(name, queue, notes)
        return
    if command in ("generate", "chat") and name in ("-t", "-p", "-m"):
        _warn_about_letter(name, queue, notes)
    if command in ("generate", "chat", "perplexity", "imatrix", "bench", "serve") and _rewrite_compute(
        name, queue, out, notes
    ):
        return
    canonical = ALIASES[command].get(name, name)
    if canonical == "--lora-scaled":
        _join_scale(name, queue, out)
        return
    if attached and canonical.startswith("--"):
        out.append(f"{canonical}={queue.pop(0)}")
        return
    if canonical:
        out.append(canonical)
    if queue and (attached or name in _TEXT_VALUES or canonical in _TEXT_VALUES):
        out.append(queue.pop(0))


def _hub_model(option: str, words: list[str]) -> list[str]:
    """`-hf user/repo[:QUANT]`, with `-hff FILE` or without, as the one source hf:..., where -hf stood."""
    rest: list[str] = []
    repo: str | None = None
    file: str | None = None
    place, queue = 0, list(words)
    while queue:
        word = queue.pop(0)
        name, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        name = name.replace("_", "-")
        if name in (*_HUB_REPO, *_HUB_FILE):
            value = value if equals else _take(name, 1, queue)[0]
            if name in _HUB_FILE:
                file = value
            else:
                repo, place = value.removeprefix("hf:"), len(rest)
        else:
            rest.append(word)
            if word in _TEXT_VALUES and queue:
                rest.append(queue.pop(0))
    if repo is None:
        if file is not None:
            raise UsageError("-hff names a file of no repository", hint="name it: -hf user/repo")
        return rest
    source = f"hf:{repo.partition(':')[0]}/{file}" if file else f"hf:{repo}"
    return [*rest[:place], option, source, *rest[place:]]


def _take(name: str, n_values: int, queue: list[str]) -> list[str]:
    """Remove the values of an option from the queue. Raises UsageError when they are not there."""
    if len(queue) < n_values:
        raise UsageError(f"option {name} requires {'an argument' if n_values == 1 else f'{n_values} arguments'}")
    taken, queue[:n_values] = queue[:n_values], []
    return taken


def _rewrite_compute(name: str, queue: list[str], out: list[str], notes: list[Note]) -> bool:
    """llama.cpp's words for where and how to compute that need more than another name; True when done."""
    if name in ("-fa", "--flash-attn"):
        if queue and queue[0] in _FLASH_WORDS:
            queue.pop(0)
        notes.append(("note", f"{name} has no effect: the fastest exact attention is always used"))
        return True
    if name in ("-ngl", "--gpu-layers", "--n-gpu-layers"):
        layers = _take(name, 1, queue)[0]
        device = "cpu" if layers == "0" else "auto"
        out += ["--device", device]
        notes.append(("note", f"{name} {layers} means --device {device} here: all layers are in one place"))
        return True
    return False


def _join_scale(name: str, queue: list[str], out: list[str]) -> None:
    """`--lora-scaled FILE SCALE`, two values as until 2024, becomes FILE:SCALE."""
    adapter = _take(name, 1, queue)[0]
    if not _is_float(adapter.rpartition(":")[2]) and queue and _is_float(queue[0]):
        adapter = f"{adapter}:{queue.pop(0)}"
    out += ["--lora-scaled", adapter]


def _check_is_as_it_is(name: str, queue: list[str], notes: list[Note]) -> None:
    """Take an option of llama-bench that may only say what is the case. Raises UnsupportedError for another value."""
    values, note, instead = compat_bench.ONLY_AS_IT_IS[name]
    value = _take(name, 1, queue)[0]
    if value not in values:
        raise UnsupportedError(f"{name} {value} is not supported", hint=instead)
    notes.append(("note", f"{name} has no effect: {note}"))


def _warn_about_letter(name: str, queue: list[str], notes: list[Note]) -> None:
    """-t is threads in llama.cpp, -p is top-p and -m a mode in llama2.c: say so when the value looks like theirs."""
    value = queue[0] if queue else ""
    if name == "-t" and value.isascii() and value.isdigit() and int(value) >= 2:
        notes.append(("warning", f"-t is the temperature, {value} a high one; llama.cpp's -t is --threads {value}"))
    if name == "-p" and _is_float(value) and 0 < float(value) <= 1:
        notes.append(("warning", f"-p is the prompt; llama2.c's -p is --top-p {value}, or llamakit run"))
    if name == "-m" and value in ("generate", "chat"):
        notes.append(("warning", f"-m is the model; llama2.c's -m is: llamakit run MODEL -m {value}"))


def _is_float(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _positional_model(words: list[str]) -> list[str]:
    """`generate model.bin -z ...`, llama2.c's form: a model file in the first place is -m; its own -m is a mode."""
    if not words or not words[0].endswith((".bin", ".gguf")):
        return words
    rest: list[str] = []
    queue = words[1:]
    while queue:
        word = queue.pop(0)
        mode = queue[0] if word == "-m" and queue else None
        if mode in ("generate", "chat"):
            queue.pop(0)
            rest += ["-cnv", "--chat-template", "llama2-sys-bos"] if mode == "chat" else []  # run.c's own
        elif word in ("-m", "--model") and mode is not None:
            return words
        else:
            rest.append(word)
    return ["-m", words[0], *rest]
