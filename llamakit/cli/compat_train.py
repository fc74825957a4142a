"""Command lines of the trainers that `train` stands for, in its own spelling: keys and values. A pure function.

Sources: llama2.c's train.py with its configurator (`--key=value`), llama.cpp's train-text-from-scratch of 2024.
"""

from __future__ import annotations

from typing import Literal

from llamakit.errors import UnsupportedError, UsageError

Note = tuple[Literal["note", "warning"], str]

#: llama2.c's keys -> ours, where the value stays as it is
KEYS = {
    "eval-interval": "--eval-every",
    "eval-iters": "--eval-iters",
    "out-dir": "--out-dir",
    "batch-size": "--batch",
    "max-seq-len": "--ctx",
    "dim": "--embd",
    "n-layers": "--layer",
    "n-heads": "--head",
    "n-kv-heads": "--head-kv",
    "gradient-accumulation-steps": "--grad-acc",
    "learning-rate": "--adam-alpha",
    "max-iters": "--adam-iter",
    "weight-decay": "--adam-decay",
    "beta1": "--adam-beta1",
    "beta2": "--adam-beta2",
    "grad-clip": "--adam-gclip",
    "warmup-iters": "--warmup",
}
#: other names that the option has elsewhere
ALIASES = {
    "-t": "--threads",
    "-s": "--seed",
    "-c": "--ctx",
    "--ctx-size": "--ctx",
    "-b": "--batch",
    "-m": "--init-from",
    "--model": "--init-from",
    "-f": "--train-data",
    "--file": "--train-data",
    "-lr": "--adam-alpha",
    "--lr": "--adam-alpha",
    "-wd": "--adam-decay",
    **{f"--{old}": new for old, new in KEYS.items()},
}
_ATTENTION = "the fastest exact attention is always used"
_STREAM = "samples are windows of one stream of tokens, shuffled anew in each epoch"
#: spelling -> (number of values, what the note says)
NO_OPS = {
    "--use-flash": (0, _ATTENTION),
    "--no-flash": (0, _ATTENTION),
    "--disable-restart": (0, "the learning rate falls once"),
    "--force-reshuffle": (0, _STREAM),
    "--fill-with-next-samples": (0, _STREAM),
    "--separate-with-bos": (0, "a BOS token begins each document"),
    "--log-interval": (1, "each iteration is logged"),
    "--always-save-checkpoint": (1, "a checkpoint is written every --save-every iterations, and the best is marked"),
    "--wandb-project": (1, "--report-to tensorboard follows a run"),
    "--wandb-run-name": (1, "--report-to tensorboard follows a run"),
}
REFUSED = {
    "--enable-restart": "the learning rate falls once: --lr-schedule cosine, linear or constant",
    "--cos-decay-restart": "the learning rate falls once: --lr-schedule cosine, linear or constant",
    "--sample-start": "llamakit data prepare --split-on line, paragraph or file cuts a text into documents",
    "--lora-out": "train changes all weights; llamakit finetune trains an adapter",
}
_DTYPES = {"bfloat16": "bf16", "float32": "f32", "bf16": "bf16", "f32": "f32", "auto": "auto"}
_TRUTH = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}
_SWITCHES = ("eval-only", "compile", "wandb-log", "decay-lr", "tie")


def rewrite_train(words: list[str], notes: list[Note]) -> list[str]:
    """The words of a `train` command in our spelling. Raises UsageError for a value that cannot be, UnsupportedError
    for what llamakit has not."""
    out: list[str] = []
    queue = list(words)
    given = {_key(word) for word in words}
    while queue:
        word = queue.pop(0)
        key, equals, value = _key(word), "=" in word, word.partition("=")[2]
        if not word.startswith("--") and word.endswith(".py") and not out:
            raise UsageError(f"{word} is a configuration in Python", hint="--config FILE.toml sets any option")
        if key in _SWITCHES and equals:
            out += _switch(key, _truth(key, value), given)
        elif key == "dtype":
            value = value if equals else _next(key, queue)
            if value not in _DTYPES:
                hint = "bf16 has the range of f32, and needs no scaled loss"
                raise UnsupportedError(f"--dtype {value} is not supported (expected bf16, f32 or auto)", hint=hint)
            out += ["--dtype", _DTYPES[value]]
        elif key == "device":
            value = value if equals else _next(key, queue)
            out += ["--device", value.partition(":")[0]]
        elif key in ("vocab-source", "vocab-size"):
            value = value if equals else _next(key, queue)
            out += _vocabulary(key, value, words, given, notes)
        elif key in ("ngl", "n-gpu-layers", "gpu-layers"):
            value = value if equals else _next(key, queue)
            out += ["--device", "cpu" if value == "0" else "auto"]
        elif key == "rope-freq-scale":
            value = value if equals else _next(key, queue)
            if value.strip() not in ("1", "1.0"):
                raise UnsupportedError(
                    "--rope-freq-scale is not supported", hint="a new model needs no stretched positions"
                )
        else:
            out.append(word)
    if "model-out" in given and not given & {"tie", "no-tie"}:
        notes.append(("note", "--model-out is train-text-from-scratch's: the output matrix is one of its own, as there"
                              " (--tie makes it the embeddings')"))  # fmt: skip
        out.append("--no-tie")
    return out


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("-").replace("_", "-") if word.startswith("-") else ""


def _next(key: str, queue: list[str]) -> str:
    if not queue:
        raise UsageError(f"option --{key} requires an argument")
    return queue.pop(0)


def _truth(key: str, value: str) -> bool:
    if value not in _TRUTH:
        raise UsageError(f"--{key}={value} (expected True or False)")
    return _TRUTH[value]


def _switch(key: str, on: bool, given: set[str]) -> list[str]:
    """llama2.c's True and False as our switches."""
    if key == "wandb-log":
        if on:
            raise UnsupportedError("--wandb-log is not supported", hint="--report-to tensorboard follows a run")
        return []
    if key == "decay-lr":
        return [] if "lr-schedule" in given else ["--lr-schedule", "cosine" if on else "constant"]
    if key == "tie":
        return ["--tie" if on else "--no-tie"]
    return [f"--{key}"] if on else []


def _vocabulary(key: str, value: str, words: list[str], given: set[str], notes: list[Note]) -> list[str]:
    """llama2.c's vocab_source says whether vocab_size is of a new vocabulary (custom) or of Llama 2's own."""
    source = next((w.partition("=")[2] for w in words if _key(w) == "vocab-source"), "")
    if key == "vocab-source":
        if value not in ("llama2", "custom"):
            raise UsageError(f"--vocab-source={value} (expected llama2 or custom)")
        if value == "llama2" and "vocab-model" not in given:
            hint = "--vocab-model FILE: any GGUF of Llama 2, or its tokenizer.model"
            raise UsageError("--vocab-source=llama2 needs the vocabulary itself", hint=hint)
        return []
    if source == "llama2" or "vocab-model" in given:
        notes.append(("note", f"--vocab-size {value} has no effect: the vocabulary is --vocab-model's"))
        return []
    return ["--vocab-size", value]
