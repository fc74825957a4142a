"""Old and other spellings of the commands in the groups `data` and `tokenizer`.

Sources: llama2.c's tinystories.py, llama.cpp's train-text-from-scratch, sentencepiece's spm_train.
"""

from __future__ import annotations

#: command -> old spelling -> ours
ALIASES: dict[str, dict[str, str]] = {
    "data prepare": {
        "--output": "-o",
        "-f": "--input",
        "--file": "--input",
        "--train-data": "--input",
        "-m": "--vocab-model",
        "--vocab": "--vocab-model",
        "-s": "--seed",
        "-t": "--workers",
        "--threads": "--workers",
    },
    "data show": {"--vocab": "--vocab-model", "--model": "--vocab-model", "--ctx-size": "--ctx"},
    "data check": {"--model": "-m", "--ctx-size": "--ctx", "--chat-template-file": "--chat-template"},
    "tokenizer train": {"--output": "-o", "-f": "--input", "--file": "--input", "--model-prefix": "-o"},
}

#: options whose value is a text or a name
TEXT_VALUES = ("--input", "--out", "--text-key", "--vocab-model", "--chat-template")
